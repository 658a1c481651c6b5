// Which tiling of the fused forward pass for which problem, and its launch.
#pragma once

#include <algorithm>

#include "forward.cuh"

namespace fastsep {
namespace cuda {

constexpr int most_shared_bytes = 99 * 1024;  // of a block: what every device from 8.0 on has
constexpr int most_weight_bytes = 16 * 1024;  // of a chunk's depthwise weights; larger kernels are read in place

// One shape of tile, and what it costs.
struct Plan {
  Forward forward;
  int64_t tiles;
  int shared_bytes;
  double cost;  // in cycles, on the whole device; infinite where it does not fit
};

// Whether copies of 4 bytes reach every input pixel of nchw: pairs of 16-bit elements where rows are of even length.
template <class T>
bool pairs_reach(const Forward& p) {
  return sizeof(T) == 4 || (p.width % 2 == 0 && reinterpret_cast<uintptr_t>(p.input) % 4 == 0);
}

// What does not depend on the tiling.
template <class T>
Forward describe_forward(const Problem& problem, const void* input, const Weights& weights, void* output) {
  const auto small = [](int64_t value) { return static_cast<int>(value); };  // validate() saw to it
  Forward p = {};
  p.input = input;
  p.depthwise_weight = weights.depthwise_weight;
  p.depthwise_bias = weights.depthwise_bias;
  p.pointwise_weight = weights.pointwise_weight;
  p.bias = weights.bias;
  p.output = output;
  p.batch = small(problem.batch), p.channels = small(problem.channels);
  p.height = small(problem.height), p.width = small(problem.width);
  p.out_channels = small(problem.out_channels), p.multiplier = small(problem.multiplier);
  p.depth = p.channels * p.multiplier;
  p.kernel_h = small(problem.kernel_h), p.kernel_w = small(problem.kernel_w);
  p.stride_h = small(problem.stride_h), p.stride_w = small(problem.stride_w);
  p.dilation_h = small(problem.dilation_h), p.dilation_w = small(problem.dilation_w);
  p.pad_top = small(problem.pad_top), p.pad_left = small(problem.pad_left);
  p.out_height = small(out_height(problem)), p.out_width = small(out_width(problem));
  p.mid_activation = problem.mid_activation, p.activation = problem.activation;
  p.planar = problem.layout == Layout::nchw;
  p.packed = !p.planar && p.multiplier == 1;
  p.wide_input = p.planar ? pairs_reach<T>(p) : p.packed && aligned<T>(input, p.channels);
  p.wide_depthwise = aligned<T>(p.depthwise_weight, 0) && aligned<T>(p.depthwise_bias, 0);
  p.wide_pointwise = aligned<T>(p.pointwise_weight, p.depth);
  p.wide_output = !p.planar && aligned<T>(output, p.out_channels);
  p.unit = p.planar && p.wide_input ? static_cast<int>(4 / sizeof(T)) : 1;
  p.weights_shared = int64_t{p.kernel_h} * p.kernel_w * chunk_bytes <= most_weight_bytes;
  p.weight_bytes =
      (p.weights_shared ? p.kernel_h * p.kernel_w * chunk_bytes : 0) + (p.depthwise_bias != nullptr ? chunk_bytes : 0);
  return p;
}

// Whether the taps are a window of 3 x 3: then they stay in registers, in kernels of their own.
inline bool has_window(const Forward& p) {
  return p.kernel_h == 3 && p.kernel_w == 3 && p.dilation_h == 1 && p.dilation_w == 1 && p.stride_h == p.stride_w &&
         p.stride_h <= 2;
}

// Fills in the halo of a tile whose pixels are set; false where it cannot be had in shared memory.
template <class T>
bool lay_out_halo(Forward& p) {
  p.taps = has_window(p) ? Taps::window : Taps::shared;
  const auto reach = [](int64_t outputs, int stride, int kernel, int dilation) {
    return (outputs - 1) * stride + int64_t{kernel - 1} * dilation + 1;
  };
  const int64_t h = reach(p.tile_h, p.stride_h, p.kernel_h, p.dilation_h);
  const int64_t w = reach(p.tile_w, p.stride_w, p.kernel_w, p.dilation_w) + p.unit - 1;
  if (h > 4096 || w > 4096 || h * w * p.tile_images > 4096) return false;
  p.halo_h = static_cast<int>(h);
  p.halo_w = round_up(static_cast<int>(w), p.unit);
  p.halo_units = p.tile_images * p.halo_h * (p.halo_w / p.unit);
  // Patches hang over the tile: what they read there is dropped, but has to be memory.
  const int64_t last = (int64_t{p.tile_images - 1} * p.halo_h +
                        reach(round_up(p.tile_h, patch_h), p.stride_h, p.kernel_h, p.dilation_h) - 1) *
                           p.halo_w +
                       reach(round_up(p.tile_w, patch_w), p.stride_w, p.kernel_w, p.dilation_w) + p.unit - 1;
  // A stride far beyond the kernel makes that more than any memory, and more than 32 bits count.
  const int64_t pixels = int64_t{p.halo_units} * p.unit, hanging = last > pixels ? last - pixels : 0;
  int64_t bytes = (pixels + hanging) * chunk_bytes;
  if (p.planar) {
    // Lanes are a channel apart: an odd number of words brings each to a bank of its own.
    p.pixel_pitch = 1;
    const int words = static_cast<int>(divide_up(pixels * static_cast<int64_t>(sizeof(T)), 4));
    p.channel_pitch = (words + 1 - words % 2) * static_cast<int>(4 / sizeof(T));
    bytes = divide_up((int64_t{chunk<T>} * p.channel_pitch + hanging) * static_cast<int64_t>(sizeof(T)), 16) * 16;
  } else {
    p.pixel_pitch = chunk<T>;
    p.channel_pitch = 1;
  }
  if (bytes > most_shared_bytes) return false;
  p.halo_bytes = static_cast<int>(bytes);
  return true;
}

// The cost of p's tile on a tiling. An estimate of issue slots: a multiprocessor issues 4 x 32 lanes a cycle. A 3 x 3
// depthwise output of 16 bits takes 9 FMAs and 5 more, about 16 instructions; a read from global memory with its checks
// 8 more a tap. Matrix instructions take rows * columns / 1024 cycles a channel, of tf32 twice and FMAs 8 times as
// many. Beside that, a tile's bytes come from the second level cache at 32 a cycle, half of what a multiprocessor
// takes, and those that no other tile reads from memory at 16: 1.5 to 4.3 TB/s for 108 to 132 multiprocessors at 1.4
// to 1.8 GHz are 10 to 18. Each chunk has to wait for about 1000 cycles, with three stages 500, in which other blocks
// of the multiprocessor may run.
template <class T, class Arithmetic, class Tile>
void estimate(Plan& plan, int processors) {
  Forward& p = plan.forward;
  p.tiles_x = static_cast<int>(divide_up(p.out_width, p.tile_w));
  p.tiles_y = static_cast<int>(divide_up(p.out_height, p.tile_h));
  p.tiles_k = static_cast<int>(divide_up(p.out_channels, Tile::columns));
  p.patches = p.tile_images * static_cast<int>(divide_up(p.tile_h, patch_h) * divide_up(p.tile_w, patch_w));
  plan.tiles = divide_up(p.batch, p.tile_images) * p.tiles_y * p.tiles_x * p.tiles_k;
  const int ring = Tile::stages * stage_bytes(p, Tile::columns) + Tile::rows * chunk_pitch;
  plan.shared_bytes = table_bytes(p, Tile::rows) + max(ring, Tile::staging_bytes);
  plan.cost = INFINITY;
  if (plan.shared_bytes > most_shared_bytes || plan.tiles > 0x7fffffff) return;
  const double taps = static_cast<double>(p.kernel_h) * p.kernel_w,
               chunks = static_cast<double>(divide_up(p.depth, chunk<T>));
  const double per_tap = p.taps == Taps::window ? 1.5 : slides(p) ? 2 : p.taps == Taps::shared ? 3 : 10;
  // Chunks that are half full take half, where half warps share them.
  const double halves =
      p.packed && p.taps != Taps::global ? static_cast<double>(divide_up(p.depth, chunk<T> / 2)) : 2 * chunks;
  const double depthwise = p.patches * patch * chunk<T> * (taps * per_tap + 3) / 128 * (halves / 2 / chunks);
  const double copies = p.taps == Taps::global ? 0 : p.halo_units * (p.wide_input && !p.planar ? 0.5 : 4);
  const double products = Tile::rows * Tile::columns * chunk<T> /
                          (std::is_same<Arithmetic, Exact>::value  ? 128.0
                           : std::is_same<Arithmetic, Tf32>::value ? 512.0
                                                                   : 1024.0);
  const double pixels = static_cast<double>(p.tile_images) * p.tile_h * p.tile_w;
  const double own = pixels * p.stride_h * p.stride_w, halo = p.taps == Taps::global ? own : p.halo_units * p.unit;
  const double written = pixels * min(p.out_channels, Tile::columns) * static_cast<double>(sizeof(T)) / chunks;
  const double from_cache = ((halo + Tile::columns) * chunk_bytes + written) / 32;
  const double from_memory = (std::min(own, halo) * chunk_bytes / p.tiles_k + written) / 16;
  const double rounds = static_cast<double>(divide_up(plan.tiles, processors));
  plan.cost = chunks * (rounds * std::max({depthwise + copies + products, from_cache, from_memory}) +
                        ceil(rounds / Tile::blocks) * (Tile::stages == 1 ? 1000 : 500));
}

// Whether a tiling has a kernel that reads the input in place, for what does not fit. For 16 bits the small one alone
// has: no layer of benchmarks/shapes takes another, and each takes seconds to compile.
template <class T, class Tile>
constexpr bool has_global_taps = sizeof(T) == 4 || std::is_same<Tile, SmallTiling>::value;

// The best shape of tile for a tiling: a few widths, as high as goes, and several images where one is small.
template <class T, class Arithmetic, class Tile>
Plan plan_tiling(const Forward& forward, int processors) {
  Plan best = {};
  best.cost = INFINITY;
  for (const int width : {forward.out_width, 32, 16, 14, 8, 4, 1}) {
    if (width > forward.out_width || width > Tile::rows) continue;
    Plan plan = {};
    plan.forward = forward;
    Forward& p = plan.forward;
    p.tile_w = width;
    p.tile_h = min(p.out_height, Tile::rows / width);
    if (p.tile_h < p.out_height && p.tile_h > 1) p.tile_h -= p.tile_h % patch_h;
    const bool whole = p.tile_h == p.out_height && p.tile_w == p.out_width;
    // Fewer images where the input of as many as there are rows does not fit.
    for (int images = whole ? min(p.batch, Tile::rows / (p.tile_h * p.tile_w)) : 1; images > 0; images /= 2) {
      p.tile_images = images;
      for (const bool global : {false, true}) {
        p.taps = Taps::global;
        p.halo_h = p.halo_w = p.halo_units = p.halo_bytes = 0;
        if (global ? has_window(p) || !has_global_taps<T, Tile> : !lay_out_halo<T>(p)) continue;
        estimate<T, Arithmetic, Tile>(plan, processors);
        if (plan.cost < best.cost) best = plan;
      }
      if (best.cost < INFINITY) break;
    }
  }
  return best;
}

template <class T, class Arithmetic, class Tile, Taps taps>
cudaError_t launch_tiling(const Plan& plan, Queue queue) {
  return launch(separable_forward<T, Arithmetic, Tile, taps>, dim3(static_cast<unsigned>(plan.tiles)), Tile::threads,
                static_cast<size_t>(plan.shared_bytes), plan.forward, queue);
}

// The cheapest of the tilings that there are for the problem. A grid of more blocks than there may be, 2^31, is refused
// as the device would refuse it: nothing that memory holds.
template <class T, class Arithmetic>
cudaError_t launch_forward(const Problem& problem, const void* input, const Weights& weights, void* output,
                           Queue queue) {
  const Forward p = describe_forward<T>(problem, input, weights, output);
  const int processors = multiprocessors(queue);
  const Plan least = plan_tiling<T, Arithmetic, SmallTiling>(p, processors);
  const Plan shorter = plan_tiling<T, Arithmetic, ShortTiling>(p, processors);
  if (!has_window(p)) {
    const bool small = least.cost < shorter.cost;
    if (!small && shorter.cost == INFINITY) return cudaErrorInvalidConfiguration;
    if ((small ? least : shorter).forward.taps == Taps::global) {
      if constexpr (has_global_taps<T, ShortTiling>) {
        if (!small) return launch_tiling<T, Arithmetic, ShortTiling, Taps::global>(shorter, queue);
      }
      return launch_tiling<T, Arithmetic, SmallTiling, Taps::global>(least, queue);
    }
    return small ? launch_tiling<T, Arithmetic, SmallTiling, Taps::shared>(least, queue)
                 : launch_tiling<T, Arithmetic, ShortTiling, Taps::shared>(shorter, queue);
  }
  const Plan large = plan_tiling<T, Arithmetic, LargeTiling>(p, processors);
  const Plan narrow = plan_tiling<T, Arithmetic, NarrowTiling>(p, processors);
  const Plan wide = plan_tiling<T, Arithmetic, WideTiling>(p, processors);
  const double cost = std::min({least.cost, shorter.cost, large.cost, wide.cost, narrow.cost});
  if (cost == INFINITY) return cudaErrorInvalidConfiguration;
  if (cost == large.cost) return launch_tiling<T, Arithmetic, LargeTiling, Taps::window>(large, queue);
  if (cost == wide.cost) return launch_tiling<T, Arithmetic, WideTiling, Taps::window>(wide, queue);
  if (cost == narrow.cost) return launch_tiling<T, Arithmetic, NarrowTiling, Taps::window>(narrow, queue);
  if (cost == shorter.cost) return launch_tiling<T, Arithmetic, ShortTiling, Taps::window>(shorter, queue);
  return launch_tiling<T, Arithmetic, SmallTiling, Taps::window>(least, queue);
}

// With T's own arithmetic, or tf32 for f32 where it is allowed.
template <class T>
int32_t forward_of(const Problem& problem, Options options, const void* input, const Weights& weights, void* output,
                   Queue queue) {
  if constexpr (sizeof(T) == 4) {
    return options.tf32 ? launch_forward<T, Tf32>(problem, input, weights, output, queue)
                        : launch_forward<T, Exact>(problem, input, weights, output, queue);
  } else {
    (void)options;
    return launch_forward<T, T>(problem, input, weights, output, queue);
  }
}

}  // namespace cuda
}  // namespace fastsep
