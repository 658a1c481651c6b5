// Every kernel of kernels.inc that runs here, on every case of the table, in both layouts:
// * between guard pages, tight at the end and at the beginning, at addresses aligned to one element only;
// * into an output filled with NaN;
// * small integers equal to the oracle to the bit, random numbers within a bound on the rounding of sums;
// * equal to the bit for 1, 2, 3 and 7 threads, and for packed and plain weights;
// * in two passes where the case says so.
#include <algorithm>
#include <iostream>

#include "cpu/parallel.h"
#include "forward_trial.h"

namespace fastsep_tests {
namespace {

using namespace fastsep;

// Another executor, and how often it was used.
struct Counted {
  Executor executor;
  int64_t runs = 0;

  Executor get() { return {executor.threads, executor.run == nullptr ? nullptr : run, this}; }
  static void run(void* state, int64_t count, void (*body)(void*, int64_t), void* context) {
    Counted& self = *static_cast<Counted*>(state);
    ++self.runs;
    self.executor.run(self.executor.state, count, body, context);
  }
};

template <class T>
struct Run {
  const Kernel& kernel;
  const Case& c;
  ForwardTrial<T> trial;
  int64_t passes = 0;  // the most that a forward had of packed weights

  Run(const Kernel& kernel_, const Case& c_, const Problem& p, bool integers, Tight tight)
      : kernel(kernel_), c(c_), trial(c_, p, integers, tight) {}

  bool forward_on(int threads, const void* packed, size_t packed_size, void* output) {
    const Problem& p = trial.p;
    set_num_threads(threads);
    Counted counted = {current_executor()};
    const Executor executor = counted.get();
    size_t bytes = 0;
    if (workspace_bytes(p, kernel.isa, executor.threads, packed == nullptr, &bytes) != Status::ok) return false;
    const Guarded workspace = spoilt_workspace(bytes, trial.tight);
    const Status status =
        packed == nullptr
            ? forward_unpacked(p, kernel.isa, trial.inputs, trial.weights, output, workspace.as(), bytes, executor)
            : forward(p, kernel.isa, trial.inputs, packed, packed_size, output, workspace.as(), bytes, executor);
    if (packed != nullptr) passes = std::max(passes, counted.runs);
    return status == Status::ok;
  }

  void all() {
    const Problem& p = trial.p;
    trial.ask_oracle();
    const Guarded output = trial.numbers.unwritten(trial.output_size);
    expect(forward_on(1, nullptr, 0, output.as()), kernel, c, p, "forward_unpacked refused");
    const std::string difference = trial.difference(output.as<T>());
    expect(difference.empty(), kernel, c, p, difference);
    const auto zeros = std::count(trial.oracle.begin(), trial.oracle.end(), 0.0);
    if (trial.output_size > 64)
      expect(zeros * 10 < trial.output_size * 9, kernel, c, p, "nearly all zeros: proves nothing");
    if (trial.integers) return;  // whose sums are exact in any order

    size_t packed_size = 0;
    expect(packed_bytes(p, kernel.isa, &packed_size) == Status::ok, kernel, c, p, "packed_bytes refused");
    const Guarded packed(packed_size, trial.tight, 64);
    expect(pack(p, kernel.isa, trial.weights, packed.as(), packed_size, Executor()) == Status::ok, kernel, c, p,
           "pack refused");
    for (int threads : {1, 2, 3, 7}) {
      const Guarded again = trial.numbers.unwritten(trial.output_size);
      expect(forward_on(threads, threads != 3 ? packed.as() : nullptr, packed_size, again.as()), kernel, c, p,
             "forward refused");
      expect(trial.same_bits(output, again), kernel, c, p, std::to_string(threads) + " threads give other bits");
    }
    if (p.out_channels > 0 && c.line.find("name=two_passes") != std::string::npos)
      expect(passes == 2, kernel, c, p, "no number of threads took two passes");
  }
};

void refused(const char* what, Status wanted, const Problem& p) {
  ++tally.checks;
  if (validate(p) == wanted) return;
  ++tally.failures;
  std::cerr << "FAILED validate: " << what << " gave \"" << describe(validate(p)) << "\"\n";
}

}  // namespace

void test_forward(const Kernel& kernel, const Case& c, const Problem& p, bool integers, Tight tight) {
  if (p.dtype == Dtype::f32)
    Run<float>(kernel, c, p, integers, tight).all();
  else
    Run<double>(kernel, c, p, integers, tight).all();
}

void test_validate(Problem good) {
  const auto with = [&](int64_t Problem::* field, int64_t value) {
    Problem p = good;
    p.*field = value;
    return p;
  };
  refused("a good problem", Status::ok, good);
  for (auto field :
       {&Problem::channels, &Problem::height, &Problem::width, &Problem::multiplier, &Problem::kernel_h,
        &Problem::kernel_w, &Problem::stride_h, &Problem::stride_w, &Problem::dilation_h, &Problem::dilation_w}) {
    refused("zero", Status::bad_size, with(field, 0));
    refused("negative", Status::bad_size, with(field, -1));
  }
  refused("no output channels: the depthwise half alone", Status::ok, with(&Problem::out_channels, 0));
  for (auto field : {&Problem::batch, &Problem::out_channels, &Problem::pad_top, &Problem::pad_bottom,
                     &Problem::pad_left, &Problem::pad_right})
    refused("negative", Status::bad_size, with(field, -1));
  for (auto field : {&Problem::batch, &Problem::channels, &Problem::height, &Problem::width, &Problem::out_channels,
                     &Problem::multiplier, &Problem::kernel_h, &Problem::dilation_h, &Problem::stride_h,
                     &Problem::pad_top, &Problem::pad_right}) {
    const Status status = validate(with(field, INT64_MAX));
    refused("the largest integer", status == Status::empty_output ? status : Status::overflow, with(field, INT64_MAX));
  }
  refused("a kernel larger than the plane", Status::empty_output, with(&Problem::kernel_h, good.height + 9));
  const auto with_operand = [&](bool Problem::* operand) {
    Problem p = good;
    p.layout = Layout::nhwc, p.kernel_h = p.kernel_w = 1;
    p.*operand = true;
    return p;
  };
  for (auto operand : {&Problem::gate, &Problem::residual}) {
    refused("a gate or residual", Status::ok, with_operand(operand));
    Problem p = with_operand(operand);
    p.layout = Layout::nchw;
    refused("one of NCHW", Status::bad_operand, p);
    p = with_operand(operand);
    p.out_channels = 0;
    p.activation = Activation::identity;
    refused("one without a pointwise half", Status::bad_operand, p);
  }
  for (auto field : {&Problem::kernel_h, &Problem::kernel_w, &Problem::multiplier}) {
    Problem p = with_operand(&Problem::gate);
    p.*field = 2;
    refused("a gate of more than a factor", Status::bad_operand, p);
  }
  const auto image_of = [&](int64_t channels, int64_t stride_w) {
    Problem p = good;
    p.layout = Layout::nhwc, p.multiplier = 1;
    p.expand = {channels, Activation::identity, 2 * p.height, 2 * p.width, 3, 3, 2, stride_w, 1, 1, true};
    return p;
  };
  refused("an image in NCHW", Status::ok, image_of(3, 2));
  refused("one of four channels", Status::bad_expansion, image_of(4, 2));
  refused("one by a stride of 3", Status::bad_expansion, image_of(3, 3));
  Problem p = good;
  p.activation = static_cast<Activation>(activation_count);
  refused("an unknown activation", Status::bad_enum, p);
}

}  // namespace fastsep_tests
