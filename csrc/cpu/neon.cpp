// NEON: the register budget of 32.
//
//   channels-last product    8 x 2 sums + 8 broadcast (4 deep) + 4 weights = 28;  64 FMAs for 16 loads
//   NCHW product             8 x 3 sums + 2 broadcast + 3 pixels           = 29;  24 FMAs for 5 loads
//   channels-last depthwise  8 sums + 7 weights (7 taps) + 1 input         = 16
//   channels-last 3 x 3      16 sums (two rows) + 9 weights + 1 input      = 26
//   NCHW 3 x 3               8 sums + 9 weights + 2 inputs                 = 19
//
// Tiles of the product on llvm-mca's models, in FMAs per cycle (benchmarks/arm_analysis.py):
//
//                8 x 2   6 x 3   7 x 3   5 x 4   4 x 4
//   Cortex-A53    0.58    0.56    0.56    0.56    0.47
//   Neoverse N1   1.88    1.94    1.91    1.86    1.64
//   Neoverse V1   3.99    3.99    3.81    3.80    3.65
//
// No other one gains 5 % anywhere, so small cores have none of their own; and a panel of 8 divides more sizes than 12.
#define FASTSEP_ISA neon
#include "simd/neon.h"

#include "forward.h"

namespace fastsep {
namespace neon {
namespace {

struct Shape {
  static constexpr int rows = 8, columns = 2, planar_rows = 8, planar_columns = 3, run = 8;
};

}  // namespace
}  // namespace neon

FASTSEP_DEFINE_KERNEL(neon, f32, float, neon::Shape)
FASTSEP_DEFINE_KERNEL(neon, f64, double, neon::Shape)

}  // namespace fastsep
