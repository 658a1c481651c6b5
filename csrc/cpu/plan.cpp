#include "plan.h"

#include <unistd.h>

#include "driver.h"

namespace fastsep {
namespace {

// Second-level cache of a core: between 1 MB, which also stands for what the C library does not tell, and 2 MB, the
// least and the most that the shares of it below were measured on.
int64_t second_level_cache() {
  static const int64_t bytes = [] {
    int64_t told = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
    told = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return most(int64_t{1} << 20, least(int64_t{2} << 20, told));
  }();
  return bytes;
}

// Depthwise output that a tile holds. The weights stream through the cache beside it, once a tile, from memory or the
// last-level cache where they are larger: with 2 MB 19 x 19 x 728 in three tiles instead of five gained 2 %. With 1 MB
// 14 x 14 x 512 in two tiles of 200 KB instead of three gained 1.5 % for NCHW, and 320 KB no more.
int64_t tile_bytes() { return second_level_cache() / 4; }

// Behind an expansion, whose rows a band keeps for the next one: fewer bands copy fewer. With 1 MB MobileNetV2's early
// blocks gained 2 % over 256 KB, and no more at 512; with 2 MB the network 1.2 % by 768 over 384.
int64_t band_bytes() { return second_level_cache() / 8 * 3; }

// What a second pass costs: to send all threads off once more, wait for them and read what the others wrote; some 8 us
// on a Zen 4, in multiply-adds of one thread.
constexpr double pass_products = 500e3;

// Cuts further than cache asks, so that all threads end together: into lower tiles, or the output channels into parts,
// which repeats the depthwise half but reads only a part of the weights. 7 rows on 2 threads are 4 and 3 (at most
// 1.75 times as fast as one), while two halves of the channels of a 7 x 7 x 1024 plane repeat less than 1 %.
void share_out(int threads, ForwardPlan* plan) {
  const Problem& p = plan->problem;
  const int64_t per_row_tile = p.batch * plan->column_tiles;
  const int64_t least_row_tiles = plan->row_tiles, most_row_tiles = least(plan->out_height, least_row_tiles + threads);
  // A tap costs about as much as two output channels do.
  const auto depthwise = static_cast<double>(2 * p.kernel_h * p.kernel_w);
  double least_cost = 0;
  const int64_t panels = most(1, plan->layout.panels);  // none in the depthwise half alone
  for (int64_t panel_tiles = 1; panel_tiles <= least(panels, threads); panel_tiles *= 2) {
    const double share = static_cast<double>(divide_up(panels, panel_tiles)) / static_cast<double>(panels);
    const double channels = share * static_cast<double>(p.out_channels);
    for (int64_t row_tiles = least_row_tiles; row_tiles <= most_row_tiles; ++row_tiles) {
      const int64_t turns = divide_up(per_row_tile * row_tiles * panel_tiles, threads);
      const int64_t rows = divide_up(plan->out_height, row_tiles);
      const double cost = static_cast<double>(turns) * static_cast<double>(rows) * (depthwise + channels);
      if (least_cost == 0 || cost < least_cost) {
        least_cost = cost;
        plan->row_tiles = row_tiles;
        plan->panel_tiles = panel_tiles;
      }
    }
  }
}

// The same in two passes, where they cost less than `row_cost` rows: no row of e is computed twice, and each thread
// reads a part of the weights. Each thread has one tile of each pass. The two are taken for equal, as they are in
// inverted residuals.
void partition_channels(const Kernel& kernel, int threads, double row_cost, ForwardPlan* plan) {
  const Problem& p = plan->problem;
  const int64_t element = element_size(p.dtype), panel = kernel.shape.vector * kernel.shape.columns;
  const int64_t pixels = plan->out_height * plan->out_width, tiles = p.batch > 0 ? threads / p.batch : 0;
  if (tiles < 2 || pixels == 0 || p.channels == 0 || p.out_channels == 0) return;
  const int64_t channel_tiles = least(plan->layout.expand_panels, tiles);
  // What a thread has of the depthwise output, and x and a panel of e.
  const int64_t bytes = element * (plan->layout.padded_channels * pixels / channel_tiles +
                                   (expansion_depth(p) + panel) * p.height * p.width);
  if (bytes > 2 * band_bytes()) return;

  // What the slowest thread has of n.
  const auto share = [](int64_t n, int64_t parts) {
    return static_cast<double>(divide_up(n, parts)) / static_cast<double>(n);
  };
  const int64_t groups = divide_up(pixels, kernel.shape.rows);
  const double products = static_cast<double>(p.height * p.width * expansion_depth(p)) * p.channels +
                          static_cast<double>(pixels * p.channels) * (p.kernel_h * p.kernel_w + p.out_channels);
  for (int64_t panel_tiles = least(plan->layout.panels, tiles); panel_tiles > 0; --panel_tiles) {
    const int64_t group_tiles = least(groups, tiles / panel_tiles);
    const double first = share(plan->layout.expand_panels, channel_tiles);
    const double second = share(plan->layout.panels, panel_tiles) * share(groups, group_tiles);
    const double cost = static_cast<double>(plan->out_height) * ((first + second) / 2 + pass_products / products);
    if (cost >= row_cost) continue;
    row_cost = cost;
    plan->channel_tiles = channel_tiles;
    plan->panel_tiles = panel_tiles;
    plan->row_tiles = group_tiles;
  }
}

// With an expansion a tile is many rows of one image, worked on in bands: a tile's first rows of e are computed a
// second time, so there are no more tiles than keep the threads busy.
void partition_expanded(const Kernel& kernel, int threads, ForwardPlan* plan) {
  const Problem& p = plan->problem;
  const int64_t element = element_size(p.dtype), panel = kernel.shape.vector * kernel.shape.columns;
  // Of one output row: the depthwise output, and for the rows of the plane it adds x and one panel of e.
  const int64_t row_bytes = element * (plan->layout.padded_channels * plan->out_width +
                                       least(p.stride_h, p.height) * (expansion_depth(p) + panel) * p.width);
  plan->band_rows = most(1, least(plan->out_height, band_bytes() / row_bytes));
  plan->row_tiles = plan->column_tiles = plan->panel_tiles = 1;
  // What a border between two tiles costs each of them, in rows.
  const double again = static_cast<double>(most(0, (p.kernel_h - 1) * p.dilation_h + 1 - p.stride_h)) /
                       static_cast<double>(4 * p.stride_h);
  double least_cost = 0;
  for (int64_t row_tiles = 1; row_tiles <= least(plan->out_height, threads); ++row_tiles) {
    const int64_t turns = divide_up(p.batch * row_tiles, threads);
    const double borders = static_cast<double>(least(row_tiles - 1, 2));
    const double rows = static_cast<double>(divide_up(plan->out_height, row_tiles)) + borders * again;
    const double cost = static_cast<double>(turns) * rows;
    if (least_cost == 0 || cost < least_cost) {
      least_cost = cost;
      plan->row_tiles = row_tiles;
    }
  }
  partition_channels(kernel, threads, least_cost, plan);
  plan->band_rows =
      plan->channel_tiles > 0 ? plan->out_height : least(plan->band_rows, divide_up(plan->out_height, plan->row_tiles));
}

// How the work is cut. It depends on the number of threads, but no sum does: a tile's border changes which pixels are
// computed together, never the order in which one pixel's products are added.
void partition_plain(const Kernel& kernel, int threads, ForwardPlan* plan) {
  const Problem& p = plan->problem;
  const int64_t element = element_size(p.dtype);
  const int64_t pixel_bytes = p.multiplier * plan->layout.padded_channels * element;
  const int64_t pixels = most(tile_bytes() / pixel_bytes, 2 * kernel.shape.rows);
  // Whole rows where they fit, else parts of one row.
  plan->column_tiles = divide_up(plan->out_width, pixels);
  const int64_t columns = divide_up(plan->out_width, plan->column_tiles);
  const int64_t rows = plan->column_tiles > 1 ? 1 : most(1, least(plan->out_height, pixels / columns));
  plan->row_tiles = divide_up(plan->out_height, rows);
  plan->panel_tiles = 1;

  if (threads > 1) share_out(threads, plan);
}

void partition(const Kernel& kernel, int threads, ForwardPlan* plan) {
  if (plan->problem.expand.channels > 0)
    partition_expanded(kernel, threads, plan);
  else
    partition_plain(kernel, threads, plan);
  if (plan->channel_tiles > 0) {
    plan->scratch_bytes = whole_cache_lines(kernel.scratch_bytes(*plan, plan->out_height, plan->out_width));
    plan->shared_bytes = whole_cache_lines(kernel.shared_bytes(*plan));
    return;
  }
  // A lower or narrower tile may take more than a larger one: its pixels may fill the product's groups worse. So all
  // sizes that tiles have are asked for.
  const Lengths heights = lengths_of(plan->out_height, plan->row_tiles);
  const Lengths widths = lengths_of(plan->out_width, plan->column_tiles);
  for (int64_t rows = heights.shorter; rows <= heights.longer; ++rows)
    for (int64_t columns = widths.shorter; columns <= widths.longer; ++columns)
      plan->scratch_bytes = most(plan->scratch_bytes, whole_cache_lines(kernel.scratch_bytes(*plan, rows, columns)));
}

}  // namespace

ForwardPlan make_plan(const Problem& problem, const Kernel& kernel, int threads) {
  ForwardPlan plan = {};
  plan.problem = problem;
  plan.out_height = out_height(problem);
  plan.out_width = out_width(problem);
  plan.layout = packed_layout(problem, kernel);
  partition(kernel, threads, &plan);
  return plan;
}

int64_t tile_count(const ForwardPlan& plan) {
  return plan.problem.batch * plan.row_tiles * plan.column_tiles * plan.panel_tiles;
}

int64_t channel_tile_count(const ForwardPlan& plan) { return plan.problem.batch * plan.channel_tiles; }

Tile tile_of(const ForwardPlan& plan, int64_t unit) {
  Tile tile;
  const int64_t k = unit % plan.panel_tiles;
  unit /= plan.panel_tiles;
  const int64_t column = unit % plan.column_tiles;
  unit /= plan.column_tiles;
  const int64_t row = unit % plan.row_tiles;
  tile.image = unit / plan.row_tiles;
  tile.row_begin = part(plan.out_height, plan.row_tiles, row);
  tile.row_end = part(plan.out_height, plan.row_tiles, row + 1);
  tile.column_begin = part(plan.out_width, plan.column_tiles, column);
  tile.column_end = part(plan.out_width, plan.column_tiles, column + 1);
  tile.panel_begin = part(plan.layout.panels, plan.panel_tiles, k);
  tile.panel_end = part(plan.layout.panels, plan.panel_tiles, k + 1);
  tile.row_tile = row;
  tile.channel_begin = 0;
  tile.channel_end = plan.layout.expand_panels;
  return tile;
}

// Of the first of two passes.
Tile channels_of(const ForwardPlan& plan, int64_t unit) {
  Tile tile = {};
  tile.image = unit / plan.channel_tiles;
  tile.row_end = plan.out_height;
  tile.column_end = plan.out_width;
  const int64_t k = unit % plan.channel_tiles;
  tile.channel_begin = part(plan.layout.expand_panels, plan.channel_tiles, k);
  tile.channel_end = part(plan.layout.expand_panels, plan.channel_tiles, k + 1);
  return tile;
}

}  // namespace fastsep
