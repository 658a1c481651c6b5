// No instruction set at all: vectors of four elements that the compiler may put into whatever the processor has
// (one SSE2 register on x86-64, where 4 x 2 sums + 2 + 1 = 11 of 16).
#define FASTSEP_ISA scalar
// What is gained by unrolling is not worth the minutes that the compiler takes over arrays of four.
#define FASTSEP_UNROLL
#include "simd/scalar.h"

#include "forward.h"

namespace fastsep {
namespace scalar {
namespace {

struct Shape {
  static constexpr int rows = 4, columns = 2, planar_rows = 4, planar_columns = 2, run = 4;
};

}  // namespace
}  // namespace scalar

FASTSEP_DEFINE_KERNEL(scalar, f32, float, scalar::Shape)
FASTSEP_DEFINE_KERNEL(scalar, f64, double, scalar::Shape)

}  // namespace fastsep
