// The oracle: the formula of fastsep.h in plain loops, sums in double.
#include <cmath>

#include "../fastsep.h"

namespace fastsep {
namespace {

double activate(Activation activation, double x) {
  const auto sigmoid = [](double v) { return 1 / (1 + std::exp(-v)); };
  const auto clamp = [](double v, double high) { return v < 0 ? 0 : v > high ? high : v; };
  switch (activation) {
    case Activation::identity: return x;
    case Activation::relu: return x < 0 ? 0 : x;
    case Activation::relu6: return clamp(x, 6);
    case Activation::leaky_relu: return x < 0 ? 0.01 * x : x;
    case Activation::silu: return x * sigmoid(x);
    case Activation::hardswish: return x * clamp(x + 3, 6) / 6;
    case Activation::hardsigmoid: return clamp(x + 3, 6) / 6;
    case Activation::sigmoid: return sigmoid(x);
    case Activation::tanh: return std::tanh(x);
    case Activation::gelu: return x * std::erfc(-x * std::sqrt(0.5)) / 2;
    case Activation::gelu_tanh:
      return x / 2 * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
  }
  return x;
}

template <class T>
void reference_as(const Problem& p, const T* x, const Weights& weights, double* y, bool magnitude) {
  const auto value = [&](const void* pointer, int64_t index) {
    const double v = pointer == nullptr ? 0 : static_cast<double>(static_cast<const T*>(pointer)[index]);
    return magnitude ? std::fabs(v) : v;
  };
  const auto finish = [&](Activation activation, double v) { return magnitude ? v : activate(activation, v); };
  const int64_t oh = out_height(p), ow = out_width(p), depth = p.channels * p.multiplier;
  const bool nhwc = p.layout == Layout::nhwc;
  const auto at = [&](int64_t n, int64_t c, int64_t h, int64_t w, int64_t cs, int64_t hs, int64_t ws) {
    return nhwc ? ((n * hs + h) * ws + w) * cs + c : ((n * cs + c) * hs + h) * ws + w;
  };
  for (int64_t n = 0; n < p.batch; ++n) {
    for (int64_t oy = 0; oy < oh; ++oy) {
      for (int64_t ox = 0; ox < ow; ++ox) {
        for (int64_t k = 0; k < p.out_channels; ++k)
          y[at(n, k, oy, ox, p.out_channels, oh, ow)] = value(weights.bias, k);
        for (int64_t i = 0; i < depth; ++i) {
          double t = value(weights.depthwise_bias, i);
          for (int64_t r = 0; r < p.kernel_h; ++r) {
            for (int64_t s = 0; s < p.kernel_w; ++s) {
              const int64_t h = oy * p.stride_h - p.pad_top + r * p.dilation_h;
              const int64_t w = ox * p.stride_w - p.pad_left + s * p.dilation_w;
              if (h < 0 || h >= p.height || w < 0 || w >= p.width) continue;
              t += value(x, at(n, i / p.multiplier, h, w, p.channels, p.height, p.width)) *
                   value(weights.depthwise_weight, (i * p.kernel_h + r) * p.kernel_w + s);
            }
          }
          t = finish(p.mid_activation, t);
          for (int64_t k = 0; k < p.out_channels; ++k)
            y[at(n, k, oy, ox, p.out_channels, oh, ow)] += t * value(weights.pointwise_weight, k * depth + i);
        }
        for (int64_t k = 0; k < p.out_channels; ++k) {
          double& out = y[at(n, k, oy, ox, p.out_channels, oh, ow)];
          out = finish(p.activation, out);
        }
      }
    }
  }
}

}  // namespace

void reference_forward(const Problem& problem, const void* input, const Weights& weights, double* output,
                       bool magnitude) {
  if (problem.dtype == Dtype::f32)
    reference_as(problem, static_cast<const float*>(input), weights, output, magnitude);
  else
    reference_as(problem, static_cast<const double*>(input), weights, output, magnitude);
}

}  // namespace fastsep
