// The backward pass, once for both layouts: NCHW comes and goes through transposed tiles, because every product of
// three sides (pixels, K, C) has the same three operands in any order.
//
//   dv = g * act'               [pixel][K]     packed for a band of pixels, in blocks of Rows pixels x group channels
//   u = mid_act(t)              [pixel][panel] computed again
//   du = dv W                   [pixel][panel] rows dv, depth K;       then dt = du * mid_act'
//   dW[k] += dv[pixel][k] * u   [K][panel]     rows dv by channel, depth pixels, into the part's sums
//   dw, dx                      from dt, of which the last rows stay for the next band's dx
//
// One unit of work takes its parts' bands in order, and for each band its panels of input channels. Panels share
// nothing but dv; parts share nothing but the rows of dt above the first, which are computed twice where a part begins
// inside an image.
#pragma once

#include <string.h>

#include "backward_products.h"

namespace fastsep {
namespace FASTSEP_ISA {
namespace {

template <class V, class Shape>
struct Backward : BackwardProducts<V, Shape> {
  using Base = BackwardProducts<V, Shape>;
  using T = typename Base::T;
  using Band = typename Base::Band;
  using Base::Columns;
  using Base::layout;
  using Base::p;
  using Base::panel;
  using Base::plan;
  using Base::Run;
  using Base::s;
  using Base::scratch;

  const BackwardWork& work;
  const bool in_place;
  int64_t *const value_places, *const input_places;  // of the pixels of a row of t, and of one of dx
  int64_t ring_begin = 0, ring_end = 0;              // rows of dt that the rings hold

  Backward(const BackwardPlan& plan_, const BackwardWork& work_, T* scratch_)
      : Base(plan_, work_.panel_end - work_.panel_begin, scratch_),
        work(work_),
        in_place(Base::is_in_place(plan_)),
        value_places(reinterpret_cast<int64_t*>(scratch + s.places)),
        input_places(value_places + plan.out_width) {
    for (int64_t i = 0; i < plan.out_width; ++i) value_places[i] = i * panel;
    const int64_t input_stride = p.stride_w * (p.layout == Layout::nhwc ? p.channels : panel);
    for (int64_t i = 0; i < (p.width + p.stride_w - 1) / p.stride_w; ++i) input_places[i] = i * input_stride;
  }

  void run() {
    const int64_t rows = p.batch * plan.out_height;
    for (int64_t part = work.part_begin; part < work.part_end; ++part) {
      T* const sums = static_cast<T*>(plan.sums) + part * layout.sums_elements;
      clear_sums(sums);
      if (plan.band_images > 0)
        images(cut(p.batch, plan.parts, part), cut(p.batch, plan.parts, part + 1), sums);
      else
        image_rows(cut(rows, plan.parts, part), cut(rows, plan.parts, part + 1), part == work.part_begin, sums);
    }
  }

  void images(int64_t begin, int64_t end, T* sums) {
    const int64_t count = (end - begin + plan.band_images - 1) / plan.band_images;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t image = begin + cut(end - begin, count, i), stop = begin + cut(end - begin, count, i + 1);
      band({image, stop - image, 0, plan.out_height, true, i == 0, sums});
    }
  }

  // Rows [part_begin, end) of the whole batch; at the beginning of this unit's the rings do not end with those above.
  void image_rows(int64_t part_begin, int64_t end, bool rings_empty, T* sums) {
    for (int64_t row = part_begin; row < end;) {
      const int64_t image = row / plan.out_height, begin = row % plan.out_height;
      const int64_t stop = smaller(plan.out_height, begin + end - row);
      if (begin == 0) ring_begin = ring_end = 0;
      if (rings_empty && row == part_begin && begin > 0 && !in_place) {
        ring_begin = ring_end = larger<int64_t>(0, begin - plan.halo);
        bands(image, ring_begin, begin, false, false, sums);
      }
      bands(image, begin, stop, true, row == part_begin, sums);
      row += stop - begin;
    }
  }

