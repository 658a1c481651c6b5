// Matrix products of the backward pass: out[part][m, n] = sum over r: A(m, r) B(n, r).
//
//                    A          B                     m      n       r
//   dt, nhwc         dv         W [k][i], across      pixel  i       k
//   dt, nchw         W, across  dv [k][pixel], across i      pixel   k         a part is an image
//   dW, nhwc         dv, across u [pixel][i], across  k      i       pixel     parts of all pixels
//   dW, nchw         dv         u [i][pixel]          k      i       pixel     parts of images
//
// An operand lies along the sum (r next to r) or across it (m next to m). dv = gradient * act'(saved), and u = act(t)
// where it is t that was kept, are made in shared memory and rounded there to the storage type, once.
//
// A block makes a tile of m x n. Chunks of 128 bytes of r come to shared memory by asynchronous copies, 16-bit elements
// as they lie, for ldmatrix turns those across the sum; f32 word by word, which turns it. Of two stages one is on its
// way during the products of the other, with one barrier a chunk: after it all is there, and nobody reads the stage
// that is filled next. `saved` needs one stage only: the thread that copied a vector of it is the one that reads it,
// before it asks for the next. 128 x 128: 64 sums a thread, 72 KB and 18 for `saved`.
//
// On the way out: dt is multiplied with mid_act'(z), for which z is read where dt is written; the sums of dv's rows,
// the parts of d bias, are one more product, in the blocks of the first columns.
#pragma once

#include "depthwise_weights.cuh"
#include "mma.cuh"

namespace fastsep {
namespace cuda {

// What is done to an operand before the product.
enum class Role { plain, gradient, activated };

struct Operand {
  const void* data;
  const void* saved;      // with a gradient; may be null where activation is the identity
  Activation activation;  // of the role; the identity: nothing is done
  int64_t pitch;          // from one m (n) to the next, or across from one r to the next
  int64_t image;          // from one image to the next
  bool wide;              // rows are whole vectors, aligned to 16 bytes
};

struct Product {
  Operand a, b;
  void* output;                       // of T, or of float in parts
  int64_t output_pitch, output_part;  // from one m, one part, to the next
  bool wide_output;                   // rows of the output are aligned to four elements
  Activation slope;                   // `output` holds z: the sums are multiplied with slope'(z)
  float* row_sums;                    // of A, in parts like the output's; may be null
  int64_t m, n, r, images;            // r of one image; n may be 0 where only the row sums are wanted
  int64_t chunks, part_size;          // chunks of one image; how many of all images' a part has
  int64_t tiles_m, tiles_n, parts;
};

template <int rows_, int columns_, int warps_m_, int warps_n_, int blocks_>
struct ProductTile {
  static constexpr int rows = rows_, columns = columns_, warps_m = warps_m_, warps_n = warps_n_, blocks = blocks_;
  static constexpr int threads = warps_m * warps_n * warp_size;
  static constexpr int warp_rows = rows / warps_m, warp_columns = columns / warps_n;
  static constexpr int staging_pitch = warp_columns + 4;
  static constexpr int stage_bytes = (rows + columns) * chunk_pitch, saved_bytes = rows * chunk_pitch;
  static constexpr int staging_bytes = warps_m * warps_n * block_rows * staging_pitch * 4;
  static_assert(rows == columns && staging_bytes <= 2 * stage_bytes, "room for either operand's saved, and the output");
};
using LargeProduct = ProductTile<128, 128, 4, 2, 2>;
using SmallProduct = ProductTile<64, 64, 2, 2, 4>;

// One operand of a tile in shared memory: [rows][chunk], or [chunk][rows] as it lies; and the units that are copied,
// of which thread i has those at i, i + threads, ...
template <class T, bool across, int rows>
struct Staged {
  static constexpr bool as_it_lies = across && sizeof(T) == 2, turned = across && sizeof(T) == 4;
  static constexpr int pitch = as_it_lies ? rows * static_cast<int>(sizeof(T)) + 16 : chunk_pitch;
  static constexpr int unit = turned ? 1 : widest<T>, units = rows * chunk<T> / unit;
  int row, r;

