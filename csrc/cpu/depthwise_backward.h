// The gradients of the depthwise half, once, on the vector type, along channels:
//
//   dw[r][s][c] += sum over output pixels of x[oy*stride_h - pad_top + r*dilation_h][ox*stride_w - pad_left +
//                                              s*dilation_w][c] * dt[oy][ox][c]
//   dx[iy][ix][c] = sum over the taps (r, s) with oy*stride_h = iy + pad_top - r*dilation_h, and ox likewise, of
//                   dt[oy][ox][c] * w[r][s][c]
//
// Pixels are added in the order of the plane, so the sums do not depend on how a plane is cut into bands.
#pragma once

#include "depthwise_placed.h"
#include "kernel.h"

namespace fastsep {
namespace FASTSEP_ISA {
namespace {

// ---- weights ------------------------------------------------------------------------------------------------------

// Some rows of dt, up to a panel of channels.
template <class T>
struct WeightGradient : Window<T> {  // on x
  explicit WeightGradient(const Window<T>& window) : Window<T>(window) {}
  int64_t stride_h, pad_top, pad_left;
  int64_t row_begin, row_end, columns;  // of dt
  const T* gradient;                    // dt, rows row_begin and on, dense
  int64_t gradient_stride;              // elements from one pixel of dt to the next
  T* sums;                              // [taps_h][taps_w][sums_stride]
  int64_t sums_stride;
};

struct Range {
  int64_t begin, end;
};

// The output positions o in `range` with 0 <= o*stride + offset < size.
inline Range inside_plane(Range range, int64_t stride, int64_t offset, int64_t size) {
  const int64_t begin = offset < 0 ? (-offset + stride - 1) / stride : 0;
  const int64_t end = offset < size ? (size - 1 - offset) / stride + 1 : 0;
  range.begin = smaller(range.end, larger(range.begin, begin));
  range.end = larger(range.begin, smaller(range.end, end));
  return range;
}

// TapRows x Taps taps from (r, s) on, one vector of channels, over rows of dt for which all these tap rows are inside
// the plane. One sum for each tap: 9, 10 or 7 independent chains of FMAs, with x as their memory operand and dt
// loaded once for all, so that loads and FMAs are about even.
template <class V, int TapRows, int Taps, class Count>
FASTSEP_NOINLINE void weight_gradient_rows(const WeightGradient<typename V::T>& g, int64_t r, int64_t s, Range rows,
                                           int64_t channel, Count lanes) {
  using T = typename V::T;
  using Reg = typename V::Reg;
  if (rows.begin >= rows.end) return;
  T* const sums = g.sums + (r * g.taps_w + s) * g.sums_stride + channel;
  Reg acc[TapRows][Taps];
  FASTSEP_UNROLL
  for (int i = 0; i < TapRows; ++i) {
    FASTSEP_UNROLL
    for (int j = 0; j < Taps; ++j) acc[i][j] = V::load(sums + (i * g.taps_w + j) * g.sums_stride);
  }
  const int64_t left = s * g.dilation_w - g.pad_left;
  const int64_t tap_stride = g.dilation_w * g.pixel_stride, step = g.stride_w * g.pixel_stride;
  // Columns where every tap is inside.
  Range columns = inside_plane({0, g.columns}, g.stride_w, left, g.width);
  columns = inside_plane(columns, g.stride_w, left + (Taps - 1) * g.dilation_w, g.width);

  for (int64_t oy = rows.begin; oy < rows.end; ++oy) {
    const T* gradient = g.gradient + (oy - g.row_begin) * g.columns * g.gradient_stride + channel;
    const T* x[TapRows];
    FASTSEP_UNROLL
    for (int i = 0; i < TapRows; ++i)
      x[i] = g.plane + (oy * g.stride_h - g.pad_top + (r + i) * g.dilation_h) * g.row_stride + left * g.pixel_stride +
             channel;
    const auto border = [&](int64_t begin, int64_t end) {
      for (int64_t ox = begin; ox < end; ++ox, gradient += g.gradient_stride) {
        const Reg dt = V::load_n(gradient, lanes);
        FASTSEP_UNROLL
        for (int j = 0; j < Taps; ++j) {
          const int64_t column = left + ox * g.stride_w + j * g.dilation_w;
          if (column < 0 || column >= g.width) continue;
          FASTSEP_UNROLL
          for (int i = 0; i < TapRows; ++i)
            acc[i][j] = V::fma(V::load_n(x[i] + ox * step + j * tap_stride, lanes), dt, acc[i][j]);
        }
      }
    };
    border(0, columns.begin);
    const T* inner[TapRows];
    FASTSEP_UNROLL
    for (int i = 0; i < TapRows; ++i) inner[i] = x[i] + columns.begin * step;
    for (int64_t ox = columns.begin; ox < columns.end; ++ox, gradient += g.gradient_stride) {
      const Reg dt = V::in_register(V::load_n(gradient, lanes));
      FASTSEP_UNROLL
      for (int i = 0; i < TapRows; ++i) {
        FASTSEP_UNROLL
        for (int j = 0; j < Taps; ++j) acc[i][j] = V::fma(V::load_n(inner[i] + j * tap_stride, lanes), dt, acc[i][j]);
        inner[i] += step;
      }
    }
    border(columns.end, g.columns);
  }
  FASTSEP_UNROLL
  for (int i = 0; i < TapRows; ++i) {
    FASTSEP_UNROLL
    for (int j = 0; j < Taps; ++j) V::store(sums + (i * g.taps_w + j) * g.sums_stride, acc[i][j]);
  }
}

// TapRows tap rows together where all of them are inside the plane, else one by one.
template <class V, int TapRows, int Taps, class Count>
void weight_gradient_taps(const WeightGradient<typename V::T>& g, int64_t r, int64_t s, int64_t channel, Count lanes) {
  Range inside[TapRows], together = {g.row_begin, g.row_end};
  for (int i = 0; i < TapRows; ++i) {
    const int64_t offset = (r + i) * g.dilation_h - g.pad_top;
    inside[i] = inside_plane({g.row_begin, g.row_end}, g.stride_h, offset, g.height);
    together = inside_plane(together, g.stride_h, offset, g.height);
  }
  for (int i = 0; TapRows > 1 && i < TapRows; ++i)
    weight_gradient_rows<V, 1, Taps>(g, r + i, s, {inside[i].begin, smaller(inside[i].end, together.begin)}, channel,
                                     lanes);
  weight_gradient_rows<V, TapRows, Taps>(g, r, s, together, channel, lanes);
  for (int i = 0; TapRows > 1 && i < TapRows; ++i)
    weight_gradient_rows<V, 1, Taps>(g, r + i, s, {larger(inside[i].begin, together.end), inside[i].end}, channel,
                                     lanes);
}

template <class V, class Count>
void weight_gradient_vector(const WeightGradient<typename V::T>& g, int64_t channel, Count lanes) {
  for (int64_t r = 0; r < g.taps_h;) {
    const int64_t left = g.taps_h - r;
    if (g.taps_w == 3 && left >= 3) {
      weight_gradient_taps<V, 3, 3>(g, r, 0, channel, lanes);
      r += 3;
    } else if (g.taps_w == 5 && left >= 2) {
      weight_gradient_taps<V, 2, 5>(g, r, 0, channel, lanes);
      r += 2;
    } else {
      for (int64_t s = 0; s < g.taps_w;) {
        const int64_t taps = g.taps_w - s;
        if (taps >= 7) {
          weight_gradient_taps<V, 1, 7>(g, r, s, channel, lanes);
          s += 7;
        } else if (taps >= 3) {
          weight_gradient_taps<V, 1, 3>(g, r, s, channel, lanes);
          s += 3;
        } else {
          weight_gradient_taps<V, 1, 1>(g, r, s, channel, lanes);
          s += 1;
        }
      }
      r += 1;
    }
  }
}

template <class V>
void weight_gradient(const WeightGradient<typename V::T>& g) {
  int64_t channel = 0;
  for (; channel + V::width <= g.channels; channel += V::width)
    weight_gradient_vector<V>(g, channel, Constant<V::width>());
  if (channel < g.channels) weight_gradient_vector<V>(g, channel, static_cast<int>(g.channels - channel));
}

// ---- input --------------------------------------------------------------------------------------------------------

// Rows of dx, up to a panel of channels. For the pixels of dx that are alike modulo the stride, the gradient is a
// depthwise convolution of dt with stride 1 and the taps of one class in reverse (ReversedTaps in kernel.h).
template <class T>
struct InputGradient {
  Window<T> window;  // on dt, of which only rows that the wanted rows of dx reach are read; the taps are set here
  ReversedTaps taps_h, taps_w;
  int64_t pad_top, pad_left;
  int64_t row_begin, row_end, columns;  // of dx
  const T* weight;                      // [taps in the order of the classes][weight_stride]
  int64_t weight_stride;
  bool finite;           // the weights
  const int64_t* place;  // [columns / stride, up]: p * stride * output_stride
  const T* zeros;        // a panel of them
  bool add;              // to what `output` has
  T* output;             // dx, rows row_begin and on
  int64_t output_row_stride, output_stride;
  bool whole_vectors;
};

template <class V, int Run>
void input_gradient(const InputGradient<typename V::T>& g) {
  using T = typename V::T;
  ChannelsLastRow<T> row(g.window);
  row.stride_w = 1;
  row.dilation_h = g.taps_h.output_dilation();
  row.dilation_w = g.taps_w.output_dilation();
  row.weight_stride = g.weight_stride;
  row.clamp = clamp_of<T>(Activation::identity);
  row.output_vector_stride = V::width;
  row.whole_vectors = g.whole_vectors;
  row.output_stride = g.taps_w.stride * g.output_stride;
  for (int64_t iy = g.row_begin; iy < g.row_end; ++iy) {
    const int64_t class_h = g.taps_h.class_of(iy + g.pad_top);
    row.taps_h = g.taps_h.count(class_h);
    row.top = g.taps_h.first(class_h, iy + g.pad_top);
    for (int64_t phase = 0; phase < smaller(g.taps_w.stride, g.columns); ++phase) {
      const int64_t class_w = g.taps_w.class_of(phase + g.pad_left);
      row.taps_w = g.taps_w.count(class_w);
      row.left = g.taps_w.first(class_w, phase + g.pad_left);
      row.pixels = (g.columns - phase + g.taps_w.stride - 1) / g.taps_w.stride;
      row.weight = g.weight + (g.taps_h.before(class_h) * g.taps_w.kernel + row.taps_h * g.taps_w.before(class_w)) *
                                  g.weight_stride;
      row.output = g.output + (iy - g.row_begin) * g.output_row_stride + phase * g.output_stride;
      row.start = g.add ? row.output : g.zeros;
      row.start_stride = g.add ? row.output_stride : 0;
      placed_or_plain_row<V, Run>(row, g.place, g.finite);
    }
  }
}

}  // namespace
}  // namespace FASTSEP_ISA
}  // namespace fastsep
