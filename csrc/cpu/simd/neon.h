// The vector type on NEON (Advanced SIMD of 64-bit ARM): 32 registers of 128 bits. The rules stand in simd/avx512.h.
//
// How ARM differs:
// * An FMA takes one of its factors from any lane of a register (fma_lane), while a broadcast from memory is an
//   instruction of its own. So the matrix product loads its broadcast side in whole vectors, see pointwise.h.
// * No masked loads and stores: a vector of four has three incomplete forms, put together from halves and lanes.
// * LD1 and ST1 know no offset. On Neoverse N1 they are one micro-operation and two where LDR and STR are two and four,
//   says LLVM's model, so the depthwise sweeps' pointers walk. LDUR, whose offset is a constant, is one there too.
// * FMAX and FMIN give NaN where either side is.
#pragma once

#include <arm_neon.h>

#include "../vector.h"

namespace fastsep {
namespace FASTSEP_ISA {
namespace {

// LDUR, whose offset is part of the instruction: what stands at p[N].
template <class Reg, int N, class T>
FASTSEP_INLINE Reg load_with_offset(const T* p) {
  constexpr int elements = N + static_cast<int>(sizeof(Reg) / sizeof(T));
  Reg a;
  asm("ldur %q0, [%1, %2]"
      : "=w"(a)
      : "r"(p), "i"(N * int(sizeof(T))), "Q"(*reinterpret_cast<const T(*)[elements]>(p)));
  return a;
}

template <class T>
struct Vec;

template <>
struct Vec<float> {
  using T = float;
  using Reg = float32x4_t;
  static constexpr int width = 4, block = 4;
  static constexpr bool has_fma_lane = true, has_half_fma = false;
  static constexpr bool large_planar_tiles = true, sweeps_channels_last = true;

  static Reg load(const T* p) { return vld1q_f32(p); }
  static Reg load_n(const T* p, int n) {
    const Reg zero = vdupq_n_f32(0);
    if (n >= width) return load(p);
    if (n <= 0) return zero;
    if (n == 1) return vld1q_lane_f32(p, zero, 0);
    const Reg two = vcombine_f32(vld1_f32(p), vdup_n_f32(0));
    return n == 2 ? two : vld1q_lane_f32(p + 2, two, 2);
  }
  static Reg load_n(const T* p, Constant<width>) { return load(p); }
  static Reg in_register(Reg a) {
    asm("" : "+w"(a));
    return a;
  }
  static void store(T* p, Reg a) { vst1q_f32(p, a); }
  static Reg load_at(const T* p) {
    Reg a;
    asm("ld1 {%0.4s}, %1" : "=w"(a) : "Q"(*reinterpret_cast<const T(*)[width]>(p)));
    return a;
  }
  template <int N>
  static Reg load_at(const T* p, Constant<N>) {
    return load_with_offset<Reg, N>(p);
  }
  static void store_at(T* p, Reg a) { asm("st1 {%1.4s}, %0" : "=Q"(*reinterpret_cast<T(*)[width]>(p)) : "w"(a)); }
  static void store_n(T* p, Reg a, int n) {
    if (n >= width) return store(p, a);
    if (n >= 2) vst1_f32(p, vget_low_f32(a));
    if (n == 3) vst1q_lane_f32(p + 2, a, 2);
    if (n == 1) vst1q_lane_f32(p, a, 0);
  }
  static void store_n(T* p, Reg a, Constant<width>) { store(p, a); }
  static Reg set1(T a) { return vdupq_n_f32(a); }
  static Reg add(Reg a, Reg b) { return vaddq_f32(a, b); }
  static Reg sub(Reg a, Reg b) { return vsubq_f32(a, b); }
  static Reg mul(Reg a, Reg b) { return vmulq_f32(a, b); }
  static Reg div(Reg a, Reg b) { return vdivq_f32(a, b); }
  // As vfmaq_f32 and vfmaq_laneq_f32, of which GCC makes copies: 10 in the product's loop of 7 x 2, for 56 FMAs.
  static Reg fma(Reg a, Reg b, Reg c) {
    asm("fmla %0.4s, %1.4s, %2.4s" : "+w"(c) : "w"(a), "w"(b));
    return c;
  }
  template <int Lane>
  static Reg fma_lane(Reg a, Reg b, Constant<Lane>, Reg c) {
    asm("fmla %0.4s, %1.4s, %2.s[%c3]" : "+w"(c) : "w"(a), "w"(b), "i"(Lane));
    return c;
  }
  static Reg max(Reg a, Reg b) { return vmaxq_f32(a, b); }
  static Reg min(Reg a, Reg b) { return vminq_f32(a, b); }
  static Reg where_at_most(Reg a, Reg b, Reg x, Reg y) { return vbslq_f32(vcleq_f32(a, b), x, y); }
  static Reg round(Reg a) { return vrndnq_f32(a); }
  // The exponent field, moved into place: -126 <= n <= 128, where 128 gives infinity.
  static Reg pow2(Reg n) {
    const int32x4_t exponent = vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127));
    return vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23));
  }
  static Reg load_even(const T* p, int n) {
    if (n < width) return vuzp1q_f32(load_n(p, 2 * n - 1), load_n(p + width, 2 * n - 1 - width));
    const Reg back = load(p + width - 1);  // p[3] to p[6]
    return vuzp1q_f32(load(p), vextq_f32(back, back, 1));
  }
  static void transpose(const T* from, int64_t from_stride, T* to, int64_t to_stride, Constant<4>) {
    const Reg a = load(from), b = load(from + from_stride);
    const Reg c = load(from + 2 * from_stride), d = load(from + 3 * from_stride);
    const Reg ac_01 = vzip1q_f32(a, c), ac_23 = vzip2q_f32(a, c);
    const Reg bd_01 = vzip1q_f32(b, d), bd_23 = vzip2q_f32(b, d);
    store(to, vzip1q_f32(ac_01, bd_01));
    store(to + to_stride, vzip2q_f32(ac_01, bd_01));
    store(to + 2 * to_stride, vzip1q_f32(ac_23, bd_23));
    store(to + 3 * to_stride, vzip2q_f32(ac_23, bd_23));
  }
};

