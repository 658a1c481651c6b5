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
// nothing but dv; parts share nothing but the rows of dt above the first, which are computed twice.
#pragma once

#include <string.h>

#include "backward_sums.h"
#include "depthwise_backward.h"
#include "kernel.h"
#include "pointwise.h"

namespace fastsep {
namespace FASTSEP_ISA {
namespace {

template <class V, class Shape>
struct Backward {
  using T = typename V::T;
  static constexpr int Rows = Shape::rows, Columns = Shape::columns, Run = Shape::run;
  // A group of output channels is cut into whole tiles of the product whose rows are output channels: of Rows rows
  // where that takes no more than three vectors (6 rows on 8 lanes: 24 channels, 4 tiles), else into equal tiles of
  // one vector (14 rows on 16 lanes: 2 tiles of 8).
  static constexpr int together = least_common_multiple(Rows, V::width);
  static constexpr int group = together <= 3 * V::width ? together : V::width;
  static constexpr int panel = Columns * V::width, block = Rows * group;

  // Parts of the scratch, in elements.
  struct Scratch {
    int64_t blocks;       // groups of output channels
    int64_t ring_rows;    // of dt that are kept
    int64_t ring_stride;  // from one filter's ring to the next
    int64_t input_rows, output_rows;
    int64_t gradient, saved, values, arguments, ring, input, output, places, total;
  };

  static Scratch scratch_of(const BackwardPlan& plan, int64_t panels) {
    const Problem& p = plan.problem;
    const int64_t pixels = plan.band_rows * plan.out_width;
    const bool planar = p.layout == Layout::nchw;
    Scratch s;
    s.blocks = (p.out_channels + group - 1) / group;
    s.ring_rows = smaller(plan.out_height, plan.halo + plan.band_rows);
    s.ring_stride = s.ring_rows * plan.out_width * panel;
    s.input_rows = is_copied(plan) ? smaller(p.height, (plan.band_rows - 1) * p.stride_h + reach(p)) : 0;
    s.output_rows = planar ? smaller(p.height, 1 + 64 / p.width) : 0;
    s.gradient = 0;
    s.saved = s.gradient + (pixels + Rows - 1) / Rows * s.blocks * block;
    s.values = s.saved + s.blocks * block;
    s.arguments = s.values + pixels * panel;
    s.ring = s.arguments + (plan.mid_from_output ? 0 : pixels * panel);
    s.input = s.ring + (plan.need_inner && !is_in_place(plan) ? panels * p.multiplier * s.ring_stride : 0);
    s.output = s.input + s.input_rows * p.width * panel;
    s.places = round_up(s.output + s.output_rows * p.width * panel, V::width);
    s.total = s.places + (plan.out_width + p.width) * int64_t(sizeof(int64_t) / sizeof(T));
    return s;
  }

  // Whether dt is the given gradient as it lies, and there is no ring.
  static bool is_in_place(const BackwardPlan& plan) {
    const Problem& p = plan.problem;
    return p.out_channels == 0 && p.layout == Layout::nhwc && p.multiplier == 1 &&
           p.mid_activation == Activation::identity;
  }

  // Whether a panel of x is copied for a band: transposed, or out of pixels of more channels, which a power of two of
  // them puts into few sets of the first cache.
  static bool is_copied(const BackwardPlan& plan) {
    return plan.problem.layout == Layout::nchw || (plan.problem.channels > panel && !is_in_place(plan));
  }
  // Rows of x that one row of t sees.
  static int64_t reach(const Problem& p) { return (p.kernel_h - 1) * p.dilation_h + 1; }

  static int64_t scratch_bytes(const BackwardPlan& plan, int64_t panels) {
    return scratch_of(plan, panels).total * int64_t(sizeof(T));
  }

  // Rows [begin, end) of the output of one image.
  struct Band {
    int64_t image, begin, end;
    bool counts;  // else only dt is wanted, for the rows of dx below
    T* sums;      // of the part
  };

  const BackwardPlan& plan;
  const Problem& p;
  const BackwardLayout& layout;
  const BackwardWork& work;
  const Scratch s;
  const bool in_place;
  T* const scratch;
  int64_t *const value_places, *const input_places;  // of the pixels of a row of t, and of one of dx
  int64_t ring_begin = 0, ring_end = 0;              // rows of dt that the rings hold