  // Those of the pointwise weights begin with the products of the first band, where there is one.
  void clear_sums(T* sums) const {
    const int64_t panels = work.panel_end - work.panel_begin;
    const auto clear = [&](int64_t offset, int64_t each) {
      memset(sums + offset + work.panel_begin * each, 0, static_cast<size_t>(panels * each) * sizeof(T));
    };
    if (p.batch == 0 && work.panel_begin == 0) memset(sums, 0, static_cast<size_t>(layout.depthwise_sums) * sizeof(T));
    clear(layout.depthwise_sums, p.multiplier * p.kernel_h * p.kernel_w * panel);
    clear(layout.depthwise_bias_sums, p.multiplier * panel);
    if (work.panel_begin == 0)
      memset(sums + layout.bias_sums, 0, static_cast<size_t>(round_up(p.out_channels, V::width)) * sizeof(T));
  }

  void bands(int64_t image, int64_t begin, int64_t end, bool counts, bool first, T* sums) {
    const int64_t count = (end - begin + plan.band_rows - 1) / plan.band_rows;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = begin + cut(end - begin, count, i), stop = begin + cut(end - begin, count, i + 1);
      band({image, 1, row, stop, counts, first && i == 0, sums});
    }
  }

  // Whether a band takes t, and whether it takes x.
  bool needs_values(const Band& b) const {
    return (b.counts && plan.gradients.pointwise_weight != nullptr) ||
           (plan.need_inner && p.mid_activation != Activation::identity);
  }
  bool needs_input(const Band& b) const {
    return needs_values(b) || (b.counts && plan.gradients.depthwise_weight != nullptr);
  }

  void band(const Band& b) {
    const bool pointwise = b.counts && plan.gradients.pointwise_weight != nullptr;
    if (p.out_channels > 0 && (pointwise || plan.need_inner || (b.counts && plan.gradients.bias != nullptr)))
      Base::pack_gradient(b);
    if (b.counts && work.panel_begin == 0 && plan.gradients.bias != nullptr) Base::bias_gradient(b);
    if (!pointwise && !plan.need_inner) return;
    keep_rows(b);
    for (int64_t q = work.panel_begin; q < work.panel_end; ++q) {
      const int64_t channel = q * panel, channels = smaller<int64_t>(panel, p.channels - channel);
      if (needs_input(b) && Base::is_copied(plan)) copy_input(b, channel, channels);
      for (int64_t filter = 0; filter < p.multiplier; ++filter) {
        const int64_t index = q * p.multiplier + filter;
        if (needs_values(b)) values_of(b, channel, channels, filter, pointwise);
        if (pointwise) Base::pointwise_gradient(b, index, channels);
        if (!plan.need_inner) continue;
        if (in_place) {
          depthwise_gradient(b, channel, channels, index, given(b, b.begin, channel), p.channels);
          continue;
        }
        T* const dt = ring(q, filter, b.begin);
        if (p.out_channels > 0)
          Base::inner_gradient(b, index, channels, dt);
        else
          take_gradient(b, channel, channels, filter, dt);
        const T* const z = scratch + (plan.mid_from_output ? s.values : s.arguments);
        for_pixels(Base::pixels_of(b), channels, [&](int64_t offset, int64_t count) {
          multiply_by_slope<V>(p.mid_activation, dt + offset, z + offset, count);
        });
        if (b.counts) depthwise_gradient(b, channel, channels, index, dt, panel);
      }
      if (b.counts && plan.gradients.input != nullptr)
        Base::for_images(b, [&](const Band& image, int64_t first_pixel) {
          rows_of_input(image, q, channel, channels, first_pixel);
        });
    }
  }

  // The spans of [pixel][panel] that hold something: of a panel with few channels, the first vectors of each pixel.
  template <class F>
  static void for_pixels(int64_t pixels, int64_t channels, const F& f) {
    const int64_t count = round_up(channels, V::width);
    if (count == panel) return f(0, pixels * panel);
    for (int64_t i = 0; i < pixels; ++i) f(i * panel, count);
  }

  // ---- the depthwise half -------------------------------------------------------------------------------------------

