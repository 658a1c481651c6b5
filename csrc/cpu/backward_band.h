// What the backward pass works on at a time, a band: some rows of one image, or some whole images. Its pixels follow
// each other in memory in every part of the scratch,
//
//   dv = g * act'   [pixel][K]       packed in blocks of Rows pixels x group channels
//   t, u            [pixel][panel]   of one panel of input channels at a time
//   dt              [pixel][panel]   a ring for each panel where bands are rows, the last of which the next band's dx
//                                    reaches; one for all where they are images
#pragma once

#include <string.h>

#include "depthwise_backward.h"
#include "kernel.h"
#include "pointwise.h"

namespace fastsep {
namespace FASTSEP_ISA {
namespace {

template <class V, class Shape>
struct BackwardBand {
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
    int64_t input_rows;   // of x that are copied, of each image
    int64_t output_rows;
    int64_t gradient, saved, values, arguments, ring, input, output, places, total;
  };

  static Scratch scratch_of(const BackwardPlan& plan, int64_t panels) {
    const Problem& p = plan.problem;
    const int64_t images = larger<int64_t>(1, plan.band_images), pixels = images * plan.band_rows * plan.out_width;
    const bool planar = p.layout == Layout::nchw;
    Scratch s;
    s.blocks = (p.out_channels + group - 1) / group;
    s.ring_rows =
        plan.band_images > 0 ? images * plan.out_height : smaller(plan.out_height, plan.halo + plan.band_rows);
    s.ring_stride = s.ring_rows * plan.out_width * panel;
    s.input_rows = is_copied(plan) ? smaller(p.height, (plan.band_rows - 1) * p.stride_h + reach(p)) : 0;
    s.output_rows = planar ? smaller(p.height, 1 + 64 / p.width) : 0;
    s.gradient = 0;
    s.saved = s.gradient + (pixels + Rows - 1) / Rows * s.blocks * block;
    s.values = s.saved + s.blocks * block;
    s.arguments = s.values + pixels * panel;
    s.ring = s.arguments + (plan.mid_from_output ? 0 : pixels * panel);
    const int64_t rings = plan.band_images > 0 ? 1 : panels;
    s.input = s.ring + (plan.need_inner && !is_in_place(plan) ? rings * p.multiplier * s.ring_stride : 0);
    s.output = s.input + images * s.input_rows * p.width * panel;
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

  // Rows [begin, end) of the output of some images: of one, or all rows of each.
  struct Band {
    int64_t image, images, begin, end;
    bool counts;  // else only dt is wanted, for the rows of dx below
    bool first;   // of those of the part that count
    T* sums;      // of the part
  };

  const BackwardPlan& plan;
  const Problem& p;
  const BackwardLayout& layout;
  const Scratch s;
  T* const scratch;

  BackwardBand(const BackwardPlan& plan_, int64_t panels, T* scratch_)
      : plan(plan_), p(plan_.problem), layout(plan_.layout), s(scratch_of(plan_, panels)), scratch(scratch_) {}

  int64_t pixels_of(const Band& b) const { return b.images * (b.end - b.begin) * plan.out_width; }

  // Calls f(image, number of its first pixel in the band) for each image, of `images` 1.
  template <class F>
  void for_images(const Band& b, const F& f) const {
    const int64_t pixels = (b.end - b.begin) * plan.out_width;
    for (int64_t i = 0; i < b.images; ++i)
      f(Band{b.image + i, 1, b.begin, b.end, b.counts, b.first, b.sums}, i * pixels);
  }

  // ---- dv -----------------------------------------------------------------------------------------------------------

  // Pixels [first, first + pixels) of a band, at most Rows, of a tensor like the output; zeros behind the last channel
  // of its vector. Pixels of channels-last are read whole, one after the other.
  void take_pixels(const void* tensor, const Band& b, int64_t first, int64_t pixels, T* to) const {
    const int64_t plane = plan.out_height * plan.out_width;
    int64_t pixel = b.image * plane + b.begin * plan.out_width + first;
    if (p.layout == Layout::nhwc) {
      const T* from = static_cast<const T*>(tensor) + pixel * p.out_channels;
      for (int64_t i = 0; i < pixels; ++i, from += p.out_channels)
        for (int64_t k = 0; k < p.out_channels; k += group)
          copy_vectors(from + k, smaller<int64_t>(group, p.out_channels - k), to + k / group * block + i * group);
      return;
    }
    for (const int64_t end = pixel + pixels; pixel < end;) {
      const int64_t image = pixel / plane, count = smaller(end, (image + 1) * plane) - pixel;
      take_planar_pixels(static_cast<const T*>(tensor) + image * plane * p.out_channels + pixel % plane, count, to);
      pixel += count;
      to += count * group;
    }
  }

  // Neighbouring pixels of one image.
  void take_planar_pixels(const T* from, int64_t pixels, T* to) const {
    const int64_t plane = plan.out_height * plan.out_width;
    for (int64_t k = 0; k < p.out_channels; k += group, to += block) {
      const int64_t channels = smaller<int64_t>(group, p.out_channels - k), whole = channels / V::width * V::width;
      for (int64_t i = 0; whole < channels && i < pixels; ++i) V::store(to + i * group + whole, V::set1(0));
      transpose<V>(from + k * plane, channels, pixels, plane, to, group);
    }
  }

  static void copy_vectors(const T* from, int64_t count, T* to) {
    int64_t i = 0;
    for (; i + V::width <= count; i += V::width) V::store(to + i, V::load(from + i));
    if (i < count) V::store(to + i, V::load_n(from + i, static_cast<int>(count - i)));
  }

  void pack_gradient(const Band& b) const {
    const int64_t pixels = pixels_of(b);
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
    const int64_t pixels = pixels_of(b);
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
};

}  // namespace
}  // namespace FASTSEP_ISA
}  // namespace fastsep
