// A thread's tile of a depthwise convolution, in registers, for both layouts and every direction.
//
// K x K taps, stride S, a tile of TY x TX results, V channels at a time. All loops are unrolled, so that which tap
// joins which input with which result is settled by the compiler: no division, no branch, and each input is read once.
//
// A Source gives the inputs of the tile: row(r) goes to row r of the window, load(c, v) reads V channels at its column
// c, 0 outside the plane. A Filter gives the weights: load(r, s, w) those of tap (r, s).
//
// Registers: V TY TX sums and V columns of a window's row; the weights of 3 x 3 taps stay in registers too.
#pragma once

#include "common.cuh"

namespace fastsep {
namespace cuda {

// Rows (or columns) of the window that a tile of `results` rows reads.
__host__ __device__ constexpr int window(int kernel, int stride, int results) {
  return (results - 1) * stride + kernel;
}
// The same where results and inputs change places, as they do in the gradient of the input.
__host__ __device__ constexpr int spread_window(int kernel, int stride, int results) {
  return (results - 1) / stride + (kernel - 1) / stride + 1;
}

// sum[y, x] += over (r, s): input(S y + r, S x + s) weight(r, s)
template <int K, int S, int TY, int TX, int V, class Source, class Filter>
__device__ __forceinline__ void correlate(float (&sum)[TY * TX][V], Source& source, const Filter& filter) {
  constexpr int rows = window(K, S, TY), columns = window(K, S, TX);
  // One row of results: the tap's row is then known at run time too, and the loop keeps the reads of the next rows, and
  // with them the registers they would take, behind this row's sums.
  [[maybe_unused]] constexpr int unrolled = TY == 1 ? 1 : rows;
#pragma unroll unrolled
  for (int row = 0; row < rows; ++row) {
    float in[columns][V];
    source.row(row);
#pragma unroll
    for (int c = 0; c < columns; ++c) source.load(c, in[c]);
#pragma unroll
    for (int y = 0; y < TY; ++y) {
      const int r = row - y * S;
      if (r < 0 || r >= K) continue;
#pragma unroll
      for (int s = 0; s < K; ++s) {
        float weight[V];
        filter.load(r, s, weight);
#pragma unroll
        for (int x = 0; x < TX; ++x)
#pragma unroll
          for (int v = 0; v < V; ++v) sum[y * TX + x][v] += in[x * S + s][v] * weight[v];
      }
    }
  }
}

// The transpose: sum[y, x] += over (r, s) and (o, q) with S o + r = y, S q + s = x: input(o, q) weight(r, s). The
// window begins at o = q = -((K - 1) / S).
template <int K, int S, int TY, int TX, int V, class Source, class Filter>
__device__ __forceinline__ void spread(float (&sum)[TY * TX][V], Source& source, const Filter& filter) {
  constexpr int rows = spread_window(K, S, TY), columns = spread_window(K, S, TX), before = (K - 1) / S;
#pragma unroll
  for (int row = 0; row < rows; ++row) {
    float in[columns][V];
    source.row(row);
#pragma unroll
    for (int c = 0; c < columns; ++c) source.load(c, in[c]);
#pragma unroll
    for (int y = 0; y < TY; ++y) {
      const int r = y - (row - before) * S;
      if (r < 0 || r >= K) continue;
#pragma unroll
      for (int s = 0; s < K; ++s) {
        float weight[V];
        filter.load(r, s, weight);
#pragma unroll
        for (int x = 0; x < TX; ++x) {
          const int c = (x - s + before * S) / S;
          if (x - s + before * S < 0 || (x - s + before * S) % S != 0 || c >= columns) continue;
#pragma unroll
          for (int v = 0; v < V; ++v) sum[y * TX + x][v] += in[c][v] * weight[v];
        }
      }
    }
  }
}

// sum[r, s] += over (y, x): input(S y + r, S x + s) gradient[y, x]
template <int K, int S, int TY, int TX, int V, class Source>
__device__ __forceinline__ void correlate_taps(float (&sum)[K * K][V], Source& source,
                                               const float (&gradient)[TY * TX][V]) {
  constexpr int rows = window(K, S, TY), columns = window(K, S, TX);
#pragma unroll
  for (int row = 0; row < rows; ++row) {
    float in[columns][V];
    source.row(row);
#pragma unroll
    for (int c = 0; c < columns; ++c) source.load(c, in[c]);
#pragma unroll
    for (int y = 0; y < TY; ++y) {
      const int r = row - y * S;
      if (r < 0 || r >= K) continue;
#pragma unroll
      for (int s = 0; s < K; ++s)
#pragma unroll
        for (int x = 0; x < TX; ++x)
#pragma unroll
          for (int v = 0; v < V; ++v) sum[r * K + s][v] += in[x * S + s][v] * gradient[y * TX + x][v];
    }
  }
}

// Channels-last: V channels of a pixel in one access. `image` points to the first of them.
template <class T, int V>
struct PixelSource {
  const T* image;
  int64_t row_elements;
  int height, width, channels;
  int y, x, step_h, step_w;  // where the window begins, and how far apart its rows and columns are
  bool inside = false;
  const T* row_start = nullptr;

