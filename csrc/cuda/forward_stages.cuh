// The stages of the fused forward pass of one block, see forward.cuh: where its tile lies, the copies to shared memory,
// the depthwise half.
#pragma once

#include "mma.cuh"

namespace fastsep {
namespace cuda {

// Depthwise outputs of one lane at a time: a patch of pixels of `lane_channels` channels. For a 3 x 3 kernel of stride
// 1 it takes 4 x 6 reads for 8 x 9 products.
constexpr int patch_h = 2, patch_w = 4;
constexpr int patch = patch_h * patch_w;

// A chunk is 32 lanes of 4 bytes.
template <class T>
constexpr int lane_channels = static_cast<int>(4 / sizeof(T));

// Where the taps are read; each has kernels of its own.
enum class Taps : int32_t {
  window,  // 3 x 3 without dilation, stride 1 or 2 both ways: from shared memory into registers, once
  shared,  // any: from shared memory, tap by tap
  global,  // the input of a tile does not fit: from the input itself
};

struct Forward {
  const void *input, *depthwise_weight, *depthwise_bias, *pointwise_weight, *bias;
  void* output;
  int batch, channels, height, width, out_channels, multiplier, depth;
  int kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left, out_height, out_width;
  Activation mid_activation, activation;
  bool planar;  // nchw

