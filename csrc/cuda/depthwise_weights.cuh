// The gradients of the depthwise weights and bias.
//
//   dw[i, r, s] = sum over n, oy, ox: dt[n, i, oy, ox] x[n, i / m, oy S - P + r D, ox S - P + s D]
//   db[i] = sum over n, oy, ox: dt[n, i, oy, ox]
//
// One pass over x and dt for all taps: a thread keeps the K K + 1 sums of its channels in registers over all the tiles
// it goes through (K = 3: 4 channels, 40 sums; 5 and 7: 2 channels, 52 and 100), a block adds up its threads and
// writes [K K + 1][channels] to the workspace, and add_parts() adds the blocks' parts. How many parts there are, and in
// which order everything is added, follows from the problem alone.
#pragma once

#include "depthwise_general.cuh"

namespace fastsep {
namespace cuda {

constexpr int weights_threads = 128;

__host__ __device__ constexpr int weights_channels(int kernel) { return kernel == 3 ? 4 : 2; }
// Columns of a tile, channels-last, and rows of one of NCHW. The compiler asks for all inputs of a tile at once, which
// keeps memory busy: as many as there are registers for.
__host__ __device__ constexpr int weights_x(int kernel, int stride) { return kernel == 7 ? 1 : stride == 2 ? 2 : 4; }
__host__ __device__ constexpr int weights_y(int kernel) { return kernel == 3 ? 8 : 4; }

// Adds the sums of all strands of a block; the total is strand 0's. scratch: [strands / 2][N][lanes][V].
template <int N, int V>
__device__ __forceinline__ void add_strands(float (&sum)[N][V], float* scratch, int strand, int strands, int lane,
                                            int lanes) {
  for (int half = strands / 2; half > 0; half /= 2) {
    float* const at = scratch + (strand % half * N * lanes + lane) * V;
    if (strand >= half && strand < 2 * half) {
#pragma unroll
      for (int i = 0; i < N; ++i) store(at + i * lanes * V, sum[i]);
    }
    __syncthreads();
    if (strand < half) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        float other[V];
        load(other, at + i * lanes * V);
#pragma unroll
        for (int v = 0; v < V; ++v) sum[i][v] += other[v];
      }
    }
    __syncthreads();
  }
}

