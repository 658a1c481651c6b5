// The depthwise tile, once, on the vector type: along channels for channels-last, along pixels for NCHW.
//
//   t[c][oy][ox] = clamp(bias[c] + sum over r, s of
//                        x[c][oy*stride_h - pad_top + r*dilation_h][ox*stride_w - pad_left + s*dilation_w] *
//                        w[c][r][s])
//
// Both add the taps in the order (r, s), so a pixel's value does not depend on the tile that it falls in.
#pragma once

#include "../fastsep.h"
#include "activation.h"
#include "vector.h"

namespace fastsep {
namespace FASTSEP_ISA {
namespace {

// ---- channels-last ------------------------------------------------------------------------------------------------

// Some channels of a channels-last plane, and the taps that look at it.
template <class T>
struct Window {
  const T* plane;
  int64_t height, width;
  int64_t row_stride, pixel_stride;  // elements from one row or pixel of the plane to the next
  int64_t channels;
  int64_t taps_h, taps_w, stride_w, dilation_h, dilation_w;
};

template <class T>
Window<T> window_of(const Problem& p, const T* plane, int64_t row_stride, int64_t pixel_stride, int64_t channels) {
  return {plane,      p.height,   p.width,    row_stride,   pixel_stride, channels,
          p.kernel_h, p.kernel_w, p.stride_w, p.dilation_h, p.dilation_w};
}

// Output pixels of one row, one filter per channel.
//
//   output[p][c] = clamp(start[p][c] + sum over r, s of plane[top + r*dilation_h][left + p*stride_w + s*dilation_w][c]
//   *
//                                                       weight[r][s][c])
template <class T>
struct ChannelsLastRow : Window<T> {
  explicit ChannelsLastRow(const Window<T>& window) : Window<T>(window) {}
  int64_t top, left;
  int64_t pixels;
  const T* weight;  // tap t, channel c at weight[t * weight_stride + c], with whole vectors behind the last channel
  int64_t weight_stride;
  const T* start;  // a bias (stride 0), or what the output has already
  int64_t start_stride;
  Clamp<T> clamp;
  T* output;  // pixel p, channel vector v at output + p * output_stride + v * output_vector_stride
  int64_t output_stride, output_vector_stride;
  bool whole_vectors;  // of the output may be written, also behind the last channel
};

// A part of such a row: up to Run neighbouring pixels, with the taps of rows inside the plane only.
template <class T>
struct ChannelsLastRun {
  const T* input;  // pixel (first valid input row, column of the first pixel's first tap); may lie left of the row
  int64_t input_row_stride;  // elements from one tap's row to the next
  int64_t input_stride;      // and between neighbouring pixels
  int64_t channels;
  int64_t column_begin;    // first column inside the plane, counted from `input`
  int64_t column_end;      // one behind the last
  int64_t taps_h, taps_w;  // taps_h: those inside the plane
  int64_t stride_w, dilation_w;
  const T* weight;  // [taps_h][taps_w][weight_stride]
  int64_t weight_stride;
  const T* start;
  int64_t start_stride;
  Clamp<T> clamp;
  T* output;
  int64_t output_stride, output_vector_stride;
  bool whole_vectors;
  int pixels;
};

// One vector of channels.
// Taps > 0: taps_w = Taps, stride_w = Stride and no dilation; every input vector is loaded once per row of taps and
// used by all the pixels that it belongs to. 3 taps, stride 1, 7 pixels: 9 + 3 loads for 21 FMAs.
// Taps = 0: any number of taps, stride and dilation; one load for each FMA, the weight shared by the run.
template <class V, int Run, int Taps, int Stride, bool Border, class Count>
FASTSEP_INLINE void channels_last_vector(const ChannelsLastRun<typename V::T>& run, int64_t channel, Count lanes) {
  using T = typename V::T;
  using Reg = typename V::Reg;
  Reg acc[Run];
  acc[0] = V::load_n(run.start + channel, lanes);
  FASTSEP_UNROLL
  for (int p = 1; p < Run; ++p) acc[p] = acc[0];
  if (run.start_stride != 0) {
    FASTSEP_UNROLL
    for (int p = 1; p < Run; ++p)
      if (!Border || p < run.pixels) acc[p] = V::load_n(run.start + channel + p * run.start_stride, lanes);
  }
  const T* input_row = run.input + channel;
  const T* weight = run.weight + channel;
  // In registers, where no compiler has to ask whether a store may have changed them.
  const int64_t output_stride = run.output_stride;
  const int64_t column_begin = run.column_begin, column_end = run.column_end;
  const auto outside = [&](int64_t column) { return column < column_begin || column >= column_end; };

  for (int64_t r = 0; r < run.taps_h; ++r, input_row += run.input_row_stride) {
    if constexpr (Taps > 0) {
      constexpr int columns = (Run - 1) * Stride + Taps;
      Reg w[Taps];
      FASTSEP_UNROLL
      for (int s = 0; s < Taps; ++s, weight += run.weight_stride) w[s] = V::load(weight);
      FASTSEP_UNROLL
      for (int column = 0; column < columns; ++column) {
        if (Border && outside(column)) continue;
        const Reg x = V::in_register(V::load_n(input_row + column * run.input_stride, lanes));
        FASTSEP_UNROLL
        for (int s = Taps - 1; s >= 0; --s) {
          const int offset = column - s;
          if (offset >= 0 && offset % Stride == 0 && offset / Stride < Run)
            acc[offset / Stride] = V::fma(x, w[s], acc[offset / Stride]);
        }
      }
    } else {
      for (int64_t s = 0; s < run.taps_w; ++s, weight += run.weight_stride) {
        const Reg w = V::load(weight);
        FASTSEP_UNROLL
        for (int p = 0; p < Run; ++p) {
          const int64_t column = p * run.stride_w + s * run.dilation_w;
          if (Border && (p >= run.pixels || outside(column))) continue;
          acc[p] = V::fma(V::load_n(input_row + column * run.input_stride, lanes), w, acc[p]);
        }
      }
    }
  }

  const Reg low = V::set1(run.clamp.low), high = V::set1(run.clamp.high);
  T* output = run.output + channel / V::width * run.output_vector_stride;
  const int pixels = run.pixels;
  const bool whole_vectors = run.whole_vectors;
  FASTSEP_UNROLL
  for (int p = 0; p < Run; ++p) {
    const Reg value = V::min(high, V::max(low, acc[p]));
    if (Border && p >= pixels) break;
    if (whole_vectors)
      V::store(output + p * output_stride, value);
    else
      V::store_n(output + p * output_stride, value, lanes);
  }
}

template <class V, int Run, int Taps, int Stride>
FASTSEP_NOINLINE void channels_last_run(const ChannelsLastRun<typename V::T>& run) {
  const int64_t needed = (Run - 1) * run.stride_w + (run.taps_w - 1) * run.dilation_w + 1;
  const bool border = run.pixels < Run || run.column_begin > 0 || run.column_end < needed;
  const auto vector = [&](auto is_border, int64_t channel, auto lanes) FASTSEP_INLINE_LAMBDA {
    channels_last_vector<V, Run, Taps, Stride, decltype(is_border)::value != 0>(run, channel, lanes);
  };
  int64_t channel = 0;
  if (border) {
    for (; channel + V::width <= run.channels; channel += V::width)
      vector(Constant<1>(), channel, Constant<V::width>());
  } else {
    for (; channel + V::width <= run.channels; channel += V::width)
      vector(Constant<0>(), channel, Constant<V::width>());
  }
  if (channel < run.channels) vector(Constant<1>(), channel, static_cast<int>(run.channels - channel));
}

// The variants that are worth their code: measured on benchmarks/shapes, see CONTRIBUTING.md.
template <class V, int Run>
void channels_last_depthwise(const ChannelsLastRun<typename V::T>& run) {
  if (run.dilation_w == 1 && run.stride_w == 1) {
    if (run.taps_w == 1) return channels_last_run<V, Run, 1, 1>(run);
    if (run.taps_w == 2) return channels_last_run<V, Run, 2, 1>(run);
    if (run.taps_w == 3) return channels_last_run<V, Run, 3, 1>(run);
    if (run.taps_w == 5) return channels_last_run<V, Run, 5, 1>(run);
    if (run.taps_w == 7) return channels_last_run<V, Run, 7, 1>(run);
  }
  if (run.dilation_w == 1 && run.stride_w == 2 && run.taps_w == 3) return channels_last_run<V, Run, 3, 2>(run);
  channels_last_run<V, Run, 0, 0>(run);
}

// A row whose taps are neighbours, or whose pixels do not share any.
template <class V, int Run>
void channels_last_pieces(const ChannelsLastRow<typename V::T>& row) {
  // The taps inside the plane: top + r * dilation_h from 0 to height - 1.
  const int64_t first = row.top < 0 ? smaller((-row.top + row.dilation_h - 1) / row.dilation_h, row.taps_h) : 0;
  const int64_t below = row.height - row.top;
  const int64_t last = below <= 0 ? first : smaller(row.taps_h, (below + row.dilation_h - 1) / row.dilation_h);
  ChannelsLastRun<typename V::T> run;
  run.input_row_stride = row.dilation_h * row.row_stride;
  run.input_stride = row.pixel_stride;
  run.channels = row.channels;
  run.taps_h = larger<int64_t>(0, last - first);
  run.taps_w = row.taps_w;
  run.stride_w = row.stride_w;
  run.dilation_w = row.dilation_w;
  run.weight = row.weight + first * row.taps_w * row.weight_stride;
  run.weight_stride = row.weight_stride;
  run.start_stride = row.start_stride;
  run.clamp = row.clamp;
  run.output_stride = row.output_stride;
  run.output_vector_stride = row.output_vector_stride;
  run.whole_vectors = row.whole_vectors;
  const int64_t pieces = (row.pixels + Run - 1) / Run;
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t from = cut(row.pixels, pieces, piece), to = cut(row.pixels, pieces, piece + 1);
    const int64_t left = row.left + from * row.stride_w;
    const int64_t needed = (to - from - 1) * row.stride_w + (row.taps_w - 1) * row.dilation_w + 1;
    run.pixels = static_cast<int>(to - from);
    run.column_begin = larger<int64_t>(0, -left);
    run.column_end = smaller(needed, row.width - left);
    run.input = row.plane + (row.top + first * row.dilation_h) * row.row_stride + left * row.pixel_stride;
    run.start = row.start + from * row.start_stride;
    run.output = row.output + from * row.output_stride;
    channels_last_depthwise<V, Run>(run);
  }
}

// Without a stride, every dilation_w-th pixel and its taps are a row without dilation, on every dilation_w-th column.
template <class V, int Run>
void channels_last_row(const ChannelsLastRow<typename V::T>& row) {
  const int64_t step = row.dilation_w;
  if (step == 1 || row.stride_w > 1 || row.taps_w == 1) return channels_last_pieces<V, Run>(row);
  for (int64_t phase = 0; phase < smaller(step, row.pixels); ++phase) {
    const int64_t left = row.left + phase, column = (left % step + step) % step;
    ChannelsLastRow<typename V::T> part = row;
    part.plane += column * row.pixel_stride;
    part.width = row.width > column ? (row.width - column + step - 1) / step : 0;
    part.pixel_stride *= step;
    part.dilation_w = 1;
    part.left = (left - column) / step;
    part.pixels = (row.pixels - phase + step - 1) / step;
    part.start += phase * row.start_stride;
    part.start_stride *= step;
    part.output += phase * row.output_stride;
    part.output_stride *= step;
    channels_last_pieces<V, Run>(part);
  }
}

// ---- NCHW ---------------------------------------------------------------------------------------------------------

// One channel of a tile. Its input rows have been copied into rows of zeros as wide as the padding asks, the columns
// of each sorted by their remainder modulo stride_w, so that every tap of every stride is a plain unit-stride run:
// output column ox, tap s stands at row[tap_offset(s) + ox]. Rows outside the plane are one row of zeros.
template <class T>
struct PlanarChannel {
  const T* const* rows;  // one pointer for each input row of the tile, from the first tap of the first output row
  int64_t stride_h, dilation_h;
  int64_t taps_h, taps_w;
  const int64_t* tap_offset;  // [taps_w]
  const T* weight;            // [taps_h][taps_w]
  T bias;
  Clamp<T> clamp;
  T* output;  // output row y at output + y * output_stride; may run over its end by one vector
  int64_t output_stride, out_rows, columns;
};

constexpr int planar_block = 4;

// Four output rows of Vectors vectors at a time, so that a weight, and for Taps x Taps with vertical stride StrideH and
// no dilation also an input vector, is loaded once for several FMAs. 3 x 3, stride 1: nine weights resident, 6 rows x
// 3 loads for 36 FMAs; 4 sums + 9 weights + 1 input are 14 registers. Larger kernels keep their broadcast weights in
// memory: with 2 vectors, 7 x 7 has 49 x 4 weight loads and 10 x 7 x 2 unaligned input loads for 392 FMAs.
// Taps = 0: any kernel.
template <class V, int Taps, int StrideH, int Vectors>
FASTSEP_NOINLINE void planar_rows(const PlanarChannel<typename V::T>& channel) {
  using T = typename V::T;
  using Reg = typename V::Reg;
  constexpr int block = planar_block;
  const Reg low = V::set1(channel.clamp.low), high = V::set1(channel.clamp.high);
  constexpr int known = Taps > 0 ? Taps * Taps : 1;
  Reg weights[known];
  FASTSEP_UNROLL
  for (int i = 0; i < known; ++i) weights[i] = V::set1(channel.weight[i]);
  int64_t offsets[Taps > 0 ? Taps : 1];
  for (int s = 0; s < Taps; ++s) offsets[s] = channel.tap_offset[s];
  const int64_t output_stride = channel.output_stride;
  for (int64_t y = 0; y < channel.out_rows; y += block) {
    const T* const* rows = channel.rows + y * channel.stride_h;
    const int64_t count = smaller<int64_t>(block, channel.out_rows - y);
    for (int64_t next = 0; next < channel.columns; next += Vectors * V::width) {
      // The last vectors of a row move back to end with it. Where a row is shorter than a vector, what is stored
      // behind its end is overwritten by the next row.
      int64_t x[Vectors];
      FASTSEP_UNROLL
      for (int v = 0; v < Vectors; ++v)
        x[v] = larger<int64_t>(0, smaller(next + v * V::width, channel.columns - V::width));
      Reg acc[block][Vectors];
      FASTSEP_UNROLL
      for (int b = 0; b < block; ++b) {
        FASTSEP_UNROLL
        for (int v = 0; v < Vectors; ++v) acc[b][v] = V::set1(channel.bias);
      }
      if constexpr (Taps > 0) {
        constexpr int input_rows = (block - 1) * StrideH + Taps;
        FASTSEP_UNROLL
        for (int i = 0; i < input_rows; ++i) {
          FASTSEP_UNROLL
          for (int s = 0; s < Taps; ++s) {
            Reg input[Vectors];
            FASTSEP_UNROLL
            for (int v = 0; v < Vectors; ++v) input[v] = V::in_register(V::load(rows[i] + x[v] + offsets[s]));
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
              const T* row = tap_rows[b * channel.stride_h] + channel.tap_offset[s];
              FASTSEP_UNROLL
              for (int v = 0; v < Vectors; ++v) acc[b][v] = V::fma(V::load(row + x[v]), w, acc[b][v]);
            }
          }
        }
      }
      T* output = channel.output + y * output_stride;
      FASTSEP_UNROLL
      for (int b = 0; b < block; ++b) {
        if (b >= count) break;
        FASTSEP_UNROLL
        for (int v = 0; v < Vectors; ++v)
          V::store(output + b * output_stride + x[v], V::min(high, V::max(low, acc[b][v])));
      }
    }
  }
}

// The same with every tap tested against the plane: for weights that are not finite, which zeros would turn into NaN.
template <class T>
FASTSEP_NOINLINE void planar_depthwise_inside(const PlanarChannel<T>& channel, const T* zeros, int64_t left,
                                              int64_t width, int64_t stride_w, int64_t dilation_w) {
  for (int64_t y = 0; y < channel.out_rows; ++y) {
    for (int64_t x = 0; x < channel.columns; ++x) {
      T sum = channel.bias;
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

// Two vectors where a row has them, but for 3 x 3 not on AVX2, where the resident weights leave no registers for it.
template <class V, int Taps, int StrideH>
void planar_rows_for(const PlanarChannel<typename V::T>& channel) {
  if ((Taps != 3 || V::registers > 16) && channel.columns > V::width) return planar_rows<V, Taps, StrideH, 2>(channel);
  planar_rows<V, Taps, StrideH, 1>(channel);
}

template <class V>
void planar_depthwise(const PlanarChannel<typename V::T>& channel) {
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
