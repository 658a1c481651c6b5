// The kernels of f16.
#include "backward.cuh"
#include "forward_launch.cuh"
#include "launchers.h"

namespace fastsep {
namespace cuda {

const Launchers launchers_f16 = {forward_of<__half>,        depthwise_of<__half>,    backward_of<__half>,
                                 backward_bytes_of<__half>, "separable_forward_f16", "separable_forward_f16",
                                 "depthwise_forward_f16"};

}  // namespace cuda
}  // namespace fastsep
