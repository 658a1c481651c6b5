// The depthwise kernels of depthwise.cuh for any kernel, stride, dilation, padding and multiplier, in both layouts: a
// thread a result, neighbouring threads neighbouring results in memory.
#pragma once

#include "depthwise.cuh"

namespace fastsep {
namespace cuda {

// Where a number of a tensor of the layout lies, from its place in memory.
struct Position {
  int64_t n, channel, y, x;
};

__device__ __forceinline__ Position position_of(int64_t index, bool nhwc, int64_t channels, int64_t height,
                                                int64_t width) {
  const int64_t inner = nhwc ? channels : width, middle = nhwc ? width : height, outer = nhwc ? height : channels;
  const int64_t row = divide(index, inner), plane = divide(row, middle), n = divide(plane, outer);
  const int64_t i = index - row * inner, j = row - plane * middle, k = plane - n * outer;
  if (nhwc) return {n, i, k, j};
  return {n, k, j, i};
}

__device__ __forceinline__ int64_t index_of(const Position& at, bool nhwc, int64_t channels, int64_t height,
                                            int64_t width) {
  return nhwc ? ((at.n * height + at.y) * width + at.x) * channels + at.channel
              : ((at.n * channels + at.channel) * height + at.y) * width + at.x;
}

template <class T>
__global__ void __launch_bounds__(depthwise_threads) depthwise_general(const DepthwiseParams p) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * depthwise_threads + threadIdx.x;
  if (index >= p.batch * p.channels * p.out_h * p.out_w) return;
  const Position at = position_of(index, p.nhwc, p.channels, p.out_h, p.out_w);
  const int64_t in_channels = p.channels / p.multiplier;
  const int64_t y = at.y * p.stride_h - p.pad_top, x = at.x * p.stride_w - p.pad_left;
  const T* const filter = static_cast<const T*>(p.weight) + at.channel * p.kernel_h * p.kernel_w;
  const Position origin = {at.n, divide(at.channel, p.multiplier), 0, 0};
  const T* const input = static_cast<const T*>(p.input) + index_of(origin, p.nhwc, in_channels, p.in_h, p.in_w);
  const int64_t step = p.nhwc ? in_channels : 1;
  float sum[1][1] = {{p.bias == nullptr ? 0.f : to_float(static_cast<const T*>(p.bias)[at.channel])}};
  for (int64_t r = 0; r < p.kernel_h; ++r) {
    const int64_t in_y = y + r * p.dilation_h;
    if (in_y < 0 || in_y >= p.in_h) continue;
    const T* const row = input + in_y * p.in_w * step;
    for (int64_t s = 0; s < p.kernel_w; ++s) {
      const int64_t in_x = x + s * p.dilation_w;
      if (in_x < 0 || in_x >= p.in_w) continue;
      sum[0][0] += to_float(row[in_x * step]) * to_float(filter[r * p.kernel_w + s]);
    }
  }
  finish<1>(p, sum, [&](int, float (&g)[1]) { g[0] = to_float(static_cast<const T*>(p.gradient)[index]); });
  static_cast<T*>(p.output)[index] = from_float<T>(sum[0][0]);
}

// The taps that reach a place whose coordinate, counted with the padding, is `at`: first, first + tap_step, ...; the
// first leads from `result`, each next from result_step less. -1 where there is none.
__device__ __forceinline__ int64_t first_tap(int64_t at, int64_t stride, int64_t dilation, int64_t kernel,
                                             int64_t tap_step, int64_t* result) {
  // All of them fit 31 bits, see validate().
  const int taps = static_cast<int>(kernel < tap_step ? kernel : tap_step);
  int from = static_cast<int>(at);
  for (int tap = 0; tap < taps && from >= 0; ++tap, from -= static_cast<int>(dilation)) {
    *result = from / static_cast<int>(stride);
    if (from % static_cast<int>(stride) == 0) return tap;
  }
  return -1;
}

// dx: `input` is dt, [N, channels, in_h, in_w], `output` dx.
template <class T>
__global__ void __launch_bounds__(depthwise_threads) depthwise_gradient_general(const DepthwiseParams p) {
  const int64_t out_channels = p.channels / p.multiplier;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * depthwise_threads + threadIdx.x;
  if (index >= p.batch * out_channels * p.out_h * p.out_w) return;
  const Position at = position_of(index, p.nhwc, out_channels, p.out_h, p.out_w);
  int64_t first_y = 0, first_x = 0;
  const int64_t first_r = first_tap(at.y + p.pad_top, p.stride_h, p.dilation_h, p.kernel_h, p.tap_step_h, &first_y);
  const int64_t first_s = first_tap(at.x + p.pad_left, p.stride_w, p.dilation_w, p.kernel_w, p.tap_step_w, &first_x);
  float sum = 0.f;
  for (int64_t j = 0; j < p.multiplier && first_r >= 0 && first_s >= 0; ++j) {
    const Position origin = {at.n, at.channel * p.multiplier + j, 0, 0};
    const T* const input = static_cast<const T*>(p.input) + index_of(origin, p.nhwc, p.channels, p.in_h, p.in_w);
    const T* const filter = static_cast<const T*>(p.weight) + origin.channel * p.kernel_h * p.kernel_w;
    const int64_t step = p.nhwc ? p.channels : 1;
    int64_t y = first_y;
    for (int64_t r = first_r; r < p.kernel_h && y >= 0; r += p.tap_step_h, y -= p.result_step_h) {
      if (y >= p.in_h) continue;
      const T* const row = input + y * p.in_w * step;
      int64_t x = first_x;
      for (int64_t s = first_s; s < p.kernel_w && x >= 0; s += p.tap_step_w, x -= p.result_step_w)
        if (x < p.in_w) sum += to_float(row[x * step]) * to_float(filter[r * p.kernel_w + s]);
    }
  }
  static_cast<T*>(p.output)[index] = from_float<T>(sum);
}

}  // namespace cuda
}  // namespace fastsep
