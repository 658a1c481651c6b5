// The kernel of one instruction set and dtype, put together from the tiles.
#pragma once

#include "backward.h"
#include "forward_channels_last.h"
#include "forward_expanded.h"
#include "forward_planar.h"

namespace fastsep {
namespace FASTSEP_ISA {
namespace {

template <class V, class Shape>
int64_t scratch_bytes(const ForwardPlan& plan, int64_t rows, int64_t columns) {
  if (plan.problem.expand.channels > 0) return ForwardExpanded<V, Shape>::scratch_bytes(plan, rows);
  return plan.problem.layout == Layout::nhwc ? ForwardChannelsLast<V, Shape>::scratch_bytes(plan, rows, columns)
                                             : ForwardPlanar<V, Shape>::scratch_bytes(plan, rows, columns);
}

template <class V, class Shape>
int64_t shared_bytes(const ForwardPlan& plan) {
  return ForwardExpanded<V, Shape>::shared_bytes(plan);
}

template <class V, class Shape>
void forward_channels(const ForwardPlan& plan, const Tile& tile, void* scratch) {
  ForwardExpanded<V, Shape>::run_channels(plan, tile, static_cast<typename V::T*>(scratch));
}

template <class V, class Shape>
void forward_tile(const ForwardPlan& plan, const Tile& tile, void* scratch) {
  auto* elements = static_cast<typename V::T*>(scratch);
  if (plan.problem.expand.channels > 0)
    ForwardExpanded<V, Shape>::run(plan, tile, elements);
  else if (plan.problem.layout == Layout::nhwc)
    ForwardChannelsLast<V, Shape>::run(plan, tile, elements);
  else
    ForwardPlanar<V, Shape>::run(plan, tile, elements);
}

template <class V>
void transpose_any(const void* from, int64_t rows, int64_t columns, int64_t from_stride, void* to, int64_t to_stride) {
  using T = typename V::T;
  transpose<V>(static_cast<const T*>(from), rows, columns, from_stride, static_cast<T*>(to), to_stride);
}

// The peak that the kernels are measured against: as many sums as the product's tile has, nothing loaded or stored.
// Those hide any FMA's latency, 2 x 5 cycles on AVX2 and AVX-512, 4 x 4 cycles on the widest ARM cores.
template <class V, class Shape>
FASTSEP_NOINLINE double fma_chain(int64_t rounds) {
  constexpr int chains = Shape::rows * Shape::columns;
  typename V::Reg acc[chains];
  FASTSEP_UNROLL
  for (int i = 0; i < chains; ++i) acc[i] = V::set1(typename V::T(i));
  const auto factor = V::set1(typename V::T(0.5));
  for (int64_t round = 0; round < rounds; ++round) {
    FASTSEP_UNROLL
    for (int i = 0; i < chains; ++i) acc[i] = V::fma(acc[i], factor, factor);
  }
  // The sums are near 1: they are asked for only so that the loop is not left out.
  FASTSEP_UNROLL
  for (int i = 1; i < chains; ++i) acc[0] = V::max(acc[0], acc[i]);
  typename V::T lanes[V::width];
  V::store(lanes, acc[0]);
  return lanes[0] > 0 ? 2.0 * chains * V::width * static_cast<double>(rounds) : 0;
}

}  // namespace
}  // namespace FASTSEP_ISA

#define FASTSEP_DEFINE_KERNEL(isa_, dtype_, element, Shape) \
  FASTSEP_DEFINE_KERNEL_FOR(isa_, isa_, dtype_, element, Shape)

// In namespace isa_, as the kernel of instruction set for_.
#define FASTSEP_DEFINE_KERNEL_FOR(for_, isa_, dtype_, element, Shape)                                                  \
  const Kernel separable_##dtype_##_##isa_ = {                                                                         \
      "separable_" #dtype_ "_" #isa_,                                                                                  \
      Isa::for_,                                                                                                       \
      Dtype::dtype_,                                                                                                   \
      {isa_::Vec<element>::width, Shape::rows, Shape::columns, Shape::planar_rows, Shape::planar_columns, Shape::run}, \
      isa_::scratch_bytes<isa_::Vec<element>, Shape>,                                                                  \
      isa_::shared_bytes<isa_::Vec<element>, Shape>,                                                                   \
      isa_::forward_tile<isa_::Vec<element>, Shape>,                                                                   \
      isa_::forward_channels<isa_::Vec<element>, Shape>,                                                               \
      isa_::backward_scratch_bytes<isa_::Vec<element>, Shape>,                                                         \
      isa_::backward_work<isa_::Vec<element>, Shape>,                                                                  \
      isa_::finish_depthwise<isa_::Vec<element>, Shape>,                                                               \
      isa_::finish_pointwise<isa_::Vec<element>, Shape>,                                                               \
      isa_::transpose_any<isa_::Vec<element>>,                                                                         \
      isa_::fma_chain<isa_::Vec<element>, Shape>};

}  // namespace fastsep
