// The forward tile with an expansion, channels-last: e = expand_act(expand(x)) as a product of its own, then what
// forward_channels_last.h does to e in the place of x, without e ever being whole.
//
// A tile is worked on in bands of rows. For each panel of channels the rows of e that the band sees are made in a
// buffer, [row][W][panel], by the same product as everywhere, and taken at once by the depthwise half; the rows that
// the next band sees too are kept. All panels of the depthwise output of a band stand in the scratch as always.
#pragma once

#include <string.h>

#include "forward_channels_last.h"

namespace fastsep {
namespace FASTSEP_ISA {
namespace {

template <class V, class Shape>
struct ForwardExpanded {
  using T = typename V::T;
  using Plain = ForwardChannelsLast<V, Shape>;
  static constexpr int Rows = Shape::rows, Columns = Shape::columns, Run = Shape::run;
  static constexpr int panel = Columns * V::width, block = Rows * V::width;

  // Parts of the scratch, in elements.
  struct Layout {
    int64_t rows;       // of e that a band sees
    int64_t kept_rows;  // of those that the next one sees too, at most
    bool by_rows;       // x as rows with its padding, see take_rows(); else in blocks, see take_patches()
    int64_t blocks;     // of V::width elements of a patch of x
    int64_t row_length;
    int64_t input, buffer, kept, groups, total;
  };

  // How many bands a tile of so many rows is cut into.
  static int64_t bands_of(const ForwardPlan& plan, int64_t tile_rows) {
    return (tile_rows + plan.band_rows - 1) / plan.band_rows;
  }

  static Layout layout_of(const ForwardPlan& plan, int64_t tile_rows) {
    const Problem& p = plan.problem;
    const int64_t reach = (p.kernel_h - 1) * p.dilation_h + 1;
    const Lengths bands = lengths_of(tile_rows, bands_of(plan, tile_rows));
    Layout layout;
    layout.rows = smaller(p.height, (bands.longer - 1) * p.stride_h + reach);
    layout.kept_rows = plan.channel_tiles > 0 ? 0 : smaller(p.height, larger<int64_t>(0, reach - p.stride_h));
    layout.blocks = (expansion_depth(p) + V::width - 1) / V::width;
    layout.by_rows = p.expand.channels * p.expand.stride_w == image_stride;
    layout.row_length = ((p.width - 1) * p.expand.stride_w + p.expand.kernel_w) * p.expand.channels;
    layout.input = 0;
    if (layout.by_rows)
      layout.buffer = round_up(((layout.rows - 1) * p.expand.stride_h + p.expand.kernel_h) * layout.row_length, block);
    else
      layout.buffer = (layout.rows * p.width + Rows - 1) / Rows * layout.blocks * block;
    layout.kept = layout.buffer + layout.rows * p.width * panel;
    layout.groups = layout.kept + plan.layout.expand_panels * layout.kept_rows * p.width * panel;
    // In the first of two passes the groups are elsewhere, and where the depthwise half is the end there are none: here
    // is only where their pixels are. A lower band may take more than a higher one, see plan.cpp.
    if (plan.channel_tiles > 0)
      layout.total = layout.groups + plan.out_height * plan.out_width * Plain::places;
    else if (p.out_channels == 0)
      layout.total = layout.groups + plan.out_width * Plain::places;
    else
      layout.total = layout.groups + larger(Plain::layout_of(plan, bands.shorter, plan.out_width).total,
                                            Plain::layout_of(plan, bands.longer, plan.out_width).total);
    return layout;
  }

  // The groups of all pixels of an image, which two passes share.
  static typename Plain::Groups shared_groups_of(const ForwardPlan& plan) {
    return Plain::groups_of(plan, plan.out_height, plan.out_width);
  }

  static int64_t shared_bytes(const ForwardPlan& plan) {
    return shared_groups_of(plan).count() * Plain::group_elements(plan) * int64_t(sizeof(T));
  }

  static int64_t scratch_bytes(const ForwardPlan& plan, int64_t rows) {
    return layout_of(plan, rows).total * int64_t(sizeof(T));
  }

  // Rows of the plane.
  struct Interval {
    int64_t begin, end;
  };