  // The rows of x that a band's taps touch, of each of its images.
  struct InputRows {
    int64_t begin, end;
  };
  InputRows input_rows(const Band& b) const {
    const int64_t top = b.begin * p.stride_h - p.pad_top;
    const int64_t bottom = top + (b.end - b.begin - 1) * p.stride_h + Base::reach(p);
    const int64_t begin = smaller(p.height, larger<int64_t>(0, top));
    return {begin, larger(begin, smaller(p.height, bottom))};
  }
  T* copied_input(int64_t image_in_band) const {
    return scratch + s.input + image_in_band * s.input_rows * p.width * panel;
  }

  void copy_input(const Band& b, int64_t channel, int64_t channels) const {
    const InputRows rows = input_rows(b);
    const int64_t pixels = (rows.end - rows.begin) * p.width;
    for (int64_t i = 0; i < b.images && pixels > 0; ++i) {
      const T* const image = static_cast<const T*>(plan.input) + (b.image + i) * p.channels * p.height * p.width;
      if (p.layout == Layout::nhwc)
        copy_panel(image + rows.begin * p.width * p.channels + channel, pixels, channels, copied_input(i));
      else
        transpose<V>(image + (channel * p.height + rows.begin) * p.width, channels, pixels, p.height * p.width,
                     copied_input(i), panel);
    }
  }

  // A panel of channels of x, of one image of a band. Only the rows that the band's taps touch are there.
  Window<T> input_of(const Band& b, int64_t image, int64_t channel, int64_t channels) const {
    const T* const plane = static_cast<const T*>(plan.input) + image * p.channels * p.height * p.width;
    if (!Base::is_copied(plan)) return window_of(p, plane + channel, p.width * p.channels, p.channels, channels);
    return window_of<T>(p, copied_input(image - b.image) - input_rows(b).begin * p.width * panel, p.width * panel,
                        panel, channels);
  }

  // Some channels of neighbouring pixels of x, in whole vectors.
  void copy_panel(const T* from, int64_t pixels, int64_t channels, T* to) const {
    for (int64_t i = 0; i < pixels; ++i, from += p.channels, to += panel) Base::copy_vectors(from, channels, to);
  }

  // t and u of one filter.
  void values_of(const Band& b, int64_t channel, int64_t channels, int64_t filter, bool need_values) const {
    T* const values = scratch + s.values;
    T* const arguments = plan.mid_from_output ? values : scratch + s.arguments;
    Base::for_images(b, [&](const Band& image, int64_t first_pixel) {
      values_of_image(image, input_of(b, image.image, channel, channels), channel, filter,
                      arguments + first_pixel * panel);
    });
    if (is_clamp(p.mid_activation) || !(need_values || plan.mid_from_output)) return;
    const int64_t pixels = Base::pixels_of(b);
    if (!plan.mid_from_output) memcpy(values, arguments, static_cast<size_t>(pixels * panel) * sizeof(T));
    for_pixels(pixels, channels,
               [&](int64_t offset, int64_t count) { activate<V>(p.mid_activation, values + offset, count); });
  }

  void values_of_image(const Band& b, const Window<T>& x, int64_t channel, int64_t filter, T* arguments) const {
    ChannelsLastRow<T> row(x);
    row.left = -p.pad_left;
    row.pixels = plan.out_width;
    row.weight =
        packed<T>(plan, layout.depthwise) + filter * p.kernel_h * p.kernel_w * layout.padded_channels + channel;
    row.weight_stride = layout.padded_channels;
    row.start = packed<T>(plan, layout.depthwise_bias) + filter * layout.padded_channels + channel;
    row.start_stride = 0;
    row.clamp = clamp_of<T>(p.mid_activation);
    row.output_stride = panel;
    row.output_vector_stride = V::width;
    row.whole_vectors = true;
    const bool finite = all_finite<V>(row.weight, x.channels, p.kernel_h * p.kernel_w, row.weight_stride);
    for (int64_t oy = b.begin; oy < b.end; ++oy) {
      row.top = oy * p.stride_h - p.pad_top;
      row.output = arguments + (oy - b.begin) * plan.out_width * panel;
      placed_or_plain_row<V, Run>(row, value_places, finite);
    }
  }

  // dy as it lies, from a row and channel on. For is_in_place().
  const T* given(const Band& b, int64_t row, int64_t channel) const {
    return static_cast<const T*>(plan.grad_output) + (b.image * plan.out_height + row) * plan.out_width * p.channels +
           channel;
  }

