// The depthwise half alone, and the gradient of its input.
//
//   u[n, i, oy, ox] = act(bias[i] + sum over (r, s): x[n, i / m, oy S - P + r D, ox S - P + s D] w[i, r, s])
//   dt = gradient * act'(t), t the argument of act, where a gradient comes with it
//   dx[n, c, iy, ix] = sum over (r, s), j < m that reach (iy, ix): dt[n, c m + j, oy, ox] w[c m + j, r, s]
//
// The work is bound by memory: 9 multiply-adds to 8 bytes (fp32) or 4 of a 3 x 3 filter, where an H200 has 7 to a byte.
// So each input should come from device memory once and each result go there once, in whole sectors:
// * Channels-last: a thread owns 4 channels (16 or 8 bytes) of 8 results or so, a block a patch of 8 x 16 results
//   of up to 64 channels: 10 x 18 / 128 = 1.4 reads of an input, of which the first level cache answers most.
// * NCHW: a block copies whole rows of a plane, or several small planes, into shared memory as fp32, by vectors
//   whatever the width; a thread owns one column of 8 results, neighbours neighbouring columns, so that there is no
//   bank conflict and stores are whole.
// These hold for square kernels of 3, 5 and 7, stride 1 (any dilation) or 2, and m = 1; anything else takes the general
// kernels, a thread a result, which the first level cache keeps at a third to a half of the speed.
//
// With stride 1 the gradient is the same sum with the filter turned around and padding D (K - 1) - P; with stride 2 it
// is spread(), tiles in coordinates that count the padding, so that all parities are known to the compiler.
#pragma once

#include "depthwise_tile.cuh"

namespace fastsep {
namespace cuda {

struct DepthwiseParams {
  const void* input;
  const void* weight;
  const void* bias;      // may be null
  const void* gradient;  // may be null
  void* output;
  // Of what is read and what is written; channels are those of the filters, i.
  int64_t batch, channels, multiplier, in_h, in_w, out_h, out_w;
  int64_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left;
  Activation activation;
  bool from_output;     // derivative_from_output(activation)
  float corner, below;  // see keep_sides()
  bool turned;          // the filter, for the gradient
  bool nhwc;
  bool vectors;  // `input` is aligned to 16 bytes