  // A tile is tile_images x tile_h x tile_w pixels, at most as many as the kernel has rows, and its output channels.
  int tile_images, tile_h, tile_w, tiles_x, tiles_y, tiles_k, patches;
  Taps taps;
  // The input of a tile: halo_units copies of `unit` elements (nhwc: of a chunk of channels of one pixel). Element
  // (pixel, channel) of it is at pixel * pixel_pitch + channel * channel_pitch, pixels in rows of halo_w.
  int halo_h, halo_w, halo_units, unit, pixel_pitch, channel_pitch;
  bool packed;                   // nhwc with m = 1: a lane's channels are neighbours, read at once
  bool wide_input;               // copied 16 bytes (nchw: 4 bytes) at a time
  bool wide_depthwise;           // the same for the depthwise weights and bias,
  bool wide_pointwise;           // the pointwise weights
  bool wide_output;              // and the output, nhwc
  bool weights_shared;           // the depthwise weights of a chunk are copied too
  int halo_bytes, weight_bytes;  // of one stage
};

// Addresses in shared memory. Tables first, then the ring of stages, then A.
struct Shared {
  int64_t* out_offset;   // [tile rows]: of each pixel's first output channel; -1 outside of the output
  int4* patches;         // [patches]: image, row and column in the tile
  int64_t* halo_offset;  // [halo_units]: of the first channel, -1 outside of the plane
  char* ring;
  char* a;
};

__host__ __device__ inline int round_up(int value, int step) { return (value + step - 1) / step * step; }

__host__ __device__ inline int table_bytes(const Forward& p, int tile_rows) {
  return round_up((tile_rows + (p.taps == Taps::global ? 0 : p.halo_units)) * 8, 16) + p.patches * 16;
}

__host__ __device__ inline int stage_bytes(const Forward& p, int tile_columns) {
  return p.halo_bytes + p.weight_bytes + tile_columns * chunk_pitch;
}

// What one block computes.
struct Place {
  int image, y, x, k;  // of its first output
  int lead;            // columns copied in front of those that are needed, to begin at a whole unit
};

__device__ __forceinline__ Place place_of(const Forward& p, int tile_columns) {
  unsigned index = blockIdx.x;
  Place at;
  at.k = static_cast<int>(index % static_cast<unsigned>(p.tiles_k)) * tile_columns;
  index /= static_cast<unsigned>(p.tiles_k);
  at.x = static_cast<int>(index % static_cast<unsigned>(p.tiles_x)) * p.tile_w;
  index /= static_cast<unsigned>(p.tiles_x);
  at.y = static_cast<int>(index % static_cast<unsigned>(p.tiles_y)) * p.tile_h;
  at.image = static_cast<int>(index / static_cast<unsigned>(p.tiles_y)) * p.tile_images;
  at.lead = p.unit == 2 ? (at.x * p.stride_w - p.pad_left) & 1 : 0;
  return at;
}

// Divisions are for once a tile, not for every chunk: their results go to tables.
__device__ __forceinline__ void fill_tables(const Forward& p, const Place& at, const Shared& shared, int tile_rows,
                                            int threads) {
  const int64_t plane = static_cast<int64_t>(p.height) * p.width;
  const int64_t out_plane = static_cast<int64_t>(p.out_height) * p.out_width;
  for (int i = this_thread(); i < tile_rows; i += threads) {
    const int x = at.x + i % p.tile_w, y = at.y + i / p.tile_w % p.tile_h, image = i / p.tile_w / p.tile_h;
    const bool inside = image < p.tile_images && at.image + image < p.batch && y < p.out_height && x < p.out_width;
    const int64_t pixel = static_cast<int64_t>(y) * p.out_width + x;
    shared.out_offset[i] =
        !inside ? -1
                : ((at.image + image) * out_plane + (p.planar ? 0 : pixel)) * p.out_channels + (p.planar ? pixel : 0);
  }
  const int across = (p.tile_w + patch_w - 1) / patch_w, down = (p.tile_h + patch_h - 1) / patch_h;
  for (int i = this_thread(); i < p.patches; i += threads) {
    int4 of_patch;
    of_patch.x = i / across / down;
    of_patch.y = i / across % down * patch_h;
    of_patch.z = i % across * patch_w;
    of_patch.w = 0;
    shared.patches[i] = of_patch;
  }
  if (p.taps == Taps::global) return;
  const int in_x = at.x * p.stride_w - p.pad_left - at.lead, in_y = at.y * p.stride_h - p.pad_top;
  for (int i = this_thread(); i < p.halo_units; i += threads) {
    const int units = p.halo_w / p.unit;
    const int x = in_x + i % units * p.unit, y = in_y + i / units % p.halo_h;
    const int image = at.image + i / units / p.halo_h;
    const bool inside = x >= 0 && x < p.width && y >= 0 && y < p.height && image < p.batch;
    const int64_t pixel = static_cast<int64_t>(y) * p.width + x;
    shared.halo_offset[i] =
        !inside ? -1 : (image * plane + (p.planar ? 0 : pixel)) * p.channels + (p.planar ? pixel : 0);
  }
}

// to[0 .. count) = from[0 .. count), in 16 bytes where `wide`, the rest one by one.
template <class T>
__device__ __forceinline__ void copy_span(T* to, const T* from, int count, bool wide, int threads) {
  const int vectors = wide ? count / widest<T> : 0;
  for (int i = this_thread(); i < vectors; i += threads) copy_async(to + i * widest<T>, from + i * widest<T>, true);
  for (int i = vectors * widest<T> + this_thread(); i < count; i += threads) to[i] = from[i];
}

// The input of the tile for the depthwise channels from `first` on, their weights and biases.
template <class T, int threads>
__device__ __forceinline__ void copy_input(const Forward& p, const Shared& shared, char* stage, int first) {
  const T* input = static_cast<const T*>(p.input);
  T* halo = reinterpret_cast<T*>(stage);
  const int thread = this_thread(), here = min(chunk<T>, p.depth - first);
  const int taps = p.kernel_h * p.kernel_w;
  T* weights = reinterpret_cast<T*>(stage + p.halo_bytes);
  if (p.weights_shared)
    copy_span(weights, static_cast<const T*>(p.depthwise_weight) + static_cast<int64_t>(first) * taps, here * taps,
              p.wide_depthwise, threads);
  if (p.depthwise_bias != nullptr)
    copy_span(weights + (p.weights_shared ? chunk<T> * taps : 0), static_cast<const T*>(p.depthwise_bias) + first, here,
              p.wide_depthwise, threads);
  if (p.taps == Taps::global) return;
  const int channel = first / p.multiplier, channels = (first + here - 1) / p.multiplier - channel + 1;
  if (p.planar) {
    const int64_t plane = static_cast<int64_t>(p.height) * p.width;
    for (int c = thread / warp_size; c < channels; c += threads / warp_size) {
      const T* from = input + (channel + c) * plane;
      T* to = halo + c * p.channel_pitch;
#pragma unroll 4
      for (int i = thread % warp_size; i < p.halo_units; i += warp_size) {
        const int64_t offset = shared.halo_offset[i];
        if (p.wide_input)
          copy_async_word(to + i * p.unit, offset < 0 ? input : from + offset, offset >= 0);
        else
          to[i] = offset < 0 ? from_float<T>(0.f) : from[offset];
      }
    }
  } else if (p.wide_input) {
    constexpr int vectors = chunk_bytes / 16;
    const int part = thread % vectors * widest<T>;
    for (int i = thread / vectors; i < p.halo_units; i += threads / vectors) {
      const int64_t offset = shared.halo_offset[i];
      const bool inside = offset >= 0 && part < channels;
      copy_async(halo + i * chunk<T> + part, inside ? input + offset + channel + part : input, inside);
    }
  } else {
#pragma unroll 4
    for (int i = thread; i < p.halo_units * chunk<T>; i += threads) {
      const int64_t offset = shared.halo_offset[i / chunk<T>];
      const int part = i % chunk<T>;
      halo[i] = offset < 0 || part >= channels ? from_float<T>(0.f) : input[offset + channel + part];
    }
  }
}

// Rows of the pointwise weights from output channel k on, `first` as above; zeros beyond both ends.
template <class T, int threads, int tile_columns>
__device__ __forceinline__ void copy_pointwise(const Forward& p, char* to, int k, int first) {
  const T* from = static_cast<const T*>(p.pointwise_weight);
  const int thread = this_thread();
  if (p.wide_pointwise) {
    constexpr int vectors = chunk_bytes / 16;
    const int part = first + thread % vectors * widest<T>;
#pragma unroll 4
    for (int i = thread / vectors; i < tile_columns; i += threads / vectors) {
      const bool inside = k + i < p.out_channels && part < p.depth;
      copy_async(to + i * chunk_pitch + thread % vectors * 16,
                 inside ? from + static_cast<int64_t>(k + i) * p.depth + part : from, inside);
    }
  } else {
#pragma unroll 4
    for (int i = thread; i < tile_columns * chunk<T>; i += threads) {
      const int row = k + i / chunk<T>, part = first + i % chunk<T>;
      const bool inside = row < p.out_channels && part < p.depth;
      reinterpret_cast<T*>(to + i / chunk<T> * chunk_pitch)[i % chunk<T>] =
          inside ? from[static_cast<int64_t>(row) * p.depth + part] : from_float<T>(0.f);
    }
  }
}

// A lane's channels at one pixel: neighbours in one access, or `second` elements apart.
template <class T, bool packed>
__device__ __forceinline__ void read_lane(float (&to)[lane_channels<T>], const T* from, int64_t second) {
  if constexpr (packed || lane_channels<T> == 1) {
    load(to, from);
  } else {
    to[0] = to_float(from[0]);
    to[1] = to_float(from[second]);
  }
}

// sums[(i * patch_w + j) * lane_channels + v], for `at` the first tap of the patch's first pixel.
template <class T, int stride, bool packed>
__device__ __forceinline__ void add_window(float (&sums)[patch * lane_channels<T>], const T* at, int second,
                                           int row_pitch, int pixel_pitch,
                                           const float (&weights)[9 * lane_channels<T>]) {
  constexpr int lanes = lane_channels<T>, rows = (patch_h - 1) * stride + 3, columns = (patch_w - 1) * stride + 3;
#pragma unroll
  for (int y = 0; y < rows; ++y, at += row_pitch) {
#pragma unroll
    for (int c = 0; c < columns; ++c) {
      float x[lanes];
      read_lane<T, packed>(x, at + c * (packed ? chunk<T> : pixel_pitch), second);
#pragma unroll
      for (int i = 0; i < patch_h; ++i)
#pragma unroll
        for (int j = 0; j < patch_w; ++j) {
          const int r = y - i * stride, s = c - j * stride;
          if (r < 0 || r > 2 || s < 0 || s > 2) continue;
#pragma unroll
          for (int v = 0; v < lanes; ++v) {
            float& sum = sums[(i * patch_w + j) * lanes + v];
            sum = fmaf(x[v], weights[(r * 3 + s) * lanes + v], sum);
          }
        }
    }
  }
}

// The lane's part of a chunk; beyond the last channel something to read, where the result will be 0.
template <class T>
struct LaneChannels {
  int filter[lane_channels<T>];   // from the chunk's first
  int channel[lane_channels<T>];  // of the input, from the chunk's first
};

template <class T, bool packed>
__device__ __forceinline__ int lane_channel(int lane, int v) {
  return packed ? lane * lane_channels<T> + v : lane + warp_size * v;
}

template <class T, bool packed>
__device__ __forceinline__ LaneChannels<T> lane_channels_of(const Forward& p, int first, int lane) {
  LaneChannels<T> lc;
#pragma unroll
  for (int v = 0; v < lane_channels<T>; ++v) {
    lc.filter[v] = min(lane_channel<T, packed>(lane, v), p.depth - first - 1);
    // Packed channels are read two at a time, so lanes beyond the last one stay where they are: the halo has room.
    lc.channel[v] =
        packed ? lane_channel<T, packed>(lane, v) : (first + lc.filter[v]) / p.multiplier - first / p.multiplier;
  }
  return lc;
}

// Tap by tap, for every kernel, stride and dilation; `at` as for add_window().
template <class T>
__device__ __forceinline__ void add_taps_shared(const Forward& p, float (&sums)[patch * lane_channels<T>], const T* at,
                                                const T* weights, const LaneChannels<T>& lc) {
  constexpr int lanes = lane_channels<T>;
  const int across = p.stride_w * p.pixel_pitch, down = p.stride_h * p.halo_w * p.pixel_pitch;
#pragma unroll 1
  for (int r = 0, tap = 0; r < p.kernel_h; ++r)
#pragma unroll 1
    for (int s = 0; s < p.kernel_w; ++s, ++tap)
#pragma unroll
      for (int v = 0; v < lanes; ++v) {
        const float weight = to_float(weights[lc.filter[v] * p.kernel_h * p.kernel_w + tap]);
        const T* from =
            at + lc.channel[v] * p.channel_pitch + (r * p.dilation_h * p.halo_w + s * p.dilation_w) * p.pixel_pitch;
#pragma unroll
        for (int i = 0; i < patch; ++i)
          sums[i * lanes + v] =
              fmaf(to_float(from[i / patch_w * down + i % patch_w * across]), weight, sums[i * lanes + v]);
      }
}

// The same from the input itself: image and (y, x) are of the patch's first pixel, `weights` and channels of the
// chunk's first channel.
template <class T>
__device__ __forceinline__ void add_taps_global(const Forward& p, float (&sums)[patch * lane_channels<T>], int image,
                                                int y, int x, int channel, const T* weights,
                                                const LaneChannels<T>& lc) {
  constexpr int lanes = lane_channels<T>;
  if (image >= p.batch) return;
  const int64_t plane = static_cast<int64_t>(p.height) * p.width;
  const T* input = static_cast<const T*>(p.input) + image * plane * p.channels;
  const int64_t pixel_pitch = p.planar ? 1 : p.channels, channel_pitch = p.planar ? plane : 1;
  const int64_t across = p.stride_w * pixel_pitch, down = static_cast<int64_t>(p.stride_h) * p.width * pixel_pitch;
#pragma unroll 1
  for (int r = 0, tap = 0; r < p.kernel_h; ++r)
#pragma unroll 1
    for (int s = 0; s < p.kernel_w; ++s, ++tap) {
      const int in_y = y * p.stride_h - p.pad_top + r * p.dilation_h;
      const int in_x = x * p.stride_w - p.pad_left + s * p.dilation_w;
      const int64_t from = (static_cast<int64_t>(in_y) * p.width + in_x) * pixel_pitch;
      float weight[lanes];
#pragma unroll
      for (int v = 0; v < lanes; ++v)
        weight[v] = to_float(weights[static_cast<int64_t>(lc.filter[v]) * p.kernel_h * p.kernel_w + tap]);
#pragma unroll
      for (int i = 0; i < patch; ++i) {
        const int at_y = in_y + i / patch_w * p.stride_h, at_x = in_x + i % patch_w * p.stride_w;
        if (at_y < 0 || at_y >= p.height || at_x < 0 || at_x >= p.width) continue;
#pragma unroll
        for (int v = 0; v < lanes; ++v) {
          const T* pixel = input + (channel + lc.channel[v]) * channel_pitch + from;
          sums[i * lanes + v] =
              fmaf(to_float(pixel[i / patch_w * down + i % patch_w * across]), weight[v], sums[i * lanes + v]);
        }
      }
    }
}

// A[pixel][channel] = mid_act(depthwise + bias), rounded once, for the channels from `first` on; zeros beyond the last.
// A warp has a patch of pixels, its lanes the channels: so the lanes read and write 128 bytes of a row.
template <class T, class Arithmetic, int threads, Taps taps, bool packed>
__device__ __forceinline__ void depthwise_by(const Forward& p, const Place& at, const Shared& shared, const char* stage,
                                             int first) {
  constexpr int lanes = lane_channels<T>;
  const int lane = this_thread() % warp_size;
  const LaneChannels<T> lc = lane_channels_of<T, packed>(p, first, lane);
  const T* copied = reinterpret_cast<const T*>(stage + p.halo_bytes);
  const T* biases = copied + (p.weights_shared ? chunk<T> * p.kernel_h * p.kernel_w : 0);
  float weights[9 * lanes];
  if constexpr (taps == Taps::window) {
#pragma unroll
    for (int tap = 0; tap < 9; ++tap)
#pragma unroll
      for (int v = 0; v < lanes; ++v) weights[tap * lanes + v] = to_float(copied[lc.filter[v] * 9 + tap]);
  }
#pragma unroll 1
  for (int i = this_thread() / warp_size; i < p.patches; i += threads / warp_size) {
    const int4 place = shared.patches[i];
    const int image = place.x, y = place.y, x = place.z;
    float sums[patch * lanes] = {};
    const T* halo = reinterpret_cast<const T*>(stage) +
                    ((image * p.halo_h + y * p.stride_h) * p.halo_w + x * p.stride_w + at.lead) * p.pixel_pitch;
    if constexpr (taps == Taps::window) {
      const T* from = halo + lc.channel[0] * p.channel_pitch;
      const int second = (lc.channel[lanes - 1] - lc.channel[0]) * p.channel_pitch;
      if (p.stride_h == 1)
        add_window<T, 1, packed>(sums, from, second, p.halo_w * p.pixel_pitch, p.pixel_pitch, weights);
      else
        add_window<T, 2, packed>(sums, from, second, p.halo_w * p.pixel_pitch, p.pixel_pitch, weights);
    } else {
      const T* filters = p.weights_shared ? copied
                                          : static_cast<const T*>(p.depthwise_weight) +
                                                static_cast<int64_t>(first) * p.kernel_h * p.kernel_w;
      if constexpr (taps == Taps::shared)
        add_taps_shared<T>(p, sums, halo, filters, lc);
      else
        add_taps_global<T>(p, sums, at.image + image, at.y + y, at.x + x, first / p.multiplier, filters, lc);
    }
    if (p.depthwise_bias != nullptr) {
#pragma unroll
      for (int v = 0; v < lanes; ++v) {
        const float bias = to_float(biases[lc.filter[v]]);
#pragma unroll
        for (int j = 0; j < patch; ++j) sums[j * lanes + v] += bias;
      }
    }
    activate(p.mid_activation, sums);
    char* row = shared.a + ((image * p.tile_h + y) * p.tile_w + x) * chunk_pitch;
#pragma unroll
    for (int j = 0; j < patch; ++j) {
      if (y + j / patch_w >= p.tile_h || x + j % patch_w >= p.tile_w) continue;
      T* to = reinterpret_cast<T*>(row + (j / patch_w * p.tile_w + j % patch_w) * chunk_pitch);
      float mine[lanes];
#pragma unroll
      for (int v = 0; v < lanes; ++v) {
        mine[v] = first + lane_channel<T, packed>(lane, v) < p.depth ? sums[j * lanes + v] : 0.f;
        if constexpr (std::is_same<Arithmetic, Tf32>::value) mine[v] = round_to_tf32(mine[v]);
      }
      if constexpr (packed || lanes == 1) {
        store(to + lane * lanes, mine);
      } else {
#pragma unroll
        for (int v = 0; v < lanes; ++v) to[lane + warp_size * v] = from_float<T>(mine[v]);
      }
    }
  }
}

template <class T, class Arithmetic, int threads, Taps taps>
__device__ __forceinline__ void depthwise(const Forward& p, const Place& at, const Shared& shared, const char* stage,
                                          int first) {
  if (taps == Taps::window && p.packed)
    depthwise_by<T, Arithmetic, threads, taps, true>(p, at, shared, stage, first);
  else
    depthwise_by<T, Arithmetic, threads, taps, false>(p, at, shared, stage, first);
}

}  // namespace cuda
}  // namespace fastsep
