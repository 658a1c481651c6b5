// The kernels of bf16.
#include "forward_launch.cuh"
#include "launchers.h"

namespace fastsep {
namespace cuda {

const Launchers launchers_bf16 = {forward_of<__nv_bfloat16>, "separable_forward_bf16", "separable_forward_bf16"};

}  // namespace cuda
}  // namespace fastsep
