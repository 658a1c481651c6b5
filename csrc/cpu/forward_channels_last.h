// The forward tile for channels-last.
//
//   y[pixel][k] = act(bias[k] + sum over i of t[pixel][i] * W[i][k])
//
// The scratch t holds groups of up to `rows` pixels, each [m][ceil(C / width)][rows][width]. A group is contiguous and
// its pixels a constant distance apart, so the product walks it with one pointer, and no two rows meet in the same
// cache set, as rows of 4 * C bytes would for C a power of two.
#pragma once

#include "depthwise_placed.h"
#include "depthwise_sweep.h"
#include "kernel.h"
#include "pointwise.h"

namespace fastsep {
namespace FASTSEP_ISA {
namespace {

template <class V, class Shape>
struct ForwardChannelsLast {
  using T = typename V::T;
  static constexpr int Rows = Shape::rows, Columns = Shape::columns, Run = Shape::run;
  static constexpr int panel = Columns * V::width;
  static constexpr int64_t places = int64_t(sizeof(int64_t) / sizeof(T));  // elements that an entry of a table takes

  // The pixels of a tile as runs (rows of the plane, or all rows as one where they are short) cut into groups.
  struct Groups {
    int64_t runs, run_pixels, per_run;
    int64_t begin(int64_t group) const { return cut(run_pixels, per_run, group); }
    int64_t pixels() const { return runs * run_pixels; }
    int64_t count() const { return runs * per_run; }
  };

  static Groups groups_of(const ForwardPlan& plan, int64_t rows, int64_t columns) {
    const int64_t apart = (columns + Rows - 1) / Rows * rows;
    const int64_t joined = (rows * columns + Rows - 1) / Rows;
    if (columns == plan.out_width && joined * 8 <= apart * 7) return {1, rows * columns, joined};
    return {rows, columns, apart / rows};
  }

  // Parts of the scratch of a tile, in elements.
  struct Layout {
    Groups groups;  // at the beginning
    int64_t place;  // the table of place_pixels()
    int64_t gate;   // the copy of gate_of()
    int64_t total;
  };

  static Layout layout_of(const ForwardPlan& plan, int64_t rows, int64_t columns) {
    Layout layout;
    layout.groups = groups_of(plan, rows, columns);
    layout.place = layout.groups.count() * group_elements(plan);
    layout.gate = layout.place + round_up(layout.groups.pixels() * places, V::width);
    layout.total = layout.gate + (plan.problem.gate ? plan.layout.padded_channels : 0);
    return layout;
  }

  // The same for the depthwise half alone.
  struct DepthwiseLayout {
    int64_t place;  // of the pixels of a row
    int64_t row;    // of one filter of all channels, where they have more
    int64_t total;
  };

  static DepthwiseLayout depthwise_layout_of(const Problem& p, int64_t columns) {
    DepthwiseLayout layout;
    layout.place = 0;
    layout.row = layout.place + columns * places;
    layout.total = layout.row + (p.multiplier > 1 ? columns * p.channels : 0);
    return layout;
  }

  static int64_t scratch_bytes(const ForwardPlan& plan, int64_t rows, int64_t columns) {
    const Problem& p = plan.problem;
    const int64_t total =
        p.out_channels > 0 ? layout_of(plan, rows, columns).total : depthwise_layout_of(p, columns).total;
    return total * int64_t(sizeof(T));
  }

  static int64_t group_elements(const ForwardPlan& plan) {
    return plan.problem.multiplier * plan.layout.padded_channels * Rows;
  }

  // What every row of the problem's depthwise half has in common, for one of its filters.
  static ChannelsLastRow<T> row_of(const ForwardPlan& plan, int64_t image, int64_t filter) {
    const Problem& p = plan.problem;
    const T* plane = static_cast<const T*>(plan.input) + image * p.height * p.width * p.channels;
    ChannelsLastRow<T> row(window_of(p, plane, p.width * p.channels, p.channels, p.channels));
    row.weight = packed<T>(plan, plan.layout.depthwise_channels_last) +
                 filter * p.kernel_h * p.kernel_w * plan.layout.padded_channels;
    row.weight_stride = plan.layout.padded_channels;
    row.start = packed<T>(plan, plan.layout.depthwise_bias) + filter * plan.layout.padded_channels;
    row.start_stride = 0;
    row.clamp = clamp_of<T>(p.mid_activation);
    return row;
  }

  // Where the pixels of a tile stand in its groups.
  static void place_pixels(const ForwardPlan& plan, const Groups& groups, int64_t* place) {
    const int64_t elements = group_elements(plan);
    for (int64_t g = 0; g < groups.count(); ++g) {
      const int64_t begin = groups.begin(g % groups.per_run), end = groups.begin(g % groups.per_run + 1);
      for (int64_t pixel = begin; pixel < end; ++pixel) *place++ = g * elements + (pixel - begin) * V::width;
    }
  }

