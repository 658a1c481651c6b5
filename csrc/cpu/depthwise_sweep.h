// The sweep of sweep.h along channels, for channels-last.
#pragma once

#include "depthwise.h"
#include "sweep.h"

namespace fastsep {
namespace FASTSEP_ISA {
namespace {

// `rows` output rows, two or more, of Columns neighbouring pixels, `row` the first of them; whole vectors of channels.
// At most one row and one column of taps are outside the plane on each side; columns only with Border.
// 4 pixels: 12 sums + 9 weights + 6 inputs + 2 bounds are 29 registers; 6 loads for 36 FMAs.
template <class V, int Columns, bool Border>
FASTSEP_NOINLINE void channels_last_sweep(const ChannelsLastRow<typename V::T>& row, int64_t rows,
                                          int64_t output_row_stride) {
  using T = typename V::T;
  using Reg = typename V::Reg;
  constexpr int columns = Columns + sweep_taps - 1;
  const Reg low = V::set1(row.clamp.low), high = V::set1(row.clamp.high);
  const int is_bounded = has_high(row.clamp);
  const bool top_inside = row.top >= 0, bottom_inside = row.top + rows + 1 < row.height;
  const int left_inside = in_register(static_cast<int>(row.left >= 0));
  const int right_inside = in_register(static_cast<int>(row.left + columns <= row.width));
  const int64_t row_stride = row.row_stride, pixel_stride = row.pixel_stride, weight_stride = row.weight_stride;
  const int64_t output_stride = row.output_stride;
  const T* input = row.plane + row.top * row_stride + row.left * pixel_stride;
  const T *all_weights = row.weight, *start = row.start;
  T* output = row.output;
  for (int64_t channels = row.channels; channels >= V::width; channels -= V::width) {
    Reg weights[sweep_taps * sweep_taps], acc[3][Columns];
    // Pointers that walk, out of the compiler's sight: it would keep the offset of each step, more than there are
    // registers for.
    const T *weight = all_weights, *x[columns];
    T* place[Columns];
    FASTSEP_UNROLL
    for (int t = 0; t < sweep_taps * sweep_taps; ++t, weight = in_register(weight + weight_stride))
      weights[t] = V::load_at(weight);
    FASTSEP_UNROLL
    for (int j = 0; j < columns; ++j) x[j] = in_register(j == 0 ? input : x[j - 1] + pixel_stride);
    FASTSEP_UNROLL
    for (int p = 0; p < Columns; ++p) place[p] = in_register(p == 0 ? output : place[p - 1] + output_stride);

    sweep(rows, [&](auto turn, auto first, auto last) FASTSEP_INLINE_LAMBDA {
      if constexpr (first == 0) {
        // Loads, since copies of one register would take FMAs' turns.
        FASTSEP_UNROLL
        for (int p = 0; p < Columns; ++p, start = in_register(start)) acc[turn][p] = V::load_at(start);
      }
      const bool row_inside = (last > 0 || top_inside) && (first < 2 || bottom_inside);
      const auto inside = [&](int j) FASTSEP_INLINE_LAMBDA {
        return row_inside && (!Border || ((j > 0 || left_inside != 0) && (j < columns - 1 || right_inside != 0)));
      };
      Reg input[columns];
      FASTSEP_UNROLL
      for (int j = 0; j < columns; ++j) {
        input[j] = V::load_at(inside(j) ? x[j] : start);  // which is not used then
        x[j] = in_register(x[j] + row_stride);
      }
      FASTSEP_UNROLL
      for (int s = 0; s < sweep_taps; ++s) {
        FASTSEP_UNROLL
        for (int r = 0; r < sweep_taps; ++r) {
          if (r < first || r > last) continue;
          Reg* const sums = acc[(turn + 3 - r) % 3];
          FASTSEP_UNROLL
          for (int p = 0; p < Columns; ++p)
            if (inside(p + s)) sums[p] = V::fma(input[p + s], weights[r * sweep_taps + s], sums[p]);
        }
      }
      if constexpr (last == 2) {
        Reg* const sums = acc[(turn + 1) % 3];
        keep_below<V>(high, is_bounded, sums, Constant<Columns>());
        FASTSEP_UNROLL
        for (int p = 0; p < Columns; ++p) {
          V::store_at(place[p], V::max(low, sums[p]));
          place[p] = in_register(place[p] + output_row_stride);
        }
      }
    });
    input += V::width;
    all_weights += V::width;
    start += V::width;
    output += row.output_vector_stride;
  }
}

// Whether channels_last_rows() has something better for this problem than row after row.
template <class V>
bool takes_sweeps(const Problem& p) {
  return V::sweeps_channels_last && p.kernel_h == 3 && p.kernel_w == 3 && p.stride_h == 1 && p.stride_w == 1 &&
         p.dilation_h == 1 && p.dilation_w == 1;
}

// Columns that a sweep takes, and rows: 12, and the two above and below them, are 5.4 KB of cache lines for 4 columns.
constexpr int64_t least_sweep_columns = 3, most_sweep_columns = 4, most_sweep_rows = 12;

// How many of `left` rows the next sweep takes: as even as can be, since one alone is none.
inline int64_t next_sweep(int64_t left) {
  const int64_t sweeps = (left + most_sweep_rows - 1) / most_sweep_rows;
  return (left + sweeps - 1) / sweeps;
}

// Pixels in sweeps of 4 and 3; of 5 one is computed twice.
template <class V>
void channels_last_sweeps(const ChannelsLastRow<typename V::T>& row, int64_t rows, int64_t output_row_stride) {
  const int64_t pieces = (row.pixels + most_sweep_columns - 1) / most_sweep_columns;
  ChannelsLastRow<typename V::T> part = row;
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t from = cut(row.pixels, pieces, piece);
    const int64_t to = larger(cut(row.pixels, pieces, piece + 1), from + least_sweep_columns);
    part.left = row.left + from;
    part.output = row.output + from * row.output_stride;
    const bool border = part.left < 0 || part.left + (to - from) + sweep_taps - 1 > row.width;
    if (to - from == most_sweep_columns)
      border ? channels_last_sweep<V, 4, true>(part, rows, output_row_stride)
             : channels_last_sweep<V, 4, false>(part, rows, output_row_stride);
    else
      border ? channels_last_sweep<V, 3, true>(part, rows, output_row_stride)
             : channels_last_sweep<V, 3, false>(part, rows, output_row_stride);
  }
}

// A row that starts from a bias and, where takes_sweeps() says so, those below it.
template <class V, int Run>
void channels_last_rows(const ChannelsLastRow<typename V::T>& row, int64_t rows, int64_t output_row_stride) {
  int64_t count;
  for (int64_t begin = 0; begin < rows; begin += count) {
    count = next_sweep(rows - begin);
    ChannelsLastRow<typename V::T> part = row;
    part.top += begin;
    part.output += begin * output_row_stride;
    if constexpr (V::sweeps_channels_last) {
      if (count >= 2 && row.pixels >= least_sweep_columns && row.channels >= V::width && part.top >= -1 &&
          part.top + count + 1 <= row.height && row.left >= -1 && row.left + row.pixels + 1 <= row.width) {
        channels_last_sweeps<V>(part, count, output_row_stride);
        part = behind_whole_vectors<V>(part);
        if (part.channels == 0) continue;
      }
    }
    for (int64_t y = 0; y < count; ++y, ++part.top, part.output += output_row_stride) channels_last_row<V, Run>(part);
  }
}

}  // namespace
}  // namespace FASTSEP_ISA
}  // namespace fastsep
