// The kernels of bf16.
#include "backward.cuh"
#include "forward_launch.cuh"
#include "launchers.h"

namespace fastsep {
namespace cuda {

const Launchers launchers_bf16 = {forward_of<__nv_bfloat16>,  depthwise_of<__nv_bfloat16>,
                                  backward_of<__nv_bfloat16>, backward_bytes_of<__nv_bfloat16>,
                                  "separable_forward_bf16",   "separable_forward_bf16",
                                  "depthwise_forward_bf16"};

}  // namespace cuda
}  // namespace fastsep
