// Random problems computed: between guard pages, each tile alone in no more scratch than it lays out, the same bits for
// every number of threads, and against the oracle where that does not take too long.
#include "../backward_trial.h"
#include "../forward_trial.h"
#include "cpu/driver.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"
#include "sweep.h"

namespace fastsep_tests {
namespace {

using namespace fastsep;

// How one problem is tried.
struct Choices {
  uint64_t seed;
  bool integers, with_oracle;
  bool infinite;  // a weight, so that taps beside the plane are left out one by one; only memory is watched then
  Tight tight;
  int some, others;  // numbers of threads
};

Executor executor_of(int threads) {
  set_num_threads(threads);
  return current_executor();
}

template <class T>
class ForwardTries {
 public:
  ForwardTries(const Case& c, const Problem& p, const Choices& choices)
      : choices_(choices), trial_(c, p, choices.integers, choices.tight, static_cast<unsigned>(choices.seed)) {
    if (choices.with_oracle) trial_.ask_oracle();
    if (choices.infinite) trial_.depthwise_weight.template as<T>()[0] = std::numeric_limits<T>::infinity();
  }

  void run(const Kernel& kernel) {
    const Guarded output = trial_.numbers.unwritten(trial_.output_size);
    whole(kernel, 1, nullptr, output);
    if (choices_.with_oracle) {
      const std::string difference = trial_.difference(output.as<T>());
      if (!difference.empty()) fail(kernel.name, "forward, " + difference);
    }
    const Guarded packed(packed_size(trial_.p, kernel), choices_.tight, 64);
    pack_weights(trial_.p, kernel, trial_.weights, packed.as(), executor_of(choices_.some));
    compare(kernel, output, choices_.some, "threads",
            [&](const Guarded& again) { whole(kernel, choices_.some, packed.as(), again); });
    compare(kernel, output, choices_.others, "threads, unpacked",
            [&](const Guarded& again) { whole(kernel, choices_.others, nullptr, again); });
    compare(kernel, output, choices_.others, "threads, each tile alone",
            [&](const Guarded& again) { tiles_alone(kernel, choices_.others, packed.as(), again); });
  }

 private:
  // As dispatch.cpp has it.
  void whole(const Kernel& kernel, int threads, const void* packed, const Guarded& output) const {
    const Executor executor = executor_of(threads);
    const Problem& p = trial_.p;
    const size_t scratch = scratch_size(p, kernel, executor.threads);
    const Guarded workspace =
        spoilt_workspace(scratch + (packed == nullptr ? packed_size(p, kernel) : 0), choices_.tight);
    if (packed == nullptr) {
      void* const behind = workspace.as<char>() + scratch;
      pack_weights(p, kernel, trial_.weights, behind, executor);
      packed = behind;
    }
    run_forward(p, kernel, trial_.inputs, packed, output.as(), workspace.as(), executor);
  }

  // Neighbouring tiles have no guard page between them, so each gets memory of its own, of its own size.
  void tiles_alone(const Kernel& kernel, int threads, const void* packed, const Guarded& output) const {
    const Problem& p = trial_.p;
    ForwardPlan plan = make_plan(p, kernel, threads);
    const Guarded shared = spoilt_workspace(static_cast<size_t>(plan.shared_bytes * p.batch), choices_.tight);
    plan.input = trial_.inputs.x;
    plan.gate = trial_.inputs.gate;
    plan.residual = trial_.inputs.residual != nullptr ? trial_.inputs.residual : trial_.inputs.x;
    plan.packed = packed_weights(packed);
    plan.output = output.as();
    plan.shared = shared.as();
    const bool two_passes = plan.channel_tiles > 0;
    const auto scratch_of = [&](int64_t rows, int64_t columns) {
      return spoilt_workspace(static_cast<size_t>(whole_cache_lines(kernel.scratch_bytes(plan, rows, columns))),
                              choices_.tight);
    };
    for (int64_t unit = 0; unit < channel_tile_count(plan); ++unit)
      kernel.forward_channels(plan, channels_of(plan, unit), scratch_of(plan.out_height, plan.out_width).as());
    for (int64_t unit = 0; unit < tile_count(plan); ++unit) {
      const Tile tile = tile_of(plan, unit);
      const Guarded scratch = two_passes
                                  ? spoilt_workspace(0, choices_.tight)
                                  : scratch_of(tile.row_end - tile.row_begin, tile.column_end - tile.column_begin);
      kernel.forward_tile(plan, tile, scratch.as());
    }
  }

  template <class F>
  void compare(const Kernel& kernel, const Guarded& output, int threads, const std::string& what, const F& run) const {
    const Guarded again = trial_.numbers.unwritten(trial_.output_size);
    run(again);
    if (!choices_.infinite && !trial_.same_bits(output, again))
      fail(kernel.name, "forward, " + std::to_string(threads) + " " + what + ": other bits");
  }

