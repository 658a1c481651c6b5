// The kernels of f32.
#include "backward.cuh"
#include "forward_launch.cuh"
#include "launchers.h"

namespace fastsep {
namespace cuda {

const Launchers launchers_f32 = {forward_of<float>,        depthwise_of<float>,     backward_of<float>,
                                 backward_bytes_of<float>, "separable_forward_f32", "separable_forward_tf32",
                                 "depthwise_forward_f32"};

}  // namespace cuda
}  // namespace fastsep