  // Channels-last: tiles of a plane, and how many of them along each axis a block takes, as powers of two.
  int tiles_y, tiles_x, groups, patches_y, patches_x;
  int log_lanes, log_x, log_y;
  // NCHW: whole planes, or bands of one.
  int planes, bands, band, band_tiles;
  Divisor by_tiles, by_columns;
  // The general gradient: taps that reach one place are tap_step apart, the results they lead from result_step.
  int64_t tap_step_h, tap_step_w, result_step_h, result_step_w;
  // The gradient of the weights: parts of part_size tiles, bands or pixels; rows of a band in shared memory.
  int64_t parts, part_size;
  int chunks, row_numbers;
};

constexpr int depthwise_threads = 256;

// ---- what becomes of the sums
// ----------------------------------------------------------------------------------------

// Where the output's slope jumps at +-corner and is taken from what is stored: a number within stays within, where
// rounding to 16 bits would move it to the corner; at most to the next number of the type, `below`. A corner of 0 is
// none.
template <int N, int V>
__device__ __forceinline__ void keep_sides(const DepthwiseParams& p, float (&values)[N][V]) {
  if (p.corner == 0.f) return;
#pragma unroll
  for (int i = 0; i < N; ++i)
#pragma unroll
    for (int v = 0; v < V; ++v)
      if (fabsf(values[i][v]) < p.corner) values[i][v] = clamp(values[i][v], -p.below, p.below);
}

// values[i] becomes act(values[i]), or gradient act'(values[i]) where gradient_at(i, v) gives one. Clamps are laid out
// for every value, the gradients of `together` asked for at once; the rest are one piece of code.
template <int together, int N, int V, class GradientAt>
__device__ __forceinline__ void finish(const DepthwiseParams& p, float (&values)[N][V], GradientAt gradient_at) {
  const Activation act = p.activation;
  if (act == Activation::identity || act == Activation::relu || act == Activation::relu6) {
    if (p.gradient != nullptr) {
      const float low = act == Activation::identity ? NAN : 0.f, high = act == Activation::relu6 ? 6.f : NAN;
      rolled(reinterpret_cast<float (&)[N / together][together * V]>(values),
             [&](int group, float (&of_group)[together* V]) {
               float g[together][V];
#pragma unroll
               for (int i = 0; i < together; ++i) gradient_at(group * together + i, g[i]);
#pragma unroll
               for (int i = 0; i < together; ++i)
#pragma unroll
                 for (int v = 0; v < V; ++v) {
                   float& value = of_group[i * V + v];
                   value = value <= low || value >= high ? 0.f : g[i][v];
                 }
             });
      return;
    }
    const float low = act == Activation::identity ? -INFINITY : 0.f;
    const float high = act == Activation::relu6 ? 6.f : INFINITY;
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int v = 0; v < V; ++v) values[i][v] = clamp(values[i][v], low, high);
    keep_sides(p, values);
    return;
  }
  rolled(values, [&](int i, float (&value)[V]) {
    float g[V];
    if (p.gradient != nullptr) gradient_at(i, g);
#pragma unroll 1
    for (int turn = 0; turn < V; ++turn) {  // the activations' code once, the values moved past it as in rolled()
      const float t = value[0];
      const float u = p.gradient == nullptr || p.from_output ? activate_one(act, t) : t;
      const float result = p.gradient == nullptr ? u : slope(act, g[0], u);
#pragma unroll
      for (int v = 0; v + 1 < V; ++v) {
        value[v] = value[v + 1];
        g[v] = g[v + 1];
      }
      value[V - 1] = result;
    }
  });
}

// ---- channels-last
// ---------------------------------------------------------------------------------------------------

constexpr int nhwc_channels = 4, nhwc_lanes = 16;

// Results of a thread. Wide rather than high where the weights come from shared memory (a read of four of them to
// 4 TX multiply-adds) and where the window's rows are long: within 128 registers, so that a processor has 512 threads.
__host__ __device__ constexpr int nhwc_y(int kernel, int stride, bool spreads) {
  return spreads || (kernel == 3 && stride == 1) ? 2 : 1;
}
__host__ __device__ constexpr int nhwc_x(int kernel, int stride) { return kernel > 3 && stride == 1 ? 8 : 4; }

// Row `tile` of tiles: the phase within a dilated step is what changes first.
__device__ __forceinline__ int tile_start(int tile, int results, int dilation) {
  if (dilation == 1) return tile * results;
  return tile / dilation * results * dilation + tile % dilation;
}

template <class T, int K, int S, bool gradient_of_stride>
__global__ void __launch_bounds__(depthwise_threads, 2) depthwise_nhwc(const DepthwiseParams p) {
  constexpr int V = nhwc_channels, TY = nhwc_y(K, S, gradient_of_stride), TX = nhwc_x(K, S);
  const int channels = static_cast<int>(p.channels), lanes = 1 << p.log_lanes, width = lanes * V;
  const int threads = static_cast<int>(blockDim.x);
  float* const filters = reinterpret_cast<float*>(shared_memory());  // [K K + 1][width], the bias last

  unsigned block = blockIdx.x;
  const int first_channel = static_cast<int>(block % static_cast<unsigned>(p.groups)) * width;
  block /= static_cast<unsigned>(p.groups);
  const int patch_x = static_cast<int>(block % static_cast<unsigned>(p.patches_x));
  block /= static_cast<unsigned>(p.patches_x);
  const int patch_y = static_cast<int>(block % static_cast<unsigned>(p.patches_y));
  block /= static_cast<unsigned>(p.patches_y);

  const T* const weight = static_cast<const T*>(p.weight);
  for (int i = static_cast<int>(threadIdx.x); i < width * K * K; i += threads) {
    const int channel = i / (K * K), tap = i % (K * K);
    filters[(p.turned ? K * K - 1 - tap : tap) * width + channel] =
        first_channel + channel < channels ? to_float(weight[static_cast<int64_t>(first_channel) * (K * K) + i]) : 0.f;
  }
  for (int i = static_cast<int>(threadIdx.x); i < width; i += threads)
    filters[K * K * width + i] = p.bias != nullptr && first_channel + i < channels
                                     ? to_float(static_cast<const T*>(p.bias)[first_channel + i])
                                     : 0.f;
  __syncthreads();

  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1), strand = static_cast<int>(threadIdx.x) >> p.log_lanes;
  const int tile_x = (patch_x << p.log_x) + (strand & ((1 << p.log_x) - 1));
  const int tile_y = (patch_y << p.log_y) + (strand >> p.log_x & ((1 << p.log_y) - 1));
  const int images = threads >> (p.log_lanes + p.log_x + p.log_y);
  const int64_t n = static_cast<int64_t>(block) * images + (strand >> (p.log_x + p.log_y));
  const int channel = first_channel + lane * V;
  if (channel >= channels || tile_x >= p.tiles_x || tile_y >= p.tiles_y || n >= p.batch) return;

