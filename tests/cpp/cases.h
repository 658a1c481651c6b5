// The table of cases, tests/cases.txt: one line a case, key=value tokens, '#' begins a comment.
#pragma once

#include <string>
#include <vector>

#include "fastsep.h"

namespace fastsep_tests {

struct Case {
  std::string line;
  fastsep::Problem problem;  // dtype and layout are the test's to choose
  bool depthwise_bias, bias;
};

// As the table has it.
const char* activation_name(fastsep::Activation activation);

// exp and its kin make no integers; their places take those that do.
fastsep::Problem with_integer_activations(fastsep::Problem p);

// Ends the program with a message where the table cannot be read.
std::vector<Case> read_cases(const std::string& path);

}  // namespace fastsep_tests
