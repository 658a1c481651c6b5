// The matrix product, once, on the vector type: one register tile of
//
//   C[i][j] = clamp(start + sum over k of A[i][k] * B[k][j]) + add[i][j],   i < Rows, j < Columns * width
//
// A is broadcast one element at a time, B is loaded in vectors, C has contiguous rows. The products of the
// forward and the backward pass are this one with other strides.
//
// Where an FMA can take its factor from any lane of a register, A is loaded in vectors too: along the rows where these
// are neighbours (RowStride 1), else along k.
//
// Half: no more than half of the last vector of each row counts, and where half an FMA takes half the time it is one:
// 24 columns are then 1.5 vectors of 16.
#pragma once

#include "activation.h"
#include "vector.h"

namespace fastsep {
namespace FASTSEP_ISA {
namespace {

template <class T>
struct Product {
  // A[i][k] for k = group * depth + block * block_depth + p stands at
  //   a[i * RowStride + (group * blocks + block) * a_block_stride + p * a_stride],
  // where the last block of each group may be shorter. RowStride is a constant, so that one pointer walks all rows. It
  // is 1, or a_stride is 1 and b_stride a panel; where it is V::width, so is block_depth.
  const T* a;
  int64_t groups, depth, block_depth;
  int64_t a_block_stride, a_stride;
  // B[k][j] at b[k * b_stride + j]
  const T* b;
  int64_t b_stride;
  // What the sums begin with: start[i * start_stride + j], a bias along the columns (stride 0), zeros, or what C holds;
  // or start[i] in every column, a bias along the rows.
  const T* start;
  int64_t start_stride;
  bool start_along_rows;
  Clamp<T> clamp;
  // C[i][j] at c[i * c_stride + j], j < column_count
  T* c;
  int64_t c_stride;
  int64_t column_count;
  bool c_is_near = false;  // in the first or second cache, and nothing is gained by asking for it ahead
  // As C, or null for none.
  const T* add = nullptr;
  // Memory that is read later and shall be in the second-level cache by then; null for none. With RowStride V::width
  // each block of A asks for half as many lines of it as it has elements. For each k that is 32 bytes in up to 28
  // cycles, about what memory gives: with more at a time the product's own loads would wait.
  const T* fetch = nullptr;
  static constexpr int64_t line = 64 / sizeof(T);

  int64_t blocks() const { return groups * ((depth + block_depth - 1) / block_depth); }