template <class T, int K, int S>
__global__ void __launch_bounds__(weights_threads, K == 7 ? 2 : 3) depthwise_weights_nhwc(const DepthwiseParams p) {
  constexpr int V = weights_channels(K), TX = weights_x(K, S), taps = K * K;
  const int channels = static_cast<int>(p.channels), lanes = 1 << p.log_lanes;
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1), strand = static_cast<int>(threadIdx.x) >> p.log_lanes;
  const int strands = weights_threads >> p.log_lanes;
  const int channel = (static_cast<int>(blockIdx.x % static_cast<unsigned>(p.groups)) * lanes + lane) * V;
  const unsigned part = blockIdx.x / static_cast<unsigned>(p.groups);
  const int in_h = static_cast<int>(p.in_h), in_w = static_cast<int>(p.in_w);
  const int out_h = static_cast<int>(p.out_h), out_w = static_cast<int>(p.out_w);
  const int step_y = static_cast<int>(p.dilation_h), step_x = static_cast<int>(p.dilation_w);
  const int64_t all = p.batch * p.tiles_y * p.tiles_x, begin = part * p.part_size;
  const unsigned end = static_cast<unsigned>(begin + p.part_size < all ? begin + p.part_size : all);

  float sum[taps][V] = {}, bias[1][V] = {};
  if (channel < channels) {
    for (unsigned tile = static_cast<unsigned>(begin + strand); tile < end; tile += static_cast<unsigned>(strands)) {
      const unsigned row = tile / static_cast<unsigned>(p.tiles_x);
      const int tile_x = static_cast<int>(tile - row * static_cast<unsigned>(p.tiles_x));
      const int n = static_cast<int>(row / static_cast<unsigned>(p.tiles_y));
      const int tile_y = static_cast<int>(row) - n * p.tiles_y;
      const int y = tile_y, x = tile_start(tile_x, TX, step_x);
      const T* const gradients = static_cast<const T*>(p.gradient) + int64_t{n} * out_h * out_w * channels + channel;
      PixelSource<T, V> dt = {gradients, static_cast<int64_t>(out_w) * channels, out_h, out_w, channels, y, x, step_y,
                              step_x};
      float gradient[TX][V];
      dt.row(0);
#pragma unroll
      for (int i = 0; i < TX; ++i) {
        dt.load(i, gradient[i]);
#pragma unroll
        for (int v = 0; v < V; ++v) bias[0][v] += gradient[i][v];
      }
      const T* const image = static_cast<const T*>(p.input) + int64_t{n} * in_h * in_w * channels + channel;
      PixelSource<T, V> source = {image,
                                  static_cast<int64_t>(in_w) * channels,
                                  in_h,
                                  in_w,
                                  channels,
                                  y * S - static_cast<int>(p.pad_top),
                                  x * S - static_cast<int>(p.pad_left),
                                  step_y,
                                  step_x};
      correlate_taps<K, S, 1, TX, V>(sum, source, gradient);
    }
  }
  float* const scratch = reinterpret_cast<float*>(shared_memory());
  add_strands(sum, scratch, strand, strands, lane, lanes);
  add_strands(bias, scratch, strand, strands, lane, lanes);
  if (strand > 0 || channel >= channels) return;
  float* const out = static_cast<float*>(p.output) + static_cast<int64_t>(part) * (taps + 1) * channels + channel;
#pragma unroll
  for (int tap = 0; tap < taps; ++tap) store(out + static_cast<int64_t>(tap) * channels, sum[tap]);
  store(out + static_cast<int64_t>(taps) * channels, bias[0]);
}

