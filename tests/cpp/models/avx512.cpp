// As csrc/cpu/avx512.cpp has it.
#define FASTSEP_ISA model_avx512
// What is gained by unrolling is not worth the minutes that the compiler takes over arrays.
#define FASTSEP_UNROLL
#include "cpu/forward.h"
#include "model.h"

namespace fastsep {
namespace model_avx512 {
namespace {

template <class Element>
struct Vec : Model<Element, 64> {
  static constexpr int block = sizeof(Element) == 4 ? 8 : 4;
  static constexpr bool has_fma_lane = false, has_half_fma = true;
  static constexpr bool large_planar_tiles = true, sweeps_channels_last = false;
};

struct Shape {
  static constexpr int rows = 14, columns = 2, planar_rows = 8, planar_columns = 3, run = 7;
};

}  // namespace
}  // namespace model_avx512

extern const Kernel separable_f32_model_avx512, separable_f64_model_avx512;
FASTSEP_DEFINE_KERNEL_FOR(avx512, model_avx512, f32, float, model_avx512::Shape)
FASTSEP_DEFINE_KERNEL_FOR(avx512, model_avx512, f64, double, model_avx512::Shape)

}  // namespace fastsep
