// NEON: the register budget of 32.
//
//   channels-last product    8 x 2 sums + 8 broadcast (4 deep) + 4 weights = 28;  64 FMAs for 16 loads
//   NCHW product             8 x 3 sums + 2 broadcast + 3 pixels           = 29;  24 FMAs for 5 loads
//   channels-last depthwise  8 sums + 7 weights (7 taps) + 1 input         = 16
//   channels-last 3 x 3      12 sums (sweep) + 9 weights + 6 inputs + 2    = 29
//   NCHW 3 x 3               12 sums (sweep) + 9 weights + 4 inputs + 2    = 27
//   and with a stride        14 sums (seven rows) + 9 weights + 2 inputs   = 25
//
// Tiles of the channels-last product on the models of LLVM 22, in FMAs per cycle (benchmarks/arm_analysis.py --tiles):
//
//                8 x 2   6 x 3   7 x 3   5 x 4   4 x 4
//   Cortex-A53    0.56    0.54    0.57    0.57    0.53
//   Cortex-A72    1.00    1.00    1.00    1.00    1.00
//   Neoverse N1   1.94    1.94    2.00    1.95    1.83
//   Neoverse V1   3.99    3.99    3.99    3.99    3.99
//   Apple M1      2.99    3.00    3.00    3.00    2.99
//
// No core gains 5 % by another one, so small cores have no kernel of their own.
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