  const int in_h = static_cast<int>(p.in_h), in_w = static_cast<int>(p.in_w);
  const int out_h = static_cast<int>(p.out_h), out_w = static_cast<int>(p.out_w);
  const int pad_y = static_cast<int>(p.pad_top), pad_x = static_cast<int>(p.pad_left);
  const int step_y = static_cast<int>(p.dilation_h), step_x = static_cast<int>(p.dilation_w);
  int y = tile_start(tile_y, TY, step_y), x = tile_start(tile_x, TX, step_x);
  int in_y, in_x;
  if (gradient_of_stride) {
    in_y = (y + pad_y - pad_y % S) / S - (K - 1) / S;
    in_x = (x + pad_x - pad_x % S) / S - (K - 1) / S;
    y -= pad_y % S;
    x -= pad_x % S;
  } else {
    in_y = y * S - pad_y;
    in_x = x * S - pad_x;
  }
  const T* const image = static_cast<const T*>(p.input) + n * in_h * in_w * channels + channel;
  PixelSource<T, V> source = {image, static_cast<int64_t>(in_w) * channels, in_h, in_w, channels, in_y, in_x, step_y,
                              step_x};
  const SharedFilter<K, V> shared = {filters + lane * V, width};

  float sum[TY * TX][V];
#pragma unroll
  for (int i = 0; i < TY * TX; ++i) load(sum[i], filters + K * K * width + lane * V);
  if constexpr (gradient_of_stride)
    spread<K, S, TY, TX, V>(sum, source, shared);
  else if constexpr (TY > 1)
    correlate<K, S, TY, TX, V>(sum, source, RegisterFilter<K, V>(shared));
  else
    correlate<K, S, TY, TX, V>(sum, source, shared);

  const int64_t origin = n * out_h * out_w * channels + channel;
  const auto inside = [&](int oy, int ox) { return oy >= 0 && oy < out_h && ox >= 0 && ox < out_w; };
  const auto offset = [&](int oy, int ox) { return origin + (static_cast<int64_t>(oy) * out_w + ox) * channels; };
  // The registers that 3 x 3 weights of f32 leave are for one.
  finish<sizeof(T) == 4 ? 1 : 4>(p, sum, [&](int i, float (&g)[V]) {
    const int oy = y + i / TX * step_y, ox = x + i % TX * step_x;
#pragma unroll
    for (int v = 0; v < V; ++v) g[v] = 0.f;
    if (inside(oy, ox)) load(g, static_cast<const T*>(p.gradient) + offset(oy, ox));
  });
#pragma unroll
  for (int i = 0; i < TY * TX; ++i) {
    const int oy = y + i / TX * step_y, ox = x + i % TX * step_x;
    if (inside(oy, ox)) store(static_cast<T*>(p.output) + offset(oy, ox), sum[i]);
  }
}

// ---- NCHW
// ------------------------------------------------------------------------------------------------------------

constexpr int nchw_y = 8;

