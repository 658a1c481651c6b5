// What the Python modules _core and _cuda have in common: integers in, Problem out. With the files that include it, the
// only one here that knows of pybind11.
#pragma once

#include <pybind11/pybind11.h>

#include "fastsep.h"

namespace fastsep {

inline void check(Status status) {
  if (status != Status::ok) throw pybind11::value_error(describe(status));
}

// The fields in the order of fastsep/_core.pyi; not validated.
inline Problem read_problem(const pybind11::tuple& fields) {
  constexpr size_t count = 20, operands_count = 22, expanded_count = 33;
  if (fields.size() != count && fields.size() != operands_count && fields.size() != expanded_count)
    throw pybind11::value_error("a problem has 20 fields, 22 with a residual and a gate, or 33 with an expansion");
  int64_t v[expanded_count] = {};
  for (size_t i = 0; i < fields.size(); ++i) v[i] = fields[i].cast<int64_t>();
  const auto number = [](int64_t value) {
    return value >= 0 && value < 1000 ? static_cast<int32_t>(value) : int32_t{-1};
  };
  Problem p;
  p.batch = v[0], p.channels = v[1], p.height = v[2], p.width = v[3];
  p.out_channels = v[4], p.multiplier = v[5];
  p.kernel_h = v[6], p.kernel_w = v[7];
  p.stride_h = v[8], p.stride_w = v[9];
  p.dilation_h = v[10], p.dilation_w = v[11];
  p.pad_top = v[12], p.pad_bottom = v[13], p.pad_left = v[14], p.pad_right = v[15];
  p.dtype = static_cast<Dtype>(number(v[16]));
  p.layout = static_cast<Layout>(number(v[17]));
  p.mid_activation = static_cast<Activation>(number(v[18]));
  p.activation = static_cast<Activation>(number(v[19]));
  p.residual = v[20] != 0, p.gate = v[21] != 0;
  p.expand.channels = v[22];
  p.expand.activation = static_cast<Activation>(number(v[23]));
  p.expand.height = v[24], p.expand.width = v[25];
  p.expand.kernel_h = v[26], p.expand.kernel_w = v[27];
  p.expand.stride_h = v[28], p.expand.stride_w = v[29];
  p.expand.pad_top = v[30], p.expand.pad_left = v[31];
  p.expand.planar = v[32] != 0;
  return p;
}

inline const void* address(uintptr_t value) { return reinterpret_cast<const void*>(value); }
inline void* mutable_address(uintptr_t value) { return reinterpret_cast<void*>(value); }

inline Gradients to_gradients(uintptr_t input, uintptr_t depthwise_weight, uintptr_t depthwise_bias,
                              uintptr_t pointwise_weight, uintptr_t bias) {
  return {mutable_address(input), mutable_address(depthwise_weight), mutable_address(depthwise_bias),
          mutable_address(pointwise_weight), mutable_address(bias)};
}

}  // namespace fastsep