// A block has one channel, and goes through bands of one image, or several whole images at a time; x in shared memory
// as in depthwise_nchw(), dt straight from memory, of which each number is used by one thread for all taps.
template <class T, int K, int S>
__global__ void __launch_bounds__(weights_threads, K == 3   ? 5
                                                   : K == 5 ? 4
                                                            : 3) depthwise_weights_nchw(const DepthwiseParams p) {
  constexpr int TY = weights_y(K), taps = K * K, step = widest<T>;
  const int in_h = static_cast<int>(p.in_h), in_w = static_cast<int>(p.in_w);
  const int out_h = static_cast<int>(p.out_h), out_w = static_cast<int>(p.out_w);
  const int pad_y = static_cast<int>(p.pad_top), pad_x = static_cast<int>(p.pad_left);
  const int step_y = static_cast<int>(p.dilation_h), step_x = static_cast<int>(p.dilation_w);
  const int64_t channel = blockIdx.x % p.channels, part = blockIdx.x / p.channels;
  const int64_t all = divide_up(p.batch, p.planes) * p.bands;
  const int64_t begin = part * p.part_size, end = begin + p.part_size < all ? begin + p.part_size : all;
  float* const rows = reinterpret_cast<float*>(shared_memory());  // [images][row_numbers]
  const T* const input = static_cast<const T*>(p.input);

  float sum[taps][1] = {}, bias = 0.f;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first_image = item / p.bands * p.planes;
    const int band_start = static_cast<int>(item % p.bands) * p.band;
    const int images = static_cast<int>(p.batch - first_image < p.planes ? p.batch - first_image : p.planes);
    int low = band_start * S - pad_y, high = (band_start + p.band - 1) * S - pad_y + (K - 1) * step_y + 1;
    low = low < 0 ? 0 : low > in_h ? in_h : low;
    high = high < low ? low : high > in_h ? in_h : high;
    const auto start_of = [&](int image) {
      return (((first_image + image) * p.channels + channel) * in_h + low) * in_w;
    };
    const int count = (high - low) * in_w, pieces = p.row_numbers / step;
    for (int i = static_cast<int>(threadIdx.x); i < images * pieces; i += weights_threads) {
      const int image = i / pieces, piece = (i - image * pieces) * step;
      const int64_t start = start_of(image), at = start - start % step + piece;
      const int64_t left = start + count - at;
      float values[step];
      if (p.vectors && left >= step)
        load(values, input + at);
      else
        load_first(values, input + at, left);
      store(rows + image * p.row_numbers + piece, values);
    }
    __syncthreads();

    const int columns = p.tiles_x, tiles = p.band_tiles * columns;
    for (int i = static_cast<int>(threadIdx.x); i < tiles * images; i += weights_threads) {
      const int image = static_cast<int>(p.by_tiles.of(static_cast<uint32_t>(i)));
      const int tile = i - image * tiles, row = static_cast<int>(p.by_columns.of(static_cast<uint32_t>(tile)));
      const int y = band_start + tile_start(row, TY, step_y), x = tile - row * columns;
      const T* const dt =
          static_cast<const T*>(p.gradient) + (((first_image + image) * p.channels + channel) * out_h + y) * out_w + x;
      float gradient[TY][1];
#pragma unroll
      for (int j = 0; j < TY; ++j) {
        gradient[j][0] = y + j * step_y < out_h ? to_float(dt[static_cast<int64_t>(j) * step_y * out_w]) : 0.f;
        bias += gradient[j][0];
      }
      const int64_t start = start_of(image);
      const float* const plane = rows + image * p.row_numbers + static_cast<int>(start % step);
      PlaneSource source = {plane, low, in_h, in_w, y * S - pad_y, x * S - pad_x, step_y, step_x};
      correlate_taps<K, S, TY, 1, 1>(sum, source, gradient);
    }
    __syncthreads();
  }

  // Lanes by shuffles, warps through shared memory.
  constexpr int warps = weights_threads / warp_size;
  const int lane = static_cast<int>(threadIdx.x) % warp_size, warp = static_cast<int>(threadIdx.x) / warp_size;
#pragma unroll
  for (int tap = 0; tap <= taps; ++tap) {
    float value = tap < taps ? sum[tap < taps ? tap : 0][0] : bias;
#pragma unroll
    for (int lanes = warp_size / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(all_lanes, value, lanes);
    if (lane == 0) rows[warp * (taps + 1) + tap] = value;
  }
  __syncthreads();
  for (int tap = static_cast<int>(threadIdx.x); tap <= taps; tap += weights_threads) {
    float value = 0.f;
    for (int i = 0; i < warps; ++i) value += rows[i * (taps + 1) + tap];
    static_cast<float*>(p.output)[(part * (taps + 1) + tap) * p.channels + channel] = value;
  }
}

// Any kernel, stride, dilation and multiplier: a thread one filter and 8 of its taps (the bias counts as one), over
// the pixels of a strand.
constexpr int general_taps = 8;

