// The forward tile for channels-last.
//
//   y[pixel][k] = act(bias[k] + sum over i of t[pixel][i] * W[i][k])
//
// The scratch t holds groups of up to `rows` pixels, each [m][ceil(C / width)][rows][width]. A group is contiguous and
// its pixels a constant distance apart, so the product walks it with one pointer, and no two rows meet in the same
// cache set, as rows of 4 * C bytes would for C a power of two.
#pragma once

#include "depthwise.h"
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

  // The pixels of a tile as runs (rows of the plane, or all rows as one where they are short) cut into groups.
  struct Groups {
    int64_t runs, run_pixels, per_run;
    int64_t begin(int64_t group) const { return cut(run_pixels, per_run, group); }
  };

  static Groups groups_of(const ForwardPlan& plan, int64_t rows, int64_t columns) {
    const int64_t apart = (columns + Rows - 1) / Rows * rows;
    const int64_t joined = (rows * columns + Rows - 1) / Rows;
    if (columns == plan.out_width && joined * 8 <= apart * 7) return {1, rows * columns, joined};
    return {rows, columns, apart / rows};
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

  // Depthwise for pixels [begin, end) of one output row, into a group at its pixel `slot`.
  static void depthwise_row(const ForwardPlan& plan, int64_t image, int64_t out_row, int64_t begin, int64_t end,
                            T* group, int64_t slot) {
    const Problem& p = plan.problem;
    for (int64_t filter = 0; filter < p.multiplier; ++filter) {
      ChannelsLastRow<T> row = row_of(plan, image, filter);
      row.top = out_row * p.stride_h - p.pad_top;
      row.left = begin * p.stride_w - p.pad_left;
      row.pixels = end - begin;
      row.output = group + filter * plan.layout.padded_channels * Rows + slot * V::width;
      row.output_stride = V::width;
      row.output_vector_stride = Rows * V::width;
      row.whole_vectors = true;
      channels_last_row<V, Run>(row);
    }
  }

  static void depthwise_tile(const ForwardPlan& plan, const Tile& tile, const Groups& groups, T* scratch) {
    const int64_t columns = tile.column_end - tile.column_begin, elements = group_elements(plan);
    T* group = scratch;
    for (int64_t r = 0; r < groups.runs; ++r) {
      for (int64_t g = 0; g < groups.per_run; ++g, group += elements) {
        const int64_t begin = groups.begin(g), end = groups.begin(g + 1);
        for (int64_t pixel = begin; pixel < end;) {
          const int64_t row = r + pixel / columns, column = pixel % columns;
          const int64_t stop = smaller(columns, column + end - pixel);
          depthwise_row(plan, tile.image, tile.row_begin + row, tile.column_begin + column, tile.column_begin + stop,
                        group, pixel - begin);
          pixel += stop - column;
        }
      }
    }
    if (!is_clamp(plan.problem.mid_activation)) activate<V>(plan.problem.mid_activation, scratch, group - scratch);
  }

  // The depthwise half alone, straight into the output; the filters of a multiplier lie between each other there.
  static void run_depthwise(const ForwardPlan& plan, const Tile& tile, T* scratch) {
    const Problem& p = plan.problem;
    const int64_t columns = tile.column_end - tile.column_begin, depth = p.channels * p.multiplier;
    for (int64_t oy = tile.row_begin; oy < tile.row_end; ++oy) {
      T* const output = static_cast<T*>(plan.output) +
                        ((tile.image * plan.out_height + oy) * plan.out_width + tile.column_begin) * depth;
      T* const filtered = p.multiplier == 1 ? output : scratch;
      for (int64_t filter = 0; filter < p.multiplier; ++filter) {
        ChannelsLastRow<T> row = row_of(plan, tile.image, filter);
        row.top = oy * p.stride_h - p.pad_top;
        row.left = tile.column_begin * p.stride_w - p.pad_left;
        row.pixels = columns;
        row.output = filtered;
        row.output_stride = p.channels;
        row.output_vector_stride = V::width;
        row.whole_vectors = false;
        channels_last_row<V, Run>(row);
        if (p.multiplier > 1)
          for (int64_t i = 0; i < columns * p.channels; ++i) output[i * p.multiplier + filter] = filtered[i];
      }
      if (!is_clamp(p.mid_activation)) activate<V>(p.mid_activation, output, columns * depth);
    }
  }

  static void run(const ForwardPlan& plan, const Tile& tile, T* scratch) {
    if (plan.problem.out_channels == 0) return run_depthwise(plan, tile, scratch);
    const Problem& p = plan.problem;
    const int64_t columns = tile.column_end - tile.column_begin, elements = group_elements(plan);
    const Groups groups = groups_of(plan, tile.row_end - tile.row_begin, columns);
    depthwise_tile(plan, tile, groups, scratch);

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
    // A panel of weights stays in cache for all pixels of the tile.
    for (int64_t k = tile.panel_begin; k < tile.panel_end; ++k) {
      product.b = packed<T>(plan, plan.layout.pointwise) + k * p.multiplier * p.channels * panel;
      product.start = packed<T>(plan, plan.layout.bias) + k * panel;
      product.column_count = smaller<int64_t>(panel, p.out_channels - k * panel);
      const int64_t registers = (product.column_count + V::width - 1) / V::width;
      product.a = scratch;
      for (int64_t r = 0; r < groups.runs; ++r) {
        T* row = image + ((tile.row_begin + r) * plan.out_width + tile.column_begin) * p.out_channels + k * panel;
        for (int64_t g = 0; g < groups.per_run; ++g, product.a += elements) {
          const int64_t begin = groups.begin(g), pixels = groups.begin(g + 1) - begin;
          product.c = row + begin * p.out_channels;
          multiply<V, Rows, Columns, V::width>(product, pixels, registers);
          if (!is_clamp(p.activation))
            for (int64_t i = 0; i < pixels; ++i)
              activate<V>(p.activation, product.c + i * product.c_stride, product.column_count);
        }
      }
    }
  }

  static int64_t scratch_bytes(const ForwardPlan& plan, int64_t rows, int64_t columns) {
    if (plan.problem.out_channels == 0) return columns * plan.problem.channels * int64_t(sizeof(T));
    const Groups groups = groups_of(plan, rows, columns);
    return groups.runs * groups.per_run * group_elements(plan) * int64_t(sizeof(T));
  }
};

}  // namespace
}  // namespace FASTSEP_ISA
}  // namespace fastsep