template <>
struct Vec<double> {
  using T = double;
  using Reg = float64x2_t;
  static constexpr int width = 2, block = 4;
  static constexpr bool has_fma_lane = true, has_half_fma = false;
  static constexpr bool large_planar_tiles = true, sweeps_channels_last = true;

  static Reg load(const T* p) { return vld1q_f64(p); }
  static Reg load_n(const T* p, int n) {
    if (n >= width) return load(p);
    const Reg zero = vdupq_n_f64(0);
    return n == 1 ? vld1q_lane_f64(p, zero, 0) : zero;
  }
  static Reg load_n(const T* p, Constant<width>) { return load(p); }
  static Reg in_register(Reg a) {
    asm("" : "+w"(a));
    return a;
  }
  static void store(T* p, Reg a) { vst1q_f64(p, a); }
  static Reg load_at(const T* p) {
    Reg a;
    asm("ld1 {%0.2d}, %1" : "=w"(a) : "Q"(*reinterpret_cast<const T(*)[width]>(p)));
    return a;
  }
  template <int N>
  static Reg load_at(const T* p, Constant<N>) {
    return load_with_offset<Reg, N>(p);
  }
  static void store_at(T* p, Reg a) { asm("st1 {%1.2d}, %0" : "=Q"(*reinterpret_cast<T(*)[width]>(p)) : "w"(a)); }
  static void store_n(T* p, Reg a, int n) {
    if (n >= width) return store(p, a);
    if (n == 1) vst1q_lane_f64(p, a, 0);
  }
  static void store_n(T* p, Reg a, Constant<width>) { store(p, a); }
  static Reg set1(T a) { return vdupq_n_f64(a); }
  static Reg add(Reg a, Reg b) { return vaddq_f64(a, b); }
  static Reg sub(Reg a, Reg b) { return vsubq_f64(a, b); }
  static Reg mul(Reg a, Reg b) { return vmulq_f64(a, b); }
  static Reg div(Reg a, Reg b) { return vdivq_f64(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) {
    asm("fmla %0.2d, %1.2d, %2.2d" : "+w"(c) : "w"(a), "w"(b));
    return c;
  }
  template <int Lane>
  static Reg fma_lane(Reg a, Reg b, Constant<Lane>, Reg c) {
    asm("fmla %0.2d, %1.2d, %2.d[%c3]" : "+w"(c) : "w"(a), "w"(b), "i"(Lane));
    return c;
  }
  static Reg max(Reg a, Reg b) { return vmaxq_f64(a, b); }
  static Reg min(Reg a, Reg b) { return vminq_f64(a, b); }
  static Reg where_at_most(Reg a, Reg b, Reg x, Reg y) { return vbslq_f64(vcleq_f64(a, b), x, y); }
  static Reg round(Reg a) { return vrndnq_f64(a); }
  // As for float, -1022 <= n <= 1024.
  static Reg pow2(Reg n) {
    const int64x2_t exponent = vaddq_s64(vcvtnq_s64_f64(n), vdupq_n_s64(1023));
    return vreinterpretq_f64_s64(vshlq_n_s64(exponent, 52));
  }
  static Reg load_even(const T* p, int n) {
    const Reg front = load_n(p, n);  // p[1] is not used, but touched only where p[2] is
    return n < width ? front : vld1q_lane_f64(p + 2, front, 1);
  }
  static void transpose_2x2(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
    const Reg a = load(from), b = load(from + from_stride);
    store(to, vzip1q_f64(a, b));
    store(to + to_stride, vzip2q_f64(a, b));
  }
  static void transpose(const T* from, int64_t from_stride, T* to, int64_t to_stride, Constant<4>) {
    for (int i = 0; i < 4; i += 2)
      for (int j = 0; j < 4; j += 2)
        transpose_2x2(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
  }
};

}  // namespace
}  // namespace FASTSEP_ISA
}  // namespace fastsep
