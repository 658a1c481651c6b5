// The forward tile for NCHW.
//
// The scratch t is [m*C][stride], the pixels of the tile in one run (whole rows of the plane, or a part of one row).
// Either
//   y[k][pixel] = act(bias[k] + sum over i of W[k][i] * t[i][pixel])      vectors of pixels,
// or, where the run fills its last vector badly (7 x 7 = 49 pixels are 3.06 vectors of 16),
//   y[pixel][k] with the scratch read as the broadcast side               vectors of output channels,
// transposed when stored. Both read the same packed weights and add in the same order.
#pragma once

#include <string.h>

#include "depthwise_placed.h"
#include "depthwise_planar.h"
#include "kernel.h"
#include "pointwise.h"

namespace fastsep {
namespace FASTSEP_ISA {
namespace {

template <class V, class Shape>
struct ForwardPlanar {
  using T = typename V::T;
  static constexpr int Rows = Shape::rows, Columns = Shape::columns;
  static constexpr int PlanarRows = Shape::planar_rows, PlanarColumns = Shape::planar_columns;
  static constexpr int panel = Columns * V::width;

  // Which copied columns of one remainder modulo stride_w lie inside the plane, and the input column of the first copy.
  struct Inside {
    int64_t first, begin, end;
  };

  // Parts of the scratch, in elements.
  struct Layout {
    int64_t stride;  // of one channel's run of pixels
    // Copied input rows: tap row r of output row y is copy y * row_stride + r * row_dilation. These are the problem's
    // stride and dilation, unless those are so large that no two taps share a row: then the gaps are left out.
    int64_t row_stride, row_dilation, copies;
    // Without a stride the output rows that are alike modulo the dilation are a problem of their own without dilation,
    // on the copies of one row phase, [row_phases][per_row_phase].
    int64_t row_phases, per_row_phase;
    int64_t phases;        // remainders modulo stride_w that taps have
    int64_t reached;       // columns of one remainder that taps reach
    int64_t phase_length;  // and room for a vector behind them
    int64_t runs, input, start, row_pointers, sources, tap_offsets, columns, transposed, total;
  };

  static Layout layout_of(const ForwardPlan& plan, int64_t rows, int64_t columns) {
    const Problem& p = plan.problem;
    constexpr int64_t size = sizeof(T), pointer = sizeof(void*) / size;
    Layout layout;
    // One vector more, because the last row is stored whole; and runs a multiple of 1024 bytes apart would share a
    // few cache sets.
    layout.stride = round_up(rows * columns, V::width) + V::width;
    if (layout.stride * size % 1024 == 0) layout.stride += 64 / size;
    const int64_t last_row = planar_rows_read<V>(rows) - 1;
    layout.row_dilation = smaller(p.dilation_h, last_row * p.stride_h + 1);
    const int64_t reach = (p.kernel_h - 1) * layout.row_dilation + 1;
    layout.row_stride = smaller(p.stride_h, reach);
    layout.copies = last_row * layout.row_stride + reach;
    layout.row_phases = 1;
    layout.per_row_phase = 0;
    // (A row shorter than a vector is stored over the next one's beginning, so the rows must come in order.)
    if (p.stride_h == 1 && p.dilation_h > 1 && p.dilation_h < rows && columns >= V::width) {
      layout.row_phases = p.dilation_h;
      layout.per_row_phase = planar_rows_read<V>((rows + p.dilation_h - 1) / p.dilation_h) + p.kernel_h - 1;
      layout.copies = layout.row_phases * layout.per_row_phase;
    }
    layout.phases = smaller(p.stride_w, (p.kernel_w - 1) * p.dilation_w + 1);
    layout.reached = columns + (p.kernel_w - 1) * p.dilation_w / p.stride_w;
    layout.phase_length = round_up(layout.reached, V::width) + V::width;
    layout.runs = 0;
    // The depthwise half alone keeps one channel at a time.
    layout.input = layout.runs + (p.out_channels > 0 ? p.multiplier * p.channels : 1) * layout.stride;
    // One row more than the copies: the zeros.
    layout.start = layout.input + (layout.copies + 1) * layout.phases * layout.phase_length;
    layout.row_pointers = layout.start + V::width;
    layout.sources = layout.row_pointers + round_up(layout.copies * pointer, 64);
    layout.tap_offsets = layout.sources + round_up(layout.copies * pointer, 64);
    layout.columns = layout.tap_offsets + round_up(p.kernel_w * pointer, 64);
    layout.transposed = layout.columns + round_up(layout.phases * int64_t(sizeof(Inside)) / size, 64);
    layout.total = layout.transposed + Rows * panel;
    return layout;
  }

