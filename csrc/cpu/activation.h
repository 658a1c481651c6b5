// Every activation, once, on the vector type.
//
// identity, relu and relu6 are a clamp to [low, high], which the tiles apply to their accumulators. The others run
// over the finished tile while it is in cache: next to an exponential, one more pass over L1 costs nothing.
#pragma once

#include <math.h>

#include "../fastsep.h"
#include "vector.h"

namespace fastsep {
namespace FASTSEP_ISA {
namespace {

template <class T>
struct Clamp {
  T low, high;
};

template <class T>
Clamp<T> clamp_of(Activation activation) {
  const T infinity = static_cast<T>(HUGE_VAL);
  switch (activation) {
    case Activation::relu: return {T(0), infinity};
    case Activation::relu6: return {T(0), T(6)};
    default: return {-infinity, infinity};
  }
}

inline bool is_clamp(Activation activation) {
  return activation == Activation::identity || activation == Activation::relu || activation == Activation::relu6;
}

// e^x = scale * (1 + tail), scale a power of two and |tail| < 0.42, kept apart so that e^x - 1 stays exact near 0.
template <class V>
struct Exponential {
  typename V::Reg scale, tail;
};

// n = round(x / ln 2), r = x - n ln 2 in two steps (the high part of ln 2 has zeros enough at its end that n times
// it is exact), then the Taylor series of e^r - 1 for |r| <= ln(2)/2. The first term left out is below
// 0.347^8 / 8! = 5e-9 in float and 0.347^14 / 14! = 4e-18 in double.
template <class V>
Exponential<V> exponential(typename V::Reg x) {
  using T = typename V::T;
  constexpr bool is_float = sizeof(T) == 4;
  constexpr int terms = is_float ? 7 : 13;
  constexpr T limit = is_float ? T(88.7) : T(709.7);
  constexpr T ln2_high = is_float ? T(0.693145751953125) : T(0x1.62e42fee00000p-1);
  constexpr T ln2_low = is_float ? T(1.428606765330187e-06) : T(0x1.a39ef35793c76p-33);
  x = V::min(V::set1(limit), V::max(V::set1(-limit + T(1.5)), x));
  const auto n = V::round(V::mul(x, V::set1(T(1.4426950408889634))));
  auto r = V::fma(n, V::set1(-ln2_high), x);
  r = V::fma(n, V::set1(-ln2_low), r);
  T factorial = 1;
  for (int i = 2; i <= terms; ++i) factorial *= T(i);
  auto series = V::set1(T(1) / factorial);
  for (int i = terms; i > 1; --i) {
    factorial /= T(i);
    series = V::fma(series, r, V::set1(T(1) / factorial));
  }
  return {V::pow2(n), V::mul(series, r)};
}

// The two parts as one. Not scale * tail + scale: where scale is infinite that is infinity minus infinity.
template <class V>
typename V::Reg together(const Exponential<V>& e) {
  return V::mul(e.scale, V::add(e.tail, V::set1(1)));
}

template <class V>
typename V::Reg sigmoid(typename V::Reg x) {
  const auto one = V::set1(1);
  const Exponential<V> e = exponential<V>(V::sub(V::set1(0), x));
  return V::div(one, V::add(one, together<V>(e)));
}

// tanh x = (e^2x - 1) / (e^2x + 1); beyond |x| = 20 it is 1 to the last bit in double.
template <class V>
typename V::Reg hyperbolic_tangent(typename V::Reg x) {
  const auto limited = V::min(V::set1(20), V::max(V::set1(-20), x));
  const Exponential<V> e = exponential<V>(V::add(limited, limited));
  const auto minus_one = V::fma(e.scale, e.tail, V::sub(e.scale, V::set1(1)));
  return V::div(minus_one, V::add(minus_one, V::set1(2)));
}

// erfc(z) = t Q(t) e^-z^2 with t = 1 / (1 + 0.38 z); Q fitted by least squares on the relative error, reweighted
// towards its largest until that was level: 2e-8.
template <class V>
typename V::Reg complementary_error_f32(typename V::Reg z) {
  const float coefficients[] = {0.05896527f, -0.26227204f, 0.36383952f, -0.16142984f, 0.23000144f,
                                0.13866163f, 0.20390325f,  0.21391985f, 0.21441093f};
  const auto one = V::set1(1);
  const auto t = V::div(one, V::fma(z, V::set1(0.38f), one));
  auto sum = V::set1(0);
  for (float coefficient : coefficients) sum = V::fma(sum, t, V::set1(coefficient));
  const Exponential<V> e = exponential<V>(V::sub(V::set1(0), V::mul(z, z)));
  return V::mul(V::mul(sum, t), together<V>(e));
}

struct LeakyRelu {
  template <class V>
  static typename V::Reg apply(typename V::Reg x) {
    const auto zero = V::set1(0);
    return V::fma(V::min(zero, x), V::set1(typename V::T(0.01)), V::max(zero, x));
  }
};

struct Silu {
  template <class V>
  static typename V::Reg apply(typename V::Reg x) {
    return V::mul(x, sigmoid<V>(x));
  }
};

struct Hardsigmoid {  // clamp(x + 3, 0, 6) / 6
  template <class V>
  static typename V::Reg apply(typename V::Reg x) {
    const auto six = V::set1(6);
    return V::div(V::min(six, V::max(V::set1(0), V::add(x, V::set1(3)))), six);
  }
};

struct Hardswish {
  template <class V>
  static typename V::Reg apply(typename V::Reg x) {
    return V::mul(x, Hardsigmoid::apply<V>(x));
  }
};

struct Sigmoid {
  template <class V>
  static typename V::Reg apply(typename V::Reg x) {
    return sigmoid<V>(x);
  }
};

struct Tanh {
  template <class V>
  static typename V::Reg apply(typename V::Reg x) {
    return hyperbolic_tangent<V>(x);
  }
};

// x Phi(x) = max(x, 0) - |x| erfc(|x| / sqrt 2) / 2: no cancellation for negative x. |x| stops at 14, where the
// second term is below the smallest normal float, so that infinity does not meet zero.
struct Gelu {
  template <class V>
  static typename V::Reg apply(typename V::Reg x) {
    using T = typename V::T;
    const T stop = sizeof(T) == 4 ? T(14) : T(38);
    const auto zero = V::set1(0);
    const auto size = V::min(V::set1(stop), V::max(x, V::sub(zero, x)));
    const auto z = V::mul(size, V::set1(T(0.70710678118654752440)));
    typename V::Reg tail;
    if constexpr (sizeof(T) == 4) {
      tail = complementary_error_f32<V>(z);
    } else {
      T lanes[V::width];
      V::store(lanes, z);
      for (T& lane : lanes) lane = ::erfc(lane);
      tail = V::load(lanes);
    }
    return V::fma(V::mul(size, V::set1(T(-0.5))), tail, V::max(zero, x));
  }
};

struct GeluTanh {  // x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
  template <class V>
  static typename V::Reg apply(typename V::Reg x) {
    using T = typename V::T;
    const auto cubic = V::fma(V::mul(V::mul(x, x), x), V::set1(T(0.044715)), x);
    const auto phi = hyperbolic_tangent<V>(V::mul(cubic, V::set1(T(0.79788456080286535588))));
    const auto half = V::mul(x, V::set1(T(0.5)));
    return V::fma(half, phi, half);
  }
};

template <class V, class F>
FASTSEP_NOINLINE void apply_to_span(typename V::T* data, int64_t count) {
  for (; count >= V::width; count -= V::width, data += V::width) V::store(data, F::template apply<V>(V::load(data)));
  if (count > 0) {
    const int n = static_cast<int>(count);
    V::store_n(data, F::template apply<V>(V::load_n(data, n)), n);
  }
}

// data[i] = activation(data[i]), for those that are not a clamp; the clamps have been applied before.
template <class V>
void activate(Activation activation, typename V::T* data, int64_t count) {
  switch (activation) {
    case Activation::identity:
    case Activation::relu:
    case Activation::relu6: return;
    case Activation::leaky_relu: return apply_to_span<V, LeakyRelu>(data, count);
    case Activation::silu: return apply_to_span<V, Silu>(data, count);
    case Activation::hardswish: return apply_to_span<V, Hardswish>(data, count);
    case Activation::hardsigmoid: return apply_to_span<V, Hardsigmoid>(data, count);
    case Activation::sigmoid: return apply_to_span<V, Sigmoid>(data, count);
    case Activation::tanh: return apply_to_span<V, Tanh>(data, count);
    case Activation::gelu: return apply_to_span<V, Gelu>(data, count);
    case Activation::gelu_tanh: return apply_to_span<V, GeluTanh>(data, count);
  }
}

}  // namespace
}  // namespace FASTSEP_ISA
}  // namespace fastsep
