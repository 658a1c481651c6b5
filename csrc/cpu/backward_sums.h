// The partial sums of the parts, added up in their order, and put where the gradients of the weights belong.
#pragma once

#include <string.h>

#include "kernel.h"
#include "vector.h"

namespace fastsep {
namespace FASTSEP_ISA {
namespace {

template <class V, class Shape>
struct BackwardSums {
  using T = typename V::T;
  static constexpr int panel = Shape::columns * V::width;

  // Where the sums of a panel's pointwise weights begin, behind those of the panels that need none.
  static int64_t pointwise_sums_of(const BackwardPlan& plan, int64_t q, int64_t filter) {
    const Problem& p = plan.problem;
    return plan.layout.pointwise_sums + ((q - plan.direct_panels) * p.multiplier + filter) * p.out_channels * panel;
  }

  // Adds the sums [offset, offset + count) of all parts, in their order, into the first part's.
  static T* add_parts(const BackwardPlan& plan, int64_t offset, int64_t count) {
    T* const total = static_cast<T*>(plan.sums) + offset;
    if (plan.parts == 1) return total;
    for (int64_t i = 0; i < count; i += V::width) {
      const int lanes = static_cast<int>(smaller<int64_t>(V::width, count - i));
      auto acc = V::load_n(total + i, lanes);
      for (int64_t part = 1; part < plan.parts; ++part)
        acc = V::add(acc, V::load_n(total + part * plan.layout.sums_elements + i, lanes));
      V::store_n(total + i, acc, lanes);
    }
    return total;
  }

  static void finish_depthwise(const BackwardPlan& plan, int64_t q) {
    const Problem& p = plan.problem;
    const int64_t m = p.multiplier, taps = p.kernel_h * p.kernel_w;
    const int64_t channel = q * panel, channels = smaller<int64_t>(panel, p.channels - channel);
    for (int64_t filter = 0; filter < m; ++filter) {
      const int64_t index = q * m + filter, first = channel * m + filter;
      if (T* to = static_cast<T*>(plan.gradients.depthwise_weight)) {
        const T* sums = add_parts(plan, plan.layout.depthwise_sums + index * taps * panel, taps * panel);
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t tap = 0; tap < taps; ++tap) to[(first + c * m) * taps + tap] = sums[tap * panel + c];
      }
      if (T* to = static_cast<T*>(plan.gradients.depthwise_bias)) {
        const T* sums = add_parts(plan, plan.layout.depthwise_bias_sums + index * panel, panel);
        for (int64_t c = 0; c < channels; ++c) to[first + c * m] = sums[c];
      }
    }
  }

  static void finish_pointwise(const BackwardPlan& plan, int64_t begin, int64_t end) {
    const Problem& p = plan.problem;
    const int64_t m = p.multiplier, depth = p.channels * m;
    T* const gradient = static_cast<T*>(plan.gradients.pointwise_weight);
    for (int64_t q = plan.direct_panels; gradient != nullptr && q < plan.layout.panels; ++q) {
      const int64_t channel = q * panel, channels = smaller<int64_t>(panel, p.channels - channel);
      for (int64_t filter = 0; filter < m; ++filter) {
        const T* sums = add_parts(plan, pointwise_sums_of(plan, q, filter) + begin * panel, (end - begin) * panel);
        T* to = gradient + begin * depth + channel * m + filter;
        for (int64_t k = begin; k < end; ++k, sums += panel, to += depth) {
          if (m == 1)
            memcpy(to, sums, static_cast<size_t>(channels) * sizeof(T));
          else
            for (int64_t c = 0; c < channels; ++c) to[c * m] = sums[c];
        }
      }
    }
    if (T* to = static_cast<T*>(plan.gradients.bias))
      memcpy(to + begin, add_parts(plan, plan.layout.bias_sums + begin, end - begin),
             static_cast<size_t>(end - begin) * sizeof(T));
  }
};

}  // namespace
}  // namespace FASTSEP_ISA
}  // namespace fastsep