  static int64_t scratch_bytes(const ForwardPlan& plan, int64_t rows, int64_t columns) {
    return layout_of(plan, rows, columns).total * int64_t(sizeof(T));
  }

  static Inside inside_of(int64_t phase, int64_t width, int64_t left, int64_t stride, const Layout& layout) {
    Inside columns;
    columns.first = left + phase;
    columns.begin = columns.first < 0 ? smaller(layout.reached, (-columns.first + stride - 1) / stride) : 0;
    const int64_t inside = columns.first < width ? (width - columns.first + stride - 1) / stride : 0;
    columns.end = larger(columns.begin, smaller(layout.reached, inside));
    return columns;
  }

  // The columns of one input row that taps reach, sorted by their remainder modulo stride_w. Those outside the plane
  // are left as they are: zeros, written once for all channels, and up to a vector of them again behind the last
  // inside.
  static void copy_row(const T* row, int64_t stride, const Layout& layout, const Inside* columns, T* copy) {
    for (int64_t phase = 0; phase < layout.phases; ++phase, copy += layout.phase_length) {
      const T* from = row + columns[phase].first;
      int64_t i = columns[phase].begin;
      const int64_t end = columns[phase].end;
      if (stride == 1) {
        for (; i + V::width <= end; i += V::width) V::store(copy + i, V::load(from + i));
        if (i < end) V::store(copy + i, V::load_n(from + i, static_cast<int>(end - i)));
      } else if (stride == 2) {
        for (; i < end; i += V::width)
          V::store(copy + i, V::load_even(from + 2 * i, static_cast<int>(smaller<int64_t>(V::width, end - i))));
      } else {
        for (; i < end; ++i) copy[i] = from[stride * i];
      }
    }
  }

