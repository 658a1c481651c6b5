// The backward pass of a problem, cut into units for any number of threads.
#include <algorithm>
#include <cstring>

#include "driver.h"

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

// Output channels whose pointwise weights are packed, or whose sums are added up, at a time.
constexpr int64_t output_chunk = 16;

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }
int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t element_size(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 8; }

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

// How the work is shared: part_slots x panel_slots threads.
struct Grid {
  int64_t part_slots, panel_slots;
};

Grid grid_of(const BackwardPlan& plan, int threads) {
  const Problem& p = plan.problem;
  // A slot does for its share of the parts: dv (as much as two channels of products) and its panels.
  const int64_t pack = 2, panel = plan.layout.panel;
  // The rows of dt that a slot computes again, in panels of one part.
  const double part_rows = static_cast<double>(p.batch * plan.out_height) / static_cast<double>(plan.parts);
  const double again = static_cast<double>(plan.halo) / (3 * part_rows);
  Grid best = {1, 1};
  double least_cost = 0;
  for (int64_t part_slots = 1; part_slots <= least(threads, plan.parts); ++part_slots) {
    const int64_t panel_slots = least(threads / part_slots, plan.layout.panels);
    const double parts =
        static_cast<double>(divide_up(plan.parts, part_slots)) + (part_slots > 1 && plan.parts > 1 ? again : 0);
    const double cost = parts * static_cast<double>(pack + divide_up(plan.layout.panels, panel_slots) * panel);
    if (least_cost == 0 || cost < least_cost) {
      least_cost = cost;
      best = {part_slots, panel_slots};
    }
  }
  return best;
}

BackwardPlan make_plan(const Problem& p, const Kernel& kernel, const Gradients& gradients) {
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
  return plan;
}

template <class T>
struct BackwardPacking {
  const Problem& problem;
  const BackwardLayout& layout;
  Weights weights;
  T* packed;

  void depthwise() const {
    const Problem& p = problem;
    const int64_t taps = p.kernel_h * p.kernel_w;
    const T* weight = static_cast<const T*>(weights.depthwise_weight);
    const T* bias = static_cast<const T*>(weights.depthwise_bias);
    const ReversedTaps taps_h(p.kernel_h, p.stride_h, p.dilation_h), taps_w(p.kernel_w, p.stride_w, p.dilation_w);
    for (int64_t filter = 0; filter < p.multiplier; ++filter) {
      T* const plain = packed + layout.depthwise + filter * taps * layout.padded_channels;
      T* const reversed = packed + layout.reversed + filter * taps * layout.padded_channels;
      for (int64_t c = 0; c < layout.padded_channels; ++c)
        packed[layout.depthwise_bias + filter * layout.padded_channels + c] =
            c < p.channels && bias != nullptr ? bias[c * p.multiplier + filter] : T(0);
      for (int64_t r = 0; r < p.kernel_h; ++r) {
        for (int64_t s = 0; s < p.kernel_w; ++s) {
          const int64_t tap = r * p.kernel_w + s, position = reversed_position(taps_h, taps_w, r, s);
          for (int64_t c = 0; c < layout.padded_channels; ++c)
            plain[tap * layout.padded_channels + c] = reversed[position * layout.padded_channels + c] =
                c < p.channels ? weight[(c * p.multiplier + filter) * taps + tap] : T(0);
        }
      }
    }
    std::memset(packed + layout.zeros, 0, static_cast<size_t>(layout.panel) * sizeof(T));
  }

  // Where tap (r, s) stands in the order of the classes.
  static int64_t reversed_position(const ReversedTaps& h, const ReversedTaps& w, int64_t r, int64_t s) {
    const int64_t class_h = r % h.step(), class_w = s % w.step();
    const int64_t row = h.count(class_h) - 1 - r / h.step(), column = w.count(class_w) - 1 - s / w.step();
    return h.before(class_h) * w.kernel + h.count(class_h) * w.before(class_w) + row * w.count(class_w) + column;
  }

