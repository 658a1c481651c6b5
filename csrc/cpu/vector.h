// What the vector types and the algorithms on them share. Included by the files of one instruction set only, so
// nothing here may have external linkage: the linker would keep one copy, perhaps one that this processor cannot
// run, for the whole program.
#pragma once

#include <stdint.h>

#define FASTSEP_INLINE inline __attribute__((always_inline))
#define FASTSEP_INLINE_LAMBDA __attribute__((always_inline))
#define FASTSEP_NOINLINE __attribute__((noinline))

// Loops over registers must be unrolled whole, or the compiler keeps the registers in memory. An instruction set
// without registers to keep may define it as nothing.
#ifndef FASTSEP_UNROLL
#define FASTSEP_UNROLL _Pragma("GCC unroll 64")
#endif

namespace fastsep {
namespace {

// A count that is known when the code is compiled; converts to the count that is not.
template <int N>
struct Constant {
  static constexpr int value = N;
  constexpr operator int() const { return N; }
};

// f(Constant<0>()), ..., f(Constant<N - 1>()): a loop whose counter is known when the code is compiled.
template <int N, int I = 0, class F>
FASTSEP_INLINE void for_each_constant(const F& f) {
  if constexpr (I < N) {
    f(Constant<I>());
    for_each_constant<N, I + 1>(f);
  }
}

template <class A>
FASTSEP_INLINE A smaller(A a, A b) {
  return b < a ? b : a;
}

template <class A>
FASTSEP_INLINE A larger(A a, A b) {
  return a < b ? b : a;
}

FASTSEP_INLINE int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

constexpr int least_common_multiple(int a, int b) {
  int multiple = a;
  while (multiple % b != 0) multiple += a;
  return multiple;
}

// a, which the compiler may not compute again from what it was computed from.
template <class A>
FASTSEP_INLINE A in_register(A a) {
  asm("" : "+r"(a));
  return a;
}

// As an offset for which ARM's vector loads have an addressing mode, unlike one in elements.
template <class T>
FASTSEP_INLINE const T* bytes_on(const T* p, int64_t bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(p) + bytes);
}

// Where part i begins when `size` is cut into `parts` that differ by one at most.
FASTSEP_INLINE int64_t cut(int64_t size, int64_t parts, int64_t i) { return size * i / parts; }

}  // namespace
}  // namespace fastsep
