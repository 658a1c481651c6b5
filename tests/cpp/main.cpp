// Runs every kernel that this processor has over the table of cases; with --share I/N, every N-th from the I-th on.
#include <cstdio>
#include <cstring>
#include <iostream>

#include "harness.h"

namespace fastsep_tests {

using namespace fastsep;

Tally tally;

void expect(bool good, const Kernel& kernel, const Case& c, const Problem& p, const std::string& what) {
  ++tally.checks;
  if (good) return;
  ++tally.failures;
  std::cerr << "FAILED " << kernel.name << (p.layout == Layout::nhwc ? " nhwc" : " nchw")
            << (p.out_channels == 0 ? " depthwise alone" : "") << ": " << what << "\n  " << c.line << "\n";
}

Problem with_integer_activations(Problem p) {
  const auto exact = [](Activation a) {
    return a == Activation::identity || a == Activation::relu || a == Activation::relu6;
  };
  if (!exact(p.mid_activation)) p.mid_activation = Activation::relu6;
  if (!exact(p.activation)) p.activation = Activation::identity;
  if (!exact(p.expand.activation)) p.expand.activation = Activation::relu;
  return p;
}

namespace {

const Kernel* const kernels[] = {
#define FASTSEP_KERNEL(isa, dtype) &separable_##dtype##_##isa,
#include "cpu/kernels.inc"
#undef FASTSEP_KERNEL
};

void run_case(const Kernel& kernel, const Case& c, Layout layout) {
  Problem p = c.problem;
  p.dtype = kernel.dtype;
  p.layout = layout;
  const Status status = validate(p);
  const bool has_operands = p.gate || p.residual;
  if (p.expand.channels > 0 && layout == Layout::nchw)
    return expect(status == Status::bad_expansion, kernel, c, p, "an expansion of NCHW");
  if (has_operands && layout == Layout::nchw)
    return expect(status == Status::bad_operand, kernel, c, p, "a gate or residual of NCHW");
  expect(status == Status::ok, kernel, c, p, std::string("validate: ") + describe(status));
  if (status != Status::ok) return;
  Problem depthwise = p;
  depthwise.out_channels = 0;
  depthwise.activation = Activation::identity;
  depthwise.residual = false;
  for (const Problem& problem : {p, depthwise}) {
    if (problem.out_channels == 0 && p.gate) continue;
    test_forward(kernel, c, with_integer_activations(problem), true, Tight::end);
    test_forward(kernel, c, problem, false, Tight::begin);
    if (p.expand.channels > 0 || has_operands) continue;
    test_backward(kernel, c, with_integer_activations(problem), true, Tight::end);
    test_backward(kernel, c, problem, false, Tight::begin);
  }
}

int run(const std::vector<std::string>& paths, int share, int shares) {
  std::vector<Case> cases;
  for (const std::string& path : paths)
    for (const Case& c : read_cases(path)) cases.push_back(c);
  for (int i = share - 1; i < kernel_count(); i += shares) {
    const Kernel* const kernel = kernels[i];
    if (!isa_available(kernel->isa)) {
      std::cout << kernel->name << ": not on this processor\n";
      continue;
    }
    const int before = tally.checks;
    for (const Case& c : cases)
      for (Layout layout : {Layout::nchw, Layout::nhwc}) run_case(*kernel, c, layout);
    test_series(*kernel);
    std::cout << kernel->name << ": " << cases.size() << " cases, " << tally.checks - before << " checks" << std::endl;
  }
  for (const Case& c : cases)
    if (c.problem.batch > 0 && c.problem.pad_top < c.problem.height && c.problem.expand.channels == 0 &&
        !c.problem.gate && !c.problem.residual) {
      test_validate(c.problem);
      break;
    }
  std::cout << tally.checks - tally.failures << " passed, " << tally.failures << " failed\n";
  return tally.failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace fastsep_tests

int main(int argc, char** argv) {
  int first = 1, share = 1, shares = 1;
  if (argc > 2 && std::strcmp(argv[1], "--share") == 0) {
    first = std::sscanf(argv[2], "%d/%d", &share, &shares) == 2 && 0 < share && share <= shares ? 3 : argc;
  }
  if (argc <= first) {
    std::cerr << "usage: fastsep_tests [--share I/N] cases.txt ...\n";
    return 2;
  }
  return fastsep_tests::run({argv + first, argv + argc}, share, shares);
}
