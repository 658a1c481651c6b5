// What the parts of the sweep share.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/kernel.h"
#include "random_case.h"

namespace fastsep_tests {

// Of many that start from one: unlike each other, and the same in every run.
uint64_t seed_of(uint64_t seed, uint64_t number);

// Counts a failure and says what to run to see it again.
void fail(const std::string& kernel, const std::string& what);

// A random problem of no more than about so many multiply-adds on every kernel that has its dtype, with some of 1 to 8
// threads.
void try_problem(const std::vector<const fastsep::Kernel*>& kernels, uint64_t seed, double most_products);

// A random size of the series of test_series.cpp, on kernels of the list, by which a series goes.
void try_series(const std::vector<const fastsep::Kernel*>& kernels, uint64_t seed);

// Whether each tile of a random problem fits into what is asked for, for `threads` threads; nothing is computed.
// Returns false where the problem is not valid.
bool try_sizes(const std::vector<const fastsep::Kernel*>& kernels, uint64_t seed, int threads);

// What is being tried, for messages.
extern std::string current_line;

}  // namespace fastsep_tests
