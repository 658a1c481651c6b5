// The forward kernel of sm_90a, for f16 and bf16.
#include "forward_hopper_launch.cuh"
#include "launchers.h"

namespace fastsep {
namespace cuda {

bool hopper_takes(const Problem& problem, int device) {
  if (!hopper::takes(problem)) return false;
  return problem.dtype == Dtype::f16 ? hopper::runs_on<__half>(device) : hopper::runs_on<__nv_bfloat16>(device);
}

bool hopper_takes_addresses(const Problem& problem, const void* input, const Weights& weights, const void* output) {
  return problem.dtype == Dtype::f16 ? hopper::takes<__half>(problem, input, weights, output)
                                     : hopper::takes<__nv_bfloat16>(problem, input, weights, output);
}

int32_t hopper_forward(const Problem& problem, const void* input, const Weights& weights, void* output, Queue queue) {
  return problem.dtype == Dtype::f16 ? hopper::launch_forward<__half>(problem, input, weights, output, queue)
                                     : hopper::launch_forward<__nv_bfloat16>(problem, input, weights, output, queue);
}

}  // namespace cuda
}  // namespace fastsep