  // Those that output rows [begin, end) see.
  static Interval seen_by(const Problem& p, int64_t begin, int64_t end) {
    const int64_t top = begin * p.stride_h - p.pad_top;
    const int64_t bottom = (end - 1) * p.stride_h - p.pad_top + (p.kernel_h - 1) * p.dilation_h + 1;
    const int64_t first = smaller(p.height, larger<int64_t>(0, top));
    return {first, larger(first, smaller(p.height, bottom))};
  }

  // The first of two passes: some channels of the depthwise output of an image, in the groups that all channels share.
  static void run_channels(const ForwardPlan& plan, const Tile& tile, T* scratch) {
    const Problem& p = plan.problem;
    const Layout layout = layout_of(plan, plan.out_height);
    const auto groups = shared_groups_of(plan);
    const Interval seen = seen_by(p, 0, plan.out_height);
    int64_t* const place = reinterpret_cast<int64_t*>(scratch + layout.groups);
    Plain::place_pixels(plan, groups, place);
    T* const shared = shared_of(plan, tile.image);
    run_panels(plan, tile, layout, {seen, {seen.begin, seen.begin}, {seen.end, seen.end}}, place, shared, scratch);
    if (is_clamp(p.mid_activation)) return;
    const int64_t begin = tile.channel_begin * panel;
    const int64_t end = smaller(plan.layout.padded_channels, tile.channel_end * panel);
    for (int64_t g = 0; g < groups.count(); ++g)
      activate<V>(p.mid_activation, shared + g * Plain::group_elements(plan) + begin * Rows, (end - begin) * Rows);
  }

  static T* shared_of(const ForwardPlan& plan, int64_t image) {
    return reinterpret_cast<T*>(static_cast<char*>(plan.shared) + image * plan.shared_bytes);
  }

  static void run(const ForwardPlan& plan, const Tile& tile, T* scratch) {
    const Problem& p = plan.problem;
    if (plan.channel_tiles > 0) {
      Tile image = tile;
      image.row_begin = 0;
      image.row_end = plan.out_height;
      const auto groups = shared_groups_of(plan);
      return Plain::pointwise_groups(plan, image, groups, shared_of(plan, tile.image),
                                     cut(groups.count(), plan.row_tiles, tile.row_tile),
                                     cut(groups.count(), plan.row_tiles, tile.row_tile + 1));
    }
    const int64_t rows = tile.row_end - tile.row_begin, bands = bands_of(plan, rows);
    const Layout layout = layout_of(plan, rows);
    Interval kept = {0, 0};
    for (int64_t i = 0; i < bands; ++i) {
      Tile band = tile;
      band.row_begin = tile.row_begin + cut(rows, bands, i);
      band.row_end = tile.row_begin + cut(rows, bands, i + 1);
      const Interval seen = seen_by(p, band.row_begin, band.row_end);
      Interval next = {seen.end, seen.end};
      if (i + 1 < bands) next.begin = smaller(seen.end, seen_by(p, band.row_end, band.row_end + 1).begin);
      if (kept.begin != seen.begin) kept = {seen.begin, seen.begin};
      run_band(plan, band, layout, {seen, kept, next}, scratch);
      kept = next;
    }
  }

  // `seen` rows of e are what a band needs; `kept` ones are there, from the first of them on; `next` ones are to be
  // kept.
  struct BandRows {
    Interval seen, kept, next;
  };

  static void run_band(const ForwardPlan& plan, const Tile& band, const Layout& layout, const BandRows& rows,
                       T* scratch) {
    const Problem& p = plan.problem;
    T* const depthwise = scratch + layout.groups;
    run_panels(plan, band, layout, rows, place_pixels(plan, band, depthwise), depthwise, scratch);
    if (p.out_channels > 0)
      return Plain::pointwise_tile(plan, band, Plain::groups_of(plan, band.row_end - band.row_begin, plan.out_width),
                                   depthwise);
    if (is_clamp(p.mid_activation)) return;
    T* const output = output_row(plan, band, band.row_begin);
    activate<V>(p.mid_activation, output, (band.row_end - band.row_begin) * plan.out_width * p.channels);
  }

