// AVX2 and FMA: the register budget of 16.
//
//   channels-last product    6 x 2 sums + 2 weights + 1 broadcast          = 15;  12 FMAs for 8 loads
//   NCHW product             4 x 3 sums + 3 pixels + 1 broadcast           = 16;  12 FMAs for 7 loads
//   channels-last depthwise  6 sums + 7 weights (7 taps) + 1 input         = 14
//   NCHW 3 x 3               4 sums + 9 weights + 1 input                  = 14
#define FASTSEP_ISA avx2
#include "simd/avx2.h"

#include "forward.h"

namespace fastsep {
namespace avx2 {
namespace {

struct Shape {
  static constexpr int rows = 6, columns = 2, planar_rows = 4, planar_columns = 3, run = 6;
};

}  // namespace
}  // namespace avx2

FASTSEP_DEFINE_KERNEL(avx2, f32, float, avx2::Shape)
FASTSEP_DEFINE_KERNEL(avx2, f64, double, avx2::Shape)

}  // namespace fastsep
