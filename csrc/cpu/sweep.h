// 3 x 3 without stride or dilation where there are registers enough: sweeps down the rows of a few columns, see
// depthwise_sweep.h for channels-last and depthwise_planar.h for NCHW.
//
// Each input row is loaded once. It starts the sums of one output row, goes into those of the row above and finishes
// those of the row above that, so three rows of sums are all that there is, however many rows there are:
//
//   acc[turn] = bias + x[y] * w[0],   acc[turn - 1] += x[y] * w[1],   t[y - 2] = clamp(acc[turn - 2] + x[y] * w[2])
//
// where the turn goes round modulo 3 and `* w[r]` stands for the three taps of row r, left to right: the order of
// depthwise.h, so the sums are the same to the last bit.
#pragma once

#include "vector.h"

namespace fastsep {
namespace FASTSEP_ISA {
namespace {

constexpr int sweep_taps = 3;

// step(turn, first, last), for each of rows + 2 input rows in order, of which tap rows first to last count: the first
// two feed fewer than three output rows, and the last two. What is not a multiple of three comes before the loop, so
// that the loop always ends on the same turn.
template <class Step>
FASTSEP_INLINE void sweep(int64_t rows, const Step& step) {
  const Constant<0> zero{};
  const Constant<1> one{};
  const Constant<2> two{};
  const int64_t whole = rows - 2;
  if (whole % 3 == 0) {
    step(two, zero, zero);
    step(zero, zero, one);
  } else if (whole % 3 == 1) {
    step(one, zero, zero);
    step(two, zero, one);
    step(zero, zero, two);
  } else {
    step(zero, zero, zero);
    step(one, zero, one);
    step(two, zero, two);
    step(zero, zero, two);
  }
  for (int64_t i = whole / 3; i > 0; --i) {
    step(one, zero, two);
    step(two, zero, two);
    step(zero, zero, two);
  }
  step(one, one, two);
  step(two, two, two);
}

}  // namespace
}  // namespace FASTSEP_ISA
}  // namespace fastsep