  __device__ __forceinline__ explicit Staged(int i) {
    if (turned) {  // 8 rows x 4 of r to a warp: sectors of 32 bytes are read, and 32 banks written
      row = i % 8 + i / 32 % (rows / 8) * 8;
      r = i / 8 % 4 + i / (4 * rows) * 4;
    } else if (as_it_lies) {
      row = i % (rows / unit) * unit;
      r = i / (rows / unit);
    } else {
      row = i / (chunk<T> / unit);
      r = i % (chunk<T> / unit) * unit;
    }
  }
  __device__ __forceinline__ int at() const {
    return as_it_lies ? r * pitch + row * static_cast<int>(sizeof(T)) : row * pitch + r * static_cast<int>(sizeof(T));
  }
  __device__ __forceinline__ int64_t from(int64_t operand_pitch) const {
    return across ? r * operand_pitch + row : row * operand_pitch + r;
  }
};

// Begins to copy the operand's chunk at data + offset, of which rows_left rows and `left` of r are there; zeros beyond.
template <class T, bool across, int rows, int threads>
__device__ __forceinline__ void copy_operand(char* to, const void* data, int64_t offset, const Operand& o,
                                             int rows_left, int left) {
  using S = Staged<T, across, rows>;
  const T* const tensor = static_cast<const T*>(data);
  const int thread = this_thread();
  // Single words are many: all their addresses at once would not find room beside the sums.
  [[maybe_unused]] constexpr int unrolled = S::turned ? 1 : S::units / threads;
#pragma unroll unrolled
  for (int i = 0; i < S::units / threads; ++i) {
    const S unit(thread + i * threads);
    const bool inside = unit.row < rows_left && unit.r < left;
    const T* const from = inside ? tensor + offset + unit.from(o.pitch) : tensor;
    if constexpr (S::unit == 1) {
      copy_async_word(to + unit.at(), from, inside);
    } else if (o.wide) {
      copy_async(to + unit.at(), from, inside);
    } else {
      float values[S::unit];
      load_first(values, from, !inside ? 0 : across ? rows_left - unit.row : left - unit.r);
      store(reinterpret_cast<T*>(to + unit.at()), values);
    }
  }
}

// g[i] = gradient[i] * act'(saved[i]).
template <int count>
__device__ __forceinline__ void multiply_slopes(Activation activation, float (&g)[count], const float (&z)[count]) {
  if (activation == Activation::relu || activation == Activation::relu6) {
    const float high = activation == Activation::relu6 ? 6.f : NAN;
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

// What the thread itself has copied becomes what the product takes.
template <Role role, class T, bool across, int rows, int threads>
__device__ __forceinline__ void prepare_operand(char* stage, const char* saved, const Operand& o) {
  using S = Staged<T, across, rows>;
  if (o.activation == Activation::identity) return;
#pragma unroll 1
  for (int i = this_thread(); i < S::units; i += threads) {
    const S unit(i);
    T* const at = reinterpret_cast<T*>(stage + unit.at());
    float values[S::unit];
    load(values, at);
    if constexpr (role == Role::gradient) {
      float z[S::unit];
      load(z, reinterpret_cast<const T*>(saved + unit.at()));
      multiply_slopes(o.activation, values, z);
    } else {
      float single[S::unit][1];
#pragma unroll
      for (int j = 0; j < S::unit; ++j) single[j][0] = values[j];
      rolled(single, [&](int, float (&value)[1]) { value[0] = activate_one(o.activation, value[0]); });
#pragma unroll
      for (int j = 0; j < S::unit; ++j) values[j] = single[j][0];
    }
    store(at, values);
  }
}

// One warp's sums to rows from m on and columns from n on, through shared memory, so that neighbouring lanes write
// neighbouring addresses. Several rows at a time: z of all of them is asked for before the first is used.
template <class Out, class Tile, class Sums>
__device__ __forceinline__ void write_product(const Product& p, const Sums& sums, float* staging, int64_t part_start,
                                              int64_t m, int64_t n, int lane) {
  constexpr int vector = 4, across_row = Tile::warp_columns / vector, rows_at_once = warp_size / across_row;
  constexpr int together = 4;
  static_assert(block_rows % (rows_at_once * together) == 0, "whole groups of rows");
  const int column = lane % across_row * vector;
  const int64_t first_n = n + column, valid = p.n - first_n;
  const bool wide = p.wide_output && valid >= vector;
  Out* const output = static_cast<Out*>(p.output) + part_start + first_n;
#pragma unroll
  for (int i = 0; i < Tile::warp_rows / block_rows; ++i) {
    sums.lay_out(staging, Tile::staging_pitch, i, lane);
    __syncwarp();
#pragma unroll 1
    for (int j = lane / across_row; j < block_rows; j += rows_at_once * together) {
      float values[together * vector];
      const int64_t to = m + i * block_rows + j;
#pragma unroll
      for (int t = 0; t < together; ++t) {
        float four[vector];
        load(four, staging + (j + t * rows_at_once) * Tile::staging_pitch + column);
#pragma unroll
        for (int v = 0; v < vector; ++v) values[t * vector + v] = four[v];
      }
      if (p.slope != Activation::identity) {
        float z[together * vector];
#pragma unroll
        for (int t = 0; t < together; ++t) {
          const int64_t row = to + t * rows_at_once;
          float four[vector] = {};
          if (row < p.m && wide)
            load(four, output + row * p.output_pitch);
          else if (row < p.m)
            load_first(four, output + row * p.output_pitch, valid);
#pragma unroll
          for (int v = 0; v < vector; ++v) z[t * vector + v] = four[v];
        }
        multiply_slopes(p.slope, values, z);
      }
#pragma unroll
      for (int t = 0; t < together; ++t) {
        const int64_t row = to + t * rows_at_once;
        if (row >= p.m || valid <= 0) continue;
        float four[vector];
#pragma unroll
        for (int v = 0; v < vector; ++v) four[v] = values[t * vector + v];
        if (wide)
          store(output + row * p.output_pitch, four);
        else
          store_first(output + row * p.output_pitch, four, valid);
      }
    }
    __syncwarp();
  }
}

template <class T, class Arithmetic, bool a_across, bool b_across, Role a_role, Role b_role, class Out, class Tile>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks) product(const Product p) {
  using OfA = Staged<T, a_across, Tile::rows>;
  using OfB = Staged<T, b_across, Tile::columns>;
  using Layout = LaidOut<OfA::as_it_lies, OfA::pitch, OfB::as_it_lies, OfB::pitch, true>;
  constexpr bool sums_rows = b_role == Role::activated;  // the product that is d pointwise_weight
  const int lane = static_cast<int>(threadIdx.x) % warp_size, warp = static_cast<int>(threadIdx.x) / warp_size;
  const int warp_m = warp % Tile::warps_m, warp_n = warp / Tile::warps_m;
  char* const ring = shared_memory();
  char* const saved = ring + 2 * Tile::stage_bytes;
  int64_t block = blockIdx.x;
  const int64_t row = divide(block, p.tiles_n);
  const int64_t n = (block - row * p.tiles_n) * Tile::columns;
  const int64_t part = divide(row, p.tiles_m), m = (row - part * p.tiles_m) * Tile::rows;
  const int rows_left = static_cast<int>(p.m - m < Tile::rows ? p.m - m : Tile::rows);
  const int columns_left = static_cast<int>(p.n - n < Tile::columns ? p.n - n : Tile::columns);

  WarpTile<Arithmetic, Tile::warp_rows, Tile::warp_columns> sums;
  sums.clear();
  RowSums<Arithmetic, Tile::warp_rows> row_sums;
  const bool with_row_sums = sums_rows && p.row_sums != nullptr && n == 0 && warp_n == 0;
  const int64_t all = p.images * p.chunks, begin = part * p.part_size;
  const int64_t end = begin + p.part_size < all ? begin + p.part_size : all;
  int64_t image = divide(begin, p.chunks), r = (begin - image * p.chunks) * chunk<T>;  // of the next chunk to copy
  const auto left_at = [&](int64_t at) { return static_cast<int>(p.r - at < chunk<T> ? p.r - at : chunk<T>); };
  const auto copy = [&](char* stage) {
    const int left = left_at(r);
    const int64_t a_offset = image * p.a.image + (a_across ? r * p.a.pitch + m : m * p.a.pitch + r);
    const int64_t b_offset = image * p.b.image + (b_across ? r * p.b.pitch + n : n * p.b.pitch + r);
    copy_operand<T, a_across, Tile::rows, Tile::threads>(stage, p.a.data, a_offset, p.a, rows_left, left);
    copy_operand<T, b_across, Tile::columns, Tile::threads>(stage + Tile::rows * chunk_pitch, p.b.data, b_offset, p.b,
                                                            columns_left, left);
    if (a_role == Role::gradient && p.a.activation != Activation::identity)
      copy_operand<T, a_across, Tile::rows, Tile::threads>(saved, p.a.saved, a_offset, p.a, rows_left, left);
    if (b_role == Role::gradient && p.b.activation != Activation::identity)
      copy_operand<T, b_across, Tile::columns, Tile::threads>(saved, p.b.saved, b_offset, p.b, columns_left, left);
    copy_commit();
    r += chunk<T>;
    if (r >= p.r) {
      r = 0;
      ++image;
    }
  };
  const int steps = static_cast<int>(end - begin);
  int bytes = left_at(r) * static_cast<int>(sizeof(T));
  if (steps > 0) copy(ring);
#pragma unroll 1
  for (int i = 0; i < steps; ++i) {
    char* const a = ring + i % 2 * Tile::stage_bytes;
    char* const b = a + Tile::rows * chunk_pitch;
    copy_wait<0>();
    if constexpr (a_role != Role::plain) prepare_operand<a_role, T, a_across, Tile::rows, Tile::threads>(a, saved, p.a);
    if constexpr (b_role != Role::plain)
      prepare_operand<b_role, T, b_across, Tile::columns, Tile::threads>(b, saved, p.b);
    __syncthreads();
    const int here = bytes;
    bytes = left_at(r) * static_cast<int>(sizeof(T));
    if (i + 1 < steps) copy(ring + (i + 1) % 2 * Tile::stage_bytes);
    const int a_first = warp_m * Tile::warp_rows * (OfA::as_it_lies ? static_cast<int>(sizeof(T)) : OfA::pitch);
    const int b_first = warp_n * Tile::warp_columns * (OfB::as_it_lies ? static_cast<int>(sizeof(T)) : OfB::pitch);
    sums.template add_laid_out<Layout>(a + a_first, b + b_first, (here + step_bytes - 1) / step_bytes, lane,
                                       [&](int j, const auto& of_a) {
                                         if (with_row_sums) row_sums.add(j, of_a);
                                       });
  }
  __syncthreads();
  if (with_row_sums)
    row_sums.write(lane, [&](int at, float sum) {
      const int64_t to = m + warp_m * Tile::warp_rows + at;
      if (to < p.m) p.row_sums[part * p.output_part + to] = sum;
    });
  float* const staging = reinterpret_cast<float*>(ring) + warp * block_rows * Tile::staging_pitch;
  write_product<Out, Tile>(p, sums, staging, part * p.output_part, m + warp_m * Tile::warp_rows,
                           n + warp_n * Tile::warp_columns, lane);
}

}  // namespace cuda
}  // namespace fastsep