  __device__ __forceinline__ void row(int r) {
    const int at = y + r * step_h;
    inside = static_cast<unsigned>(at) < static_cast<unsigned>(height);
    row_start = image + at * row_elements;
  }
  __device__ __forceinline__ void load(int column, float (&to)[V]) const {
    const int at = x + column * step_w;
#pragma unroll
    for (int v = 0; v < V; ++v) to[v] = 0.f;
    if (inside && static_cast<unsigned>(at) < static_cast<unsigned>(width))
      cuda::load(to, row_start + static_cast<int64_t>(at) * channels);
  }
};

// NCHW: one number of a plane of which some rows lie in shared memory, already in fp32: from row `low` on, at `rows`.
// Rows are counted from there, because a plane may have more numbers than 32 bits count.
struct PlaneSource {
  const float* rows;
  int low, height, width;
  int y, x, step_h, step_w;
  bool inside = false;
  const float* row_start = nullptr;

  __device__ __forceinline__ void row(int r) {
    const int at = y + r * step_h;
    inside = static_cast<unsigned>(at) < static_cast<unsigned>(height);
    row_start = rows + (inside ? at - low : 0) * width;
  }
  __device__ __forceinline__ void load(int column, float (&to)[1]) const {
    const int at = x + column * step_w;
    to[0] = inside && static_cast<unsigned>(at) < static_cast<unsigned>(width) ? row_start[at] : 0.f;
  }
};

// Weights in shared memory, [tap][stride] with the thread's V channels at `first`.
template <int K, int V>
struct SharedFilter {
  const float* first;
  int stride;
  __device__ __forceinline__ void load(int r, int s, float (&weight)[V]) const {
    cuda::load(weight, first + (r * K + s) * stride);
  }
};

template <int K, int V>
struct RegisterFilter {
  float weights[K * K][V];
  __device__ __forceinline__ explicit RegisterFilter(const SharedFilter<K, V>& from) {
#pragma unroll
    for (int tap = 0; tap < K * K; ++tap) from.load(tap / K, tap % K, weights[tap]);
  }
  __device__ __forceinline__ void load(int r, int s, float (&weight)[V]) const {
#pragma unroll
    for (int v = 0; v < V; ++v) weight[v] = weights[r * K + s][v];
  }
};

// f(i, values[i]) for every i, as one loop that is not unrolled: the values move past index 0, because registers have
// no run-time index. For what would be too much code to have once for every value.
template <int N, int V, class F>
__device__ __forceinline__ void rolled(float (&values)[N][V], F f) {
#pragma unroll 1
  for (int i = 0; i < N; ++i) {
    float first[V];
#pragma unroll
    for (int v = 0; v < V; ++v) first[v] = values[0][v];
    f(i, first);
#pragma unroll
    for (int j = 0; j + 1 < N; ++j)
#pragma unroll
      for (int v = 0; v < V; ++v) values[j][v] = values[j + 1][v];
#pragma unroll
    for (int v = 0; v < V; ++v) values[N - 1][v] = first[v];
  }
}

// to[0 .. end - begin rounded up to whole vectors) = tensor[begin .. end) in fp32, by all threads of the block. `begin`
// is a multiple of a vector, and so is, with `vectors`, the tensor's address.
template <class T>
__device__ __forceinline__ void stage(float* to, const T* tensor, int64_t begin, int64_t end, bool vectors) {
  constexpr int step = widest<T>;
  const int count = static_cast<int>(end - begin), threads = static_cast<int>(blockDim.x);
  for (int i = static_cast<int>(threadIdx.x) * step; i < count; i += threads * step) {
    float values[step];
    if (vectors && i + step <= count)
      load(values, tensor + begin + i);
    else
      load_first(values, tensor + begin + i, count - i);
    store(to + i, values);
  }
}

// value / divisor for value * divisor < 2^32, by a multiplication.
struct Divisor {
  uint32_t divisor = 1, reciprocal = 0;  // 2^32 / divisor rounded up
  Divisor() = default;
  explicit Divisor(uint32_t by) : divisor(by), reciprocal(by < 2 ? 0 : 0xffffffffu / by + 1) {}
  __device__ __forceinline__ uint32_t of(uint32_t value) const {
    return divisor == 1 ? value : static_cast<uint32_t>(static_cast<uint64_t>(value) * reciprocal >> 32);
  }
};

// Whole numbers of up to 63 bits, in 32 where that is enough: a quarter of the instructions.
__device__ __forceinline__ int64_t divide(int64_t value, int64_t divisor) {
  if (((value | divisor) >> 32) == 0) return static_cast<uint32_t>(value) / static_cast<uint32_t>(divisor);
  return value / divisor;
}

}  // namespace cuda
}  // namespace fastsep