  // Some output channels of all panels: rows of the weights are read whole, for neighbouring rows of a power of two of
  // bytes lie in the same cache sets.
  void pointwise(int64_t chunk) const {
    const Problem& p = problem;
    const int64_t m = p.multiplier, depth = p.channels * m;
    const int64_t k_begin = chunk * output_chunk, k_end = least(p.out_channels, k_begin + output_chunk);
    for (int64_t q = 0; q < layout.panels; ++q) {
      const int64_t first = q * layout.panel, count = least(layout.panel, p.channels - first);
      for (int64_t filter = 0; filter < m; ++filter) {
        T* out = packed + layout.pointwise + ((q * m + filter) * p.out_channels + k_begin) * layout.panel;
        const T* from = static_cast<const T*>(weights.pointwise_weight) + k_begin * depth + first * m + filter;
        for (int64_t k = k_begin; k < k_end; ++k, out += layout.panel, from += depth) {
          if (m == 1)
            std::memcpy(out, from, static_cast<size_t>(count) * sizeof(T));
          else
            for (int64_t c = 0; c < count; ++c) out[c] = from[c * m];
          for (int64_t c = count; c < layout.panel; ++c) out[c] = T(0);
        }
      }
    }
  }
};

template <class T>
void pack_as(const Problem& problem, const BackwardLayout& layout, const Weights& weights, bool pointwise, void* packed,
             const Executor& executor) {
  BackwardPacking<T> packing = {problem, layout, weights, static_cast<T*>(packed)};
  const auto body = [](void* context, int64_t index) {
    const auto& self = *static_cast<const BackwardPacking<T>*>(context);
    if (index == 0)
      self.depthwise();
    else
      self.pointwise(index - 1);
  };
  run_on(executor, 1 + (pointwise ? divide_up(problem.out_channels, output_chunk) : 0), body, &packing);
}

// The workspace, in bytes.
struct Sizes {
  int64_t packed, sums, scratch;
};

Sizes sizes_of(const BackwardPlan& plan, const Kernel& kernel, const Grid& grid) {
  const int64_t size = element_size(plan.problem.dtype);
  const int64_t panels = divide_up(plan.layout.panels, grid.panel_slots);
  return {plan.layout.elements * size, plan.parts * plan.layout.sums_elements * size,
          whole_cache_lines(kernel.backward_scratch_bytes(plan, panels))};
}

struct Job {
  const BackwardPlan* plan;
  const Kernel* kernel;
  Grid grid;
  char* scratch;
};

void run_slot(void* context, int64_t slot) {
  const Job& job = *static_cast<const Job*>(context);
  const int64_t panel = slot % job.grid.panel_slots, row = slot / job.grid.panel_slots;
  const BackwardWork work = {part(job.plan->parts, job.grid.part_slots, row),
                             part(job.plan->parts, job.grid.part_slots, row + 1),
                             part(job.plan->layout.panels, job.grid.panel_slots, panel),
                             part(job.plan->layout.panels, job.grid.panel_slots, panel + 1)};
  job.kernel->backward_work(*job.plan, work, job.scratch + slot * job.plan->scratch_bytes);
}

void finish_panel(void* context, int64_t index) {
  const Job& job = *static_cast<const Job*>(context);
  const int64_t panels = job.plan->layout.panels;
  if (index < panels) return job.kernel->finish_depthwise(*job.plan, index);
  const int64_t k = (index - panels) * output_chunk;
  job.kernel->finish_pointwise(*job.plan, k, least(job.plan->problem.out_channels, k + output_chunk));
}

// The depthwise convolution of dy that gives dx, where there is one: without a stride that of the reversed filter.
bool is_convolution(const Problem& p, const Gradients& gradients, Problem* convolution) {
  if (gradients.input == nullptr || p.out_channels > 0 || p.multiplier > 1 || p.stride_h > 1 || p.stride_w > 1 ||
      p.mid_activation != Activation::identity)
    return false;
  const int64_t reach_h = (p.kernel_h - 1) * p.dilation_h, reach_w = (p.kernel_w - 1) * p.dilation_w;
  *convolution = p;
  convolution->height = out_height(p);
  convolution->width = out_width(p);
  convolution->pad_top = reach_h - p.pad_top;
  convolution->pad_bottom = reach_h - p.pad_bottom;
  convolution->pad_left = reach_w - p.pad_left;
  convolution->pad_right = reach_w - p.pad_right;
  return least(least(convolution->pad_top, convolution->pad_bottom),
               least(convolution->pad_left, convolution->pad_right)) >= 0;
}

