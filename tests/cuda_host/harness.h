// What the tests of the CUDA kernels on the host share: the count of checks, the types, numbers in guarded memory.
#pragma once

#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "cases.h"
#include "cuda/common.cuh"
#include "guarded.h"

namespace fastsep_tests {

struct Tally {
  int checks = 0, failures = 0;
};
extern Tally tally;

// A storage type, and whether its products may be rounded to tf32.
struct Variant {
  const char* name;
  fastsep::Dtype dtype;
  bool tf32;
  double storage_eps, product_eps;  // of what is stored, and of the operands of the matrix product
};
extern const std::vector<Variant> variants;

// Counts, and complains where not good.
void expect(bool good, const std::string& what);
// With the case, type and layout in the complaint.
void expect(bool good, const Variant& variant, const Case& c, const fastsep::Problem& p, const std::string& what);

size_t element_size(fastsep::Dtype dtype);
// The nearest number of the type.
double rounded(fastsep::Dtype dtype, double value);

// A tensor between guard pages, and the same numbers in double for the oracle.
struct Tensor {
  fastsep::Dtype dtype;
  Guarded memory;
  std::vector<double> values;

  double at(int64_t index) const;  // what is in memory now
};

// Aligned to one element only, tight at the end or the beginning, or (`wide`) to 16 bytes, as torch allocates.
Tensor drawn(fastsep::Dtype dtype, int64_t count, bool integers, bool wide, std::mt19937& random);
// All NaN.
Tensor unwritten(fastsep::Dtype dtype, int64_t count, bool wide);

// tests/cuda_launches.txt: how many kernels a backward pass launches, by the words before the count.
using Launches = std::map<std::string, int64_t>;
extern Launches launches;
extern std::set<std::string> launches_held;  // lines that a pass was held against

// For which tilings are chosen, as the queue has it.
extern int multiprocessors;
inline fastsep::cuda::Queue queue() { return {0, nullptr, multiprocessors}; }

void test_shim();
void test_hopper_instructions();
// All checks of forward() on one case, in the problem's dtype and layout: small integers or reals, addresses aligned to
// 16 bytes or to one element only.
void test_forward(const Variant& variant, const Case& c, const fastsep::Problem& p, bool integers, bool wide,
                  fastsep::cuda::ForwardKernel kernel = fastsep::cuda::ForwardKernel::portable);
// Larger problems, for the tilings that the table's small ones do not take.
void test_tilings(const Variant& variant);
// What is an error and no launch.
void test_refusals(const Variant& variant);
// The kernel of sm_90a, on layers of its own.
void test_hopper(const Variant& variant);
// The same of backward(), and with `subsets` every choice of gradients.
void test_backward(const Variant& variant, const Case& c, const fastsep::Problem& p, bool integers, bool wide,
                   bool subsets);
void test_backward_tilings(const Variant& variant);
// Holds a pass of each kind that tests/cuda_launches.txt knows against its line.
void test_launches(const Variant& variant);

}  // namespace fastsep_tests
