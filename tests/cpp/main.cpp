// Runs every kernel that this processor has over the table of cases; with --share I/N, every N-th from the I-th on.
// With --require ISA it fails where those kernels cannot run here, instead of passing the others.
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

struct Options {
  int share = 1, shares = 1;
  std::vector<Isa> required;
  std::vector<std::string> paths;
};

// Whether the arguments make sense.
bool parse(int argc, char** argv, Options* options) {
  int i = 1;
  for (; i + 1 < argc && std::strncmp(argv[i], "--", 2) == 0; i += 2) {
    Isa isa;
    if (std::strcmp(argv[i], "--share") == 0) {
      int& share = options->share;
      int& shares = options->shares;
      if (std::sscanf(argv[i + 1], "%d/%d", &share, &shares) != 2 || share < 1 || share > shares) return false;
    } else if (std::strcmp(argv[i], "--require") == 0 && isa_from_name(argv[i + 1], &isa)) {
      options->required.push_back(isa);
    } else {
      return false;
    }
  }
  options->paths.assign(argv + i, argv + argc);
  return !options->paths.empty();
}

int run(const Options& options) {
  for (Isa isa : options.required)
    if (!isa_available(isa)) {
      std::cerr << "FAILED: kernels for " << isa_name(isa) << " are required, and "
                << (isa_compiled(isa) ? "do not run on this processor\n" : "were not compiled\n");
      return 1;
    }
  std::vector<Case> cases;
  for (const std::string& path : options.paths)
    for (const Case& c : read_cases(path)) cases.push_back(c);
  int ran = 0;
  for (int i = options.share - 1; i < kernel_count(); i += options.shares) {
    const Kernel* const kernel = kernels[i];
    if (!isa_available(kernel->isa)) {
      std::cout << kernel->name << ": not on this processor\n";
      continue;
    }
    ++ran;
    const int before = tally.checks;
    for (const Case& c : cases)
      for (Layout layout : {Layout::nchw, Layout::nhwc}) run_case(*kernel, c, layout);
    // A group is as many images as lie in 8 MB: all three of the small ones, some of the large ones.
    for (const SeriesSize& size : {SeriesSize{3, 9, 0, 3}, {1, 10, 0, 3}, {5, 175, 0, 3}}) test_series(*kernel, size);
    std::cout << kernel->name << ": " << cases.size() << " cases, " << tally.checks - before << " checks" << std::endl;
  }
  if (ran == 0) {
    std::cerr << "FAILED: of the " << kernel_count() << " kernels, share " << options.share << "/" << options.shares
              << " has none that runs on this processor\n";
    return 1;
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
  fastsep_tests::Options options;
  if (!fastsep_tests::parse(argc, argv, &options)) {
    std::cerr << "usage: fastsep_tests [--share I/N] [--require ISA] cases.txt ...\n";
    return 2;
  }
  return fastsep_tests::run(options);
}
