// The depthwise half of the fused forward pass, see forward.cuh: from the input of a tile in shared memory to A.
#pragma once

#include "forward_stages.cuh"

namespace fastsep {
namespace cuda {

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

// `lanes` of them share a chunk.
template <class T, bool packed, int lanes>
__device__ __forceinline__ int lane_channel(int lane, int v) {
  return packed ? lane * lane_channels<T> + v : lane + lanes * v;
}

template <class T, bool packed, int lanes>
__device__ __forceinline__ LaneChannels<T> lane_channels_of(const Forward& p, int first, int lane) {
  LaneChannels<T> lc;
#pragma unroll
  for (int v = 0; v < lane_channels<T>; ++v) {
    lc.filter[v] = min(lane_channel<T, packed, lanes>(lane, v), p.depth - first - 1);
    // Packed channels are read two at a time, so lanes beyond the last one stay where they are: the halo has room.
    lc.channel[v] =
        packed ? lane_channel<T, packed, lanes>(lane, v) : (first + lc.filter[v]) / p.multiplier - first / p.multiplier;
  }
  return lc;
}

// Larger kernels, row by row of the window: each input is read once for the row, each weight once for a row of results,
// so that a 5 x 5 patch takes 48 + 50 reads (of packed channels, and of weights for each channel) for 200 products.
template <class T, int kernel, int stride, bool packed>
__device__ __forceinline__ void add_rows(float (&sums)[patch * lane_channels<T>], const T* at, int second,
                                         int row_pitch, int pixel_pitch, const T* weights, const LaneChannels<T>& lc) {
  constexpr int lanes = lane_channels<T>, rows = (patch_h - 1) * stride + kernel,
                columns = (patch_w - 1) * stride + kernel;
#pragma unroll 1
  for (int y = 0; y < rows; ++y, at += row_pitch) {
    float x[columns][lanes];
#pragma unroll
    for (int c = 0; c < columns; ++c) read_lane<T, packed>(x[c], at + c * (packed ? chunk<T> : pixel_pitch), second);
#pragma unroll
    for (int i = 0; i < patch_h; ++i) {
      const int r = y - i * stride;
      if (r < 0 || r >= kernel) continue;
#pragma unroll
      for (int s = 0; s < kernel; ++s)
#pragma unroll
        for (int v = 0; v < lanes; ++v) {
          const float weight = to_float(weights[(lc.filter[v] * kernel + r) * kernel + s]);
#pragma unroll
          for (int j = 0; j < patch_w; ++j) {
            float& sum = sums[(i * patch_w + j) * lanes + v];
            sum = fmaf(x[j * stride + s][v], weight, sum);
          }
        }
    }
  }
}

// Tap by tap, for every kernel, stride and dilation.
template <class T, bool packed>
__device__ __forceinline__ void add_taps_shared(const Forward& p, float (&sums)[patch * lane_channels<T>], const T* at,
                                                int second, const T* weights, const LaneChannels<T>& lc) {
  constexpr int lanes = lane_channels<T>;
  const int across = p.stride_w * p.pixel_pitch, down = p.stride_h * p.halo_w * p.pixel_pitch;
#pragma unroll 1
  for (int r = 0, tap = 0; r < p.kernel_h; ++r)
#pragma unroll 1
    for (int s = 0; s < p.kernel_w; ++s, ++tap) {
      const T* from = at + (r * p.dilation_h * p.halo_w + s * p.dilation_w) * p.pixel_pitch;
      float weight[lanes];
#pragma unroll
      for (int v = 0; v < lanes; ++v) weight[v] = to_float(weights[lc.filter[v] * p.kernel_h * p.kernel_w + tap]);
#pragma unroll
      for (int i = 0; i < patch; ++i) {
        float x[lanes];
        read_lane<T, packed>(x, from + i / patch_w * down + i % patch_w * across, second);
#pragma unroll
        for (int v = 0; v < lanes; ++v) sums[i * lanes + v] = fmaf(x[v], weight[v], sums[i * lanes + v]);
      }
    }
}

template <class T, bool packed>
__device__ __forceinline__ void add_shared(const Forward& p, float (&sums)[patch * lane_channels<T>], const T* at,
                                           int second, const T* weights, const LaneChannels<T>& lc) {
  const int row_pitch = p.halo_w * p.pixel_pitch;
  if (!slides(p))
    add_taps_shared<T, packed>(p, sums, at, second, weights, lc);
  else if (p.kernel_h == 7)
    add_rows<T, 7, 1, packed>(sums, at, second, row_pitch, p.pixel_pitch, weights, lc);
  else if (p.stride_h == 2)
    add_rows<T, 5, 2, packed>(sums, at, second, row_pitch, p.pixel_pitch, weights, lc);
  else
    add_rows<T, 5, 1, packed>(sums, at, second, row_pitch, p.pixel_pitch, weights, lc);
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
// A warp has a patch of pixels, its lanes the channels: so the lanes read and write 128 bytes of a row. Where half of
// the channels are not there, as of 32 with 16 bits, each half of the warp has a patch of its own: 16 `lanes` instead
// of 32.
template <class T, class Arithmetic, int threads, Taps taps, bool packed, int lanes>
__device__ __forceinline__ void depthwise_by(const Forward& p, const Place& at, const Shared& shared, const char* stage,
                                             int first) {
  constexpr int lane_values = lane_channels<T>;
  const int lane = this_thread() % lanes;
  const LaneChannels<T> lc = lane_channels_of<T, packed, lanes>(p, first, lane);
  const T* copied = reinterpret_cast<const T*>(stage + p.halo_bytes);
  const T* biases = copied + (p.weights_shared ? chunk<T> * p.kernel_h * p.kernel_w : 0);
  float weights[9 * lane_values];
  if constexpr (taps == Taps::window) {
#pragma unroll
    for (int tap = 0; tap < 9; ++tap)
#pragma unroll
      for (int v = 0; v < lane_values; ++v) weights[tap * lane_values + v] = to_float(copied[lc.filter[v] * 9 + tap]);
  }
#pragma unroll 1
  for (int i = this_thread() / lanes; i < p.patches; i += threads / lanes) {
    const int4 place = shared.patches[i];
    const int image = place.x, y = place.y, x = place.z;
    float sums[patch * lane_values] = {};
    const T* halo = reinterpret_cast<const T*>(stage) +
                    ((image * p.halo_h + y * p.stride_h) * p.halo_w + x * p.stride_w + at.lead) * p.pixel_pitch;
    const T* from = halo + lc.channel[0] * p.channel_pitch;
    const int second = (lc.channel[lane_values - 1] - lc.channel[0]) * p.channel_pitch;
    if constexpr (taps == Taps::window) {
      if (p.stride_h == 1)
        add_window<T, 1, packed>(sums, from, second, p.halo_w * p.pixel_pitch, p.pixel_pitch, weights);
      else
        add_window<T, 2, packed>(sums, from, second, p.halo_w * p.pixel_pitch, p.pixel_pitch, weights);
    } else {
      const T* filters = p.weights_shared ? copied
                                          : static_cast<const T*>(p.depthwise_weight) +
                                                static_cast<int64_t>(first) * p.kernel_h * p.kernel_w;
      if constexpr (taps == Taps::shared)
        add_shared<T, packed>(p, sums, from, second, filters, lc);
      else
        add_taps_global<T>(p, sums, at.image + image, at.y + y, at.x + x, first / p.multiplier, filters, lc);
    }
    if (p.depthwise_bias != nullptr) {
#pragma unroll
      for (int v = 0; v < lane_values; ++v) {
        const float bias = to_float(biases[lc.filter[v]]);
#pragma unroll
        for (int j = 0; j < patch; ++j) sums[j * lane_values + v] += bias;
      }
    }
    activate(p.mid_activation, sums);
    char* row = shared.a + ((image * p.tile_h + y) * p.tile_w + x) * chunk_pitch;
#pragma unroll
    for (int j = 0; j < patch; ++j) {
      if (y + j / patch_w >= p.tile_h || x + j % patch_w >= p.tile_w) continue;
      T* to = reinterpret_cast<T*>(row + (j / patch_w * p.tile_w + j % patch_w) * chunk_pitch);
      float mine[lane_values];
#pragma unroll
      for (int v = 0; v < lane_values; ++v) {
        mine[v] = first + lane_channel<T, packed, lanes>(lane, v) < p.depth ? sums[j * lane_values + v] : 0.f;
        if constexpr (std::is_same<Arithmetic, Tf32>::value) mine[v] = round_to_tf32(mine[v]);
      }
      if constexpr (packed || lane_values == 1) {
        store(to + lane * lane_values, mine);
      } else {
#pragma unroll
        for (int v = 0; v < lane_values; ++v) to[lane + lanes * v] = from_float<T>(mine[v]);
      }
    }
  }
}

template <class T, class Arithmetic, int threads, Taps taps>
__device__ __forceinline__ void depthwise(const Forward& p, const Place& at, const Shared& shared, const char* stage,
                                          int first) {
  if (taps == Taps::global || !p.packed)
    depthwise_by<T, Arithmetic, threads, taps, false, warp_size>(p, at, shared, stage, first);
  else if (p.depth - first > chunk<T> / 2)
    depthwise_by<T, Arithmetic, threads, taps, true, warp_size>(p, at, shared, stage, first);
  else
    depthwise_by<T, Arithmetic, threads, taps, true, warp_size / 2>(p, at, shared, stage, first);
}

}  // namespace cuda
}  // namespace fastsep
