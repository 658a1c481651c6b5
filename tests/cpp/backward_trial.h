// The operands of one backward problem between guard pages, and what the oracle makes of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "harness.h"

namespace fastsep_tests {

// The five gradients, by number.
constexpr unsigned gradient_count = 5, all_gradients = (1u << gradient_count) - 1;
inline const char* const gradient_names[gradient_count] = {"input", "depthwise_weight", "depthwise_bias",
                                                           "pointwise_weight", "bias"};

// Of those whose bit is set.
template <class Memory>
fastsep::Gradients gradients_at(const std::vector<Memory>& memory, unsigned wanted) {
  void* address[gradient_count];
  for (unsigned i = 0; i < gradient_count; ++i) address[i] = wanted >> i & 1 ? memory[i].template as<void>() : nullptr;
  return {address[0], address[1], address[2], address[3], address[4]};
}

template <class T>
struct BackwardTrial {
  struct Doubles {
    std::vector<double> values;
    template <class>
    void* as() const {
      return const_cast<double*>(values.data());
    }
  };

  fastsep::Problem p;
  bool integers;
  Tight tight;
  Numbers<T> numbers;
  int64_t depth = p.channels * p.multiplier;
  int64_t pixels = p.batch * fastsep::out_height(p) * fastsep::out_width(p);
  Guarded input = numbers.drawn(size_of(0)), depthwise_weight = numbers.drawn(size_of(1));
  Guarded depthwise_bias = numbers.drawn(size_of(2)), pointwise_weight = numbers.drawn(size_of(3));
  Guarded bias = numbers.drawn(size_of(4));
  Guarded grad_output = numbers.drawn(pixels * (p.out_channels > 0 ? p.out_channels : depth));
  fastsep::Weights weights;
  Guarded saved;  // y or v, as the kernel wants it
  std::vector<Doubles> oracle, magnitude;

  BackwardTrial(const Case& c, const fastsep::Problem& problem, bool integers_, Tight tight_,
                unsigned seed = plain_seed)
      : p(problem),
        integers(integers_),
        tight(tight_),
        numbers(integers_, tight_, seed),
        weights{depthwise_weight.as(), c.depthwise_bias ? depthwise_bias.as() : nullptr, pointwise_weight.as(),
                c.bias ? bias.as() : nullptr},
        saved(numbers.unwritten(pixels * p.out_channels)) {}

  int64_t size_of(unsigned gradient) const {
    switch (gradient) {
      case 0: return p.batch * p.channels * p.height * p.width;
      case 1: return depth * p.kernel_h * p.kernel_w;
      case 2: return depth;
      case 3: return p.out_channels * depth;
      default: return p.out_channels;
    }
  }

  std::vector<Guarded> unwritten() const {
    std::vector<Guarded> memory;
    for (unsigned i = 0; i < gradient_count; ++i) memory.push_back(numbers.unwritten(size_of(i)));
    return memory;
  }

  // What the forward pass saves, by the oracle.
  void save_output() {
    fastsep::Problem asked = p;
    if (!fastsep::derivative_from_output(p.activation)) asked.activation = fastsep::Activation::identity;
    std::vector<double> output(static_cast<size_t>(pixels * std::max(p.out_channels, depth)));
    fastsep::reference_forward(asked, input.as(), weights, output.data(), false);
    std::transform(output.begin(), output.begin() + pixels * p.out_channels, saved.template as<T>(),
                   [](double value) { return static_cast<T>(value); });
  }

  // Or anything, where only memory and bits are asked for.
  void save_drawn() { saved = numbers.drawn(pixels * p.out_channels); }

  void ask_oracle() {
    oracle.resize(gradient_count);
    magnitude.resize(gradient_count);
    for (unsigned i = 0; i < gradient_count; ++i)
      for (auto* doubles : {&oracle, &magnitude}) (*doubles)[i].values.resize(static_cast<size_t>(size_of(i)));
    fastsep::reference_backward(p, input.as(), weights, grad_output.as(), gradients_at(oracle, all_gradients), false);
    if (integers) return;
    fastsep::reference_backward(p, input.as(), weights, grad_output.as(), gradients_at(magnitude, all_gradients), true);
  }

  // What is wrong with a gradient, against the oracle; empty where nothing is.
  std::string difference(unsigned gradient, const T* got) const {
    // Each product and addition of the sums that lead to a gradient errs by eps of the sum of magnitudes at most.
    // Slopes are at most 1.13, and err by a few eps of the arguments' magnitudes.
    const double terms =
        static_cast<double>(p.kernel_h * p.kernel_w + depth + p.out_channels + (gradient == 0 ? 0 : pixels) + 16);
    const double eps = std::numeric_limits<T>::epsilon();
    const std::vector<double>&wanted = oracle[gradient].values, &magnitudes = magnitude[gradient].values;
    int64_t bad = -1;
    for (int64_t i = 0; i < size_of(gradient); ++i) {
      const auto at = static_cast<size_t>(i);
      const double error = std::fabs(static_cast<double>(got[i]) - wanted[at]);
      if (integers ? static_cast<T>(wanted[at]) != got[i] : !(error <= 2 * terms * eps * (magnitudes[at] + 1))) bad = i;
    }
    if (bad < 0) return "";
    return std::string(integers ? "integers" : "reals") + ", gradient of " + gradient_names[gradient] + " differs at " +
           std::to_string(bad) + ": got " + std::to_string(got[bad]) + " for " +
           std::to_string(wanted[static_cast<size_t>(bad)]);
  }

  bool same_bits(unsigned gradient, const std::vector<Guarded>& a, const std::vector<Guarded>& b) const {
    const size_t bytes = static_cast<size_t>(size_of(gradient)) * sizeof(T);
    return bytes == 0 || std::memcmp(a[gradient].as(), b[gradient].as(), bytes) == 0;
  }
};

}  // namespace fastsep_tests