  // dy of the depthwise half alone, one filter.
  void take_gradient(const Band& b, int64_t channel, int64_t channels, int64_t filter, T* to) const {
    const int64_t plane = plan.out_height * plan.out_width, depth = p.channels * p.multiplier;
    const int64_t pixel = b.begin * plan.out_width, pixels = (b.end - b.begin) * plan.out_width;
    const int64_t first = channel * p.multiplier + filter;
    const T* image = static_cast<const T*>(plan.grad_output) + b.image * plane * depth;
    if (p.layout == Layout::nchw)
      return transpose<V>(image + first * plane + pixel, channels, pixels, p.multiplier * plane, to, panel);
    const T* from = image + pixel * depth + first;
    for (int64_t i = 0; i < pixels; ++i, from += depth, to += panel) {
      if (p.multiplier == 1)
        copy_panel(from, 1, channels, to);
      else
        for (int64_t c = 0; c < channels; ++c) to[c] = from[c * p.multiplier];
    }
  }

  void depthwise_gradient(const Band& b, int64_t channel, int64_t channels, int64_t index, const T* dt,
                          int64_t dt_stride) const {
    if (plan.gradients.depthwise_weight != nullptr)
      Base::for_images(b, [&](const Band& image, int64_t first_pixel) {
        depthwise_weight_gradient(image, input_of(b, image.image, channel, channels), index,
                                  dt + first_pixel * dt_stride, dt_stride);
      });
    if (plan.gradients.depthwise_bias != nullptr) depthwise_bias_gradient(b, index, channels, dt, dt_stride);
  }

  void depthwise_weight_gradient(const Band& b, const Window<T>& x, int64_t index, const T* dt,
                                 int64_t dt_stride) const {
    WeightGradient<T> g(x);
    g.stride_h = p.stride_h;
    g.pad_top = p.pad_top;
    g.pad_left = p.pad_left;
    g.row_begin = b.begin;
    g.row_end = b.end;
    g.columns = plan.out_width;
    g.gradient = dt;
    g.gradient_stride = dt_stride;
    g.sums = b.sums + layout.depthwise_sums + index * p.kernel_h * p.kernel_w * panel;
    g.sums_stride = panel;
    weight_gradient<V>(g);
  }

  void depthwise_bias_gradient(const Band& b, int64_t index, int64_t channels, const T* dt, int64_t dt_stride) const {
    T* const sums = b.sums + layout.depthwise_bias_sums + index * panel;
    const int64_t pixels = Base::pixels_of(b);
    if (channels == panel) {
      const T* from[Columns];
      for (int i = 0; i < Columns; ++i) from[i] = dt + i * V::width;
      return Base::template add_pixels<Columns>(from, dt_stride, pixels, 0, pixels, sums);
    }
    for (int64_t c = 0; c < channels; c += V::width) {
      const T* from[1] = {dt + c};
      Base::template add_pixels<1>(from, dt_stride, pixels, 0, pixels, sums + c,
                                   static_cast<int>(smaller<int64_t>(V::width, channels - c)));
    }
  }

  // ---- dt's ring and dx ---------------------------------------------------------------------------------------------

  T* ring(int64_t q, int64_t filter, int64_t row) const {
    const int64_t place = plan.band_images > 0 ? 0 : q - work.panel_begin;
    return scratch + s.ring + (place * p.multiplier + filter) * s.ring_stride +
           (row - ring_begin) * plan.out_width * panel;
  }

  // Makes room for a band behind the rows of dt that its rows of dx reach.
  void keep_rows(const Band& b) {
    if (!plan.need_inner || in_place) return;
    if (plan.gradients.input == nullptr || plan.band_images > 0) ring_end = ring_begin = b.begin;
    const int64_t begin = larger(ring_begin, smaller(ring_end, b.begin - plan.halo));
    if (begin > ring_begin) {
      const int64_t kept = (ring_end - begin) * plan.out_width * panel;
      for (int64_t q = work.panel_begin; q < work.panel_end && kept > 0; ++q)
        for (int64_t filter = 0; filter < p.multiplier; ++filter)
          memmove(ring(q, filter, ring_begin), ring(q, filter, begin), static_cast<size_t>(kept) * sizeof(T));
    }
    ring_begin = begin;
    ring_end = b.end;
  }

