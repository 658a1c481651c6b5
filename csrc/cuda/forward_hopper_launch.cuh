// Whether the forward kernel of sm_90a takes a problem, and its tiling.
#pragma once

#include "forward_hopper.cuh"

namespace fastsep {
namespace cuda {
namespace hopper {

constexpr int most_shared_bytes = 227 * 1024;  // of a block of compute capability 9.0

inline bool takes(const Problem& p) {
  const bool window = p.kernel_h == 3 && p.kernel_w == 3 && p.stride_h == 1 && p.stride_w == 1 && p.dilation_h == 1 &&
                      p.dilation_w == 1 && p.multiplier == 1;
  const bool vectors = p.channels % 8 == 0 && p.out_channels % 8 == 0 && p.out_channels > 0;
  // Pixels, and rows of a batch with those of a tile behind it, are counted in 32 bits. Patches of 2 x 4 want input for
  // as many.
  const int64_t most = 0x7fffffff;
  return p.layout == Layout::nhwc && (p.dtype == Dtype::f16 || p.dtype == Dtype::bf16) && window && vectors &&
         is_simple(p.activation) && p.batch <= most / p.height / p.width && p.batch <= (most - rows) / out_height(p) &&
         out_width(p) >= patch_w && p.batch * out_height(p) >= patch_h;
}

template <class T>
bool takes(const Problem& p, const void* input, const Weights& weights, const void* output) {
  return takes(p) && aligned<T>(input, p.channels) && aligned<T>(output, p.out_channels) &&
         aligned<T>(weights.pointwise_weight, p.channels) && aligned<T>(weights.depthwise_weight, 0) &&
         aligned<T>(weights.depthwise_bias, 0) && aligned<T>(weights.bias, 0);
}

// Whether the kernel can run on the device, which is the current one: it is of compute capability 9.0, and code for
// sm_90a is what the driver found for it. What was compiled for another architecture has no registers for the sums.
template <class T>
bool runs_on(int device) {
  // What fails here is nothing that a later call should hear of.
  const auto good = [](cudaError_t error) {
    if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
    return error == cudaSuccess;
  };
  int major = 0, minor = 0;
  if (!good(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) ||
      !good(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device)) || major != 9 || minor != 0)
    return false;
  static const int registers = [&] {
    cudaFuncAttributes attributes = {};
    const void* kernel = reinterpret_cast<const void*>(separable_forward_hopper<T>);
    return good(cudaFuncGetAttributes(&attributes, kernel)) ? attributes.numRegs : 0;
  }();
  return registers >= 128;
}

// How many images `rows` rows of the batch may touch.
inline int images_of(int rows, int out_height) {
  if (out_height % rows == 0) return 1;
  return rows % out_height == 0 ? rows / out_height : (rows - 2) / out_height + 2;
}

struct Plan {
  Forward forward;
  int shared_bytes;
  double cost;  // cycles of a multiprocessor; infinite where it does not fit
};

// A tile of rows x w pixels. Products of a chunk take 1024 cycles, 2 * 4 of 128. A patch takes a producer warp about
// 280 instructions, of which the one warp on a scheduler issues one in 1.5 cycles; a copy of 16 bytes 5 cycles of a
// producer warp for its 32 lanes. A tile ends with about 1500 cycles of stores, beside which the next one begins.
inline Plan plan_tile(const Forward& forward, int rows_of_tile, int tile_w, int processors) {
  Plan plan = {forward, 0, INFINITY};
  Forward& p = plan.forward;
  const int all_rows = p.batch * p.out_height;
  const int images = images_of(rows_of_tile, p.out_height);
  p.tile_rows = rows_of_tile, p.tile_w = tile_w;
  p.halo_w = tile_w + 2;
  p.halo_pixels = (rows_of_tile + 2 * images) * p.halo_w;
  p.patches_across = static_cast<int>(divide_up(tile_w, patch_w));
  // Each image that is begun within the tile may begin with half a pair.
  p.patches = (static_cast<int>(divide_up(rows_of_tile, patch_h)) + images - 1) * p.patches_across;
  p.tiles_x = static_cast<int>(divide_up(p.out_width, tile_w));
  p.tiles_k = static_cast<int>(divide_up(p.out_channels, columns));
  const int64_t tiles = divide_up(all_rows, rows_of_tile) * p.tiles_x * p.tiles_k;
  if (tiles > 0x7fffffff - 0x10000) return plan;  // with room for a step of the grid
  p.tiles = static_cast<int>(tiles);
  p.slot_bytes = round_up(halo_bytes(p) + weight_bytes + bias_bytes, 128);
  p.table_bytes = round_up(p.halo_pixels * 4 + p.patches * static_cast<int>(sizeof(Patch)), 16);
  const int chunks = static_cast<int>(divide_up(p.channels, depth));
  for (p.slots = chunks > 1 ? 3 : 2; p.slots > 1; --p.slots) {
    const int64_t bytes = pattern_bytes - 128 + stages * stage_bytes + int64_t{p.slots} * p.slot_bytes +
                          2 * stages * static_cast<int>(sizeof(Barrier)) + 2 * p.table_bytes;
    if (bytes > most_shared_bytes) continue;
    plan.shared_bytes = static_cast<int>(bytes);
    const double depthwise = divide_up(p.patches, producer_warps) * 280 * 1.5;
    const double copies = (p.halo_pixels + columns) * (row_bytes / 16) / static_cast<double>(producers) * 5;
    const double chunk = std::max(1024., depthwise + copies) * (p.slots == 2 ? 1.1 : 1);
    plan.cost = static_cast<double>(divide_up(p.tiles, processors)) * (chunks * chunk + 1500);
    break;
  }
  return plan;
}

// The cheapest of a few widths and heights.
inline Plan plan_forward(const Forward& forward, int processors) {
  Plan best = {};
  best.cost = INFINITY;
  const int all_rows = forward.batch * forward.out_height;
  for (const int width : {forward.out_width, 32, 28, 16, 14, 8}) {
    if (width > forward.out_width || width > rows / patch_h) continue;
    const int most = std::min(rows / width, all_rows);
    const int whole = most / forward.out_height * forward.out_height;
    for (const int height : {most, most - most % patch_h, whole, forward.out_height, most / 2}) {
      if (height < patch_h || height > most) continue;
      const Plan plan = plan_tile(forward, height, width, processors);
      if (plan.cost < best.cost) best = plan;
    }
  }
  return best;
}

template <class T>
cudaError_t launch_forward(const Problem& problem, const void* input, const Weights& weights, void* output,
                           Queue queue) {
  const auto small = [](int64_t value) { return static_cast<int>(value); };  // validate() saw to it
  Forward p = {};
  p.input = input, p.output = output;
  p.depthwise_weight = weights.depthwise_weight, p.depthwise_bias = weights.depthwise_bias;
  p.pointwise_weight = weights.pointwise_weight, p.bias = weights.bias;
  p.batch = small(problem.batch), p.channels = small(problem.channels);
  p.height = small(problem.height), p.width = small(problem.width), p.out_channels = small(problem.out_channels);
  p.pad_top = small(problem.pad_top), p.pad_left = small(problem.pad_left);
  p.out_height = small(out_height(problem)), p.out_width = small(out_width(problem));
  p.mid_activation = problem.mid_activation, p.activation = problem.activation;
  const int processors = multiprocessors(queue);
  const Plan plan = plan_forward(p, processors);
  if (plan.cost == INFINITY) return cudaErrorInvalidConfiguration;
  const int blocks = std::min(plan.forward.tiles, processors);
  return launch(separable_forward_hopper<T>, dim3(static_cast<unsigned>(blocks)), threads,
                static_cast<size_t>(plan.shared_bytes), plan.forward, queue);
}

}  // namespace hopper
}  // namespace cuda
}  // namespace fastsep