  // One filter of each channel that `base` describes, for all pixels of the tile; `out` is the first group's place of
  // these channels, `place` what place_pixels() says. before(oy) is called before output row oy is computed.
  template <class Before>
  static void depthwise_tile(const ForwardPlan& plan, const Tile& tile, const Groups& groups,
                             const ChannelsLastRow<T>& base, const int64_t* place, T* out, const Before& before) {
    const Problem& p = plan.problem;
    const int64_t columns = tile.column_end - tile.column_begin;
    ChannelsLastRow<T> row = base;
    row.output_vector_stride = Rows * V::width;
    row.whole_vectors = true;
    row.left = tile.column_begin * p.stride_w - p.pad_left;
    row.pixels = columns;
    if (takes_placed_rows<V>(row) &&
        all_finite<V>(row.weight, row.channels, p.kernel_h * p.kernel_w, row.weight_stride)) {
      row.output = out;
      for (int64_t r = tile.row_begin; r < tile.row_end; ++r, place += columns) {
        before(r);
        row.top = r * p.stride_h - p.pad_top;
        placed_rows<V>(row, place);
      }
      row.output = out;
      row = behind_whole_vectors<V>(row);
      if (row.channels == 0) return;
      out = row.output;
    }
    before(tile.row_end - 1);
    depthwise_groups(plan, tile, groups, row, out);
  }

  // The same group by group.
  static void depthwise_groups(const ForwardPlan& plan, const Tile& tile, const Groups& groups, ChannelsLastRow<T> row,
                               T* out) {
    const Problem& p = plan.problem;
    const int64_t columns = tile.column_end - tile.column_begin, elements = group_elements(plan);
    row.output_stride = V::width;
    const int64_t below = groups.per_run * elements;  // from a group to that of the row below
    int64_t rows;
    for (int64_t r = 0; r < groups.runs; r += rows, out += (rows - 1) * below) {
      rows = takes_sweeps<V>(p) ? groups.runs : 1;
      for (int64_t g = 0; g < groups.per_run; ++g, out += elements) {
        const int64_t begin = groups.begin(g), end = groups.begin(g + 1);
        for (int64_t pixel = begin; pixel < end; pixel += row.pixels) {
          const int64_t column = pixel % columns;
          row.top = (tile.row_begin + r + pixel / columns) * p.stride_h - p.pad_top;
          row.left = (tile.column_begin + column) * p.stride_w - p.pad_left;
          row.pixels = smaller(columns - column, end - pixel);
          row.output = out + (pixel - begin) * V::width;
          channels_last_rows<V, Run>(row, rows, below);
        }
      }
    }
  }

  // The depthwise half alone, straight into the output; the filters of a multiplier lie between each other there.
  static void run_depthwise(const ForwardPlan& plan, const Tile& tile, T* scratch) {
    const Problem& p = plan.problem;
    const int64_t columns = tile.column_end - tile.column_begin, depth = p.channels * p.multiplier;
    const int64_t below = plan.out_width * depth;
    const DepthwiseLayout layout = depthwise_layout_of(p, columns);
    int64_t* const place = reinterpret_cast<int64_t*>(scratch + layout.place);
    for (int64_t i = 0; i < columns; ++i) place[i] = i * p.channels;
    const T* const weight = packed<T>(plan, plan.layout.depthwise_channels_last);
    const bool finite = all_finite<V>(weight, p.multiplier * p.kernel_h * p.kernel_w * plan.layout.padded_channels);
    int64_t rows;
    for (int64_t oy = tile.row_begin; oy < tile.row_end; oy += rows) {
      rows = takes_sweeps<V>(p) && p.multiplier == 1 ? tile.row_end - oy : 1;
      T* const output = static_cast<T*>(plan.output) +
                        ((tile.image * plan.out_height + oy) * plan.out_width + tile.column_begin) * depth;
      T* const filtered = p.multiplier == 1 ? output : scratch + layout.row;
      for (int64_t filter = 0; filter < p.multiplier; ++filter) {
        ChannelsLastRow<T> row = row_of(plan, tile.image, filter);
        row.top = oy * p.stride_h - p.pad_top;
        row.left = tile.column_begin * p.stride_w - p.pad_left;
        row.pixels = columns;
        row.output = filtered;
        row.output_stride = p.channels;
        row.output_vector_stride = V::width;
        row.whole_vectors = false;
        if (rows > 1)
          channels_last_rows<V, Run>(row, rows, below);
        else
          placed_or_plain_row<V, Run>(row, place, finite);
        if (p.multiplier > 1)
          for (int64_t i = 0; i < columns * p.channels; ++i) output[i * p.multiplier + filter] = filtered[i];
      }
      if (!is_clamp(p.mid_activation))
        for (int64_t i = 0; i < rows; ++i) activate<V>(p.mid_activation, output + i * below, columns * depth);
    }
  }

