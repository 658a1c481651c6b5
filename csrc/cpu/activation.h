// Every activation and its derivative, once, on the vector type.
//
// identity, relu and relu6 are a clamp to [low, high], which the tiles apply to their accumulators. The others run
// over the finished tile while it is in cache: next to an exponential, one more pass over L1 costs nothing.
//
// slope(g, z) is g times the derivative: z is the activation's value where derivative_from_output() says so
// (fastsep.h; the parameter is called y then), else its argument x. Where a derivative jumps it takes PyTorch's side.
// Of an infinite x it is the limit; of one that is not a number it is nothing to rely on.
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

// Whether there is anything to be kept below, for keep_below(), in a register for all of a loop.
template <class T>
FASTSEP_INLINE int has_high(const Clamp<T>& clamp) {
  return in_register(static_cast<int>(clamp.high < static_cast<T>(HUGE_VAL)));
}

// The minimum that identity and relu do without: it would take a tenth of the depthwise tile's time.
template <class V, int N>
FASTSEP_INLINE void keep_below(typename V::Reg high, int is_bounded, typename V::Reg* sums, Constant<N>) {
  if (is_bounded == 0) return;
  FASTSEP_UNROLL
  for (int i = 0; i < N; ++i) sums[i] = V::min(high, sums[i]);
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

struct Relu {
  template <class V>
  static typename V::Reg slope(typename V::Reg g, typename V::Reg y) {
    const auto zero = V::set1(0);
    return V::where_at_most(y, zero, zero, g);
  }
};

struct Relu6 {
  template <class V>
  static typename V::Reg slope(typename V::Reg g, typename V::Reg y) {
    return V::where_at_most(V::set1(6), y, V::set1(0), Relu::slope<V>(g, y));
  }
};

struct LeakyRelu {
  template <class V>
  static typename V::Reg apply(typename V::Reg x) {
    const auto zero = V::set1(0);
    return V::fma(V::min(zero, x), V::set1(typename V::T(0.01)), V::max(zero, x));
  }
  template <class V>
  static typename V::Reg slope(typename V::Reg g, typename V::Reg y) {
    return V::where_at_most(y, V::set1(0), V::mul(g, V::set1(typename V::T(0.01))), g);
  }
};

struct Silu {
  template <class V>
  static typename V::Reg apply(typename V::Reg x) {
    const auto one = V::set1(1);
    const Exponential<V> e = exponential<V>(V::sub(V::set1(0), x));
    return V::div(x, V::fma(e.scale, V::add(e.tail, one), one));
  }
  template <class V>
  static typename V::Reg slope(typename V::Reg g, typename V::Reg x) {  // s (1 + x (1 - s))
    const auto one = V::set1(1), s = sigmoid<V>(x);
    return V::mul(V::mul(g, s), V::fma(x, V::sub(one, s), one));
  }
};

struct Hardsigmoid {  // clamp(x + 3, 0, 6) / 6, by a product: 6 times the sixth is 1 in float and double
  template <class V>
  static typename V::Reg apply(typename V::Reg x) {
    const auto limited = V::min(V::set1(6), V::max(V::set1(0), V::add(x, V::set1(3))));
    return V::mul(limited, V::set1(typename V::T(1) / typename V::T(6)));
  }
  template <class V>
  static typename V::Reg slope(typename V::Reg g, typename V::Reg x) {
    const auto zero = V::set1(0);
    const auto below = V::where_at_most(V::set1(3), x, zero, V::div(g, V::set1(6)));
    return V::where_at_most(x, V::set1(-3), zero, below);
  }
};

struct Hardswish {
  template <class V>
  static typename V::Reg apply(typename V::Reg x) {
    return V::mul(x, Hardsigmoid::apply<V>(x));
  }
  template <class V>
  static typename V::Reg slope(typename V::Reg g, typename V::Reg x) {
    const auto three = V::set1(3);
    const auto between = V::mul(g, V::add(V::div(x, three), V::set1(typename V::T(0.5))));
    return V::where_at_most(x, V::set1(-3), V::set1(0), V::where_at_most(three, x, g, between));
  }
};

struct Sigmoid {
  template <class V>
  static typename V::Reg apply(typename V::Reg x) {
    return sigmoid<V>(x);
  }
  template <class V>
  static typename V::Reg slope(typename V::Reg g, typename V::Reg y) {
    return V::mul(V::mul(g, y), V::sub(V::set1(1), y));
  }
};

struct Tanh {
  template <class V>
  static typename V::Reg apply(typename V::Reg x) {
    return hyperbolic_tangent<V>(x);
  }
  template <class V>
  static typename V::Reg slope(typename V::Reg g, typename V::Reg y) {
    return V::mul(g, V::sub(V::set1(1), V::mul(y, y)));
  }
};

// x Phi(x) = max(x, 0) - |x| erfc(|x| / sqrt 2) / 2: no cancellation for negative x. |x| stops at 14, where the
// second term is below the smallest normal float, so that infinity does not meet zero. The derivative is
// Phi(x) + x phi(x).
struct Gelu {
  template <class V>
  static typename V::Reg size_of(typename V::Reg x) {
    using T = typename V::T;
    return V::min(V::set1(sizeof(T) == 4 ? T(14) : T(38)), V::max(x, V::sub(V::set1(0), x)));
  }

  template <class V>
  static typename V::Reg complementary_error(typename V::Reg z) {
    using T = typename V::T;
    if constexpr (sizeof(T) == 4) {
      return complementary_error_f32<V>(z);
    } else {
      T lanes[V::width];
      V::store(lanes, z);
      for (T& lane : lanes) lane = ::erfc(lane);
      return V::load(lanes);
    }
  }

  template <class V>
  static typename V::Reg apply(typename V::Reg x) {
    using T = typename V::T;
    const auto size = size_of<V>(x);
    const auto tail = complementary_error<V>(V::mul(size, V::set1(T(0.70710678118654752440))));
    return V::fma(V::mul(size, V::set1(T(-0.5))), tail, V::max(V::set1(0), x));
  }

  template <class V>
  static typename V::Reg slope(typename V::Reg g, typename V::Reg x) {
    using T = typename V::T;
    const auto size = size_of<V>(x), zero = V::set1(0);
    const auto z = V::mul(size, V::set1(T(0.70710678118654752440)));
    const auto half_tail = V::mul(V::set1(T(0.5)), complementary_error<V>(z));
    const auto normal = V::where_at_most(x, zero, half_tail, V::sub(V::set1(1), half_tail));
    const auto density =
        V::mul(together<V>(exponential<V>(V::sub(zero, V::mul(z, z)))), V::set1(T(0.39894228040143267794)));
    // Limited as its size is: the density does not go on to zero, as it would have to for any x.
    const auto limited = V::where_at_most(x, zero, V::sub(zero, size), size);
    return V::mul(g, V::fma(limited, density, normal));
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
  // (1 + f)/2 + x/2 (1 - f^2) sqrt(2/pi) (1 + 3 0.044715 x^2), f the tanh, which from |x| = 14 on is 1 to the last bit
  template <class V>
  static typename V::Reg slope(typename V::Reg g, typename V::Reg x) {
    using T = typename V::T;
    const T root = T(0.79788456080286535588), cube = T(0.044715);
    x = V::min(V::set1(14), V::max(V::set1(-14), x));
    const auto one = V::set1(1), half = V::set1(T(0.5)), square = V::mul(x, x);
    const auto inner = V::mul(V::mul(x, V::set1(root)), V::fma(square, V::set1(cube), one));
    const auto f = hyperbolic_tangent<V>(inner);
    const auto inner_slope = V::fma(square, V::set1(T(3) * cube * root), V::set1(root));
    const auto rise = V::mul(V::mul(V::mul(half, x), inner_slope), V::sub(one, V::mul(f, f)));
    return V::mul(g, V::fma(half, f, V::add(half, rise)));
  }
};

template <class V, class F>
FASTSEP_NOINLINE void slope_on_span(typename V::T* gradient, const typename V::T* z, int64_t count) {
  for (; count >= V::width; count -= V::width, gradient += V::width, z += V::width)
    V::store(gradient, F::template slope<V>(V::load(gradient), V::load(z)));
  if (count > 0) {
    const int n = static_cast<int>(count);
    V::store_n(gradient, F::template slope<V>(V::load_n(gradient, n), V::load_n(z, n)), n);
  }
}

// gradient[i] *= activation'(at z[i]); z as slope() takes it.
template <class V>
void multiply_by_slope(Activation activation, typename V::T* gradient, const typename V::T* z, int64_t count) {
  switch (activation) {
    case Activation::identity: return;
    case Activation::relu: return slope_on_span<V, Relu>(gradient, z, count);
    case Activation::relu6: return slope_on_span<V, Relu6>(gradient, z, count);
    case Activation::leaky_relu: return slope_on_span<V, LeakyRelu>(gradient, z, count);
    case Activation::silu: return slope_on_span<V, Silu>(gradient, z, count);
    case Activation::hardswish: return slope_on_span<V, Hardswish>(gradient, z, count);
    case Activation::hardsigmoid: return slope_on_span<V, Hardsigmoid>(gradient, z, count);
    case Activation::sigmoid: return slope_on_span<V, Sigmoid>(gradient, z, count);
    case Activation::tanh: return slope_on_span<V, Tanh>(gradient, z, count);
    case Activation::gelu: return slope_on_span<V, Gelu>(gradient, z, count);
    case Activation::gelu_tanh: return slope_on_span<V, GeluTanh>(gradient, z, count);
  }
}

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