  // The panels of channels of the band's depthwise output, to the groups at `depthwise`, if that is not the end.
  static void run_panels(const ForwardPlan& plan, const Tile& band, const Layout& layout, const BandRows& rows,
                         const int64_t* place, T* depthwise, T* scratch) {
    const Problem& p = plan.problem;
    const auto groups = Plain::groups_of(plan, band.row_end - band.row_begin, plan.out_width);
    const Interval seen = rows.seen, kept = rows.kept, next = rows.next;
    const int64_t row_elements = p.width * panel;
    T* const buffer = scratch + layout.buffer;
    const T* const input = input_of(plan, band.image, {kept.end, seen.end}, layout, scratch + layout.input);
    for (int64_t q = band.channel_begin; q < band.channel_end; ++q) {
      const int64_t channel = q * panel, channels = smaller<int64_t>(panel, p.channels - channel);
      T* const keep = scratch + layout.kept + q * layout.kept_rows * row_elements;
      memcpy(buffer, keep, static_cast<size_t>((kept.end - kept.begin) * row_elements) * sizeof(T));
      Panel e(plan, q, q + 1 < band.channel_end, channels, layout, input, kept.end,
              buffer + (kept.end - seen.begin) * row_elements);

      ChannelsLastRow<T> row(window_of<T>(p, buffer - seen.begin * row_elements, row_elements, panel, channels));
      row.weight = packed<T>(plan, plan.layout.depthwise_channels_last) + channel;
      row.weight_stride = plan.layout.padded_channels;
      row.start = packed<T>(plan, plan.layout.depthwise_bias) + channel;
      row.start_stride = 0;
      row.clamp = clamp_of<T>(p.mid_activation);
      const auto before = [&](int64_t oy) { e.make(seen_by(p, oy, oy + 1).end, seen.end); };
      if (p.out_channels == 0)
        depthwise_to_output(plan, band, channel, row, place, before);
      else
        Plain::depthwise_tile(plan, band, groups, row, place, depthwise + channel * Rows, before);
      e.make(seen.end, seen.end);
      memcpy(keep, buffer + (next.begin - seen.begin) * row_elements,
             static_cast<size_t>((next.end - next.begin) * row_elements) * sizeof(T));
    }
  }

  // Where the depthwise half is the end: row oy of the output.
  static T* output_row(const ForwardPlan& plan, const Tile& band, int64_t oy) {
    const int64_t row = band.image * plan.out_height + oy;
    return static_cast<T*>(plan.output) + row * plan.out_width * plan.problem.channels;
  }

  // Where the pixels of the depthwise output stand: of a row of it, or in the groups of a band.
  static const int64_t* place_pixels(const ForwardPlan& plan, const Tile& band, T* scratch) {
    if (plan.problem.out_channels > 0) {
      const auto layout = Plain::layout_of(plan, band.row_end - band.row_begin, plan.out_width);
      int64_t* const place = reinterpret_cast<int64_t*>(scratch + layout.place);
      Plain::place_pixels(plan, layout.groups, place);
      return place;
    }
    int64_t* const place = reinterpret_cast<int64_t*>(scratch);
    for (int64_t i = 0; i < plan.out_width; ++i) place[i] = i * plan.problem.channels;
    return place;
  }

  // The channels of a panel, `row` for one filter of each, to all rows of the band.
  template <class Before>
  static void depthwise_to_output(const ForwardPlan& plan, const Tile& band, int64_t channel, ChannelsLastRow<T> row,
                                  const int64_t* place, const Before& before) {
    const Problem& p = plan.problem;
    row.left = -p.pad_left;
    row.pixels = plan.out_width;
    row.output_stride = p.channels;
    row.output_vector_stride = V::width;
    row.whole_vectors = false;
    const bool finite = all_finite<V>(row.weight, row.channels, p.kernel_h * p.kernel_w, row.weight_stride);
    int64_t rows;
    for (int64_t oy = band.row_begin; oy < band.row_end; oy += rows) {
      rows = takes_sweeps<V>(p) ? next_sweep(band.row_end - oy) : 1;
      before(oy + rows - 1);
      row.top = oy * p.stride_h - p.pad_top;
      row.output = output_row(plan, band, oy) + channel;
      if (rows > 1)
        channels_last_rows<V, Run>(row, rows, plan.out_width * p.channels);
      else
        placed_or_plain_row<V, Run>(row, place, finite);
    }
  }

