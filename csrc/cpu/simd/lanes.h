// The operations of a vector type without any instruction set: elements in an array, for every processor that has a C++
// compiler. The rules stand in simd/avx512.h. fma() rounds twice, because a correctly rounded one is a slow library
// call where there is no instruction for it.
#pragma once

#include <math.h>

#include "../vector.h"

namespace fastsep {
namespace FASTSEP_ISA {
namespace {

template <class Element, int Width>
struct Lanes {
  using T = Element;
  static constexpr int width = Width;
  struct Reg {
    T lane[width];
  };

  template <class F>
  static Reg each(F f) {
    Reg result;
    for (int i = 0; i < width; ++i) result.lane[i] = f(i);
    return result;
  }

  static Reg load(const T* p) {
    return each([&](int i) { return p[i]; });
  }
  static Reg load_n(const T* p, int n) {
    return each([&](int i) { return i < n ? p[i] : T(0); });
  }
  static Reg in_register(Reg a) { return a; }
  static void store(T* p, Reg a) { store_n(p, a, width); }
  static void store_n(T* p, Reg a, int n) {
    for (int i = 0; i < n; ++i) p[i] = a.lane[i];
  }
  static Reg set1(T a) {
    return each([&](int) { return a; });
  }
  static Reg add(Reg a, Reg b) {
    return each([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static Reg sub(Reg a, Reg b) {
    return each([&](int i) { return a.lane[i] - b.lane[i]; });
  }
  static Reg mul(Reg a, Reg b) {
    return each([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static Reg div(Reg a, Reg b) {
    return each([&](int i) { return a.lane[i] / b.lane[i]; });
  }
  static Reg fma(Reg a, Reg b, Reg c) {
    return each([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
  }
  static Reg max(Reg a, Reg b) {
    return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static Reg min(Reg a, Reg b) {
    return each([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static Reg where_at_most(Reg a, Reg b, Reg x, Reg y) {
    return each([&](int i) { return a.lane[i] <= b.lane[i] ? x.lane[i] : y.lane[i]; });
  }
  static Reg round(Reg a) {
    return each([&](int i) { return static_cast<T>(::rint(a.lane[i])); });
  }
  static Reg pow2(Reg n) {
    return each([&](int i) { return static_cast<T>(::exp2(n.lane[i])); });
  }
  static Reg load_even(const T* p, int n) {
    return each([&](int i) { return i < n ? p[2 * i] : T(0); });
  }
  template <int Block>
  static void transpose(const T* from, int64_t from_stride, T* to, int64_t to_stride, Constant<Block>) {
    for (int i = 0; i < Block; ++i)
      for (int j = 0; j < Block; ++j) to[j * to_stride + i] = from[i * from_stride + j];
  }
};

}  // namespace
}  // namespace FASTSEP_ISA
}  // namespace fastsep
