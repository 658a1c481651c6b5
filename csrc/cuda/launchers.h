// What the .cu file of each dtype offers to dispatch.cpp, which knows no header of CUDA. Errors are cudaError_t.
#pragma once

#include "../fastsep_cuda.h"

namespace fastsep {
namespace cuda {

struct Launchers {
  // The fused pair; out_channels > 0 and batch > 0.
  int32_t (*forward)(const Problem& problem, Options options, const void* input, const Weights& weights, void* output,
                     Queue queue);
  // The depthwise half alone, K = 0.
  int32_t (*depthwise)(const Problem& problem, const void* input, const Weights& weights, void* output, Queue queue);
  // Any problem, and any of the gradients; what the workspace needs for them.
  int32_t (*backward)(const Problem& problem, Options options, const void* input, const Weights& weights,
                      const void* saved, const void* grad_output, const Gradients& gradients, void* workspace,
                      Queue queue);
  size_t (*backward_bytes)(const Problem& problem, const Gradients& gradients);
  // What forward() launches, for reports: the fused pair, with tf32 too, and the depthwise half alone.
  const char* forward_name;
  const char* forward_name_tf32;
  const char* depthwise_name;
};

extern const Launchers launchers_f32, launchers_f16, launchers_bf16;

// The forward kernel of sm_90a, in hopper.cu: whether it takes the problem on the device, which is the current one;
// whether it can have these addresses; and its launch, for a problem and addresses that it takes.
bool hopper_takes(const Problem& problem, int device);
bool hopper_takes_addresses(const Problem& problem, const void* input, const Weights& weights, const void* output);
int32_t hopper_forward(const Problem& problem, const void* input, const Weights& weights, void* output, Queue queue);

}  // namespace cuda
}  // namespace fastsep