  Choices choices_;
  ForwardTrial<T> trial_;
};

template <class T>
class BackwardTries {
 public:
  BackwardTries(const Case& c, const Problem& p, const Choices& choices)
      : choices_(choices), trial_(c, p, choices.integers, choices.tight, static_cast<unsigned>(choices.seed)) {
    if (choices.with_oracle) {
      trial_.save_output();
      trial_.ask_oracle();
    } else {
      trial_.save_drawn();
    }
    if (choices.infinite) trial_.depthwise_weight.template as<T>()[0] = std::numeric_limits<T>::infinity();
  }

  void run(const Kernel& kernel) {
    const std::vector<Guarded> gradients = trial_.unwritten();
    whole(kernel, 1, gradients_at(gradients, all_gradients));
    for (unsigned i = 0; i < gradient_count && choices_.with_oracle; ++i) {
      const std::string difference = trial_.difference(i, gradients[i].template as<T>());
      if (!difference.empty()) fail(kernel.name, "backward, " + difference);
    }
    const unsigned wanted = static_cast<unsigned>(choices_.seed % all_gradients + 1);
    for (const auto& [threads, which] : {std::pair{choices_.some, all_gradients}, {choices_.others, wanted}}) {
      const std::vector<Guarded> again = trial_.unwritten();
      whole(kernel, threads, gradients_at(again, which));
      for (unsigned i = 0; i < gradient_count; ++i)
        if (which >> i & 1 && !choices_.infinite && !trial_.same_bits(i, gradients, again))
          fail(kernel.name, "backward, " + std::to_string(threads) + " threads, gradients " + std::to_string(which) +
                                ": other bits of " + gradient_names[i]);
    }
  }

 private:
  void whole(const Kernel& kernel, int threads, const Gradients& gradients) const {
    const Executor executor = executor_of(threads);
    const Guarded workspace =
        spoilt_workspace(backward_size(trial_.p, kernel, gradients, executor.threads), choices_.tight);
    run_backward(trial_.p, kernel, trial_.input.as(), trial_.weights, trial_.saved.as(), trial_.grad_output.as(),
                 gradients, workspace.as(), executor);
  }

  Choices choices_;
  BackwardTrial<T> trial_;
};

// Whose slope has no jump: where it has one, rounding decides which side a sum falls on.
Activation smooth(Activation activation) {
  switch (activation) {
    case Activation::relu:
    case Activation::relu6:
    case Activation::leaky_relu: return Activation::silu;
    case Activation::hardswish:
    case Activation::hardsigmoid: return Activation::gelu;
    default: return activation;
  }
}

template <class T>
void try_as(const std::vector<const Kernel*>& kernels, const Case& c, const Choices& choices) {
  Problem p = choices.integers ? with_integer_activations(c.problem) : c.problem;
  {
    ForwardTries<T> forward(c, p, choices);
    for (const Kernel* kernel : kernels)
      if (kernel->dtype == p.dtype) forward.run(*kernel);
  }
  if (p.expand.channels > 0 || p.gate || p.residual) return;
  if (choices.with_oracle && !choices.integers) {
    p.mid_activation = smooth(p.mid_activation);
    p.activation = smooth(p.activation);
  }
  BackwardTries<T> backward(c, p, choices);
  for (const Kernel* kernel : kernels)
    if (kernel->dtype == p.dtype) backward.run(*kernel);
}

}  // namespace

void try_series(const std::vector<const Kernel*>& kernels, uint64_t seed) {
  // Whole images of the last one are 100 to 200 KB a result, so that few or many of them make a group.
  const auto size = static_cast<int64_t>((seed >> 8) % 60 + 1);
  const auto more = static_cast<int64_t>((seed >> 16) % static_cast<uint64_t>(1 + 4000 / (size * size + 20)));
  const SeriesSize s = {static_cast<int64_t>((seed >> 32) % 5 + 1), size, more, static_cast<int>((seed >> 40) % 7 + 2)};
  current_line = "series of " + std::to_string(s.batch) + " images of " + std::to_string(s.size) + ", " +
                 std::to_string(s.more) + " more channels, " + std::to_string(s.threads) + " threads";
  for (const Kernel* kernel : kernels) test_series(*kernel, s);
}

void try_problem(const std::vector<const Kernel*>& kernels, uint64_t seed, double most_products) {
  Choices choices = {};
  choices.seed = seed;
  choices.with_oracle = (seed >> 8) % 2 == 0;
  choices.integers = (seed >> 9) % 2 == 0;
  choices.infinite = !choices.with_oracle && (seed >> 20) % 8 == 0;
  choices.tight = (seed >> 10) % 3 == 0 ? Tight::begin : Tight::end;
  choices.some = static_cast<int>(2 + (seed >> 12) % 7);
  choices.others = static_cast<int>(2 + (seed >> 16) % 7);
  // The oracle takes as long for one product as the kernels for twenty.
  const Case c = random_case(seed, choices.with_oracle ? most_products / 20 : most_products);
  current_line = c.line + (c.problem.layout == Layout::nhwc ? "  # nhwc" : "  # nchw") +
                 (c.problem.dtype == Dtype::f32 ? " f32" : " f64");
  if (c.problem.dtype == Dtype::f32)
    try_as<float>(kernels, c, choices);
  else
    try_as<double>(kernels, c, choices);
}

}  // namespace fastsep_tests