  Backward(const BackwardPlan& plan_, const BackwardWork& work_, T* scratch_)
      : plan(plan_),
        p(plan_.problem),
        layout(plan_.layout),
        work(work_),
        s(scratch_of(plan_, work_.panel_end - work_.panel_begin)),
        in_place(is_in_place(plan_)),
        scratch(scratch_),
        value_places(reinterpret_cast<int64_t*>(scratch_ + s.places)),
        input_places(value_places + plan_.out_width) {
    for (int64_t i = 0; i < plan.out_width; ++i) value_places[i] = i * panel;
    const int64_t input_stride = p.stride_w * (p.layout == Layout::nhwc ? p.channels : panel);
    for (int64_t i = 0; i < (p.width + p.stride_w - 1) / p.stride_w; ++i) input_places[i] = i * input_stride;
  }

  void run() {
    const int64_t rows = p.batch * plan.out_height;
    const int64_t first = cut(rows, plan.parts, work.part_begin);
    for (int64_t part = work.part_begin; part < work.part_end; ++part) {
      T* const sums = static_cast<T*>(plan.sums) + part * layout.sums_elements;
      clear_sums(sums);
      const int64_t end = cut(rows, plan.parts, part + 1);
      for (int64_t row = cut(rows, plan.parts, part); row < end;) {
        const int64_t image = row / plan.out_height, begin = row % plan.out_height;
        const int64_t stop = smaller(plan.out_height, begin + end - row);
        if (begin == 0) ring_begin = ring_end = 0;
        if (row == first && begin > 0 && !in_place) {
          ring_begin = ring_end = larger<int64_t>(0, begin - plan.halo);
          bands(image, ring_begin, begin, false, sums);
        }
        bands(image, begin, stop, true, sums);
        row += stop - begin;
      }
    }
  }

  void clear_sums(T* sums) const {
    const int64_t panels = work.panel_end - work.panel_begin;
    const auto clear = [&](int64_t offset, int64_t each) {
      memset(sums + offset + work.panel_begin * each, 0, static_cast<size_t>(panels * each) * sizeof(T));
    };
    if (plan.gradients.pointwise_weight != nullptr && !plan.direct)
      clear(layout.pointwise_sums, p.multiplier * p.out_channels * panel);
    clear(layout.depthwise_sums, p.multiplier * p.kernel_h * p.kernel_w * panel);
    clear(layout.depthwise_bias_sums, p.multiplier * panel);
    if (work.panel_begin == 0)
      memset(sums + layout.bias_sums, 0, static_cast<size_t>(round_up(p.out_channels, V::width)) * sizeof(T));
  }

  void bands(int64_t image, int64_t begin, int64_t end, bool counts, T* sums) {
    const int64_t count = (end - begin + plan.band_rows - 1) / plan.band_rows;
    for (int64_t i = 0; i < count; ++i)
      band({image, begin + cut(end - begin, count, i), begin + cut(end - begin, count, i + 1), counts, sums});
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
      pack_gradient(b);
    if (b.counts && work.panel_begin == 0 && plan.gradients.bias != nullptr) bias_gradient(b);
    if (!pointwise && !plan.need_inner) return;
    keep_rows(b);
    for (int64_t q = work.panel_begin; q < work.panel_end; ++q) {
      const int64_t channel = q * panel, channels = smaller<int64_t>(panel, p.channels - channel);
      const Window<T> x = needs_input(b) ? input_of(b, channel, channels) : Window<T>();
      for (int64_t filter = 0; filter < p.multiplier; ++filter) {
        const int64_t index = q * p.multiplier + filter;
        if (needs_values(b)) values_of(b, x, channel, filter, pointwise);
        if (pointwise) pointwise_gradient(b, index, channels);
        if (!plan.need_inner) continue;
        if (in_place) {
          depthwise_gradient(b, x, index, channels, given(b, b.begin, channel), p.channels);
          continue;
        }
        T* const dt = ring(q, filter, b.begin);
        const int64_t pixels = (b.end - b.begin) * plan.out_width;
        if (p.out_channels > 0)
          product(b, index, channels, dt);
        else
          take_gradient(b, channel, channels, filter, dt);
        const T* const z = scratch + (plan.mid_from_output ? s.values : s.arguments);
        for_pixels(pixels, channels, [&](int64_t offset, int64_t count) {
          multiply_by_slope<V>(p.mid_activation, dt + offset, z + offset, count);
        });
        if (b.counts) depthwise_gradient(b, x, index, channels, dt, panel);
      }
      if (b.counts && plan.gradients.input != nullptr) rows_of_input(b, q, channel, channels);
    }
  }

  // The spans of [pixel][panel] that hold something: of a panel with few channels, the first vectors of each pixel.
  template <class F>
  static void for_pixels(int64_t pixels, int64_t channels, const F& f) {
    const int64_t count = round_up(channels, V::width);
    if (count == panel) return f(0, pixels * panel);
    for (int64_t i = 0; i < pixels; ++i) f(i * panel, count);
  }