  // The rows of dx whose last row of dt is in this band, of one image.
  void rows_of_input(const Band& b, int64_t q, int64_t channel, int64_t channels, int64_t first_pixel) const {
    const auto row_of = [&](int64_t oy) { return smaller(p.height, larger<int64_t>(0, oy * p.stride_h - p.pad_top)); };
    const int64_t begin = b.begin == 0 ? 0 : row_of(b.begin);
    const int64_t end = b.end == plan.out_height ? p.height : row_of(b.end);
    T* const image = static_cast<T*>(plan.gradients.input) + b.image * p.channels * p.height * p.width;
    if (p.layout == Layout::nhwc) {
      T* const to = image + begin * p.width * p.channels + channel;
      return rows_of_input(b, begin, end, q, channel, channels, first_pixel, to, p.channels, false);
    }
    T* const rows = scratch + s.output;
    for (int64_t row = begin; row < end; row += s.output_rows) {
      const int64_t stop = smaller(end, row + s.output_rows);
      rows_of_input(b, row, stop, q, channel, channels, first_pixel, rows, panel, true);
      transpose<V>(rows, (stop - row) * p.width, channels, panel, image + channel * p.height * p.width + row * p.width,
                   p.height * p.width);
    }
  }

  void rows_of_input(const Band& b, int64_t begin, int64_t end, int64_t q, int64_t channel, int64_t channels,
                     int64_t first_pixel, T* to, int64_t to_stride, bool whole_vectors) const {
    InputGradient<T> g = {};
    g.window.height = plan.out_height;
    g.window.width = plan.out_width;
    g.window.pixel_stride = in_place ? p.channels : panel;
    g.window.row_stride = plan.out_width * g.window.pixel_stride;
    g.window.channels = channels;
    g.taps_h = ReversedTaps(p.kernel_h, p.stride_h, p.dilation_h);
    g.taps_w = ReversedTaps(p.kernel_w, p.stride_w, p.dilation_w);
    g.pad_top = p.pad_top;
    g.pad_left = p.pad_left;
    g.row_begin = begin;
    g.row_end = end;
    g.columns = p.width;
    g.weight_stride = layout.padded_channels;
    g.place = input_places;
    g.zeros = packed<T>(plan, layout.zeros);
    g.output = to;
    g.output_row_stride = p.width * to_stride;
    g.output_stride = to_stride;
    g.whole_vectors = whole_vectors;
    for (int64_t filter = 0; filter < p.multiplier; ++filter) {
      g.window.plane = in_place ? given(b, 0, channel) : ring(q, filter, 0) + first_pixel * panel;
      g.weight = packed<T>(plan, layout.reversed) + filter * p.kernel_h * p.kernel_w * layout.padded_channels + channel;
      g.add = filter > 0;
      g.finite = all_finite<V>(g.weight, channels, p.kernel_h * p.kernel_w, g.weight_stride);
      input_gradient<V, Run>(g);
    }
  }
};

template <class V, class Shape>
int64_t backward_scratch_bytes(const BackwardPlan& plan, int64_t panels) {
  return BackwardBand<V, Shape>::scratch_of(plan, panels).total * int64_t(sizeof(typename V::T));
}

template <class V, class Shape>
void backward_work(const BackwardPlan& plan, const BackwardWork& work, void* scratch) {
  Backward<V, Shape>(plan, work, static_cast<typename V::T*>(scratch)).run();
}

template <class V, class Shape>
void finish_depthwise(const BackwardPlan& plan, int64_t panel) {
  BackwardSums<V, Shape>::finish_depthwise(plan, panel);
}

template <class V, class Shape>
void finish_pointwise(const BackwardPlan& plan, int64_t begin, int64_t end) {
  BackwardSums<V, Shape>::finish_pointwise(plan, begin, end);
}

}  // namespace
}  // namespace FASTSEP_ISA
}  // namespace fastsep
