// Runs the CUDA kernels' source on the host, over the table of cases. With --elements N it leaves out those with more
// elements between the two halves.
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>

#include "harness.h"

namespace fastsep_tests {

using namespace fastsep;

Tally tally;
Launches launches;
std::set<std::string> launches_held;
int multiprocessors = 1;

const std::vector<Variant> variants = {{"f32", Dtype::f32, false, 0x1p-23, 0x1p-23},
                                       {"tf32", Dtype::f32, true, 0x1p-23, 0x1p-10},
                                       {"f16", Dtype::f16, false, 0x1p-10, 0x1p-10},
                                       {"bf16", Dtype::bf16, false, 0x1p-7, 0x1p-7}};

void expect(bool good, const std::string& what) {
  ++tally.checks;
  if (good) return;
  ++tally.failures;
  std::cerr << "FAILED " << what << "\n";
}

void expect(bool good, const Variant& variant, const Case& c, const Problem& p, const std::string& what) {
  expect(good, std::string(variant.name) + (p.layout == Layout::nhwc ? " nhwc" : " nchw") +
                   (p.out_channels == 0 ? " depthwise alone" : "") + ": " + what + "\n  " + c.line);
}

size_t element_size(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

double rounded(Dtype dtype, double value) {
  const float single = static_cast<float>(value);
  if (dtype == Dtype::f16) return __half2float(__float2half_rn(single));
  if (dtype == Dtype::bf16) return __bfloat162float(__float2bfloat16_rn(single));
  return single;
}

double Tensor::at(int64_t index) const {
  if (dtype == Dtype::f32) return memory.as<float>()[index];
  if (dtype == Dtype::f16) return __half2float(memory.as<__half>()[index]);
  return __bfloat162float(memory.as<__nv_bfloat16>()[index]);
}

Tensor unwritten(Dtype dtype, int64_t count, bool wide) {
  const size_t size = element_size(dtype), bytes = static_cast<size_t>(count) * size;
  Tensor tensor = {dtype, Guarded(bytes, wide ? Tight::begin : Tight::end, size), {}};
  std::memset(tensor.memory.as(), 0xff, bytes);
  return tensor;
}

Tensor drawn(Dtype dtype, int64_t count, bool integers, bool wide, std::mt19937& random) {
  Tensor tensor = unwritten(dtype, count, wide);
  std::uniform_int_distribution<int> whole(-2, 2);
  std::uniform_real_distribution<double> real(-1, 1);
  tensor.values.resize(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    const double value = rounded(dtype, integers ? whole(random) : real(random));
    tensor.values[static_cast<size_t>(i)] = value;
    const float single = static_cast<float>(value);
    if (dtype == Dtype::f32)
      tensor.memory.as<float>()[i] = single;
    else if (dtype == Dtype::f16)
      tensor.memory.as<__half>()[i] = __float2half_rn(single);
    else
      tensor.memory.as<__nv_bfloat16>()[i] = __float2bfloat16_rn(single);
  }
  return tensor;
}

namespace {

// Integers and reals, each in both layouts; addresses and the number of multiprocessors, which decides between tiles,
// alternate.
void run_case(const Variant& variant, const Case& c, size_t index) {
  for (const Layout layout : {Layout::nchw, Layout::nhwc}) {
    Problem p = c.problem;
    p.dtype = variant.dtype;
    p.layout = layout;
    const Status status = cuda::validate(p);
    expect(status == Status::ok, variant, c, p, std::string("validate: ") + describe(status));
    if (status != Status::ok) continue;
    for (const bool integers : {true, false}) {
      const bool wide = (index / 2 + (layout == Layout::nhwc) + integers) % 2 == 0;
      multiprocessors = index % 3 == 0 ? 1 : 100;
      cuda_host::enough_blocks = index % 3 == 1 ? 1 : 264;
      Problem depthwise = p;
      depthwise.out_channels = 0;
      depthwise.activation = Activation::identity;
      for (const Problem& problem : {p, depthwise}) {
        if (variant.tf32 && problem.out_channels == 0) continue;  // no product: the kernels of f32
        const Problem exact = with_integer_activations(problem);
        test_forward(variant, c, integers ? exact : problem, integers, wide);
        if (cuda::has_hopper_kernel(integers ? exact : problem, 0))
          test_forward(variant, c, integers ? exact : problem, integers, true, cuda::ForwardKernel::hopper);
        // Half of the backward runs: each case has integers in one layout and reals in the other.
        if ((index + (layout == Layout::nhwc) + integers) % 2 == 0 || index % 16 == 0)
          test_backward(variant, c, integers ? exact : problem, integers, wide, index % 16 == 0);
      }
    }
  }
}

// Every kernel of a type, for each number of threads that it may be launched with.
void test_coverage(const Variant& variant) {
  const bool halves = variant.dtype != Dtype::f32;
  const size_t forward = 5 + 2 + (halves ? 1 : 2);  // tilings with the taps as a window, in shared and global memory
  constexpr size_t depthwise = 7 * 2 + 7 + 2;       // channels-last with 256 and 64 threads, NCHW, general both ways
  constexpr size_t weights = 5 + 5 + 1 + 1;         // channels-last, NCHW, general, the parts added up
  constexpr size_t products = 4 * 2;
  const size_t hopper = halves ? 1 : 0;
  const size_t all = forward + depthwise + weights + products + hopper;
  expect(cuda_host::kernels.size() == all, std::string(variant.name) + ": cases ran " +
                                               std::to_string(cuda_host::kernels.size()) + " of the " +
                                               std::to_string(all) + " kernels");
}

Launches read_launches(const std::string& path) {
  Launches found;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    const size_t blank = line.rfind(' ');
    if (line[0] != '#' && blank != std::string::npos) found[line.substr(0, blank)] = std::stoll(line.substr(blank + 1));
  }
  expect(!found.empty(), path + " has no lines");
  return found;
}

int64_t elements_between(const Problem& p) {
  return p.batch * p.channels * p.multiplier * out_height(p) * out_width(p);
}

int run(int64_t elements, const std::string& launches_path, const std::vector<std::string>& paths) {
  launches = read_launches(launches_path);
  std::vector<Case> cases;
  for (const std::string& path : paths)
    for (const Case& c : read_cases(path)) {
      if (elements_between(c.problem) <= elements)
        cases.push_back(c);
      else
        std::cout << "left out: " << c.line << std::endl;  // before the processes part
    }
  test_shim();
  test_hopper_instructions();
  // The types side by side, each in a process of its own: the shim knows one thread.
  std::vector<pid_t> children;
  for (const Variant& variant : variants) {
    children.push_back(fork());
    if (children.back() != 0) continue;
    tally = {};
    cuda_host::kernels.clear();
    const auto begin = std::chrono::steady_clock::now();
    for (size_t i = 0; i < cases.size(); ++i) run_case(variant, cases[i], i);
    test_tilings(variant);
    test_backward_tilings(variant);
    test_hopper(variant);
    test_refusals(variant);
    test_launches(variant);
    test_coverage(variant);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    std::cout << variant.name << ": " << cases.size() << " cases, " << tally.checks << " checks, " << tally.failures
              << " failed, " << seconds.count() << " s" << std::endl;
    std::_Exit(tally.failures == 0 ? 0 : 1);
  }
  for (const pid_t child : children) {
    int status = 1;
    expect(child > 0 && waitpid(child, &status, 0) == child && status == 0, "all checks of one type");
  }
  std::cout << tally.checks - tally.failures << " passed, " << tally.failures << " failed\n";
  return tally.failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace fastsep_tests

int main(int argc, char** argv) {
  int64_t elements = INT64_MAX;
  char** path = argv + 1;
  if (argc > 2 && std::strcmp(argv[1], "--elements") == 0) {
    elements = std::atoll(argv[2]);
    path += 2;
  }
  if (argv + argc - path < 2 || elements < 1) {
    std::cerr << "usage: fastsep_cuda_host_tests [--elements N] cuda_launches.txt cases.txt ...\n";
    return 2;
  }
  return fastsep_tests::run(elements, path[0], {path + 1, argv + argc});
}