  // ---- dv -----------------------------------------------------------------------------------------------------------

  // Pixels [first, first + pixels) of a band, at most Rows, of a tensor like the output; zeros behind the last channel
  // of its vector. Pixels of channels-last are read whole, one after the other.
  void take_pixels(const void* tensor, const Band& b, int64_t first, int64_t pixels, T* to) const {
    const int64_t plane = plan.out_height * plan.out_width, pixel = b.begin * plan.out_width + first;
    const T* image = static_cast<const T*>(tensor) + b.image * plane * p.out_channels;
    if (p.layout == Layout::nhwc) {
      const T* from = image + pixel * p.out_channels;
      for (int64_t i = 0; i < pixels; ++i, from += p.out_channels)
        for (int64_t k = 0; k < p.out_channels; k += group)
          copy_vectors(from + k, smaller<int64_t>(group, p.out_channels - k), to + k / group * block + i * group);
      return;
    }
    for (int64_t k = 0; k < p.out_channels; k += group, to += block) {
      const int64_t channels = smaller<int64_t>(group, p.out_channels - k), whole = channels / V::width * V::width;
      for (int64_t i = 0; whole < channels && i < pixels; ++i) V::store(to + i * group + whole, V::set1(0));
      transpose<V>(image + k * plane + pixel, channels, pixels, plane, to, group);
    }
  }

  static void copy_vectors(const T* from, int64_t count, T* to) {
    int64_t i = 0;
    for (; i + V::width <= count; i += V::width) V::store(to + i, V::load(from + i));
    if (i < count) V::store(to + i, V::load_n(from + i, static_cast<int>(count - i)));
  }

  void pack_gradient(const Band& b) const {
    const int64_t pixels = (b.end - b.begin) * plan.out_width;
    T *to = scratch + s.gradient, *const saved = scratch + s.saved;
    for (int64_t first = 0; first < pixels; first += Rows, to += s.blocks * block) {
      const int64_t count = smaller<int64_t>(Rows, pixels - first);
      take_pixels(plan.grad_output, b, first, count, to);
      if (p.activation == Activation::identity) continue;
      take_pixels(plan.saved, b, first, count, saved);
      for (int64_t k = 0, at = 0; k < p.out_channels; k += group, at += block) {
        const int64_t channels = smaller<int64_t>(group, round_up(p.out_channels - k, V::width));
        const int64_t spans = channels == group ? 1 : count;
        for (int64_t i = 0; i < spans; ++i)
          multiply_by_slope<V>(p.activation, to + at + i * group, saved + at + i * group, count / spans * channels);
      }
    }
  }

  void bias_gradient(const Band& b) const {
    const int64_t pixels = (b.end - b.begin) * plan.out_width;
    const auto first_pixel = [&](int64_t k) { return scratch + s.gradient + k / group * block + k % group; };
    constexpr int many = 4;
    int64_t k = 0;
    for (; k + many * V::width <= p.out_channels; k += many * V::width) {
      const T* from[many];
      for (int i = 0; i < many; ++i) from[i] = first_pixel(k + i * V::width);
      add_pixels<many>(from, group, Rows, s.blocks * block, pixels, b.sums + layout.bias_sums + k);
    }
    for (; k < p.out_channels; k += V::width) {
      const T* from[1] = {first_pixel(k)};
      add_pixels<1>(from, group, Rows, s.blocks * block, pixels, b.sums + layout.bias_sums + k);
    }
  }

  // Adds vectors of pixels to their sums, one pixel after the other; several vectors at a time, whose chains of
  // additions overlap. `neighbours` pixels are `stride` apart, then come the next ones, `next` further.
  template <int Vectors, class Count = Constant<V::width>>
  static void add_pixels(const T* (&from)[Vectors], int64_t stride, int64_t neighbours, int64_t next, int64_t pixels,
                         T* sums, Count lanes = {}) {
    typename V::Reg acc[Vectors];
    FASTSEP_UNROLL
    for (int v = 0; v < Vectors; ++v) acc[v] = V::load(sums + v * V::width);
    for (; pixels > 0; pixels -= neighbours) {
      const int64_t count = smaller(pixels, neighbours);
      for (int64_t i = 0; i < count; ++i) {
        FASTSEP_UNROLL
        for (int v = 0; v < Vectors; ++v) acc[v] = V::add(acc[v], V::load_n(from[v] + i * stride, lanes));
      }
      FASTSEP_UNROLL
      for (int v = 0; v < Vectors; ++v) from[v] += next;
    }
    FASTSEP_UNROLL
    for (int v = 0; v < Vectors; ++v) V::store(sums + v * V::width, acc[v]);
  }

