// The operands of one forward problem between guard pages, and what the oracle makes of them.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "harness.h"

namespace fastsep_tests {

template <class T>
struct ForwardTrial {
  fastsep::Problem p;
  bool integers;
  Tight tight;
  Numbers<T> numbers;
  int64_t depth = p.channels * p.multiplier;
  int64_t output_size =
      p.batch * (p.out_channels > 0 ? p.out_channels : depth) * fastsep::out_height(p) * fastsep::out_width(p);
  Guarded input = numbers.drawn(p.batch * (p.expand.channels > 0 ? p.expand.channels * p.expand.height * p.expand.width
                                                                 : p.channels * p.height * p.width));
  Guarded expand_weight = numbers.drawn(fastsep::expansion_depth(p) * p.channels);
  Guarded expand_bias = numbers.drawn(p.channels);
  Guarded depthwise_weight = numbers.drawn(depth * p.kernel_h * p.kernel_w);
  Guarded depthwise_bias = numbers.drawn(depth);
  Guarded pointwise_weight = numbers.drawn(p.out_channels * depth), bias = numbers.drawn(p.out_channels);
  Guarded gate = numbers.drawn(p.gate ? p.batch * p.channels : 0);
  Guarded summand = numbers.drawn(p.residual ? output_size : 0);
  fastsep::Weights weights;
  fastsep::Inputs inputs;
  std::vector<double> oracle, magnitude;

  ForwardTrial(const Case& c, const fastsep::Problem& problem, bool integers_, Tight tight_, unsigned seed = plain_seed)
      : p(problem),
        integers(integers_),
        tight(tight_),
        numbers(integers_, tight_, seed),
        weights{depthwise_weight.as(), c.depthwise_bias ? depthwise_bias.as() : nullptr,
                pointwise_weight.as(), c.bias ? bias.as() : nullptr,
                expand_weight.as(),    c.bias ? expand_bias.as() : nullptr},
        inputs(input.as(), p.gate ? gate.as() : nullptr, p.residual && !adds_input() ? summand.as() : nullptr) {}

  // Whether the residual is x: of an expansion, where x is like the output.
  bool adds_input() const {
    const fastsep::Expansion& e = p.expand;
    return e.channels > 0 && e.channels == p.out_channels && e.height == fastsep::out_height(p) &&
           e.width == fastsep::out_width(p) && !e.planar;
  }

  void ask_oracle() {
    oracle.resize(static_cast<size_t>(output_size));
    fastsep::reference_forward(p, inputs, weights, oracle.data(), false);
    if (integers) return;
    magnitude.resize(oracle.size());
    fastsep::reference_forward(p, inputs, weights, magnitude.data(), true);
  }

  // What is wrong with `got`, against the oracle; empty where nothing is.
  std::string difference(const T* got) const {
    // Rounding: each of the n additions and products of a sum errs by eps of the sum of magnitudes at most; an
    // activation stretches that by less than 2 (hardswish and silu have slopes up to 1.5) and rounds on its own.
    const double terms = static_cast<double>(p.kernel_h * p.kernel_w + depth + fastsep::expansion_depth(p) + 8);
    const double eps = std::numeric_limits<T>::epsilon();
    int64_t bad = -1;
    for (int64_t i = 0; i < output_size; ++i) {
      const auto at = static_cast<size_t>(i);
      const double error = std::fabs(static_cast<double>(got[i]) - oracle[at]);
      if (integers ? static_cast<T>(oracle[at]) != got[i] : !(error <= 2 * terms * eps * (magnitude[at] + 1))) bad = i;
    }
    if (bad < 0) return "";
    return std::string(integers ? "integers" : "reals") + " differ at " + std::to_string(bad) + ": got " +
           std::to_string(got[bad]) + " for " + std::to_string(oracle[static_cast<size_t>(bad)]);
  }

  bool same_bits(const Guarded& a, const Guarded& b) const {
    const size_t bytes = static_cast<size_t>(output_size) * sizeof(T);
    return bytes == 0 || std::memcmp(a.as(), b.as(), bytes) == 0;
  }
};

}  // namespace fastsep_tests
