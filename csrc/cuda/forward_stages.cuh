// The fused forward pass of one block, see forward.cuh: its argument, where its tile lies, the copies to shared memory.
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
  shared,  // any: from shared memory, a row of them or one tap at a time
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

// Whether the taps, read from shared memory, are 5 x 5 or 7 x 7 without dilation: then row by row, see add_rows().
__host__ __device__ inline bool slides(const Forward& p) {
  return p.taps == Taps::shared && p.kernel_h == p.kernel_w && p.dilation_h == 1 && p.dilation_w == 1 &&
         p.stride_h == p.stride_w && ((p.kernel_h == 5 && p.stride_h <= 2) || (p.kernel_h == 7 && p.stride_h == 1));
}

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

}  // namespace cuda
}  // namespace fastsep
