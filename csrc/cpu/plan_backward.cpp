// How the backward pass of a problem is cut into units for any number of threads.
#include "driver.h"
#include "plan.h"

namespace fastsep {
namespace {

// What a band holds at a time: dv, and for one panel x, t, dt and dx. Half of a second-level cache of 512 KB; the
// panel's weights and their sums stream through the rest.
constexpr int64_t band_bytes = 256 * 1024;

// Bands of whole images are of at least so many pixels, where the batch has them. For each band the pointwise weights
// are read and the sums of their gradients read and written, and where planes are small no cache holds them: 12 bytes
// for 2 FMAs of each pixel. At 96 pixels, with a memory of 20 GB/s and 59 G FMAs/s, that is a fifth of the time of the
// products.
constexpr int64_t least_band_pixels = 96;

// As many units as this are enough for any machine's threads; each part costs partial sums.
constexpr int64_t most_units = 32;
// With fewer pixels a part's sums, written and read again, cost more than a few hundredths of its products.
constexpr int64_t least_part_pixels = 256;

BackwardLayout layout_of(const Problem& p, const Kernel& kernel, int64_t panels_of_sums) {
  const int64_t line = 64 / element_size(p.dtype), m = p.multiplier, taps = p.kernel_h * p.kernel_w;
  const auto whole_lines = [&](int64_t elements) { return divide_up(elements, line) * line; };
  BackwardLayout layout;
  layout.panel = kernel.shape.vector * kernel.shape.columns;
  layout.panels = divide_up(p.channels, layout.panel);
  layout.padded_channels = divide_up(p.channels, kernel.shape.vector) * kernel.shape.vector;
  layout.depthwise = 0;
  layout.depthwise_bias = layout.depthwise + whole_lines(m * taps * layout.padded_channels);
  layout.reversed = layout.depthwise_bias + whole_lines(m * layout.padded_channels);
  layout.pointwise = layout.reversed + whole_lines(m * taps * layout.padded_channels);
  layout.zeros = layout.pointwise + layout.panels * m * p.out_channels * layout.panel;
  layout.zeros = whole_lines(layout.zeros);
  layout.elements = layout.zeros + whole_lines(layout.panel);

  layout.pointwise_sums = 0;
  layout.depthwise_sums = layout.pointwise_sums + panels_of_sums * m * p.out_channels * layout.panel;
  layout.depthwise_bias_sums = layout.depthwise_sums + layout.panels * m * taps * layout.panel;
  layout.bias_sums = layout.depthwise_bias_sums + layout.panels * m * layout.panel;
  layout.sums_elements =
      whole_lines(layout.bias_sums + divide_up(p.out_channels, kernel.shape.vector) * kernel.shape.vector);
  return layout;
}

// Shares the work among part_slots x panel_slots threads.
void share_out(int threads, BackwardPlan* shared) {
  const BackwardPlan& plan = *shared;
  const Problem& p = plan.problem;
  // A slot does for its share of the parts: dv (as much as two channels of products) and its panels.
  const int64_t pack = 2, panel = plan.layout.panel;
  // The rows of dt that a slot computes again, in panels of one part.
  const double part_rows = static_cast<double>(p.batch * plan.out_height) / static_cast<double>(plan.parts);
  const double again = static_cast<double>(plan.halo) / (3 * part_rows);
  double least_cost = 0;
  for (int64_t part_slots = 1; part_slots <= least(threads, plan.parts); ++part_slots) {
    const int64_t panel_slots = least(threads / part_slots, plan.layout.panels);
    const double parts =
        static_cast<double>(divide_up(plan.parts, part_slots)) + (part_slots > 1 && plan.parts > 1 ? again : 0);
    const double cost = parts * static_cast<double>(pack + divide_up(plan.layout.panels, panel_slots) * panel);
    if (least_cost == 0 || cost < least_cost) {
      least_cost = cost;
      shared->part_slots = part_slots;
      shared->panel_slots = panel_slots;
    }
  }
}

}  // namespace

BackwardPlan make_plan(const Problem& p, const Kernel& kernel, const Gradients& gradients, int threads) {
  BackwardPlan plan = {};
  plan.problem = p;
  plan.out_height = out_height(p);
  plan.out_width = out_width(p);
  plan.gradients = gradients;
  plan.mid_from_output = derivative_from_output(p.mid_activation);
  plan.need_inner =
      gradients.input != nullptr || gradients.depthwise_weight != nullptr || gradients.depthwise_bias != nullptr;
  plan.halo = gradients.input == nullptr ? 0 : least(plan.out_height, (p.kernel_h - 1) * p.dilation_h / p.stride_h);

  const int64_t rows = p.batch * plan.out_height;
  const int64_t panel = kernel.shape.vector * kernel.shape.columns, panels = divide_up(p.channels, panel);
  const int64_t row_bytes = (p.out_channels + 4 * panel) * plan.out_width * element_size(p.dtype);
  const int64_t fitting_rows = band_bytes / row_bytes;
  plan.band_rows = most(1, least(plan.out_height, fitting_rows));
  // The gradient of the depthwise half alone has no use for more than an image at a time.
  if (p.out_channels > 0 && plan.band_rows == plan.out_height)
    plan.band_images = least(
        p.batch, most(fitting_rows / plan.out_height, divide_up(least_band_pixels, plan.out_height * plan.out_width)));
  if (plan.band_images > 0) plan.halo = 0;
  const int64_t bands = plan.band_images > 0 ? divide_up(p.batch, plan.band_images) : divide_up(rows, plan.band_rows);
  const int64_t parts = divide_up(most_units, panels);
  const int64_t worthwhile = most(1, rows * plan.out_width / least_part_pixels);
  // Not limited by how many images fit into a band: a band is no longer than its part, and threads want parts.
  plan.parts = most(1, least(parts, least(worthwhile, plan.band_images > 0 ? p.batch : bands)));
  // The gradient of the depthwise half alone, channels-last: panels of some rows in turn, of which whole pixels fit.
  const int64_t whole_row_bytes = p.channels * plan.out_width * element_size(p.dtype);
  if (p.out_channels == 0 && p.layout == Layout::nhwc)
    plan.band_rows = least(plan.band_rows, most(2, band_bytes / whole_row_bytes));
  const bool pointwise = p.out_channels > 0 && gradients.pointwise_weight != nullptr;
  // Rows of the gradient itself are far apart, so to come back to them many times costs more than to copy the sums.
  if (pointwise && plan.parts == 1 && rows > 0 && bands <= 2 && p.multiplier == 1)
    plan.direct_panels = panels - (p.channels % kernel.shape.vector == 0 ? 0 : 1);
  plan.layout = layout_of(p, kernel, pointwise ? panels - plan.direct_panels : 0);
  share_out(threads, &plan);

  const Lengths slots = lengths_of(plan.layout.panels, plan.panel_slots);
  for (int64_t slot_panels = slots.shorter; slot_panels <= slots.longer; ++slot_panels)
    plan.scratch_bytes = most(plan.scratch_bytes, whole_cache_lines(kernel.backward_scratch_bytes(plan, slot_panels)));
  return plan;
}

int64_t slot_count(const BackwardPlan& plan) { return plan.part_slots * plan.panel_slots; }

BackwardWork work_of(const BackwardPlan& plan, int64_t slot) {
  const int64_t panel = slot % plan.panel_slots, row = slot / plan.panel_slots;
  return {part(plan.parts, plan.part_slots, row), part(plan.parts, plan.part_slots, row + 1),
          part(plan.layout.panels, plan.panel_slots, panel), part(plan.layout.panels, plan.panel_slots, panel + 1)};
}

int64_t packed_bytes(const BackwardPlan& plan) { return plan.layout.elements * element_size(plan.problem.dtype); }

int64_t sums_bytes(const BackwardPlan& plan) {
  return plan.parts * plan.layout.sums_elements * element_size(plan.problem.dtype);
}

}  // namespace fastsep