  // ---- the two products -------------------------------------------------------------------------------------------

  // du, into the ring
  void product(const Band& b, int64_t index, int64_t channels, T* du) const {
    const int64_t pixels = (b.end - b.begin) * plan.out_width;
    Product<T> product = {};
    product.groups = 1;
    product.depth = p.out_channels;
    product.block_depth = group;
    product.a_block_stride = block;
    product.a_stride = 1;
    product.b = packed<T>(plan, layout.pointwise) + index * p.out_channels * panel;
    product.b_stride = panel;
    product.start = packed<T>(plan, layout.zeros);
    product.clamp = clamp_of<T>(Activation::identity);
    product.c_stride = product.column_count = panel;
    for (int64_t first = 0; first < pixels; first += Rows) {
      product.a = scratch + s.gradient + first / Rows * s.blocks * block;
      product.c = du + first * panel;
      multiply<V, Rows, Columns, group>(product, smaller<int64_t>(Rows, pixels - first),
                                        (channels + V::width - 1) / V::width);
    }
  }

  // The rows are output channels of one group; those of the last are cut as evenly as possible, for a tile of few rows
  // waits for its own sums.
  void pointwise_gradient(const Band& b, int64_t index, int64_t channels) const {
    Product<T> product = {};
    product.groups = 1;
    product.depth = (b.end - b.begin) * plan.out_width;
    product.block_depth = Rows;
    product.a_block_stride = s.blocks * block;
    product.a_stride = group;
    product.b = scratch + s.values;
    product.b_stride = panel;
    product.clamp = clamp_of<T>(Activation::identity);
    T* sums = b.sums + layout.pointwise_sums + index * p.out_channels * panel;
    product.c_stride = panel;
    if (plan.direct) {
      sums = static_cast<T*>(plan.gradients.pointwise_weight) + index * panel;
      product.c_stride = p.channels;
    }
    const bool first = plan.direct && b.image == 0 && b.begin == 0;
    product.start_stride = first ? 0 : product.c_stride;
    product.column_count = plan.direct ? channels : panel;
    for (int64_t k = 0; k < p.out_channels; k += group) {
      const int64_t count = smaller<int64_t>(group, p.out_channels - k), tiles = (count + Rows - 1) / Rows;
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t begin = cut(count, tiles, i);
        product.a = scratch + s.gradient + k / group * block + begin;
        product.c = sums + (k + begin) * product.c_stride;
        product.start = first ? packed<T>(plan, layout.zeros) : product.c;
        multiply<V, Rows, Columns, 1>(product, cut(count, tiles, i + 1) - begin, (channels + V::width - 1) / V::width);
      }
    }
  }

  // ---- the depthwise half -------------------------------------------------------------------------------------------

  // A panel of channels of x. Only the rows that the band's taps touch are there.
  Window<T> input_of(const Band& b, int64_t channel, int64_t channels) const {
    const T* image = static_cast<const T*>(plan.input) + b.image * p.channels * p.height * p.width;
    if (!is_copied(plan)) return window_of(p, image + channel, p.width * p.channels, p.channels, channels);
    const int64_t top = b.begin * p.stride_h - p.pad_top;
    const int64_t begin = smaller(p.height, larger<int64_t>(0, top));
    const int64_t bottom = top + (b.end - b.begin - 1) * p.stride_h + reach(p);
    const int64_t end = larger(begin, smaller(p.height, bottom)), pixels = (end - begin) * p.width;
    T* const copy = scratch + s.input;
    if (p.layout == Layout::nhwc)
      copy_panel(image + begin * p.width * p.channels + channel, pixels, channels, copy);
    else if (pixels > 0)
      transpose<V>(image + (channel * p.height + begin) * p.width, channels, pixels, p.height * p.width, copy, panel);
    return window_of<T>(p, copy - begin * p.width * panel, p.width * panel, panel, channels);
  }

  // Some channels of neighbouring pixels of x, in whole vectors.
  void copy_panel(const T* from, int64_t pixels, int64_t channels, T* to) const {
    for (int64_t i = 0; i < pixels; ++i, from += p.channels, to += panel) copy_vectors(from, channels, to);
  }

