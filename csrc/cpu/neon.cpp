// NEON: the register budget of 32.
//
//   channels-last product    8 x 2 sums + 8 broadcast (4 deep) + 4 weights = 28;  64 FMAs for 16 loads
//   NCHW product             8 x 3 sums + 2 broadcast + 3 pixels           = 29;  24 FMAs for 5 loads
//   channels-last depthwise  8 sums + 7 weights (7 taps) + 1 input         = 16
//   channels-last 3 x 3      16 sums (two rows) + 9 weights + 1 input      = 26
//   NCHW 3 x 3               8 sums + 9 weights + 2 input                  = 19
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
