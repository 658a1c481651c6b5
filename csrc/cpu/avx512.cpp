// AVX-512 (F, DQ, BW, VL): the register budget of 32.
//
//   channels-last product   14 x 2 sums + 2 weights + 1 broadcast          = 31;  28 FMAs for 16 loads
//   NCHW product             8 x 3 sums + 3 pixels + 1 broadcast           = 28;  24 FMAs for 11 loads
//   channels-last depthwise  7 sums + 7 weights (7 taps) + 1 input         = 15
//   NCHW 3 x 3              12 sums (sweep) + 9 weights + 4 inputs + 2     = 27
//   and with a stride       14 sums (seven rows) + 9 weights + 2 inputs    = 25
//
// 14 rows, because planes of 7, 14, 28, 56 and 112 pixels divide by 14 or 7.
#define FASTSEP_ISA avx512
#include "simd/avx512.h"

#include "forward.h"

namespace fastsep {
namespace avx512 {
namespace {

struct Shape {
  static constexpr int rows = 14, columns = 2, planar_rows = 8, planar_columns = 3, run = 7;
};

}  // namespace
}  // namespace avx512

FASTSEP_DEFINE_KERNEL(avx512, f32, float, avx512::Shape)
FASTSEP_DEFINE_KERNEL(avx512, f64, double, avx512::Shape)

}  // namespace fastsep
