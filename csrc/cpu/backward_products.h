// The two products of the backward pass. Both read dv as it was packed for a band, along its pixels or its channels:
//
//   du[pixel][j] = sum over k of dv[pixel][k] * W[k][j]
//   dW[k][j] += sum over pixels of dv[pixel][k] * u[pixel][j],   j < panel
#pragma once

#include "backward_band.h"
#include "backward_sums.h"

namespace fastsep {
namespace FASTSEP_ISA {
namespace {

template <class V, class Shape>
struct BackwardProducts : BackwardBand<V, Shape> {
  using Base = BackwardBand<V, Shape>;
  using T = typename Base::T;
  using Band = typename Base::Band;
  using Base::Base;
  using Base::block;
  using Base::Columns;
  using Base::group;
  using Base::layout;
  using Base::p;
  using Base::panel;
  using Base::plan;
  using Base::Rows;
  using Base::s;
  using Base::scratch;

  // du = dv W: rows are pixels.
  void inner_gradient(const Band& b, int64_t index, int64_t channels, T* du) const {
    const int64_t pixels = Base::pixels_of(b);
    Product<T> product = {};
    product.groups = 1;
    product.depth = p.out_channels;
    product.block_depth = group;
    product.a_block_stride = block;
    product.a_stride = 1;
    product.b = packed<T>(plan, layout.pointwise) + index * p.out_channels * panel;
    product.b_stride = panel;
    product.start = packed<T>(plan, layout.zeros);
    product.clamp = clamp_of<T>(Activation::identity);
    product.c_stride = product.column_count = panel;
    for (int64_t first = 0; first < pixels; first += Rows) {
      product.a = scratch + s.gradient + first / Rows * s.blocks * block;
      product.c = du + first * panel;
      multiply<V, Rows, Columns, group>(product, smaller<int64_t>(Rows, pixels - first), channels);
    }
  }

  // dW[k] += dv[pixel][k] * u, into the part's sums or where it belongs: rows are output channels of one group; those
  // of the last are cut as evenly as possible, for a tile of few rows waits for its own sums.
  void pointwise_gradient(const Band& b, int64_t index, int64_t channels) const {
    Product<T> product = {};
    product.groups = 1;
    product.depth = Base::pixels_of(b);
    product.block_depth = Rows;
    product.a_block_stride = s.blocks * block;
    product.a_stride = group;
    product.b = scratch + s.values;
    product.b_stride = panel;
    product.clamp = clamp_of<T>(Activation::identity);
    const int64_t q = index / p.multiplier;
    const bool direct = q < plan.direct_panels;
    T* const sums = direct ? static_cast<T*>(plan.gradients.pointwise_weight) + q * panel
                           : b.sums + BackwardSums<V, Shape>::pointwise_sums_of(plan, q, index % p.multiplier);
    product.c_stride = direct ? p.channels : panel;
    product.start_stride = b.first ? 0 : product.c_stride;
    product.column_count = direct ? channels : panel;
    for (int64_t k = 0; k < p.out_channels; k += group) {
      const int64_t count = smaller<int64_t>(group, p.out_channels - k), tiles = (count + Rows - 1) / Rows;
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t begin = cut(count, tiles, i);
        product.a = scratch + s.gradient + k / group * block + begin;
        product.c = sums + (k + begin) * product.c_stride;
        product.start = b.first ? packed<T>(plan, layout.zeros) : product.c;
        multiply<V, Rows, Columns, 1>(product, cut(count, tiles, i + 1) - begin, channels);
      }
    }
  }
};

}  // namespace
}  // namespace FASTSEP_ISA
}  // namespace fastsep