template <class T>
__global__ void __launch_bounds__(weights_threads) depthwise_weights_general(const DepthwiseParams p) {
  const int lanes = 1 << p.log_lanes, strands = weights_threads >> p.log_lanes;
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1), strand = static_cast<int>(threadIdx.x) >> p.log_lanes;
  const int64_t group = blockIdx.x % p.groups, chunk = blockIdx.x / p.groups % p.chunks;
  const int64_t part = blockIdx.x / p.groups / p.chunks, filter = group * lanes + lane;
  const int64_t taps = p.kernel_h * p.kernel_w, first = chunk * general_taps, plane = p.out_h * p.out_w;
  const int64_t begin = part * p.part_size, all = p.batch * plane;
  const int64_t end = begin + p.part_size < all ? begin + p.part_size : all;
  const int64_t in_channels = p.channels / p.multiplier;
  const T *const input = static_cast<const T*>(p.input), *const gradient = static_cast<const T*>(p.gradient);

  float sum[general_taps][1] = {};
  if (filter < p.channels) {
    int64_t down[general_taps], right[general_taps];
#pragma unroll
    for (int j = 0; j < general_taps; ++j) {
      down[j] = divide(first + j, p.kernel_w) * p.dilation_h - p.pad_top;
      right[j] = (first + j - divide(first + j, p.kernel_w) * p.kernel_w) * p.dilation_w - p.pad_left;
    }
    for (int64_t pixel = begin + strand; pixel < end; pixel += strands) {
      const int64_t n = divide(pixel, plane), y = divide(pixel - n * plane, p.out_w);
      const int64_t x = pixel - n * plane - y * p.out_w;
      const float g = to_float(gradient[index_of({n, filter, y, x}, p.nhwc, p.channels, p.out_h, p.out_w)]);
      const int64_t c = divide(filter, p.multiplier);
#pragma unroll
      for (int j = 0; j < general_taps; ++j) {
        if (first + j == taps) sum[j][0] += g;
        if (first + j >= taps) continue;
        const int64_t in_y = y * p.stride_h + down[j], in_x = x * p.stride_w + right[j];
        if (in_y < 0 || in_y >= p.in_h || in_x < 0 || in_x >= p.in_w) continue;
        sum[j][0] += g * to_float(input[index_of({n, c, in_y, in_x}, p.nhwc, in_channels, p.in_h, p.in_w)]);
      }
    }
  }
  add_strands(sum, reinterpret_cast<float*>(shared_memory()), strand, strands, lane, lanes);
  if (strand > 0 || filter >= p.channels) return;
#pragma unroll
  for (int j = 0; j < general_taps; ++j)
    if (first + j <= taps)
      static_cast<float*>(p.output)[(part * (taps + 1) + first + j) * p.channels + filter] = sum[j][0];
}

// ---- parts
// -----------------------------------------------------------------------------------------------------------

// parts: [count][stride], of which two pieces are added, [rows][columns] at its beginning and `tail` numbers at
// tail_at; what a piece comes to may be null.
struct AddParts {
  const float* parts;
  int64_t count, stride, rows, columns;
  void* output;  // [columns][rows] where transposed, else [rows][columns]
  bool transposed;
  int64_t tail_at, tail;
  void* tail_output;
};

constexpr int add_columns = 32, add_strands_count = 8;  // of a block: eight warps share the parts of 32 numbers

template <class T>
__global__ void __launch_bounds__(add_columns* add_strands_count) add_parts(const AddParts p) {
  const int lane = static_cast<int>(threadIdx.x) % add_columns, strand = static_cast<int>(threadIdx.x) / add_columns;
  const int64_t place = static_cast<int64_t>(blockIdx.x) * add_columns + lane, most = p.rows * p.columns;
  const bool in_tail = place >= most, there = place < most + p.tail;
  const int64_t index = in_tail ? p.tail_at + place - most : place;
  const int64_t share = divide_up(p.count, add_strands_count);
  const int64_t begin = strand * share, end = begin + share < p.count ? begin + share : p.count;
  float* const shared = reinterpret_cast<float*>(shared_memory());
  float sum = 0.f;
  if (there) {
#pragma unroll 4
    for (int64_t part = begin; part < end; ++part) sum += p.parts[part * p.stride + index];
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (strand > 0 || !there) return;
  for (int i = 1; i < add_strands_count; ++i) sum += shared[i * add_columns + lane];
  if (in_tail) {
    static_cast<T*>(p.tail_output)[place - most] = from_float<T>(sum);
    return;
  }
  const int64_t row = divide(index, p.columns), column = index - row * p.columns;
  static_cast<T*>(p.output)[p.transposed ? column * p.rows + row : index] = from_float<T>(sum);
}

}  // namespace cuda
}  // namespace fastsep