  // The share of tile i in `elements` from `next` on.
  void fetch_part(const T* next, int64_t elements, int64_t i) {
    const int64_t at = i * blocks() * ((block_depth + 1) / 2) * line;
    fetch = at < elements ? next + at : nullptr;
  }
};

// Whether A and B are asked for a block ahead, of the second cache, where both lie. 14 x 2 vectors of 64 bytes take 184
// bytes in 14 cycles of two FMAs, more than the hardware's own prefetching keeps up with: on a Xeon with 2 MB a tile of
// depth 736 went from 88 to 94 % of the peak, MobileNetV1 gained 1 % and Xception 5. Vectors of 32 bytes take half as
// many a cycle, and gained next to nothing.
template <class V, int RowStride>
constexpr bool asks_ahead = RowStride == V::width && sizeof(typename V::Reg) == 64;

template <int Elements, class T>
FASTSEP_INLINE void prefetch_lines(const T* p) {
  FASTSEP_UNROLL
  for (int i = 0; i < Elements; i += 64 / int(sizeof(T))) __builtin_prefetch(p + i);
}

template <class V, int Columns>
FASTSEP_INLINE void prefetch_to_write(const typename V::T* row) {
  FASTSEP_UNROLL
  for (int j = 0; j < Columns; ++j) __builtin_prefetch(row + j * V::width, 1);
}

// acc += A * B for Depth neighbouring k.
template <class V, int Rows, int Columns, int RowStride, int Depth, bool Half>
FASTSEP_INLINE void multiply_step(const typename V::T* a, int64_t a_stride, const typename V::T* b, int64_t b_stride,
                                  typename V::Reg (&acc)[Rows][Columns]) {
  using Reg = typename V::Reg;
  Reg b_row[Columns];
  // In the order of the source on ARM, whose small cores wait for a load where it stands.
  const auto load_row = [&](int k) FASTSEP_INLINE_LAMBDA {
    FASTSEP_UNROLL
    for (int j = 0; j < Columns; ++j) {
      b_row[j] = V::load(b + k * b_stride + j * V::width);
      if (V::has_fma_lane) b_row[j] = V::in_register(b_row[j]);
    }
  };
  if constexpr (V::has_fma_lane && RowStride == 1) {
    FASTSEP_UNROLL
    for (int k = 0; k < Depth; ++k, a = in_register(a + a_stride), b = in_register(b + b_stride)) {
      // The last vector moves back to end with the rows, where they are no fewer than a vector.
      constexpr int parts = (Rows + V::width - 1) / V::width, last = Rows < V::width ? 0 : Rows - V::width;
      load_row(0);
      Reg a_column[parts];
      FASTSEP_UNROLL
      for (int part = 0; part < parts - 1; ++part) a_column[part] = V::load(a + part * V::width);
      a_column[parts - 1] = V::load_n(a + last, Constant<Rows - last>());
      for_each_constant<Rows>([&](auto row) FASTSEP_INLINE_LAMBDA {
        constexpr int i = decltype(row)::value, part = i / V::width;
        constexpr int lane = part < parts - 1 ? i % V::width : i - last;
        FASTSEP_UNROLL
        for (int j = 0; j < Columns; ++j)
          acc[i][j] = V::fma_lane(b_row[j], a_column[part], Constant<lane>(), acc[i][j]);
      });
    }
  } else if constexpr (Depth > 1) {
    static_assert(Depth == V::width, "one vector of each row of A");
    Reg a_row[Rows];
    FASTSEP_UNROLL
    for (int i = 0; i < Rows; ++i) a_row[i] = V::load(a + i * RowStride);
    for_each_constant<Depth>([&](auto lane) FASTSEP_INLINE_LAMBDA {
      load_row(lane);
      FASTSEP_UNROLL
      for (int i = 0; i < Rows; ++i) {
        FASTSEP_UNROLL
        for (int j = 0; j < Columns; ++j) acc[i][j] = V::fma_lane(b_row[j], a_row[i], lane, acc[i][j]);
      }
    });
  } else {
    load_row(0);
    if constexpr (asks_ahead<V, RowStride>) prefetch_lines<Columns * V::width>(b + V::width * b_stride);
    FASTSEP_UNROLL
    for (int i = 0; i < Rows; ++i) {
      const Reg a_element = V::set1(a[i * RowStride]);
      FASTSEP_UNROLL
      for (int j = 0; j < Columns - Half; ++j) acc[i][j] = V::fma(a_element, b_row[j], acc[i][j]);
      if constexpr (Half) acc[i][Columns - 1] = V::fma_half(a_element, b_row[Columns - 1], acc[i][Columns - 1]);
    }
  }
}

template <class V, int Rows, int Columns, int RowStride, int Panel, bool Half>
FASTSEP_NOINLINE void multiply_tile(const Product<typename V::T>& product) {
  using T = typename V::T;
  using Reg = typename V::Reg;
  Reg acc[Rows][Columns];
  if (product.start_stride == 0 && !product.start_along_rows) {
    FASTSEP_UNROLL
    for (int j = 0; j < Columns; ++j) {
      acc[0][j] = V::load(product.start + j * V::width);
      FASTSEP_UNROLL
      for (int i = 1; i < Rows; ++i) acc[i][j] = acc[0][j];
    }
  } else {
    FASTSEP_UNROLL
    for (int i = 0; i < Rows; ++i) {
      FASTSEP_UNROLL
      for (int j = 0; j < Columns; ++j)
        acc[i][j] = product.start_along_rows ? V::set1(product.start[i])
                                             : V::load(product.start + i * product.start_stride + j * V::width);
    }
  }

  // C is asked for before it is written: at once or, where A and B are asked for too, some rows with each of their
  // blocks. 28 lines would keep those waiting, for a Xeon has 16 under way: its first blocks of MobileNetV1 gained 2 to
  // 7 %, and the whole network 1.
  const T* c_row = product.c;
  int c_rows = product.c_is_near ? 0 : Rows, c_rows_at_once = Rows;
  if constexpr (asks_ahead<V, RowStride>) {
    c_rows_at_once = static_cast<int>(Rows / larger<int64_t>(1, product.blocks())) + 1;
  } else if (c_rows > 0) {
    FASTSEP_UNROLL
    for (int i = 0; i < Rows; ++i) {
      prefetch_to_write<V, Columns>(c_row);
      c_row = in_register(c_row + product.c_stride);
    }
  }
  const T* b = product.b;
  const T* fetch = product.fetch;
  const T* a_block = product.a;
  const int64_t a_stride = RowStride == 1 ? product.a_stride : 1, b_stride = RowStride == 1 ? product.b_stride : Panel;
  constexpr int step = V::has_fma_lane ? V::width : 1;
  // Where a step is a whole block, the compiler shall see that it is the only one.
  const int64_t block_depth = step > 1 && RowStride == V::width ? V::width : product.block_depth;
  for (int64_t group = 0; group < product.groups; ++group) {
    for (int64_t left = product.depth; left > 0; left -= block_depth, a_block += product.a_block_stride) {
      const T* a = a_block;
      int64_t k = smaller(left, block_depth);
      if constexpr (asks_ahead<V, RowStride>) {
        prefetch_lines<Rows * V::width>(a + product.a_block_stride);
        for (int i = 0; i < c_rows_at_once && c_rows > 0; ++i, --c_rows, c_row += product.c_stride)
          prefetch_to_write<V, Columns>(c_row);
      }
      if (RowStride == V::width && fetch != nullptr) {
        FASTSEP_UNROLL
        for (int i = 0; i < (V::width + 1) / 2; ++i, fetch += product.line) __builtin_prefetch(fetch, 0, 2);
      }
      for (; k >= step; k -= step, a += step * a_stride, b += step * b_stride)
        multiply_step<V, Rows, Columns, RowStride, step, Half>(a, a_stride, b, b_stride, acc);
      for (; step > 1 && k > 0; --k, a += a_stride, b += b_stride)
        multiply_step<V, Rows, Columns, RowStride, 1, Half>(a, a_stride, b, b_stride, acc);
    }
  }

  // In registers, where no compiler has to ask whether a store may have changed them. And read anew: GCC would keep
  // what the prefetches have read, and have no register for the loop's own pointers.
  const Product<T>& end = *in_register(&product);
  const Reg low = V::set1(end.clamp.low), high = V::set1(end.clamp.high);
  const int64_t c_stride = end.c_stride, column_count = end.column_count;
  const T* const add = end.add;
  const auto finish = [&](auto is_whole, auto with_sum) FASTSEP_INLINE_LAMBDA {
    // One pointer that walks: left to itself, GCC computes the addresses of all rows first and keeps them on the stack.
    T* c = end.c;
    const T* summand = add;
    FASTSEP_UNROLL
    for (int i = 0; i < Rows; ++i) {
      FASTSEP_UNROLL
      for (int j = 0; j < Columns; ++j) {
        Reg value = V::min(high, V::max(low, acc[i][j]));
        if constexpr (decltype(is_whole)::value != 0) {
          if constexpr (decltype(with_sum)::value != 0) value = V::add(value, V::load(summand + j * V::width));
          V::store(c + j * V::width, value);
        } else {
          const auto lanes = static_cast<int>(smaller<int64_t>(V::width, column_count - j * V::width));
          if (lanes <= 0) break;
          if constexpr (decltype(with_sum)::value != 0) value = V::add(value, V::load_n(summand + j * V::width, lanes));
          V::store_n(c + j * V::width, value, lanes);
        }
      }
      c = in_register(c + c_stride);
      if constexpr (decltype(with_sum)::value != 0) summand = in_register(summand + c_stride);
    }
  };
  if (column_count < Columns * V::width)
    add == nullptr ? finish(Constant<0>(), Constant<0>()) : finish(Constant<0>(), Constant<1>());
  else
    add == nullptr ? finish(Constant<1>(), Constant<0>()) : finish(Constant<1>(), Constant<1>());
}

// The tile with as many rows and columns as the end of a plane or panel leaves.
template <class V, int Rows, int Columns, int RowStride, int Panel = Columns * V::width>
void multiply(const Product<typename V::T>& product, int64_t rows, int64_t columns) {
  if constexpr (Columns > 1) {
    if (columns <= (Columns - 1) * V::width)
      return multiply<V, Rows, Columns - 1, RowStride, Panel>(product, rows, columns);
  }
  if constexpr (Rows > 1) {
    if (rows < Rows) return multiply<V, Rows - 1, Columns, RowStride, Panel>(product, rows, columns);
  }
  if constexpr (V::has_half_fma && RowStride == V::width) {
    if (columns <= Columns * V::width - V::width / 2)
      return multiply_tile<V, Rows, Columns, RowStride, Panel, true>(product);
  }
  multiply_tile<V, Rows, Columns, RowStride, Panel, false>(product);
}

// In blocks of Block x Block, which neither side is shorter than; the last ones move back to end with the matrix.
// Sixteen columns at a time, so that cache lines of `from` are used whole and those of `to` stay until they are full.
template <class V, int Block>
void transpose_blocks(const typename V::T* from, int64_t rows, int64_t columns, int64_t from_stride, typename V::T* to,
                      int64_t to_stride) {
  constexpr int64_t strip = 16;
  for (int64_t begin = 0; begin < columns; begin += strip) {
    const int64_t end = smaller(begin + strip, columns);
    for (int64_t next_k = 0; next_k < rows; next_k += Block) {
      const int64_t k = smaller(next_k, rows - Block);
      for (int64_t next_i = begin; next_i < end; next_i += Block) {
        const int64_t i = smaller(next_i, columns - Block);
        V::transpose(from + k * from_stride + i, from_stride, to + i * to_stride + k, to_stride, Constant<Block>());
      }
    }
  }
}

// to[i * to_stride + k] = from[k * from_stride + i] for k < rows, i < columns.
template <class V>
void transpose(const typename V::T* from, int64_t rows, int64_t columns, int64_t from_stride, typename V::T* to,
               int64_t to_stride) {
  const int64_t side = smaller(rows, columns);
  if (side >= V::block) return transpose_blocks<V, V::block>(from, rows, columns, from_stride, to, to_stride);
  if (side >= 4) return transpose_blocks<V, 4>(from, rows, columns, from_stride, to, to_stride);
  for (int64_t k = 0; k < rows; ++k)
    for (int64_t i = 0; i < columns; ++i) to[i * to_stride + k] = from[k * from_stride + i];
}

}  // namespace
}  // namespace FASTSEP_ISA
}  // namespace fastsep
