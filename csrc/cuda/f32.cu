// The kernels of f32.
#include "forward_launch.cuh"
#include "launchers.h"

namespace fastsep {
namespace cuda {

const Launchers launchers_f32 = {forward_of<float>, "separable_forward_f32", "separable_forward_tf32"};

}  // namespace cuda
}  // namespace fastsep