  // What the product makes rows [begin, end) of e from.
  static const T* input_of(const ForwardPlan& plan, int64_t image, const Interval& rows, const Layout& layout,
                           T* room) {
    const Expansion& e = plan.problem.expand;
    const T* plane = static_cast<const T*>(plan.input) + image * e.height * e.width * e.channels;
    if (layout.by_rows) {
      take_rows(plan, plane, rows, layout, room);
    } else if (is_1x1(plan.problem)) {
      // Pixels of as many channels as a vector has elements are such blocks as they lie.
      if (e.channels == V::width) return plane + rows.begin * e.width * V::width;
      take_pixels(plane + rows.begin * e.width * e.channels, (rows.end - rows.begin) * e.width, e.channels, room);
    } else {
      take_patches(plan, plane, rows, layout, room);
    }
    return room;
  }

  // Of the same pixels as the plane: neither more nor fewer, or rows would be of other lengths.
  static bool is_1x1(const Problem& p) {
    const Expansion& e = p.expand;
    return e.kernel_h * e.kernel_w * e.stride_h * e.stride_w == 1 && e.pad_top == 0 && e.pad_left == 0 &&
           e.height == p.height && e.width == p.width;
  }

  // Pixels in blocks of Rows pixels x width; behind the last channel of a block may stand anything.
  static void take_pixels(const T* x, int64_t pixels, int64_t channels, T* to) {
    const int64_t whole = channels / V::width, rest = channels % V::width;
    for (int64_t pixel = 0; pixel < pixels; pixel += Rows) {
      const int64_t count = smaller<int64_t>(Rows, pixels - pixel);
      for (int64_t b = 0; b < whole; ++b, to += block)
        for (int64_t i = 0; i < count; ++i) V::store(to + i * V::width, V::load(x + i * channels + b * V::width));
      if (rest > 0) {
        for (int64_t i = 0; i < count; ++i)
          V::store(to + i * V::width, V::load_n(x + i * channels + whole * V::width, static_cast<int>(rest)));
        to += block;
      }
      x += count * channels;
    }
  }

  // For each pixel its patch of x, row by row, in blocks of Rows pixels x width. Outside of x it is zero.
  static void take_patches(const ForwardPlan& plan, const T* plane, const Interval& rows, const Layout& layout, T* to) {
    const Problem& p = plan.problem;
    const Expansion& e = p.expand;
    const int64_t groups = ((rows.end - rows.begin) * p.width + Rows - 1) / Rows;
    memset(to, 0, static_cast<size_t>(groups * layout.blocks * block) * sizeof(T));
    int64_t pixel = 0;
    for (int64_t y = rows.begin; y < rows.end; ++y) {
      for (int64_t x = 0; x < p.width; ++x, ++pixel) {
        T* const blocks = to + pixel / Rows * layout.blocks * block + pixel % Rows * V::width;
        const int64_t left = x * e.stride_w - e.pad_left;
        const int64_t begin = larger<int64_t>(0, -left), end = smaller(e.kernel_w, e.width - left);
        for (int64_t r = 0; r < e.kernel_h; ++r) {
          const int64_t row = y * e.stride_h - e.pad_top + r;
          if (row < 0 || row >= e.height || begin >= end) continue;
          copy_to_blocks(plane + (row * e.width + left + begin) * e.channels, (end - begin) * e.channels,
                         (r * e.kernel_w + begin) * e.channels, blocks);
        }
      }
    }
  }

  // from[0 .. count) to position `at` and on of one pixel of a group.
  static void copy_to_blocks(const T* from, int64_t count, int64_t at, T* blocks) {
    while (count > 0) {
      const int64_t lane = at % V::width, lanes = smaller(count, V::width - lane);
      T* const place = blocks + at / V::width * block + lane;
      if (lanes == V::width)
        V::store(place, V::load(from));
      else
        V::store_n(place, V::load_n(from, static_cast<int>(lanes)), static_cast<int>(lanes));
      from += lanes;
      at += lanes;
      count -= lanes;
    }
  }

  // The same as rows of x with zeros around, [row][row_length], for the product to walk as they are: the patches of
  // neighbouring pixels of an image are image_stride apart, three channels by a stride of two.
  static constexpr int image_stride = 6;