  static void depthwise_tile(const ForwardPlan& plan, const Tile& tile, const Layout& layout, T* scratch) {
    const Problem& p = plan.problem;
    const int64_t rows = tile.row_end - tile.row_begin, columns = tile.column_end - tile.column_begin;
    const int64_t top = tile.row_begin * p.stride_h - p.pad_top, left = tile.column_begin * p.stride_w - p.pad_left;
    const int64_t taps = p.kernel_h * p.kernel_w;
    const int64_t row_elements = layout.phases * layout.phase_length;
    T* const copies = scratch + layout.input;
    T* const zeros = copies + layout.copies * row_elements;
    T** const row_pointers = reinterpret_cast<T**>(scratch + layout.row_pointers);
    int64_t* const sources = reinterpret_cast<int64_t*>(scratch + layout.sources);
    int64_t* const tap_offsets = reinterpret_cast<int64_t*>(scratch + layout.tap_offsets);
    Inside* const columns_inside = reinterpret_cast<Inside*>(scratch + layout.columns);
    for (int64_t phase = 0; phase < layout.phases; ++phase)
      columns_inside[phase] = inside_of(phase, p.width, left, p.stride_w, layout);
    for (int64_t s = 0; s < p.kernel_w; ++s) {
      const int64_t column = s * p.dilation_w;
      tap_offsets[s] = column % p.stride_w * layout.phase_length + column / p.stride_w;
    }
    // Which rows the taps touch is the same for every channel.
    for (int64_t i = 0; i < (layout.copies + 1) * row_elements; ++i) copies[i] = 0;
    for (int64_t i = 0; i < layout.copies; ++i) row_pointers[i] = zeros;
    for (int64_t y = 0; y < rows; ++y) {
      for (int64_t r = 0; r < p.kernel_h; ++r) {
        int64_t i = y * layout.row_stride + r * layout.row_dilation;
        if (layout.row_phases > 1) i = i % p.dilation_h * layout.per_row_phase + i / p.dilation_h;
        sources[i] = top + y * p.stride_h + r * p.dilation_h;
        if (sources[i] >= 0 && sources[i] < p.height) row_pointers[i] = copies + i * row_elements;
      }
    }

    PlanarChannel<T> channel;
    channel.stride_h = layout.row_stride;
    channel.dilation_h = layout.row_phases > 1 ? 1 : layout.row_dilation;
    channel.output_stride = layout.row_phases * columns;
    channel.taps_h = p.kernel_h;
    channel.taps_w = p.kernel_w;
    channel.tap_offset = tap_offsets;
    channel.copy_stride = row_elements;
    channel.clamp = clamp_of<T>(p.mid_activation);
    channel.columns = columns;
    T* const start = scratch + layout.start;
    channel.start = start;
    const T* image = static_cast<const T*>(plan.input) + tile.image * p.channels * p.height * p.width;
    for (int64_t c = 0; c < p.channels; ++c) {
      const T* plane = image + c * p.height * p.width;
      for (int64_t i = 0; i < layout.copies; ++i)
        if (row_pointers[i] != zeros)
          copy_row(plane + sources[i] * p.width, p.stride_w, layout, columns_inside, row_pointers[i]);
      for (int64_t filter = 0; filter < p.multiplier; ++filter) {
        const int64_t i = filter * p.channels + c;
        channel.weight = packed<T>(plan, plan.layout.depthwise_planar) + i * taps;
        V::store(start, V::set1(packed<T>(plan, plan.layout.depthwise_bias)[filter * plan.layout.padded_channels + c]));
        T* const run = scratch + layout.runs + (p.out_channels > 0 ? i * layout.stride : 0);
        const bool finite = all_finite<V>(channel.weight, taps);
        for (int64_t phase = 0; phase < layout.row_phases; ++phase) {
          channel.rows = row_pointers + phase * layout.per_row_phase;
          channel.copies = copies + phase * layout.per_row_phase * row_elements;
          channel.out_rows = (rows - phase + layout.row_phases - 1) / layout.row_phases;
          channel.output = run + phase * columns;
          if (finite)
            planar_depthwise<V>(channel);
          else
            planar_depthwise_inside(channel, zeros, left, p.width, p.stride_w, p.dilation_w);
        }
        if (!is_clamp(p.mid_activation)) activate<V>(p.mid_activation, run, rows * columns);
        if (p.out_channels == 0) store_depthwise(plan, tile, c * p.multiplier + filter, run);
      }
    }
  }

  // One finished channel of the depthwise half alone. The rows are whole, or there is but one.
  static void store_depthwise(const ForwardPlan& plan, const Tile& tile, int64_t channel, const T* values) {
    const int64_t pixels = (tile.row_end - tile.row_begin) * (tile.column_end - tile.column_begin);
    const int64_t depth = plan.problem.channels * plan.problem.multiplier;
    T* const plane = static_cast<T*>(plan.output) + (tile.image * depth + channel) * plan.out_height * plan.out_width;
    memcpy(plane + tile.row_begin * plan.out_width + tile.column_begin, values,
           static_cast<size_t>(pixels) * sizeof(T));
  }

