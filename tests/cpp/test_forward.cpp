// Every kernel of kernels.inc that runs here, on every case of the table, in both layouts:
// * between guard pages, tight at the end and at the beginning, at addresses aligned to one element only;
// * into an output filled with NaN;
// * small integers equal to the oracle to the bit, random numbers within a bound on the rounding of sums;
// * equal to the bit for 1, 2, 3 and 7 threads, and for packed and plain weights;
// * in two passes where the case says so.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <iostream>
#include <vector>

#include "cpu/parallel.h"
#include "harness.h"

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
  Problem p;
  bool integers;
  Tight tight;
  Numbers<T> numbers{integers, tight};
  int64_t passes = 0;  // the most that a forward had of packed weights

  int64_t channels() const { return p.out_channels > 0 ? p.out_channels : p.channels * p.multiplier; }
  int64_t output_size() const { return p.batch * channels() * out_height(p) * out_width(p); }

  bool forward_on(int threads, const Inputs& input, const Weights& weights, const void* packed, size_t packed_size,
                  void* output) {
    set_num_threads(threads);
    Counted counted = {current_executor()};
    const Executor executor = counted.get();
    size_t bytes = 0;
    if (workspace_bytes(p, kernel.isa, executor.threads, packed == nullptr, &bytes) != Status::ok) return false;
    const Guarded workspace = spoilt_workspace(bytes, tight);
    const Status status =
        packed == nullptr ? forward_unpacked(p, kernel.isa, input, weights, output, workspace.as(), bytes, executor)
                          : forward(p, kernel.isa, input, packed, packed_size, output, workspace.as(), bytes, executor);
    if (packed != nullptr) passes = std::max(passes, counted.runs);
    return status == Status::ok;
  }

  void compare_with_oracle(const T* got, const std::vector<double>& oracle, const std::vector<double>& magnitude) {
    // Rounding: each of the n additions and products of a sum errs by eps of the sum of magnitudes at most; an
    // activation stretches that by less than 2 (hardswish and silu have slopes up to 1.5) and rounds on its own.
    const double terms =
        static_cast<double>(p.kernel_h * p.kernel_w + p.channels * p.multiplier + expansion_depth(p) + 8);
    const double eps = std::numeric_limits<T>::epsilon();
    int64_t bad = -1, zeros = 0;
    for (int64_t i = 0; i < output_size(); ++i) {
      const double error = std::fabs(static_cast<double>(got[i]) - oracle[i]);
      zeros += oracle[i] == 0;
      if (integers ? static_cast<T>(oracle[i]) != got[i] : !(error <= 2 * terms * eps * (magnitude[i] + 1))) bad = i;
    }
    expect(bad < 0, kernel, c, p,
           std::string(integers ? "integers" : "reals") + " differ at " + std::to_string(bad) + ": got " +
               (bad < 0 ? "" : std::to_string(got[bad]) + " for " + std::to_string(oracle[bad])));
    if (output_size() > 64) expect(zeros * 10 < output_size() * 9, kernel, c, p, "nearly all zeros: proves nothing");
  }

  void all() {
    const int64_t depth = p.channels * p.multiplier;
    const Expansion& e = p.expand;
    const Guarded input =
        numbers.drawn(p.batch * (e.channels > 0 ? e.channels * e.height * e.width : p.channels * p.height * p.width));
    const Guarded expand_weight = numbers.drawn(expansion_depth(p) * p.channels),
                  expand_bias = numbers.drawn(p.channels);
    const Guarded depthwise_weight = numbers.drawn(depth * p.kernel_h * p.kernel_w),
                  depthwise_bias = numbers.drawn(depth);
    const Guarded pointwise_weight = numbers.drawn(p.out_channels * depth), bias = numbers.drawn(p.out_channels);
    const Weights weights = {depthwise_weight.as(), c.depthwise_bias ? depthwise_bias.as() : nullptr,
                             pointwise_weight.as(), c.bias ? bias.as() : nullptr,
                             expand_weight.as(),    c.bias ? expand_bias.as() : nullptr};
    // The residual of an expansion is x, as long as no other is named.
    const Guarded gate = numbers.drawn(p.batch * p.channels), summand = numbers.drawn(output_size());
    const Inputs inputs(input.as(), p.gate ? gate.as() : nullptr,
                        p.residual && e.channels == 0 ? summand.as() : nullptr);
    std::vector<double> oracle(static_cast<size_t>(output_size())), magnitude(oracle.size());
    reference_forward(p, inputs, weights, oracle.data(), false);
    reference_forward(p, inputs, weights, magnitude.data(), true);

    const Guarded output = numbers.unwritten(output_size());
    expect(forward_on(1, inputs, weights, nullptr, 0, output.as()), kernel, c, p, "forward_unpacked refused");
    compare_with_oracle(output.as<T>(), oracle, magnitude);
    if (integers) return;  // whose sums are exact in any order

    size_t packed_size = 0;
    expect(packed_bytes(p, kernel.isa, &packed_size) == Status::ok, kernel, c, p, "packed_bytes refused");
    const Guarded packed(packed_size, tight, 64);
    expect(pack(p, kernel.isa, weights, packed.as(), packed_size, Executor()) == Status::ok, kernel, c, p,
           "pack refused");
    for (int threads : {1, 2, 3, 7}) {
      const Guarded again = numbers.unwritten(output_size());
      const bool use_packed = threads != 3;
      expect(forward_on(threads, inputs, weights, use_packed ? packed.as() : nullptr, packed_size, again.as()), kernel,
             c, p, "forward refused");
      expect(std::memcmp(output.as(), again.as(), static_cast<size_t>(output_size()) * sizeof(T)) == 0, kernel, c, p,
             std::to_string(threads) + " threads give other bits");
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
    Run<float>{kernel, c, p, integers, tight}.all();
  else
    Run<double>{kernel, c, p, integers, tight}.all();
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
