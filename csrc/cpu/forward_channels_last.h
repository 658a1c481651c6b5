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

  // Depthwise for pixels [begin, end) of one output row, into a group at its pixel `slot`.
  static void depthwise_row(const ForwardPlan& plan, int64_t image, int64_t out_row, int64_t begin, int64_t end,
                            T* group, int64_t slot) {
    const Problem& p = plan.problem;
    const int64_t taps = p.kernel_h * p.kernel_w;
    const int64_t top = out_row * p.stride_h - p.pad_top;
    const int64_t first_tap = top < 0 ? smaller((-top + p.dilation_h - 1) / p.dilation_h, p.kernel_h) : 0;
    const int64_t below = p.height - top;  // rows from the first tap's to the end of the plane
    const int64_t last_tap = below <= 0 ? first_tap : smaller(p.kernel_h, (below + p.dilation_h - 1) / p.dilation_h);
    ChannelsLastRun<T> run;
    run.channels = p.channels;
    run.input_row_stride = p.dilation_h * p.width * p.channels;
    run.taps_h = larger<int64_t>(0, last_tap - first_tap);
    run.taps_w = p.kernel_w;
    run.stride_w = p.stride_w;
    run.dilation_w = p.dilation_w;
    run.weight_stride = plan.layout.padded_channels;
    run.clamp = clamp_of<T>(p.mid_activation);
    run.scratch_stride = Rows * V::width;
    const T* plane = static_cast<const T*>(plan.input) + image * p.height * p.width * p.channels;

    const int64_t pieces = (end - begin + Run - 1) / Run;
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t from = begin + cut(end - begin, pieces, piece), to = begin + cut(end - begin, pieces, piece + 1);
      const int64_t left = from * p.stride_w - p.pad_left;
      const int64_t needed = (to - from - 1) * p.stride_w + (p.kernel_w - 1) * p.dilation_w + 1;
      run.pixels = static_cast<int>(to - from);
      run.column_begin = larger<int64_t>(0, -left);
      run.column_end = smaller(needed, p.width - left);
      run.input = plane + ((top + first_tap * p.dilation_h) * p.width + left) * p.channels;
      for (int64_t filter = 0; filter < p.multiplier; ++filter) {
        run.weight = packed<T>(plan, plan.layout.depthwise_channels_last) +
                     (filter * taps + first_tap * p.kernel_w) * plan.layout.padded_channels;
        run.bias = packed<T>(plan, plan.layout.depthwise_bias) + filter * plan.layout.padded_channels;
        run.scratch = group + filter * plan.layout.padded_channels * Rows + (slot + from - begin) * V::width;
        channels_last_depthwise<V, Run>(run);
      }
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

  static void run(const ForwardPlan& plan, const Tile& tile, T* scratch) {
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
    product.bias_along_rows = false;
    product.clamp = clamp_of<T>(p.activation);
    product.c_stride = p.out_channels;
    T* image = static_cast<T*>(plan.output) + tile.image * plan.out_height * plan.out_width * p.out_channels;
    // A panel of weights stays in cache for all pixels of the tile.
    for (int64_t k = tile.panel_begin; k < tile.panel_end; ++k) {
      product.b = packed<T>(plan, plan.layout.pointwise) + k * p.multiplier * p.channels * panel;
      product.bias = packed<T>(plan, plan.layout.bias) + k * panel;
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
    const Groups groups = groups_of(plan, rows, columns);
    return groups.runs * groups.per_run * group_elements(plan) * int64_t(sizeof(T));
  }
};

}  // namespace
}  // namespace FASTSEP_ISA
}  // namespace fastsep