  static void run(const ForwardPlan& plan, const Tile& tile, T* scratch) {
    const Problem& p = plan.problem;
    const int64_t rows = tile.row_end - tile.row_begin, columns = tile.column_end - tile.column_begin;
    const int64_t pixels = rows * columns, plane = plan.out_height * plan.out_width;
    const Layout layout = layout_of(plan, rows, columns);
    depthwise_tile(plan, tile, layout, scratch);
    if (p.out_channels == 0) return;

    const int64_t depth = p.multiplier * p.channels;
    const int64_t vectors = (pixels + V::width - 1) / V::width;
    // In units of one FMA per pixel and channel: the vectors' unused lanes, against 16 for the transposing stores.
    const bool transpose = vectors * V::width * depth > pixels * (depth + 16);
    T* output = static_cast<T*>(plan.output) + tile.image * p.out_channels * plane + tile.row_begin * plan.out_width +
                tile.column_begin;
    for (int64_t k = tile.panel_begin; k < tile.panel_end; ++k) {
      const T* weights = packed<T>(plan, plan.layout.pointwise) + k * depth * panel;
      const T* bias = packed<T>(plan, plan.layout.bias) + k * panel;
      const int64_t channels = smaller<int64_t>(panel, p.out_channels - k * panel);
      Product<T> product;
      product.groups = 1;
      product.depth = product.block_depth = depth;
      product.a_block_stride = 0;
      product.clamp = clamp_of<T>(p.activation);
      if (transpose)
        channels_by_vector(product, layout, scratch, weights, bias, pixels, channels, output + k * panel * plane,
                           plane);
      else
        pixels_by_vector(product, layout, scratch, weights, bias, pixels, channels, output + k * panel * plane, plane);
      if (!is_clamp(p.activation))
        for (int64_t i = 0; i < channels; ++i) activate<V>(p.activation, output + (k * panel + i) * plane, pixels);
    }
  }

  static void pixels_by_vector(Product<T>& product, const Layout& layout, const T* scratch, const T* weights,
                               const T* bias, int64_t pixels, int64_t channels, T* output, int64_t plane) {
    product.a_stride = panel;
    product.b_stride = layout.stride;
    product.start_stride = 0;
    product.start_along_rows = true;
    product.c_stride = plane;
    const int64_t vectors = (pixels + V::width - 1) / V::width;
    const int64_t column_tiles = (vectors + PlanarColumns - 1) / PlanarColumns;
    const int64_t row_tiles = (channels + PlanarRows - 1) / PlanarRows;
    for (int64_t j = 0; j < column_tiles; ++j) {
      const int64_t first = cut(vectors, column_tiles, j), registers = cut(vectors, column_tiles, j + 1) - first;
      product.b = scratch + layout.runs + first * V::width;
      product.column_count = smaller<int64_t>(registers * V::width, pixels - first * V::width);
      for (int64_t i = 0; i < row_tiles; ++i) {
        const int64_t row = cut(channels, row_tiles, i);
        product.a = weights + row;
        product.start = bias + row;
        product.c = output + row * plane + first * V::width;
        multiply<V, PlanarRows, PlanarColumns, 1>(product, cut(channels, row_tiles, i + 1) - row, product.column_count);
      }
    }
  }

  static void channels_by_vector(Product<T>& product, const Layout& layout, T* scratch, const T* weights, const T* bias,
                                 int64_t pixels, int64_t channels, T* output, int64_t plane) {
    T* const tile = scratch + layout.transposed;
    product.a_stride = layout.stride;
    product.b = weights;
    product.b_stride = panel;
    product.start = bias;
    product.start_stride = 0;
    product.start_along_rows = false;
    product.c = tile;
    product.c_stride = panel;
    product.column_count = panel;
    const int64_t row_tiles = (pixels + Rows - 1) / Rows;
    for (int64_t i = 0; i < row_tiles; ++i) {
      const int64_t first = cut(pixels, row_tiles, i), count = cut(pixels, row_tiles, i + 1) - first;
      product.a = scratch + layout.runs + first;
      multiply<V, Rows, Columns, 1>(product, count, channels);
      transpose<V>(tile, count, channels, panel, output + first, plane);
    }
  }
};

}  // namespace
}  // namespace FASTSEP_ISA
}  // namespace fastsep
