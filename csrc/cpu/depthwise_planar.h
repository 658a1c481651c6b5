// The depthwise tile along pixels, for NCHW: see depthwise.h, which has the formula.
#pragma once

#include "activation.h"
#include "sweep.h"
#include "vector.h"

namespace fastsep {
namespace FASTSEP_ISA {
namespace {

// One channel of a tile. Its input rows have been copied into rows of zeros as wide as the padding asks, the columns
// of each sorted by their remainder modulo stride_w, so that every tap of every stride is a plain unit-stride run:
// output column ox, tap s stands at row[tap_offset(s) + ox]. Rows outside the plane are one row of zeros.
template <class T>
struct PlanarChannel {
  const T* const* rows;  // one pointer for each input row of the tile, from the first tap of the first output row
  const T* copies;       // the same rows one behind the other, where stride_h and dilation_h are 1: those outside the
  int64_t copy_stride;   // plane are zeros there too
  int64_t stride_h, dilation_h;
  int64_t taps_h, taps_w;
  const int64_t* tap_offset;  // [taps_w]
  const T* weight;            // [taps_h][taps_w]
  const T* start;             // the bias, a vector of it
  Clamp<T> clamp;
  T* output;  // output row y at output + y * output_stride; may run over its end by one vector
  int64_t output_stride, out_rows, columns;
};

// Output rows at a time, but for sweeps. Where there are registers for it seven, which divides the heights of most
// networks' planes: 7 x 2 sums + 9 weights + 2 inputs are 25, and 9 x 3 x 2 loads serve 126 FMAs, 0.43 each, instead of
// 0.5. For 7 x 7 four as elsewhere: GCC would keep some sums in memory, and on AVX-512 take 1.5 times as long.
template <class V, int Taps>
constexpr int planar_block = V::large_planar_tiles && Taps < 7 ? 7 : 4;

// The output rows whose input is read for `rows` of them.
template <class V>
int64_t planar_rows_read(int64_t rows) {
  return larger(round_up(rows, planar_block<V, 0>), round_up(rows, planar_block<V, 7>));
}

// Some output rows of Vectors vectors at a time, so that a weight, and for Taps x Taps with vertical stride StrideH and
// no dilation also an input vector, is loaded once for several FMAs. Four rows, 3 x 3, stride 1: nine weights resident,
// 6 rows x 3 loads for 36 FMAs; 4 sums + 9 weights + 1 input are 14 registers. Larger kernels keep their broadcast
// weights in memory: with 2 vectors, 7 x 7 has 49 x 4 weight loads and 10 x 7 x 2 unaligned input loads for 392 FMAs.
// Taps = 0: any kernel.
template <class V, int Taps, int StrideH, int Vectors>
FASTSEP_NOINLINE void planar_rows(const PlanarChannel<typename V::T>& channel) {
  using T = typename V::T;
  using Reg = typename V::Reg;
  constexpr int block = planar_block<V, Taps>, span = Vectors * V::width;
  const Reg low = V::set1(channel.clamp.low), high = V::set1(channel.clamp.high);
  const int is_bounded = has_high(channel.clamp);
  constexpr int known = Taps > 0 ? Taps * Taps : 1;
  Reg weights[known];
  FASTSEP_UNROLL
  for (int i = 0; i < known; ++i) weights[i] = V::set1(channel.weight[i]);
  int64_t offsets[Taps > 0 ? Taps : 1];
  for (int s = 0; s < Taps; ++s) offsets[s] = channel.tap_offset[s];
  const int64_t output_stride = channel.output_stride, columns = channel.columns;
  const T* start = channel.start;
  for (int64_t y = 0; y < channel.out_rows; y += block) {
    const T* const* rows = in_register(channel.rows + y * channel.stride_h);
    T* const output_rows = channel.output + y * output_stride;
    const int64_t count = smaller<int64_t>(block, channel.out_rows - y);
    for (int64_t next = 0; next < columns; next += span) {
      // The last vectors of a row move back to end with it. Where a row is shorter than that, what is stored behind its
      // end is overwritten by the next row.
      const int64_t x = larger<int64_t>(0, smaller(next, columns - span));
      Reg acc[block][Vectors];
      // Loads, since copies of one register would take FMAs' turns. The pointer goes on through all rounds out of the
      // compiler's sight, or there would be a register with the same address for each.
      FASTSEP_UNROLL
      for (int b = 0; b < block; ++b) {
        FASTSEP_UNROLL
        for (int v = 0; v < Vectors; ++v, start = in_register(start)) acc[b][v] = V::load(start);
      }
      if constexpr (Taps > 0) {
        constexpr int input_rows = (block - 1) * StrideH + Taps;
        int64_t at[Taps];
        FASTSEP_UNROLL
        for (int s = 0; s < Taps; ++s) at[s] = in_register((x + offsets[s]) * int64_t(sizeof(T)));
        FASTSEP_UNROLL
        for (int i = 0; i < input_rows; ++i) {
          FASTSEP_UNROLL
          for (int s = 0; s < Taps; ++s) {
            const T* place = bytes_on(rows[i], at[s]);
            if (Vectors > 1) place = in_register(place);  // ARM loads a pair from an address without an index only
            Reg input[Vectors];
            FASTSEP_UNROLL
            for (int v = 0; v < Vectors; ++v) input[v] = V::in_register(V::load(place + v * V::width));
            FASTSEP_UNROLL
            for (int b = 0; b < block; ++b) {
              const int r = i - b * StrideH;
              if (r < 0 || r >= Taps) continue;
              FASTSEP_UNROLL
              for (int v = 0; v < Vectors; ++v) acc[b][v] = V::fma(input[v], weights[r * Taps + s], acc[b][v]);
            }
          }
        }
      } else {
        const T* weight = channel.weight;
        for (int64_t r = 0; r < channel.taps_h; ++r) {
          const T* const* tap_rows = rows + r * channel.dilation_h;
          for (int64_t s = 0; s < channel.taps_w; ++s, ++weight) {
            const Reg w = V::set1(*weight);
            FASTSEP_UNROLL
            for (int b = 0; b < block; ++b) {
              const T* place = tap_rows[b * channel.stride_h] + channel.tap_offset[s] + x;
              FASTSEP_UNROLL
              for (int v = 0; v < Vectors; ++v) acc[b][v] = V::fma(V::load(place + v * V::width), w, acc[b][v]);
            }
          }
        }
      }
      keep_below<V>(high, is_bounded, acc[0], Constant<block * Vectors>());
      const auto store_rows = [&](auto rows_of_block) FASTSEP_INLINE_LAMBDA {
        T* output = in_register(output_rows + x);
        FASTSEP_UNROLL
        for (int b = 0; b < block; ++b, output = in_register(output + output_stride)) {
          if (b >= rows_of_block) break;
          FASTSEP_UNROLL
          for (int v = 0; v < Vectors; ++v) V::store(output + v * V::width, V::max(low, acc[b][v]));
        }
      };
      if (count == block)
        store_rows(Constant<block>());
      else
        store_rows(count);
    }
  }
}

// 3 x 3 without stride or dilation, two output rows or more: Vectors vectors of their columns from `begin` on.
// 4 vectors: 12 sums + 9 weights + 4 inputs + 2 bounds are 27 registers; 12 loads for 36 FMAs.
template <class V, int Vectors>
FASTSEP_NOINLINE void planar_sweep(const PlanarChannel<typename V::T>& channel, int64_t begin) {
  using T = typename V::T;
  using Reg = typename V::Reg;
  const Reg low = V::set1(channel.clamp.low), high = V::set1(channel.clamp.high);
  const int is_bounded = has_high(channel.clamp);
  const int64_t copy_stride = channel.copy_stride, output_stride = channel.output_stride;
  const T *x = channel.copies + begin, *start = channel.start;
  T* output = channel.output + begin;
  Reg weights[sweep_taps * sweep_taps], acc[3][Vectors];
  FASTSEP_UNROLL
  for (int i = 0; i < sweep_taps * sweep_taps; ++i) weights[i] = V::set1(channel.weight[i]);
  sweep(channel.out_rows, [&](auto turn, auto first, auto last) FASTSEP_INLINE_LAMBDA {
    if constexpr (first == 0) {
      // Loads, since copies of one register would take FMAs' turns.
      FASTSEP_UNROLL
      for (int v = 0; v < Vectors; ++v, start = in_register(start)) acc[turn][v] = V::load_at(start);
    }
    for_each_constant<sweep_taps>([&](auto s) FASTSEP_INLINE_LAMBDA {
      Reg input[Vectors];
      const auto load = [&](auto v) FASTSEP_INLINE_LAMBDA { input[v] = V::load_at(x, Constant<s + v * V::width>()); };
      for_each_constant<Vectors>(load);
      FASTSEP_UNROLL
      for (int r = 0; r < sweep_taps; ++r) {
        if (r < first || r > last) continue;
        Reg* const sums = acc[(turn + 3 - r) % 3];
        FASTSEP_UNROLL
        for (int v = 0; v < Vectors; ++v) sums[v] = V::fma(input[v], weights[r * sweep_taps + s], sums[v]);
      }
    });
    x = in_register(x + copy_stride);
    if constexpr (last == 2) {
      Reg* const sums = acc[(turn + 1) % 3];
      keep_below<V>(high, is_bounded, sums, Constant<Vectors>());
      FASTSEP_UNROLL
      for (int v = 0; v < Vectors; ++v)
        V::store_at(v == 0 ? output : in_register(output + v * V::width), V::max(low, sums[v]));
      output = in_register(output + output_stride);
    }
  });
}

// Whether planar_sweeps() takes this channel. Two vectors or more, so that sweeps are not too narrow.
template <class V>
bool takes_planar_sweeps(const PlanarChannel<typename V::T>& channel) {
  const bool plain = channel.taps_h == 3 && channel.taps_w == 3 && channel.stride_h == 1 && channel.dilation_h == 1 &&
                     channel.tap_offset[1] == 1 && channel.tap_offset[2] == 2;
  const bool ends_with_row = channel.columns >= 4 * V::width || channel.columns % V::width == 0;
  return plain && channel.out_rows >= 2 && channel.columns > V::width &&
         (ends_with_row || channel.output_stride == channel.columns);
}

// A row in sweeps of 2 to 4 vectors. The last moves back to end with it; but where there is but one, what that stores
// behind the end is overwritten by the next row.
template <class V>
void planar_sweeps(const PlanarChannel<typename V::T>& channel) {
  const int64_t vectors = (channel.columns + V::width - 1) / V::width, pieces = (vectors + 3) / 4;
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t first = cut(vectors, pieces, piece), count = cut(vectors, pieces, piece + 1) - first;
    const int64_t begin = larger<int64_t>(0, smaller(first * V::width, channel.columns - count * V::width));
    if (count == 4)
      planar_sweep<V, 4>(channel, begin);
    else if (count == 3)
      planar_sweep<V, 3>(channel, begin);
    else
      planar_sweep<V, 2>(channel, begin);
  }
}

// The same with every tap tested against the plane: for weights that are not finite, which zeros would turn into NaN.
template <class T>
FASTSEP_NOINLINE void planar_depthwise_inside(const PlanarChannel<T>& channel, const T* zeros, int64_t left,
                                              int64_t width, int64_t stride_w, int64_t dilation_w) {
  for (int64_t y = 0; y < channel.out_rows; ++y) {
    for (int64_t x = 0; x < channel.columns; ++x) {
      T sum = *channel.start;
      for (int64_t r = 0; r < channel.taps_h; ++r) {
        const T* row = channel.rows[y * channel.stride_h + r * channel.dilation_h];
        for (int64_t s = 0; s < channel.taps_w; ++s) {
          const int64_t column = left + x * stride_w + s * dilation_w;
          if (row == zeros || column < 0 || column >= width) continue;
          sum += row[channel.tap_offset[s] + x] * channel.weight[r * channel.taps_w + s];
        }
      }
      if (sum < channel.clamp.low) sum = channel.clamp.low;
      if (sum > channel.clamp.high) sum = channel.clamp.high;
      channel.output[y * channel.output_stride + x] = sum;
    }
  }
}

// Two vectors where a row has them, or more than one and the next row comes behind it; but for 3 x 3, whose resident
// weights leave no registers for it on AVX2, not everywhere.
template <class V, int Taps, int StrideH>
void planar_rows_for(const PlanarChannel<typename V::T>& channel) {
  const bool has_two = channel.columns >= 2 * V::width;
  const bool may_overrun = channel.columns > V::width && channel.output_stride == channel.columns;
  if ((Taps != 3 || V::large_planar_tiles) && (has_two || may_overrun))
    return planar_rows<V, Taps, StrideH, 2>(channel);
  planar_rows<V, Taps, StrideH, 1>(channel);
}

template <class V>
void planar_depthwise(const PlanarChannel<typename V::T>& channel) {
  if constexpr (V::large_planar_tiles) {
    if (takes_planar_sweeps<V>(channel)) return planar_sweeps<V>(channel);
  }
  if (channel.taps_h == channel.taps_w && channel.dilation_h == 1) {
    if (channel.stride_h == 1) {
      if (channel.taps_h == 3) return planar_rows_for<V, 3, 1>(channel);
      if (channel.taps_h == 5) return planar_rows_for<V, 5, 1>(channel);
      if (channel.taps_h == 7) return planar_rows_for<V, 7, 1>(channel);
    }
    if (channel.stride_h == 2 && channel.taps_h == 3) return planar_rows_for<V, 3, 2>(channel);
  }
  planar_rows_for<V, 0, 0>(channel);
}

}  // namespace
}  // namespace FASTSEP_ISA
}  // namespace fastsep
