// The vector type without any instruction set: four elements in an array.
#pragma once

#include "lanes.h"

namespace fastsep {
namespace FASTSEP_ISA {
namespace {

template <class Element>
struct Vec : Lanes<Element, 4> {
  static constexpr int block = 4;
  static constexpr bool has_fma_lane = false, has_half_fma = false;
  static constexpr bool large_planar_tiles = false, sweeps_channels_last = false;
};

}  // namespace
}  // namespace FASTSEP_ISA
}  // namespace fastsep
