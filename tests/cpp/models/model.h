// A vector type without any instruction set that has the widths and the ways of one that this processor may lack: it
// runs that set's tiles, with their reads and writes, anywhere.
#pragma once

#include <limits>

#include "cpu/simd/lanes.h"

namespace fastsep {
namespace FASTSEP_ISA {
namespace {

template <class Element, int RegisterBytes>
struct Model : Lanes<Element, RegisterBytes / int(sizeof(Element))> {
  using Base = Lanes<Element, RegisterBytes / int(sizeof(Element))>;
  using T = Element;
  using Reg = typename Base::Reg;

  static Reg load_at(const T* p) { return Base::load(p); }
  template <int N>
  static Reg load_at(const T* p, Constant<N>) {
    return Base::load(p + N);
  }
  static void store_at(T* p, Reg a) { Base::store(p, a); }
  template <int Lane>
  static Reg fma_lane(Reg a, Reg b, Constant<Lane>, Reg c) {
    return Base::fma(a, Base::set1(b.lane[Lane]), c);
  }
  // Anything in the other half.
  static Reg fma_half(Reg a, Reg b, Reg c) {
    Reg result = Base::fma(a, b, c);
    for (int i = Base::width / 2; i < Base::width; ++i) result.lane[i] = std::numeric_limits<T>::quiet_NaN();
    return result;
  }
};

}  // namespace
}  // namespace FASTSEP_ISA
}  // namespace fastsep
