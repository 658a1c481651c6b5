// What the .cu file of each dtype offers to dispatch.cpp, which knows no header of CUDA. Errors are cudaError_t.
#pragma once

#include "../fastsep_cuda.h"

namespace fastsep {
namespace cuda {

struct Launchers {
  // The fused pair; out_channels > 0 and batch > 0.
  int32_t (*forward)(const Problem& problem, Options options, const void* input, const Weights& weights, void* output,
                     Queue queue);
  // How forward() is called in reports, with and without tf32.
  const char* forward_name;
  const char* forward_name_tf32;
};

extern const Launchers launchers_f32, launchers_f16, launchers_bf16;

}  // namespace cuda
}  // namespace fastsep