template <class T, int K, int S, bool gradient_of_stride>
__global__ void __launch_bounds__(depthwise_threads, K == 7 ? 2 : 3) depthwise_nchw(const DepthwiseParams p) {
  constexpr int TY = nchw_y, TX = gradient_of_stride ? S : 1;
  const int in_h = static_cast<int>(p.in_h), in_w = static_cast<int>(p.in_w);
  const int out_h = static_cast<int>(p.out_h), out_w = static_cast<int>(p.out_w);
  const int pad_y = static_cast<int>(p.pad_top), pad_x = static_cast<int>(p.pad_left);
  const int step_y = static_cast<int>(p.dilation_h), step_x = static_cast<int>(p.dilation_w);
  float* const filters = reinterpret_cast<float*>(shared_memory());  // [planes][K K + 1], the bias last
  float* const rows = filters + (p.planes * (K * K + 1) + 3) / 4 * 4;

  const int64_t first_plane = static_cast<int64_t>(blockIdx.x / static_cast<unsigned>(p.bands)) * p.planes;
  const int band_start = static_cast<int>(blockIdx.x % static_cast<unsigned>(p.bands)) * p.band;
  const int64_t all_planes = p.batch * p.channels;
  const int planes = static_cast<int>(all_planes - first_plane < p.planes ? all_planes - first_plane : p.planes);

  for (int i = static_cast<int>(threadIdx.x); i < planes * (K * K + 1); i += depthwise_threads) {
    const int tap = i % (K * K + 1);
    const int64_t channel = (first_plane + i / (K * K + 1)) % p.channels;
    if (tap == K * K)
      filters[i] = p.bias == nullptr ? 0.f : to_float(static_cast<const T*>(p.bias)[channel]);
    else
      filters[i] = to_float(static_cast<const T*>(p.weight)[channel * (K * K) + (p.turned ? K * K - 1 - tap : tap)]);
  }
  // The rows of the planes that the band reads: one piece of memory, whatever the width.
  int low = 0, high = in_h;
  if (p.bands > 1) {
    const int first = gradient_of_stride ? (band_start + pad_y - pad_y % S) / S - (K - 1) / S : band_start * S - pad_y;
    const int behind = gradient_of_stride ? (band_start + p.band - 1 + pad_y - pad_y % S) / S + 1
                                          : (band_start + p.band - 1) * S - pad_y + (K - 1) * step_y + 1;
    low = first < 0 ? 0 : first > in_h ? in_h : first;
    high = behind < low ? low : behind > in_h ? in_h : behind;
  }
  const int64_t begin = (first_plane * in_h + low) * in_w, end = ((first_plane + planes - 1) * in_h + high) * in_w;
  const int64_t origin = begin - begin % widest<T>;
  if (begin < end) stage(rows, static_cast<const T*>(p.input), origin, end, p.vectors);
  __syncthreads();

  const int columns = p.tiles_x, tiles = p.band_tiles * columns;
  for (int i = static_cast<int>(threadIdx.x); i < tiles * planes; i += depthwise_threads) {
    const int plane = static_cast<int>(p.by_tiles.of(static_cast<uint32_t>(i)));
    const int tile = i - plane * tiles, row = static_cast<int>(p.by_columns.of(static_cast<uint32_t>(tile)));
    int y = band_start + tile_start(row, TY, step_y), x = (tile - row * columns) * TX;
    int in_y, in_x;
    if (gradient_of_stride) {
      in_y = (y + pad_y - pad_y % S) / S - (K - 1) / S;
      in_x = (x + pad_x - pad_x % S) / S - (K - 1) / S;
      y -= pad_y % S;
      x -= pad_x % S;
    } else {
      in_y = y * S - pad_y;
      in_x = x * S - pad_x;
    }
    const float* const plane_rows = rows + (begin - origin) + plane * in_h * in_w;  // planes of a block are small
    PlaneSource source = {plane_rows, low, in_h, in_w, in_y, in_x, step_y, step_x};
    const float* const filter = filters + plane * (K * K + 1);
    float sum[TY * TX][1];
#pragma unroll
    for (int j = 0; j < TY * TX; ++j) sum[j][0] = filter[K * K];
    const RegisterFilter<K, 1> weights(SharedFilter<K, 1>{filter, 1});
    if constexpr (gradient_of_stride)
      spread<K, S, TY, TX, 1>(sum, source, weights);
    else
      correlate<K, S, TY, TX, 1>(sum, source, weights);

    const int64_t out = (first_plane + plane) * out_h * out_w;
    const auto inside = [&](int oy, int ox) { return oy >= 0 && oy < out_h && ox >= 0 && ox < out_w; };
    const auto offset = [&](int oy, int ox) { return out + static_cast<int64_t>(oy) * out_w + ox; };
    finish<4>(p, sum, [&](int j, float (&g)[1]) {
      const int oy = y + j / TX * step_y, ox = x + j % TX;
      g[0] = inside(oy, ox) ? to_float(static_cast<const T*>(p.gradient)[offset(oy, ox)]) : 0.f;
    });
#pragma unroll
    for (int j = 0; j < TY * TX; ++j) {
      const int oy = y + j / TX * step_y, ox = x + j % TX;
      if (inside(oy, ox)) static_cast<T*>(p.output)[offset(oy, ox)] = from_float<T>(sum[j][0]);
    }
  }
}

}  // namespace cuda
}  // namespace fastsep
