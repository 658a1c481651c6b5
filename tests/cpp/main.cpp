// Runs every kernel that this processor has over the table of cases; with --share I/N, every N-th kernel from the I-th
// on; with --part I/N, every N-th case and series from the I-th on, and with --parts N a part that is drawn.
// With --require ISA it fails where those kernels cannot run here, instead of passing the others.
#include <cstdio>
#include <cstring>
#include <iostream>
#include <random>

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

// Every count-th of a list, from number `index` on, counted from 1.
struct Part {
  int index = 1, count = 1;

  bool parse(const char* text) {
    return std::sscanf(text, "%d/%d", &index, &count) == 2 && index >= 1 && index <= count;
  }
  template <class T>
  std::vector<T> of(const std::vector<T>& all) const {
    std::vector<T> found;
    for (size_t i = static_cast<size_t>(index) - 1; i < all.size(); i += static_cast<size_t>(count))
      found.push_back(all[i]);
    return found;
  }
  bool draw(const char* text) {
    if (std::sscanf(text, "%d", &count) != 1 || count < 1) return false;
    std::random_device device;
    index = std::uniform_int_distribution<int>(1, count)(device);
    return true;
  }
};

struct Options {
  Part share, part;
  std::vector<Isa> required;
  std::vector<std::string> paths;
};

// Whether the arguments make sense.
bool parse(int argc, char** argv, Options* options) {
  int i = 1;
  for (; i + 1 < argc && std::strncmp(argv[i], "--", 2) == 0; i += 2) {
    Isa isa;
    if (std::strcmp(argv[i], "--share") == 0) {
      if (!options->share.parse(argv[i + 1])) return false;
    } else if (std::strcmp(argv[i], "--part") == 0) {
      if (!options->part.parse(argv[i + 1])) return false;
    } else if (std::strcmp(argv[i], "--parts") == 0) {
      if (!options->part.draw(argv[i + 1])) return false;
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
  const std::vector<Case> chosen = options.part.of(cases);
  // A group is as many images as lie in 8 MB: all three of the small ones, some of the large ones.
  const std::vector<SeriesSize> sizes = options.part.of<SeriesSize>({{3, 9, 0, 3}, {1, 10, 0, 3}, {5, 175, 0, 3}});
  if (options.part.count > 1)
    std::cout << "of the cases --part " << options.part.index << "/" << options.part.count << std::endl;
  int ran = 0;
  for (int i = options.share.index - 1; i < kernel_count(); i += options.share.count) {
    const Kernel* const kernel = kernels[i];
    if (!isa_available(kernel->isa)) {
      std::cout << kernel->name << ": not on this processor\n";
      continue;
    }
    ++ran;
    const int before = tally.checks;
    for (const Case& c : chosen)
      for (Layout layout : {Layout::nchw, Layout::nhwc}) run_case(*kernel, c, layout);
    for (const SeriesSize& size : sizes) test_series(*kernel, size);
    std::cout << kernel->name << ": " << chosen.size() << " cases, " << tally.checks - before << " checks" << std::endl;
  }
  if (chosen.empty()) {
    std::cerr << "FAILED: part " << options.part.index << "/" << options.part.count << " has no case\n";
    return 1;
  }
  if (ran == 0) {
    std::cerr << "FAILED: of the " << kernel_count() << " kernels, share " << options.share.index << "/"
              << options.share.count << " has none that runs on this processor\n";
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
    std::cerr << "usage: fastsep_tests [--share I/N] [--part I/N | --parts N] [--require ISA] cases.txt ...\n";
    return 2;
  }
  return fastsep_tests::run(options);
}
