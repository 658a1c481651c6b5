// Random problems, each from a seed of its own.
#pragma once

#include <cstdint>

#include "../cases.h"

namespace fastsep_tests {

// Planes 1 to 80, channels 1 to 1200, batch 1 to 5, kernels 1 to 7, strides, dilations, unequal paddings, multipliers,
// expansions, gates, residuals; dtype and layout too. Valid, and of no more than about so many multiply-adds.
Case random_case(uint64_t seed, double most_products);

// Sizes without regard to memory, up to the largest numbers; often not valid.
Case random_sizes(uint64_t seed);

// Multiply-adds of the forward pass.
double products_of(const fastsep::Problem& p);

// A line as tests/cases.txt has them.
std::string line_of(const Case& c);

}  // namespace fastsep_tests
