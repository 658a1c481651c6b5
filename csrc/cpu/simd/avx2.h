// The vector type on AVX2 with FMA: 16 registers of 256 bits. The rules stand in simd/avx512.h.
#pragma once

#include <immintrin.h>

#include "../vector.h"
#include "transpose_x86.h"

namespace fastsep {
namespace FASTSEP_ISA {
namespace {

template <class T>
struct Vec;

template <>
struct Vec<float> {
  using T = float;
  using Reg = __m256;
  static constexpr int width = 8, block = 8;
  static constexpr bool has_fma_lane = false, has_half_fma = false;
  static constexpr bool large_planar_tiles = false, sweeps_channels_last = false;

  // All ones in the first n lanes.
  static __m256i head(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }

  static Reg load(const T* p) { return _mm256_loadu_ps(p); }
  static Reg load_n(const T* p, int n) { return _mm256_maskload_ps(p, head(n)); }
  static Reg load_n(const T* p, Constant<width>) { return load(p); }
  static Reg in_register(Reg a) {
    asm("" : "+x"(a));
    return a;
  }
  static void store(T* p, Reg a) { _mm256_storeu_ps(p, a); }
  static void store_n(T* p, Reg a, int n) { _mm256_maskstore_ps(p, head(n), a); }
  static void store_n(T* p, Reg a, Constant<width>) { store(p, a); }
  static Reg set1(T a) { return _mm256_set1_ps(a); }
  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static Reg min(Reg a, Reg b) { return _mm256_min_ps(a, b); }
  static Reg where_at_most(Reg a, Reg b, Reg x, Reg y) {
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LE_OQ));
  }
  static Reg round(Reg a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // The exponent field, moved into place: -126 <= n <= 128, where 128 gives infinity.
  static Reg pow2(Reg n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
  }
  static Reg load_even(const T* p, int n) {
    const Reg front = load_n(p, 2 * n - 1), back = load_n(p + width, 2 * n - 1 - width);
    const __m256 even = _mm256_shuffle_ps(front, back, _MM_SHUFFLE(2, 0, 2, 0));
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(even), _MM_SHUFFLE(3, 1, 2, 0)));
  }
  template <int Block>
  static void transpose(const T* from, int64_t from_stride, T* to, int64_t to_stride, Constant<Block> block) {
    transpose_x86(from, from_stride, to, to_stride, block);
  }
};

template <>
struct Vec<double> {
  using T = double;
  using Reg = __m256d;
  static constexpr int width = 4, block = 4;
  static constexpr bool has_fma_lane = false, has_half_fma = false;
  static constexpr bool large_planar_tiles = false, sweeps_channels_last = false;

  static __m256i head(int n) { return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)); }

  static Reg load(const T* p) { return _mm256_loadu_pd(p); }
  static Reg load_n(const T* p, int n) { return _mm256_maskload_pd(p, head(n)); }
  static Reg load_n(const T* p, Constant<width>) { return load(p); }
  static Reg in_register(Reg a) {
    asm("" : "+x"(a));
    return a;
  }
  static void store(T* p, Reg a) { _mm256_storeu_pd(p, a); }
  static void store_n(T* p, Reg a, int n) { _mm256_maskstore_pd(p, head(n), a); }
  static void store_n(T* p, Reg a, Constant<width>) { store(p, a); }
  static Reg set1(T a) { return _mm256_set1_pd(a); }
  static Reg add(Reg a, Reg b) { return _mm256_add_pd(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm256_sub_pd(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_pd(a, b); }
  static Reg div(Reg a, Reg b) { return _mm256_div_pd(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_pd(a, b, c); }
  static Reg max(Reg a, Reg b) { return _mm256_max_pd(a, b); }
  static Reg min(Reg a, Reg b) { return _mm256_min_pd(a, b); }
  static Reg where_at_most(Reg a, Reg b, Reg x, Reg y) {
    return _mm256_blendv_pd(y, x, _mm256_cmp_pd(a, b, _CMP_LE_OQ));
  }
  static Reg round(Reg a) { return _mm256_round_pd(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // As for float, -1022 <= n <= 1024.
  static Reg pow2(Reg n) {
    const __m256i exponent = _mm256_add_epi64(_mm256_cvtepi32_epi64(_mm256_cvtpd_epi32(n)), _mm256_set1_epi64x(1023));
    return _mm256_castsi256_pd(_mm256_slli_epi64(exponent, 52));
  }
  static Reg load_even(const T* p, int n) {
    const Reg front = load_n(p, 2 * n - 1), back = load_n(p + width, 2 * n - 1 - width);
    return _mm256_permute4x64_pd(_mm256_unpacklo_pd(front, back), _MM_SHUFFLE(3, 1, 2, 0));
  }
  template <int Block>
  static void transpose(const T* from, int64_t from_stride, T* to, int64_t to_stride, Constant<Block> block) {
    transpose_x86(from, from_stride, to, to_stride, block);
  }
};

}  // namespace
}  // namespace FASTSEP_ISA
}  // namespace fastsep
