#include "cases.h"

#include <cstdlib>
#include <fstream>
#include <iostream>
#include <map>
#include <sstream>

namespace fastsep_tests {
namespace {

[[noreturn]] void fail(const std::string& message) {
  std::cerr << message << "\n";
  std::exit(2);
}

constexpr const char* activation_names[fastsep::activation_count] = {
    "identity",    "relu",    "relu6", "leaky_relu", "silu",     "hardswish",
    "hardsigmoid", "sigmoid", "tanh",  "gelu",       "gelu_tanh"};

fastsep::Activation activation_from_name(const std::string& name) {
  for (int i = 0; i < fastsep::activation_count; ++i)
    if (activation_names[i] == name) return static_cast<fastsep::Activation>(i);
  fail("unknown activation " + name);
}

Case parse(const std::string& line) {
  std::map<std::string, std::string> fields;
  std::istringstream tokens(line);
  for (std::string token; tokens >> token;) {
    const size_t equal = token.find('=');
    if (equal == std::string::npos) fail("not key=value: " + token + " in: " + line);
    fields[token.substr(0, equal)] = token.substr(equal + 1);
  }
  const auto take = [&](const std::string& key, const std::string& otherwise) {
    const auto found = fields.find(key);
    if (found == fields.end()) {
      if (otherwise.empty()) fail("no " + key + "= in: " + line);
      return otherwise;
    }
    const std::string value = found->second;
    fields.erase(found);
    return value;
  };
  const auto number = [&](const std::string& key, const std::string& otherwise) {
    return std::stoll(take(key, otherwise));
  };
  Case c = {};
  c.line = line;
  fastsep::Problem& p = c.problem;
  take("name", "unnamed");
  p.batch = number("n", "1");
  p.channels = number("c", "");
  p.height = number("h", "");
  p.width = number("w", "");
  p.out_channels = number("k", "");
  p.multiplier = number("m", "1");
  p.kernel_h = number("kh", "");
  p.kernel_w = number("kw", "");
  p.stride_h = number("sh", "1");
  p.stride_w = number("sw", "1");
  p.dilation_h = number("dh", "1");
  p.dilation_w = number("dw", "1");
  p.pad_top = number("pt", "0");
  p.pad_bottom = number("pb", "0");
  p.pad_left = number("pl", "0");
  p.pad_right = number("pr", "0");
  c.depthwise_bias = number("db", "0") != 0;
  c.bias = number("b", "0") != 0;
  p.mid_activation = activation_from_name(take("mid", "identity"));
  p.activation = activation_from_name(take("act", "identity"));
  p.expand.channels = number("e", "0");
  p.expand.activation = activation_from_name(take("ea", "identity"));
  p.expand.height = number("eh", std::to_string(p.height));
  p.expand.width = number("ew", std::to_string(p.width));
  p.expand.kernel_h = number("ekh", "1");
  p.expand.kernel_w = number("ekw", "1");
  p.expand.stride_h = number("esh", "1");
  p.expand.stride_w = number("esw", "1");
  p.expand.pad_top = number("ept", "0");
  p.expand.pad_left = number("epl", "0");
  p.expand.planar = number("planar", "0") != 0;
  p.residual = number("res", "0") != 0;
  p.gate = number("gate", "0") != 0;
  if (!fields.empty()) fail("unknown key " + fields.begin()->first + " in: " + line);
  return c;
}

}  // namespace

const char* activation_name(fastsep::Activation activation) { return activation_names[static_cast<int>(activation)]; }

fastsep::Problem with_integer_activations(fastsep::Problem p) {
  const auto exact = [](fastsep::Activation a) {
    return a == fastsep::Activation::identity || a == fastsep::Activation::relu || a == fastsep::Activation::relu6;
  };
  if (!exact(p.mid_activation)) p.mid_activation = fastsep::Activation::relu6;
  if (!exact(p.activation)) p.activation = fastsep::Activation::identity;
  if (!exact(p.expand.activation)) p.expand.activation = fastsep::Activation::relu;
  return p;
}

std::vector<Case> read_cases(const std::string& path) {
  std::ifstream file(path);
  if (!file) fail("cannot read " + path);
  std::vector<Case> cases;
  for (std::string line; std::getline(file, line);) {
    line = line.substr(0, line.find('#'));
    if (line.find_first_not_of(" \t\r") != std::string::npos) cases.push_back(parse(line));
  }
  if (cases.empty()) fail("no case in " + path);
  return cases;
}

}  // namespace fastsep_tests
