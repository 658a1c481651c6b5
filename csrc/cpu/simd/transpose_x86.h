// The 4 x 4 transposes of the x86 instruction sets, which both do them in registers of 128 and 256 bits.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace fastsep {
namespace FASTSEP_ISA {
namespace {

inline void transpose_x86(const float* from, int64_t from_stride, float* to, int64_t to_stride, Constant<4>) {
  __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + from_stride);
  __m128 c = _mm_loadu_ps(from + 2 * from_stride), d = _mm_loadu_ps(from + 3 * from_stride);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(to, a);
  _mm_storeu_ps(to + to_stride, b);
  _mm_storeu_ps(to + 2 * to_stride, c);
  _mm_storeu_ps(to + 3 * to_stride, d);
}

inline void transpose_x86(const double* from, int64_t from_stride, double* to, int64_t to_stride, Constant<4>) {
  const __m256d a = _mm256_loadu_pd(from), b = _mm256_loadu_pd(from + from_stride);
  const __m256d c = _mm256_loadu_pd(from + 2 * from_stride), d = _mm256_loadu_pd(from + 3 * from_stride);
  const __m256d ab_02 = _mm256_unpacklo_pd(a, b), ab_13 = _mm256_unpackhi_pd(a, b);
  const __m256d cd_02 = _mm256_unpacklo_pd(c, d), cd_13 = _mm256_unpackhi_pd(c, d);
  _mm256_storeu_pd(to, _mm256_permute2f128_pd(ab_02, cd_02, 0x20));
  _mm256_storeu_pd(to + to_stride, _mm256_permute2f128_pd(ab_13, cd_13, 0x20));
  _mm256_storeu_pd(to + 2 * to_stride, _mm256_permute2f128_pd(ab_02, cd_02, 0x31));
  _mm256_storeu_pd(to + 3 * to_stride, _mm256_permute2f128_pd(ab_13, cd_13, 0x31));
}

// The two halves of each row of four are loaded into the halves of a register, so that all that is left is a 4 x 4
// transpose in each half.
FASTSEP_INLINE void transpose_4x8_x86(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  const auto load = [&](int64_t row) {
    const __m256 low = _mm256_castps128_ps256(_mm_loadu_ps(from + row * from_stride));
    return _mm256_insertf128_ps(low, _mm_loadu_ps(from + (row + 4) * from_stride), 1);
  };
  const __m256 a = load(0), b = load(1), c = load(2), d = load(3);
  const __m256d ab_01 = _mm256_castps_pd(_mm256_unpacklo_ps(a, b)), ab_23 = _mm256_castps_pd(_mm256_unpackhi_ps(a, b));
  const __m256d cd_01 = _mm256_castps_pd(_mm256_unpacklo_ps(c, d)), cd_23 = _mm256_castps_pd(_mm256_unpackhi_ps(c, d));
  _mm256_storeu_ps(to, _mm256_castpd_ps(_mm256_unpacklo_pd(ab_01, cd_01)));
  _mm256_storeu_ps(to + to_stride, _mm256_castpd_ps(_mm256_unpackhi_pd(ab_01, cd_01)));
  _mm256_storeu_ps(to + 2 * to_stride, _mm256_castpd_ps(_mm256_unpacklo_pd(ab_23, cd_23)));
  _mm256_storeu_ps(to + 3 * to_stride, _mm256_castpd_ps(_mm256_unpackhi_pd(ab_23, cd_23)));
}

inline void transpose_x86(const float* from, int64_t from_stride, float* to, int64_t to_stride, Constant<8>) {
  transpose_4x8_x86(from, from_stride, to, to_stride);
  transpose_4x8_x86(from + 4, from_stride, to + 4 * to_stride, to_stride);
}

}  // namespace
}  // namespace FASTSEP_ISA
}  // namespace fastsep