  // t and u of one filter.
  void values_of(const Band& b, const Window<T>& x, int64_t channel, int64_t filter, bool need_values) const {
    T* const values = scratch + s.values;
    T* const arguments = plan.mid_from_output ? values : scratch + s.arguments;
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
    if (is_clamp(p.mid_activation) || !(need_values || plan.mid_from_output)) return;
    const int64_t pixels = (b.end - b.begin) * plan.out_width;
    if (!plan.mid_from_output) memcpy(values, arguments, static_cast<size_t>(pixels * panel) * sizeof(T));
    for_pixels(pixels, x.channels,
               [&](int64_t offset, int64_t count) { activate<V>(p.mid_activation, values + offset, count); });
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

  void depthwise_gradient(const Band& b, const Window<T>& x, int64_t index, int64_t channels, const T* dt,
                          int64_t dt_stride) const {
    const int64_t taps = p.kernel_h * p.kernel_w;
    if (plan.gradients.depthwise_weight != nullptr) {
      WeightGradient<T> g(x);
      g.stride_h = p.stride_h;
      g.pad_top = p.pad_top;
      g.pad_left = p.pad_left;
      g.row_begin = b.begin;
      g.row_end = b.end;
      g.columns = plan.out_width;
      g.gradient = dt;
      g.gradient_stride = dt_stride;
      g.sums = b.sums + layout.depthwise_sums + index * taps * panel;
      g.sums_stride = panel;
      weight_gradient<V>(g);
    }
    if (plan.gradients.depthwise_bias != nullptr) {
      T* const sums = b.sums + layout.depthwise_bias_sums + index * panel;
      const int64_t pixels = (b.end - b.begin) * plan.out_width;
      if (channels == panel) {
        const T* from[Columns];
        for (int i = 0; i < Columns; ++i) from[i] = dt + i * V::width;
        return add_pixels<Columns>(from, dt_stride, pixels, 0, pixels, sums);
      }
      for (int64_t c = 0; c < channels; c += V::width) {
        const T* from[1] = {dt + c};
        add_pixels<1>(from, dt_stride, pixels, 0, pixels, sums + c,
                      static_cast<int>(smaller<int64_t>(V::width, channels - c)));
      }
    }
  }

  // ---- dt's ring and dx ---------------------------------------------------------------------------------------------

  T* ring(int64_t q, int64_t filter, int64_t row) const {
    return scratch + s.ring + ((q - work.panel_begin) * p.multiplier + filter) * s.ring_stride +
           (row - ring_begin) * plan.out_width * panel;
  }

  // Makes room for a band behind the rows of dt that its rows of dx reach.
  void keep_rows(const Band& b) {
    if (!plan.need_inner || in_place) return;
    if (plan.gradients.input == nullptr) ring_end = ring_begin = b.begin;
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

  // The rows of dx whose last row of dt is in this band.
  void rows_of_input(const Band& b, int64_t q, int64_t channel, int64_t channels) const {
    const auto row_of = [&](int64_t oy) { return smaller(p.height, larger<int64_t>(0, oy * p.stride_h - p.pad_top)); };
    const int64_t begin = b.begin == 0 ? 0 : row_of(b.begin);
    const int64_t end = b.end == plan.out_height ? p.height : row_of(b.end);
    T* const image = static_cast<T*>(plan.gradients.input) + b.image * p.channels * p.height * p.width;
    if (p.layout == Layout::nhwc) {
      T* const to = image + begin * p.width * p.channels + channel;
      return rows_of_input(b, begin, end, q, channel, channels, to, p.channels, false);
    }
    T* const rows = scratch + s.output;
    for (int64_t row = begin; row < end; row += s.output_rows) {
      const int64_t stop = smaller(end, row + s.output_rows);
      rows_of_input(b, row, stop, q, channel, channels, rows, panel, true);
      transpose<V>(rows, (stop - row) * p.width, channels, panel, image + channel * p.height * p.width + row * p.width,
                   p.height * p.width);
    }
  }

  void rows_of_input(const Band& b, int64_t begin, int64_t end, int64_t q, int64_t channel, int64_t channels, T* to,
                     int64_t to_stride, bool whole_vectors) const {
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
      g.window.plane = in_place ? given(b, 0, channel) : ring(q, filter, 0);
      g.weight = packed<T>(plan, layout.reversed) + filter * p.kernel_h * p.kernel_w * layout.padded_channels + channel;
      g.add = filter > 0;
      g.finite = all_finite<V>(g.weight, channels, p.kernel_h * p.kernel_w, g.weight_stride);
      input_gradient<V, Run>(g);
    }
  }
};

template <class V, class Shape>
int64_t backward_scratch_bytes(const BackwardPlan& plan, int64_t panels) {
  return Backward<V, Shape>::scratch_bytes(plan, panels);
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