  static void run(const ForwardPlan& plan, const Tile& tile, T* scratch) {
    const Problem& p = plan.problem;
    if (p.out_channels == 0) return run_depthwise(plan, tile, scratch);
    const Layout layout = layout_of(plan, tile.row_end - tile.row_begin, tile.column_end - tile.column_begin);
    const Groups& groups = layout.groups;
    int64_t* const place = reinterpret_cast<int64_t*>(scratch + layout.place);
    place_pixels(plan, groups, place);
    for (int64_t filter = 0; filter < p.multiplier; ++filter) {
      ChannelsLastRow<T> row = row_of(plan, tile.image, filter);
      if (p.gate) row.weight = gate_of(plan, tile.image, scratch + layout.gate);
      depthwise_tile(plan, tile, groups, row, place, scratch + filter * plan.layout.padded_channels * Rows,
                     [](int64_t) {});
    }
    pointwise_tile(plan, tile, groups, scratch);
  }

  // The factors of an image, in whole vectors as the packed weights are.
  static const T* gate_of(const ForwardPlan& plan, int64_t image, T* room) {
    const int64_t channels = plan.problem.channels;
    const T* const gate = static_cast<const T*>(plan.gate) + image * channels;
    for (int64_t c = 0; c < plan.layout.padded_channels; ++c) room[c] = c < channels ? gate[c] : T(0);
    return room;
  }

  // From the finished groups, after their activation, to the output.
  static void pointwise_tile(const ForwardPlan& plan, const Tile& tile, const Groups& groups, T* scratch) {
    const Problem& p = plan.problem;
    if (!is_clamp(p.mid_activation)) activate<V>(p.mid_activation, scratch, groups.count() * group_elements(plan));
    pointwise_groups(plan, tile, groups, scratch, 0, groups.count());
  }

  // Groups [group_begin, group_end) of those of the tile.
  static void pointwise_groups(const ForwardPlan& plan, const Tile& tile, const Groups& groups, const T* scratch,
                               int64_t group_begin, int64_t group_end) {
    const Problem& p = plan.problem;
    const int64_t elements = group_elements(plan);
    Product<T> product;
    product.groups = p.multiplier;
    product.depth = p.channels;
    product.block_depth = V::width;
    product.a_block_stride = Rows * V::width;
    product.a_stride = 1;
    product.b_stride = panel;
    product.start_stride = 0;
    product.start_along_rows = false;
    product.clamp = clamp_of<T>(p.activation);
    product.c_stride = p.out_channels;
    T* image = static_cast<T*>(plan.output) + tile.image * plan.out_height * plan.out_width * p.out_channels;
    const T* const summand = static_cast<const T*>(plan.residual);
    // A panel of weights stays in cache for all pixels of the tile, which ask for the next one, where they are many
    // enough to compute for as long as that takes.
    const int64_t panel_elements = p.multiplier * p.channels * panel, count = group_end - group_begin;
    for (int64_t k = tile.panel_begin; k < tile.panel_end; ++k) {
      product.b = packed<T>(plan, plan.layout.pointwise) + k * panel_elements;
      const bool fetches = k + 1 < tile.panel_end && count > 1;
      product.start = packed<T>(plan, plan.layout.bias) + k * panel;
      product.column_count = smaller<int64_t>(panel, p.out_channels - k * panel);
      product.a = scratch + group_begin * elements;
      for (int64_t i = group_begin; i < group_end; ++i, product.a += elements) {
        const int64_t r = i / groups.per_run, g = i % groups.per_run;
        const int64_t begin = groups.begin(g), pixels = groups.begin(g + 1) - begin;
        T* row = image + ((tile.row_begin + r) * plan.out_width + tile.column_begin) * p.out_channels + k * panel;
        product.c = row + begin * p.out_channels;
        if (fetches) product.fetch_part(product.b + panel_elements, panel_elements, i - group_begin);
        // It has the output's shape, and is added behind the activation: here, where that is no clamp.
        const T* residual = p.residual ? summand + (product.c - static_cast<T*>(plan.output)) : nullptr;
        if (is_clamp(p.activation)) product.add = residual;
        multiply<V, Rows, Columns, V::width>(product, pixels, product.column_count);
        if (is_clamp(p.activation)) continue;
        for (int64_t pixel = 0; pixel < pixels; ++pixel) {
          activate<V>(p.activation, product.c + pixel * product.c_stride, product.column_count);
          if (p.residual)
            add_row(residual + pixel * p.out_channels, product.column_count, product.c + pixel * p.out_channels);
        }
      }
    }
  }

  static void add_row(const T* from, int64_t channels, T* to) {
    for (int64_t k = 0; k < channels; k += V::width) {
      const int lanes = static_cast<int>(smaller<int64_t>(V::width, channels - k));
      V::store_n(to + k, V::add(V::load_n(to + k, lanes), V::load_n(from + k, lanes)), lanes);
    }
  }
};

}  // namespace
}  // namespace FASTSEP_ISA
}  // namespace fastsep
