// The depthwise tile, once, on the vector type: along channels for channels-last here, along pixels for NCHW in
// depthwise_planar.h.
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
// inside: bit i is set where column i of the input is inside the plane, for Taps > 0.
template <class V, int Run, int Taps, int Stride, bool Border, class Count>
FASTSEP_INLINE void channels_last_vector(const ChannelsLastRun<typename V::T>& run, uint64_t inside, int64_t channel,
                                         Count lanes) {
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
      static_assert(columns <= 64, "a bit for each column");
      Reg w[Taps];
      FASTSEP_UNROLL
      for (int s = 0; s < Taps; ++s, weight += run.weight_stride) w[s] = V::load(weight);
      FASTSEP_UNROLL
      for (int column = 0; column < columns; ++column) {
        if (Border && (inside >> column & 1) == 0) continue;
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
  const auto first_bits = [](int64_t count) { return count < 64 ? (uint64_t{1} << count) - 1 : ~uint64_t{0}; };
  const uint64_t inside =
      first_bits(larger<int64_t>(0, run.column_end)) & ~first_bits(larger<int64_t>(0, run.column_begin));
  const auto vector = [&](auto is_border, int64_t channel, auto lanes) FASTSEP_INLINE_LAMBDA {
    channels_last_vector<V, Run, Taps, Stride, decltype(is_border)::value != 0>(run, inside, channel, lanes);
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

// One pixel, several vectors of channels at a time: what its taps read lies together. In a plane that is one kernel
// wide, as in a mean over it, each tap of a single vector would be on a page of its own: 1024 channels x 7 x 7 take 20
// times as long.
template <class V, int Vectors>
FASTSEP_NOINLINE void channels_last_pixel(const ChannelsLastRun<typename V::T>& run) {
  using T = typename V::T;
  using Reg = typename V::Reg;
  const Reg low = V::set1(run.clamp.low), high = V::set1(run.clamp.high);
  for (int64_t channel = 0; channel < run.channels; channel += Vectors * V::width) {
    const auto lanes_of = [&](int v) FASTSEP_INLINE_LAMBDA {
      return static_cast<int>(larger<int64_t>(0, smaller<int64_t>(V::width, run.channels - channel - v * V::width)));
    };
    const auto vectors = [&](auto lanes) FASTSEP_INLINE_LAMBDA {
      Reg acc[Vectors];
      FASTSEP_UNROLL
      for (int v = 0; v < Vectors; ++v) acc[v] = V::load_n(run.start + channel + v * V::width, lanes(v));
      const T* input_row = run.input + channel;
      const T* weight = run.weight + channel;
      for (int64_t r = 0; r < run.taps_h; ++r, input_row += run.input_row_stride) {
        for (int64_t s = 0; s < run.taps_w; ++s, weight += run.weight_stride) {
          const int64_t column = s * run.dilation_w;
          if (column < run.column_begin || column >= run.column_end) continue;
          const T* x = input_row + column * run.input_stride;
          FASTSEP_UNROLL
          for (int v = 0; v < Vectors; ++v)
            acc[v] = V::fma(V::load_n(x + v * V::width, lanes(v)), V::load_n(weight + v * V::width, lanes(v)), acc[v]);
        }
      }
      T* const output = run.output + channel / V::width * run.output_vector_stride;
      FASTSEP_UNROLL
      for (int v = 0; v < Vectors; ++v) {
        const Reg value = V::min(high, V::max(low, acc[v]));
        T* const place = output + v * run.output_vector_stride;
        if (run.whole_vectors && lanes(v) > 0)
          V::store(place, value);
        else
          V::store_n(place, value, lanes(v));
      }
    };
    if (run.channels - channel >= Vectors * V::width)
      vectors([](int) { return Constant<V::width>(); });
    else
      vectors(lanes_of);
  }
}

// The variants that are worth their code: measured on benchmarks/shapes, see CONTRIBUTING.md.
template <class V, int Run>
void channels_last_depthwise(const ChannelsLastRun<typename V::T>& run) {
  if (run.pixels == 1) return channels_last_pixel<V, Run>(run);
  if (run.dilation_w == 1 && run.stride_w == 1) {
    if (run.taps_w == 1) return channels_last_run<V, Run, 1, 1>(run);
    if (run.taps_w == 2) return channels_last_run<V, Run, 2, 1>(run);
    if (run.taps_w == 3) {
      // Groups of 8 pixels are of 7 where the plane is 7 x 2^n wide.
      if constexpr (Run == 8)
        if (run.pixels == 7) return channels_last_run<V, 7, 3, 1>(run);
      return channels_last_run<V, Run, 3, 1>(run);
    }
    if (run.taps_w == 5) return channels_last_run<V, Run, 5, 1>(run);
    if (run.taps_w == 7) return channels_last_run<V, Run, 7, 1>(run);
  }
  if (run.dilation_w == 1 && run.stride_w == 2 && run.taps_w == 3) {
    if constexpr (Run == 8)
      if (run.pixels == 7) return channels_last_run<V, 7, 3, 2>(run);
    return channels_last_run<V, Run, 3, 2>(run);
  }
  channels_last_run<V, Run, 0, 0>(run);
}

// The rows of taps inside the plane: top + r * dilation_h from 0 to height - 1.
struct TapRows {
  int64_t first, count;
};

template <class T>
TapRows tap_rows_inside(const ChannelsLastRow<T>& row) {
  const int64_t first = row.top < 0 ? smaller((-row.top + row.dilation_h - 1) / row.dilation_h, row.taps_h) : 0;
  const int64_t below = row.height - row.top;
  const int64_t last = below <= 0 ? first : smaller(row.taps_h, (below + row.dilation_h - 1) / row.dilation_h);
  return {first, larger<int64_t>(0, last - first)};
}

// A row whose taps are neighbours, or whose pixels do not share any.
template <class V, int Run>
void channels_last_pieces(const ChannelsLastRow<typename V::T>& row) {
  const TapRows inside = tap_rows_inside(row);
  const int64_t first = inside.first;
  ChannelsLastRun<typename V::T> run;
  run.input_row_stride = row.dilation_h * row.row_stride;
  run.input_stride = row.pixel_stride;
  run.channels = row.channels;
  run.taps_h = inside.count;
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

// What of a row's channels is left when the whole vectors are done.
template <class V>
ChannelsLastRow<typename V::T> behind_whole_vectors(ChannelsLastRow<typename V::T> row) {
  const int64_t vectors = row.channels / V::width, done = vectors * V::width;
  row.plane += done;
  row.channels -= done;
  row.weight += done;
  row.start += done;
  row.output += vectors * row.output_vector_stride;
  return row;
}

}  // namespace
}  // namespace FASTSEP_ISA
}  // namespace fastsep