  static void take_rows(const ForwardPlan& plan, const T* plane, const Interval& rows, const Layout& layout, T* to) {
    const Expansion& e = plan.problem.expand;
    const int64_t before = smaller(layout.row_length, e.pad_left * e.channels);
    const int64_t inside = smaller(layout.row_length - before, e.width * e.channels);
    const int64_t first = rows.begin * e.stride_h - e.pad_top;
    const int64_t last = (rows.end - 1) * e.stride_h - e.pad_top + e.kernel_h;
    for (int64_t row = first; row < last; ++row, to += layout.row_length) {
      memset(to, 0, static_cast<size_t>(layout.row_length) * sizeof(T));
      if (row < 0 || row >= e.height) continue;
      if (e.planar)
        take_planes(plane + row * e.width, e.height * e.width, inside / planes, to + before);
      else
        memcpy(to + before, plane + row * e.width * e.channels, static_cast<size_t>(inside) * sizeof(T));
    }
  }

  // The same of a row of each of an image's planes.
  static constexpr int planes = 3;

  static void take_planes(const T* __restrict x, int64_t plane, int64_t pixels, T* __restrict to) {
    for (int64_t i = 0; i < pixels; ++i)
      for (int64_t channel = 0; channel < planes; ++channel) to[i * planes + channel] = x[channel * plane + i];
  }

  // One panel of e, made row after row as the depthwise half asks for it, so that it finds the rows in the first cache.
  struct Panel {
    const ForwardPlan& plan;
    const Layout& layout;
    const T* const input;
    T* const e;  // rows first_row and on
    const int64_t first_row, channels;
    const bool has_next;
    int64_t made = 0;  // pixels of e
    Product<T> product = {};

    Panel(const ForwardPlan& plan_, int64_t q, bool has_next_, int64_t channels_, const Layout& layout_,
          const T* input_, int64_t first_row_, T* e_)
        : plan(plan_),
          layout(layout_),
          input(input_),
          e(e_),
          first_row(first_row_),
          channels(channels_),
          has_next(has_next_) {
      const Problem& p = plan.problem;
      product.groups = 1;
      product.depth = expansion_depth(p);
      product.block_depth = V::width;
      product.a_block_stride = block;
      product.a_stride = 1;
      product.b = packed<T>(plan, plan.layout.expand) + q * expansion_depth(p) * panel;
      product.b_stride = panel;
      product.start = packed<T>(plan, plan.layout.expand_bias) + q * panel;
      product.clamp = clamp_of<T>(p.expand.activation);
      product.c_stride = product.column_count = panel;
      product.c_is_near = true;
      if (layout.by_rows) {
        product.groups = p.expand.kernel_h;
        product.depth = product.block_depth = p.expand.kernel_w * p.expand.channels;
        product.a_block_stride = layout.row_length;
      }
    }

    // Makes the rows before `end` that are not there yet, of `rows_end` in all.
    void make(int64_t end, int64_t rows_end) {
      const Problem& p = plan.problem;
      const int64_t begin = made;
      const int64_t wanted = (end - first_row) * p.width, all = (rows_end - first_row) * p.width;
      if (layout.by_rows) {
        const int64_t tiles = (p.width + Rows - 1) / Rows;
        for (; made < wanted; made += p.width) {
          product.a = input + made / p.width * p.expand.stride_h * layout.row_length;
          product.c = e + made * panel;
          for (int64_t i = 0; i < tiles; ++i) {
            const int64_t pixels = cut(p.width, tiles, i + 1) - cut(p.width, tiles, i);
            multiply<V, Rows, Columns, image_stride>(product, pixels, channels);
            product.a += pixels * image_stride;
            product.c += pixels * panel;
          }
        }
      } else {
        const int64_t elements = product.depth * panel;
        for (; made < wanted; made = smaller(all, made + Rows)) {
          if (has_next) product.fetch_part(product.b + elements, elements, made / Rows);
          product.a = input + made / Rows * layout.blocks * block;
          product.c = e + made * panel;
          multiply<V, Rows, Columns, V::width>(product, smaller<int64_t>(Rows, all - made), channels);
        }
      }
      if (!is_clamp(p.expand.activation)) activate<V>(p.expand.activation, e + begin * panel, (made - begin) * panel);
    }
  };
};

}  // namespace
}  // namespace FASTSEP_ISA
}  // namespace fastsep
