// The backward pass of a problem.
#include <algorithm>
#include <cstring>

#include "driver.h"
#include "plan.h"

namespace fastsep {
namespace {

// Output channels whose pointwise weights are packed, or whose sums are added up, at a time.
constexpr int64_t output_chunk = 16;

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

struct Job {
  const BackwardPlan* plan;
  const Kernel* kernel;
  char* scratch;
};

void run_slot(void* context, int64_t slot) {
  const Job& job = *static_cast<const Job*>(context);
  job.kernel->backward_work(*job.plan, work_of(*job.plan, slot), job.scratch + slot * job.plan->scratch_bytes);
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
  const BackwardPlan plan = make_plan(problem, kernel, rest, threads);
  return std::max(before, static_cast<size_t>(packed_bytes(plan) + sums_bytes(plan)) +
                              static_cast<size_t>(slot_count(plan) * plan.scratch_bytes));
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
  BackwardPlan plan = make_plan(problem, kernel, rest, executor.threads);
  plan.input = input;
  plan.saved = saved;
  plan.grad_output = grad_output;
  plan.packed = memory;
  plan.sums = memory + packed_bytes(plan);
  if (problem.dtype == Dtype::f32)
    pack_as<float>(problem, plan.layout, weights, plan.need_inner, memory, executor);
  else
    pack_as<double>(problem, plan.layout, weights, plan.need_inner, memory, executor);
  Job job = {&plan, &kernel, memory + packed_bytes(plan) + sums_bytes(plan)};
  run_on(executor, slot_count(plan), run_slot, &job);
  run_on(executor, plan.layout.panels + divide_up(problem.out_channels, output_chunk), finish_panel, &job);
}

}  // namespace fastsep
