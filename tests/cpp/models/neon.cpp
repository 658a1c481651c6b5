// As csrc/cpu/neon.cpp has it.
#define FASTSEP_ISA model_neon
// What is gained by unrolling is not worth the minutes that the compiler takes over arrays.
#define FASTSEP_UNROLL
#include "cpu/forward.h"
#include "model.h"

namespace fastsep {
namespace model_neon {
namespace {

template <class Element>
struct Vec : Model<Element, 16> {
  static constexpr int block = 4;
  static constexpr bool has_fma_lane = true, has_half_fma = false;
  static constexpr bool large_planar_tiles = true, sweeps_channels_last = true;
};

struct Shape {
  static constexpr int rows = 8, columns = 2, planar_rows = 8, planar_columns = 3, run = 8;
};

}  // namespace
}  // namespace model_neon

extern const Kernel separable_f32_model_neon, separable_f64_model_neon;
FASTSEP_DEFINE_KERNEL_FOR(neon, model_neon, f32, float, model_neon::Shape)
FASTSEP_DEFINE_KERNEL_FOR(neon, model_neon, f64, double, model_neon::Shape)

}  // namespace fastsep
