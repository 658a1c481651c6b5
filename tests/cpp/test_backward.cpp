// The gradients of every kernel, on every case of the table, in both layouts, with and without the pointwise half:
// * between guard pages, tight at the end and at the beginning, into memory filled with NaN;
// * small integers equal to the oracle to the bit, random numbers within a bound on the rounding of sums;
// * equal to the bit for 1, 2, 3 and 7 threads, and for every single gradient asked for alone.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/parallel.h"
#include "harness.h"

namespace fastsep_tests {
namespace {

using namespace fastsep;

// The five gradients, by number.
constexpr int parts = 5;
const char* const part_names[parts] = {"input", "depthwise_weight", "depthwise_bias", "pointwise_weight", "bias"};

template <class Memory>
Gradients pointers(const std::vector<Memory>& memory, unsigned wanted) {
  void* address[parts];
  for (unsigned i = 0; i < parts; ++i) address[i] = wanted >> i & 1 ? memory[i].template as<void>() : nullptr;
  return {address[0], address[1], address[2], address[3], address[4]};
}

struct Doubles {
  std::vector<double> values;
  template <class T>
  void* as() const {
    return const_cast<double*>(values.data());
  }
};

template <class T>
struct Run {
  const Kernel& kernel;
  const Case& c;
  Problem p;
  bool integers;
  Tight tight;
  Numbers<T> numbers{integers, tight};

  int64_t depth() const { return p.channels * p.multiplier; }
  int64_t pixels() const { return p.batch * out_height(p) * out_width(p); }
  int64_t size_of(unsigned part) const {
    switch (part) {
      case 0: return p.batch * p.channels * p.height * p.width;
      case 1: return depth() * p.kernel_h * p.kernel_w;
      case 2: return depth();
      case 3: return p.out_channels * depth();
      default: return p.out_channels;
    }
  }

  std::vector<Guarded> unwritten() const {
    std::vector<Guarded> memory;
    for (unsigned i = 0; i < parts; ++i) memory.push_back(numbers.unwritten(size_of(i)));
    return memory;
  }

  bool backward_on(int threads, const void* input, const Weights& weights, const void* saved, const void* grad_output,
                   const Gradients& gradients) const {
    set_num_threads(threads);
    const Executor executor = current_executor();
    size_t bytes = 0;
    if (backward_workspace_bytes(p, kernel.isa, executor.threads, gradients, &bytes) != Status::ok) return false;
    const Guarded workspace = spoilt_workspace(bytes, tight);
    return backward(p, kernel.isa, input, weights, saved, grad_output, gradients, workspace.as(), bytes, executor) ==
           Status::ok;
  }

  // y or v, as the kernel wants it.
  Guarded saved_output(const void* input, const Weights& weights) const {
    Problem asked = p;
    if (!derivative_from_output(p.activation)) asked.activation = Activation::identity;
    std::vector<double> output(static_cast<size_t>(pixels() * std::max(p.out_channels, depth())));
    reference_forward(asked, input, weights, output.data(), false);
    Guarded saved = numbers.unwritten(pixels() * p.out_channels);
    for (int64_t i = 0; i < pixels() * p.out_channels; ++i)
      saved.template as<T>()[i] = static_cast<T>(output[static_cast<size_t>(i)]);
    return saved;
  }

  void compare_with_oracle(unsigned part, const T* got, const std::vector<double>& oracle,
                           const std::vector<double>& magnitude) {
    // Each product and addition of the sums that lead to a gradient errs by eps of the sum of magnitudes at most.
    // Slopes are at most 1.13, and err by a few eps of the arguments' magnitudes.
    const double terms =
        static_cast<double>(p.kernel_h * p.kernel_w + depth() + p.out_channels + (part == 0 ? 0 : pixels()) + 16);
    const double eps = std::numeric_limits<T>::epsilon();
    int64_t bad = -1;
    for (int64_t i = 0; i < size_of(part); ++i) {
      const double want = oracle[static_cast<size_t>(i)], error = std::fabs(static_cast<double>(got[i]) - want);
      const double bound = 2 * terms * eps * (magnitude[static_cast<size_t>(i)] + 1);
      if (integers ? static_cast<T>(want) != got[i] : !(error <= bound)) bad = i;
    }
    expect(bad < 0, kernel, c, p,
           std::string(integers ? "integers" : "reals") + ", gradient of " + part_names[part] + " differs at " +
               std::to_string(bad) + ": got " +
               (bad < 0 ? "" : std::to_string(got[bad]) + " for " + std::to_string(oracle[static_cast<size_t>(bad)])));
  }

  void all() {
    const Guarded input = numbers.drawn(size_of(0)), depthwise_weight = numbers.drawn(size_of(1));
    const Guarded depthwise_bias = numbers.drawn(size_of(2)), pointwise_weight = numbers.drawn(size_of(3));
    const Guarded bias = numbers.drawn(size_of(4));
    const Guarded grad_output = numbers.drawn(pixels() * (p.out_channels > 0 ? p.out_channels : depth()));
    const Weights weights = {depthwise_weight.as(), c.depthwise_bias ? depthwise_bias.as() : nullptr,
                             pointwise_weight.as(), c.bias ? bias.as() : nullptr};
    const Guarded saved = saved_output(input.as(), weights);
    const unsigned all_parts = (1u << parts) - 1;
    std::vector<Doubles> oracle(parts), magnitude(parts);
    for (unsigned i = 0; i < parts; ++i)
      for (auto* doubles : {&oracle, &magnitude}) (*doubles)[i].values.resize(static_cast<size_t>(size_of(i)));
    reference_backward(p, input.as(), weights, grad_output.as(), pointers(oracle, all_parts), false);
    reference_backward(p, input.as(), weights, grad_output.as(), pointers(magnitude, all_parts), true);

    const std::vector<Guarded> gradients = unwritten();
    expect(backward_on(1, input.as(), weights, saved.as(), grad_output.as(), pointers(gradients, all_parts)), kernel, c,
           p, "backward refused");
    for (unsigned i = 0; i < parts; ++i)
      compare_with_oracle(i, gradients[i].template as<T>(), oracle[i].values, magnitude[i].values);
    if (integers) return;  // whose sums are exact in any order

    const auto same = [&](unsigned part, const std::vector<Guarded>& again, const std::string& what) {
      const size_t bytes = static_cast<size_t>(size_of(part)) * sizeof(T);
      expect(bytes == 0 || std::memcmp(gradients[part].as(), again[part].as(), bytes) == 0, kernel, c, p,
             what + " other bits, gradient of " + part_names[part]);
    };
    for (int threads : {2, 3, 7}) {
      const std::vector<Guarded> again = unwritten();
      backward_on(threads, input.as(), weights, saved.as(), grad_output.as(), pointers(again, all_parts));
      for (unsigned i = 0; i < parts; ++i) same(i, again, std::to_string(threads) + " threads give");
    }
    for (unsigned i = 0; i < parts; ++i) {
      const std::vector<Guarded> again = unwritten();
      backward_on(2, input.as(), weights, saved.as(), grad_output.as(), pointers(again, 1u << i));
      same(i, again, "asked for alone it has");
    }
  }
};

}  // namespace

void test_backward(const Kernel& kernel, const Case& c, const Problem& p, bool integers, Tight tight) {
  if (p.dtype == Dtype::f32)
    Run<float>{kernel, c, p, integers, tight}.all();
  else
    Run<double>{kernel, c, p, integers, tight}.all();
}

}  // namespace fastsep_tests
