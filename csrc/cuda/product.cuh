// Matrix products of the backward pass: out[part][m, n] = sum over r: A(m, r) B(n, r).
//
//                    A          B                     m      n       r
//   dt, nhwc         dv         W [k][i], across      pixel  i       k
//   dt, nchw         W, across  dv [k][pixel], across i      pixel   k         a part is an image
//   dW, nhwc         dv, across u [pixel][i], across  k      i       pixel     parts of all pixels
//   dW, nchw         dv         u [i][pixel]          k      i       pixel     parts of images
//
// An operand lies along the sum (r next to r) or across it (m next to m). dv = gradient * act'(saved) is made where an
// operand is staged, and rounded there to the storage type (to tf32), once.
//
// A block makes a tile of m x n. For a chunk of 128 bytes of r it stages both operands in shared memory as WarpTile
// wants them, [m][chunk] and [n][chunk], turning those that lie across, and adds the products. 128 x 128: 64 sums a
// thread, 36 KB, so two blocks share a multiprocessor and one's reads run beside the other's products.
#pragma once

#include "depthwise_weights.cuh"
#include "mma.cuh"

namespace fastsep {
namespace cuda {

struct Operand {
  const void* data;
  const void* saved;  // with `data` a gradient; may be null where activation is the identity
  Activation activation;
  int64_t pitch;  // from one m (n) to the next, or across from one r to the next
  int64_t image;  // from one image to the next
  bool wide;      // rows are aligned to 16 bytes
};

struct Product {
  Operand a, b;
  void* output;                       // of T, or of float in parts
  int64_t output_pitch, output_part;  // from one m, one part, to the next
  bool wide_output;                   // rows of the output are aligned to four elements
  int64_t m, n, r, images;            // r of one image
  int64_t chunks, part_size;          // chunks of one image; how many of all images' a part has
  int64_t tiles_m, tiles_n, parts;
};

template <int rows_, int columns_, int warps_m_, int warps_n_, int blocks_>
struct ProductTile {
  static constexpr int rows = rows_, columns = columns_, warps_m = warps_m_, warps_n = warps_n_, blocks = blocks_;
  static constexpr int threads = warps_m * warps_n * warp_size;
  static constexpr int warp_rows = rows / warps_m, warp_columns = columns / warps_n;
  static constexpr int staging_pitch = warp_columns + 4;
  static constexpr int operand_bytes = (rows + columns) * chunk_pitch;
  static constexpr int staging_bytes = warps_m * warps_n * block_rows * staging_pitch * 4;
  static constexpr int shared_bytes = operand_bytes > staging_bytes ? operand_bytes : staging_bytes;
};
using LargeProduct = ProductTile<128, 128, 4, 2, 2>;
using SmallProduct = ProductTile<64, 64, 2, 2, 4>;

// g[i] = gradient[i] * act'(saved[i]).
template <int count>
__device__ __forceinline__ void multiply_slopes(Activation activation, float (&g)[count], const float (&z)[count]) {
  if (activation == Activation::relu || activation == Activation::relu6) {
    const float high = activation == Activation::relu6 ? 6.f : INFINITY;
#pragma unroll
    for (int i = 0; i < count; ++i) g[i] = z[i] <= 0.f || z[i] >= high ? 0.f : g[i];
    return;
  }
  float both[count][2];
#pragma unroll
  for (int i = 0; i < count; ++i) {
    both[i][0] = g[i];
    both[i][1] = z[i];
  }
  rolled(both, [&](int, float (&pair)[2]) { pair[0] = slope(activation, pair[0], pair[1]); });
#pragma unroll
  for (int i = 0; i < count; ++i) g[i] = both[i][0];
}

// `valid` elements from `offset` on, the rest 0, as the product takes them.
template <class T, class Arithmetic, bool slopes>
__device__ __forceinline__ void read_operand(float (&to)[widest<T>], const Operand& o, int64_t offset, int64_t valid) {
  const T* const data = static_cast<const T*>(o.data) + offset;
  if (o.wide && valid >= widest<T>)
    load(to, data);
  else
    load_first(to, data, valid);
  if (slopes && o.activation != Activation::identity) {
    const T* const saved = static_cast<const T*>(o.saved) + offset;
    float z[widest<T>];
    if (o.wide && valid >= widest<T>)
      load(z, saved);
    else
      load_first(z, saved, valid);
    multiply_slopes(o.activation, to, z);
  }
  if constexpr (std::is_same<Arithmetic, Tf32>::value) {
#pragma unroll
    for (int i = 0; i < widest<T>; ++i) to[i] = round_to_tf32(to[i]);
  }
}

// to[row][chunk] = operand(first + row, r ...); zeros beyond `count` rows and `left` elements of r.
template <class T, class Arithmetic, bool across, bool slopes, int rows, int threads>
__device__ __forceinline__ void stage_operand(char* to, const Operand& o, int64_t image, int64_t first, int64_t count,
                                              int64_t r, int64_t left) {
  constexpr int vector = widest<T>, vectors = chunk<T> / vector;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t base = image * o.image;
  if constexpr (!across) {
#pragma unroll 2
    for (int i = thread; i < rows * vectors; i += threads) {
      const int row = i / vectors, part = i % vectors * vector;
      float values[vector] = {};
      if (first + row < count && part < left)
        read_operand<T, Arithmetic, slopes>(values, o, base + (first + row) * o.pitch + r + part, left - part);
      store(reinterpret_cast<T*>(to + row * chunk_pitch) + part, values);
    }
  } else {
    // A thread has the elements of r that share a word, and turns a vector of each: so a warp's lanes write
    // neighbouring words of one row.
    constexpr int together = static_cast<int>(4 / sizeof(T)), words = chunk<T> / together;
#pragma unroll 2
    for (int i = thread; i < rows / vector * words; i += threads) {
      const int word = i % words, row = i / words * vector;
      float values[together][vector] = {};
#pragma unroll
      for (int j = 0; j < together; ++j)
        if (word * together + j < left && first + row < count)
          read_operand<T, Arithmetic, slopes>(values[j], o, base + (r + word * together + j) * o.pitch + first + row,
                                              count - first - row);
#pragma unroll
      for (int v = 0; v < vector; ++v) {
        float pair[together];
#pragma unroll
        for (int j = 0; j < together; ++j) pair[j] = values[j][v];
        store(reinterpret_cast<T*>(to + (row + v) * chunk_pitch) + word * together, pair);
      }
    }
  }
}

// a_slopes: A is dv, else B is.
template <class T, class Arithmetic, bool a_across, bool b_across, bool a_slopes, class Out, class Tile>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks) product(const Product p) {
  const int lane = static_cast<int>(threadIdx.x) % warp_size, warp = static_cast<int>(threadIdx.x) / warp_size;
  const int warp_m = warp % Tile::warps_m, warp_n = warp / Tile::warps_m;
  char* const a = shared_memory();
  char* const b = a + Tile::rows * chunk_pitch;
  int64_t block = blockIdx.x;
  const int64_t row = divide(block, p.tiles_n);
  const int64_t n = (block - row * p.tiles_n) * Tile::columns;
  const int64_t part = divide(row, p.tiles_m), m = (row - part * p.tiles_m) * Tile::rows;

  WarpTile<Arithmetic, Tile::warp_rows, Tile::warp_columns> sums;
  sums.clear();
  const int64_t all = p.images * p.chunks, begin = part * p.part_size;
  const int64_t end = begin + p.part_size < all ? begin + p.part_size : all;
  int64_t image = divide(begin, p.chunks), r = (begin - image * p.chunks) * chunk<T>;
#pragma unroll 1
  for (int steps = static_cast<int>(end - begin); steps > 0; --steps) {
    const int64_t left = p.r - r;
    stage_operand<T, Arithmetic, a_across, a_slopes, Tile::rows, Tile::threads>(a, p.a, image, m, p.m, r, left);
    stage_operand<T, Arithmetic, b_across, !a_slopes, Tile::columns, Tile::threads>(b, p.b, image, n, p.n, r, left);
    __syncthreads();
    const int bytes = left < chunk<T> ? static_cast<int>(left) * static_cast<int>(sizeof(T)) : chunk_bytes;
    sums.add(a + warp_m * Tile::warp_rows * chunk_pitch, b + warp_n * Tile::warp_columns * chunk_pitch,
             (bytes + step_bytes - 1) / step_bytes, lane);
    __syncthreads();
    r += chunk<T>;
    if (r >= p.r) {
      r = 0;
      ++image;
    }
  }

  // Through shared memory, so that neighbouring lanes store neighbouring addresses.
  constexpr int vector = 4, across_row = Tile::warp_columns / vector;
  float* const staging = reinterpret_cast<float*>(a) + warp * block_rows * Tile::staging_pitch;
  const int column = lane % across_row * vector;
  const int64_t first_n = n + warp_n * Tile::warp_columns + column;
  Out* const output = static_cast<Out*>(p.output) + part * p.output_part + first_n;
#pragma unroll
  for (int i = 0; i < Tile::warp_rows / block_rows; ++i) {
    sums.lay_out(staging, Tile::staging_pitch, i, lane);
    __syncwarp();
#pragma unroll 1
    for (int j = lane / across_row; j < block_rows; j += warp_size / across_row) {
      const int64_t to = m + warp_m * Tile::warp_rows + i * block_rows + j;
      if (to >= p.m || first_n >= p.n) continue;
      float values[vector];
      load(values, staging + j * Tile::staging_pitch + column);
      if (p.wide_output && first_n + vector <= p.n)
        store(output + to * p.output_pitch, values);
      else
        store_first(output + to * p.output_pitch, values, p.n - first_n);
    }
    __syncwarp();
  }
}

// ---- column sums
// -----------------------------------------------------------------------------------------------------

// d bias[k] = sum over pixels of dv[k]: parts, [parts][channels].
struct ColumnSums {
  const void *gradient, *saved;
  Activation activation;
  float* output;
  int64_t channels, plane, pixels, part_size, groups;
  int log_lanes;
  bool nhwc;
};

constexpr int column_threads = 256;

template <class T>
__global__ void __launch_bounds__(column_threads) column_sums(const ColumnSums p) {
  const int lanes = 1 << p.log_lanes, lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int strand = static_cast<int>(threadIdx.x) >> p.log_lanes, strands = column_threads >> p.log_lanes;
  const int64_t part = divide(blockIdx.x, p.groups), channel = (blockIdx.x - part * p.groups) * lanes + lane;
  const int64_t begin = part * p.part_size, end = begin + p.part_size < p.pixels ? begin + p.part_size : p.pixels;
  float sum[1][1] = {};
  if (channel < p.channels) {
#pragma unroll 4
    for (int64_t pixel = begin + strand; pixel < end; pixel += strands) {
      const int64_t n = p.nhwc ? 0 : divide(pixel, p.plane);
      const int64_t at =
          p.nhwc ? pixel * p.channels + channel : (n * p.channels + channel) * p.plane + pixel - n * p.plane;
      const float g = to_float(static_cast<const T*>(p.gradient)[at]);
      sum[0][0] += p.activation == Activation::identity
                       ? g
                       : slope(p.activation, g, to_float(static_cast<const T*>(p.saved)[at]));
    }
  }
  add_strands(sum, reinterpret_cast<float*>(shared_memory()), strand, strands, lane, lanes);
  if (strand == 0 && channel < p.channels) p.output[part * p.channels + channel] = sum[0][0];
}

}  // namespace cuda
}  // namespace fastsep
