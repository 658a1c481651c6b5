// Whether what is asked for is enough, for every tile that a plan cuts and every number of threads.
#include <set>
#include <utility>

#include "cpu/driver.h"
#include "cpu/plan.h"
#include "sweep.h"

namespace fastsep_tests {
namespace {

using namespace fastsep;
using Wide = __int128;

// The heights or widths of tiles.
using Extents = std::set<int64_t>;

struct TileSizes {
  Extents rows, columns;
};

// Of all tiles; of many rows or columns the first and last ones, between which no others come.
TileSizes tile_sizes(const ForwardPlan& plan) {
  TileSizes sizes;
  const auto numbers = [](int64_t count) {
    std::set<int64_t> some;
    for (int64_t i = 0; i < count && i < 64; ++i) some.insert({i, count - 1 - i});
    return some;
  };
  for (int64_t row : numbers(plan.row_tiles)) {
    const Tile tile = tile_of(plan, row * plan.column_tiles * plan.panel_tiles);
    sizes.rows.insert(tile.row_end - tile.row_begin);
  }
  for (int64_t column : numbers(plan.column_tiles)) {
    const Tile tile = tile_of(plan, column * plan.panel_tiles);
    sizes.columns.insert(tile.column_end - tile.column_begin);
  }
  return sizes;
}

// The least that a tile can do with: its depthwise output and, channels-last, where each pixel of it is.
Wide least_bytes(const ForwardPlan& plan, int64_t rows, int64_t columns) {
  const Problem& p = plan.problem;
  const Wide pixels = Wide(rows) * columns;
  if (p.out_channels == 0) return p.layout == Layout::nhwc ? Wide(columns) * 8 : pixels * element_size(p.dtype);
  const Wide output = pixels * p.multiplier * p.channels * element_size(p.dtype);
  return output + (p.layout == Layout::nhwc ? pixels * 8 : 0);
}

std::string bytes_of(Wide bytes) { return std::to_string(static_cast<double>(bytes)) + " bytes"; }

void expect_enough(const Kernel& kernel, Wide asked, Wide used, const std::string& what, int threads) {
  if (used >= 0 && asked >= used) return;
  fail(kernel.name,
       what + " takes " + bytes_of(used) + " of " + bytes_of(asked) + " with " + std::to_string(threads) + " threads");
}

void try_forward(const Kernel& kernel, const Problem& p, int threads) {
  const ForwardPlan plan = make_plan(p, kernel, threads);
  expect_enough(kernel, static_cast<int64_t>(scratch_size(p, kernel, threads)),
                Wide(plan.scratch_bytes) * threads + Wide(plan.shared_bytes) * p.batch, "the workspace", threads);
  if (plan.channel_tiles > 0) {
    expect_enough(kernel, plan.shared_bytes,
                  least_bytes(plan, plan.out_height, plan.out_width) - Wide(plan.out_height) * plan.out_width * 8,
                  "what two passes share", threads);
    expect_enough(kernel, plan.scratch_bytes, kernel.scratch_bytes(plan, plan.out_height, plan.out_width),
                  "the first of two passes", threads);
    return;
  }
  const TileSizes sizes = tile_sizes(plan);
  for (int64_t rows : sizes.rows) {
    for (int64_t columns : sizes.columns) {
      const std::string tile = "a tile of " + std::to_string(rows) + " x " + std::to_string(columns);
      const int64_t used = kernel.scratch_bytes(plan, rows, columns);
      expect_enough(kernel, plan.scratch_bytes, used, tile, threads);
      const int64_t band = p.expand.channels > 0 ? (rows < plan.band_rows ? rows : plan.band_rows + 1) / 2 : rows;
      expect_enough(kernel, used, least_bytes(plan, band, columns), "the depthwise output of " + tile, threads);
    }
  }
}

void try_backward(const Kernel& kernel, const Problem& p, const Gradients& gradients, int threads) {
  const BackwardPlan plan = make_plan(p, kernel, gradients, threads);
  // Of the depthwise half alone the gradient of the input may be a forward pass, see driver_backward.cpp.
  if (p.out_channels > 0)
    expect_enough(kernel, static_cast<int64_t>(backward_size(p, kernel, gradients, threads)),
                  Wide(packed_bytes(plan)) + sums_bytes(plan) + Wide(slot_count(plan)) * plan.scratch_bytes,
                  "the backward pass", threads);
  if (slot_count(plan) > threads) fail(kernel.name, "more units than threads");
  int64_t parts = 0, panels = 0;
  for (int64_t slot = 0; slot < slot_count(plan); ++slot) {
    const BackwardWork work = work_of(plan, slot);
    if (work.part_begin == 0) panels += work.panel_end - work.panel_begin;
    if (work.panel_begin == 0) parts += work.part_end - work.part_begin;
    expect_enough(kernel, plan.scratch_bytes, kernel.backward_scratch_bytes(plan, work.panel_end - work.panel_begin),
                  "a backward unit", threads);
  }
  if (parts != plan.parts || panels != plan.layout.panels) fail(kernel.name, "backward units are not all of the work");
  const Wide weights = Wide(p.channels) * p.multiplier * (Wide(2) * p.kernel_h * p.kernel_w + p.out_channels);
  expect_enough(kernel, packed_bytes(plan), weights * element_size(p.dtype), "the weights", threads);
}

}  // namespace

bool try_sizes(const std::vector<const Kernel*>& kernels, uint64_t seed, int threads) {
  const Case c = random_sizes(seed);
  current_line = c.line;
  if (validate(c.problem) != Status::ok) return false;
  for (const Kernel* kernel : kernels) {
    for (Dtype dtype : {Dtype::f32, Dtype::f64}) {
      Problem p = c.problem;
      p.dtype = dtype;
      if (kernel->dtype != dtype) continue;
      const Wide weights = Wide(p.channels) * p.multiplier * (Wide(p.kernel_h) * p.kernel_w + p.out_channels);
      expect_enough(*kernel, static_cast<int64_t>(packed_size(p, *kernel)), weights * element_size(dtype),
                    "the packed weights", threads);
      try_forward(*kernel, p, threads);
      if (p.expand.channels > 0 || p.gate || p.residual) continue;
      int anything = 0;
      for (unsigned wanted : {31u, static_cast<unsigned>(seed % 31 + 1)}) {
        void* at[5];
        for (unsigned i = 0; i < 5; ++i) at[i] = wanted >> i & 1 ? &anything : nullptr;
        try_backward(*kernel, p,
                     {at[0], at[1], at[2], p.out_channels > 0 ? at[3] : nullptr, p.out_channels > 0 ? at[4] : nullptr},
                     threads);
      }
    }
  }
  return true;
}

}  // namespace fastsep_tests
