// The gradients of every kernel, on every case of the table, in both layouts, with and without the pointwise half:
// * between guard pages, tight at the end and at the beginning, into memory filled with NaN;
// * small integers equal to the oracle to the bit, random numbers within a bound on the rounding of sums;
// * equal to the bit for 1, 2, 3 and 7 threads, and for every single gradient asked for alone.
#include <vector>

#include "backward_trial.h"
#include "cpu/parallel.h"

namespace fastsep_tests {
namespace {

using namespace fastsep;

template <class T>
struct Run {
  const Kernel& kernel;
  const Case& c;
  BackwardTrial<T> trial;

  Run(const Kernel& kernel_, const Case& c_, const Problem& p, bool integers, Tight tight)
      : kernel(kernel_), c(c_), trial(c_, p, integers, tight) {}

  bool backward_on(int threads, const Gradients& gradients) const {
    const Problem& p = trial.p;
    set_num_threads(threads);
    const Executor executor = current_executor();
    size_t bytes = 0;
    if (backward_workspace_bytes(p, kernel.isa, executor.threads, gradients, &bytes) != Status::ok) return false;
    const Guarded workspace = spoilt_workspace(bytes, trial.tight);
    return backward(p, kernel.isa, trial.input.as(), trial.weights, trial.saved.as(), trial.grad_output.as(), gradients,
                    workspace.as(), bytes, executor) == Status::ok;
  }

  void all() {
    const Problem& p = trial.p;
    trial.save_output();
    trial.ask_oracle();
    const std::vector<Guarded> gradients = trial.unwritten();
    expect(backward_on(1, gradients_at(gradients, all_gradients)), kernel, c, p, "backward refused");
    for (unsigned i = 0; i < gradient_count; ++i) {
      const std::string difference = trial.difference(i, gradients[i].template as<T>());
      expect(difference.empty(), kernel, c, p, difference);
    }
    if (trial.integers) return;  // whose sums are exact in any order

    const auto same = [&](unsigned i, const std::vector<Guarded>& again, const std::string& what) {
      expect(trial.same_bits(i, gradients, again), kernel, c, p,
             what + " other bits, gradient of " + gradient_names[i]);
    };
    for (int threads : {2, 3, 7}) {
      const std::vector<Guarded> again = trial.unwritten();
      backward_on(threads, gradients_at(again, all_gradients));
      for (unsigned i = 0; i < gradient_count; ++i) same(i, again, std::to_string(threads) + " threads give");
    }
    for (unsigned i = 0; i < gradient_count; ++i) {
      const std::vector<Guarded> again = trial.unwritten();
      backward_on(2, gradients_at(again, 1u << i));
      same(i, again, "asked for alone it has");
    }
  }
};

}  // namespace

void test_backward(const Kernel& kernel, const Case& c, const Problem& p, bool integers, Tight tight) {
  if (p.dtype == Dtype::f32)
    Run<float>(kernel, c, p, integers, tight).all();
  else
    Run<double>(kernel, c, p, integers, tight).all();
}

}  // namespace fastsep_tests