int64_t depthwise_bytes(const Problem& p) {
  return whole_cache_lines(p.channels * p.kernel_h * p.kernel_w * element_size(p.dtype));
}

template <class T>
void reverse(const Problem& p, const void* weight, void* reversed) {
  const int64_t taps = p.kernel_h * p.kernel_w;
  for (int64_t c = 0; c < p.channels; ++c)
    std::reverse_copy(static_cast<const T*>(weight) + c * taps, static_cast<const T*>(weight) + (c + 1) * taps,
                      static_cast<T*>(reversed) + c * taps);
}

void run_convolution(const Problem& p, const Kernel& kernel, const Weights& weights, const void* grad_output,
                     void* grad_input, char* memory, const Executor& executor) {
  char* const packed = memory + depthwise_bytes(p);
  Weights reversed = {memory, nullptr, nullptr, nullptr};
  if (p.dtype == Dtype::f32)
    reverse<float>(p, weights.depthwise_weight, memory);
  else
    reverse<double>(p, weights.depthwise_weight, memory);
  pack_weights(p, kernel, reversed, packed, executor);
  run_forward(p, kernel, grad_output, packed, grad_input, packed + packed_size(p, kernel), executor);
}

bool any(const Gradients& gradients) {
  return gradients.input != nullptr || gradients.depthwise_weight != nullptr || gradients.depthwise_bias != nullptr ||
         gradients.pointwise_weight != nullptr || gradients.bias != nullptr;
}

}  // namespace

size_t backward_size(const Problem& problem, const Kernel& kernel, const Gradients& gradients, int threads) {
  Problem convolution;
  size_t before = 0;
  Gradients rest = gradients;
  if (is_convolution(problem, gradients, &convolution)) {
    before = static_cast<size_t>(depthwise_bytes(convolution)) + packed_size(convolution, kernel) +
             scratch_size(convolution, kernel, threads);
    rest.input = nullptr;
    if (!any(rest)) return before;
  }
  const BackwardPlan plan = make_plan(problem, kernel, rest);
  const Grid grid = grid_of(plan, threads);
  const Sizes sizes = sizes_of(plan, kernel, grid);
  return std::max(before,
                  static_cast<size_t>(sizes.packed + sizes.sums + grid.part_slots * grid.panel_slots * sizes.scratch));
}

void run_backward(const Problem& problem, const Kernel& kernel, const void* input, const Weights& weights,
                  const void* saved, const void* grad_output, const Gradients& gradients, void* workspace,
                  const Executor& executor) {
  char* const memory = static_cast<char*>(workspace);
  Problem convolution;
  Gradients rest = gradients;
  if (is_convolution(problem, gradients, &convolution)) {
    run_convolution(convolution, kernel, weights, grad_output, gradients.input, memory, executor);
    rest.input = nullptr;
    if (!any(rest)) return;
  }
  BackwardPlan plan = make_plan(problem, kernel, rest);
  const Grid grid = grid_of(plan, executor.threads);
  const Sizes sizes = sizes_of(plan, kernel, grid);
  plan.input = input;
  plan.saved = saved;
  plan.grad_output = grad_output;
  plan.packed = memory;
  plan.sums = memory + sizes.packed;
  plan.scratch_bytes = sizes.scratch;
  if (problem.dtype == Dtype::f32)
    pack_as<float>(problem, plan.layout, weights, plan.need_inner, memory, executor);
  else
    pack_as<double>(problem, plan.layout, weights, plan.need_inner, memory, executor);
  Job job = {&plan, &kernel, grid, memory + sizes.packed + sizes.sums};
  run_on(executor, grid.part_slots * grid.panel_slots, run_slot, &job);
  run_on(executor, plan.layout.panels + divide_up(problem.out_channels, output_chunk), finish_panel, &job);
}

}  // namespace fastsep
