// The vector type on AVX-512: 32 registers of 512 bits.
//
// Every instruction set has this same list of operations; the algorithms are written on it once. Two rules hold:
// * *_n touch exactly the first n elements of memory, 0 <= n <= width; a load sets the others to zero.
//   n may be Constant<width>, which makes it the plain load or store.
// * load_even(p, n) gives p[0], p[2], ..., p[2n - 2], n <= width, and touches nothing behind the last.
// * transpose writes to[j][i] = from[i][j] for a square of rows `from_stride` and `to_stride` apart, 4 x 4 or, where
//   that is larger, `block` x `block`.
// * in_register(a) is a, which the compiler may not turn back into a memory operand: GCC would load a value again for
//   each of its uses.
// * large_planar_tiles: whether 3 x 3 in NCHW goes by sweeps (sweep.h), and what else by seven rows of two vectors.
//   On Intel's AVX-512 that is 2 to 13 % of the depthwise half, where most loads are across two cache lines.
// * sweeps_channels_last: whether it does so in channels-last. That pays where a load costs as much of the front end as
//   an FMA. On AVX-512 planes of 14 to 112 pixels gained a tenth, of 7 and 19 lost a twentieth, whole networks nothing.
// * load_at(p) and store_at(p, a) are load and store through an address without an offset, load_at(p, Constant<n>) is
//   load(p + n), for where the compiler's choice costs more. Where sweeps are not taken there is no need for them.
// * max(a, b) and min(a, b) are NaN where b is; the value that may be NaN goes second.
// * fma_lane(a, b, lane, c) is a * b[lane] + c; only where has_fma_lane says that it is one instruction.
// * fma_half(a, b, c) is fma in the first half of the lanes, and anything in the others; only where has_half_fma says
//   that it may take half as long: on AMD's Zen 4, whose units are half as wide as the registers. (Elsewhere as long.)
// * where_at_most(a, b, x, y) gives x where a <= b, else y, also where a or b is NaN.
#pragma once

#include <immintrin.h>

#include "../vector.h"
#include "transpose_x86.h"

// GCC before 13 warns of the undefined pass-through operand in its own definition of _mm512_max_ps and others (GCC bug
// 105593).
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace fastsep {
namespace FASTSEP_ISA {
namespace {

template <class T>
struct Vec;

template <>
struct Vec<float> {
  using T = float;
  using Reg = __m512;
  static constexpr int width = 16, block = 8;
  static constexpr bool has_fma_lane = false, has_half_fma = true;
  static constexpr bool large_planar_tiles = true, sweeps_channels_last = false;

  static __mmask16 head(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

  static Reg load(const T* p) { return _mm512_loadu_ps(p); }
  static Reg load_n(const T* p, int n) { return _mm512_maskz_loadu_ps(head(n), p); }
  static Reg load_n(const T* p, Constant<width>) { return load(p); }
  static Reg in_register(Reg a) {
    asm("" : "+v"(a));
    return a;
  }
  static void store(T* p, Reg a) { _mm512_storeu_ps(p, a); }
  static Reg load_at(const T* p) { return in_register(load(p)); }
  template <int N>
  static Reg load_at(const T* p, Constant<N>) {
    return in_register(load(p + N));
  }
  static void store_at(T* p, Reg a) { store(p, a); }
  static void store_n(T* p, Reg a, int n) { _mm512_mask_storeu_ps(p, head(n), a); }
  static void store_n(T* p, Reg a, Constant<width>) { store(p, a); }
  static Reg set1(T a) { return _mm512_set1_ps(a); }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static Reg fma_half(Reg a, Reg b, Reg c) {
    asm("vfmadd231ps %t2, %t1, %t0" : "+v"(c) : "v"(a), "v"(b));
    return c;
  }
  static Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static Reg min(Reg a, Reg b) { return _mm512_min_ps(a, b); }
  static Reg where_at_most(Reg a, Reg b, Reg x, Reg y) {
    return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ), x);
  }
  static Reg round(Reg a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Reg pow2(Reg n) { return _mm512_scalef_ps(_mm512_set1_ps(1.0f), n); }
  static Reg load_even(const T* p, int n) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const uint32_t touched = (uint32_t{1} << (2 * n - 1)) - 1;
    return _mm512_permutex2var_ps(_mm512_maskz_loadu_ps(static_cast<__mmask16>(touched), p), even,
                                  _mm512_maskz_loadu_ps(static_cast<__mmask16>(touched >> width), p + width));
  }
  template <int Block>
  static void transpose(const T* from, int64_t from_stride, T* to, int64_t to_stride, Constant<Block> block) {
    transpose_x86(from, from_stride, to, to_stride, block);
  }
};

template <>
struct Vec<double> {
  using T = double;
  using Reg = __m512d;
  static constexpr int width = 8, block = 4;
  static constexpr bool has_fma_lane = false, has_half_fma = true;
  static constexpr bool large_planar_tiles = true, sweeps_channels_last = false;

  static __mmask8 head(int n) { return static_cast<__mmask8>((1u << n) - 1u); }

  static Reg load(const T* p) { return _mm512_loadu_pd(p); }
  static Reg load_n(const T* p, int n) { return _mm512_maskz_loadu_pd(head(n), p); }
  static Reg load_n(const T* p, Constant<width>) { return load(p); }
  static Reg in_register(Reg a) {
    asm("" : "+v"(a));
    return a;
  }
  static void store(T* p, Reg a) { _mm512_storeu_pd(p, a); }
  static Reg load_at(const T* p) { return in_register(load(p)); }
  template <int N>
  static Reg load_at(const T* p, Constant<N>) {
    return in_register(load(p + N));
  }
  static void store_at(T* p, Reg a) { store(p, a); }
  static void store_n(T* p, Reg a, int n) { _mm512_mask_storeu_pd(p, head(n), a); }
  static void store_n(T* p, Reg a, Constant<width>) { store(p, a); }
  static Reg set1(T a) { return _mm512_set1_pd(a); }
  static Reg add(Reg a, Reg b) { return _mm512_add_pd(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm512_sub_pd(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_pd(a, b); }
  static Reg div(Reg a, Reg b) { return _mm512_div_pd(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_pd(a, b, c); }
  static Reg fma_half(Reg a, Reg b, Reg c) {
    asm("vfmadd231pd %t2, %t1, %t0" : "+v"(c) : "v"(a), "v"(b));
    return c;
  }
  static Reg max(Reg a, Reg b) { return _mm512_max_pd(a, b); }
  static Reg min(Reg a, Reg b) { return _mm512_min_pd(a, b); }
  static Reg where_at_most(Reg a, Reg b, Reg x, Reg y) {
    return _mm512_mask_mov_pd(y, _mm512_cmp_pd_mask(a, b, _CMP_LE_OQ), x);
  }
  static Reg round(Reg a) { return _mm512_roundscale_pd(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Reg pow2(Reg n) { return _mm512_scalef_pd(_mm512_set1_pd(1.0), n); }
  static Reg load_even(const T* p, int n) {
    const __m512i even = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
    const uint32_t touched = (uint32_t{1} << (2 * n - 1)) - 1;
    return _mm512_permutex2var_pd(_mm512_maskz_loadu_pd(static_cast<__mmask8>(touched), p), even,
                                  _mm512_maskz_loadu_pd(static_cast<__mmask8>(touched >> width), p + width));
  }
  template <int Block>
  static void transpose(const T* from, int64_t from_stride, T* to, int64_t to_stride, Constant<Block> block) {
    transpose_x86(from, from_stride, to, to_stride, block);
  }
};

}  // namespace
}  // namespace FASTSEP_ISA
}  // namespace fastsep
