// The oracle: the formulas of fastsep.h in plain loops, sums in double.
#include <algorithm>
#include <cmath>
#include <vector>

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

double slope(Activation activation, double x) {
  const double root = std::sqrt(2 / std::acos(-1.0)), cube = 0.044715;
  const double sigmoid = 1 / (1 + std::exp(-x)), tangent = std::tanh(x);
  const double inner = std::tanh(root * (x + cube * x * x * x));
  switch (activation) {
    case Activation::identity: return 1;
    case Activation::relu: return x <= 0 ? 0 : 1;
    case Activation::relu6: return x <= 0 || x >= 6 ? 0 : 1;
    case Activation::leaky_relu: return x <= 0 ? 0.01 : 1;
    case Activation::silu: return sigmoid * (1 + x * (1 - sigmoid));
    case Activation::hardswish: return x <= -3 ? 0 : x >= 3 ? 1 : x / 3 + 0.5;
    case Activation::hardsigmoid: return x <= -3 || x >= 3 ? 0 : 1.0 / 6;
    case Activation::sigmoid: return sigmoid * (1 - sigmoid);
    case Activation::tanh: return 1 - tangent * tangent;
    case Activation::gelu: return std::erfc(-x * std::sqrt(0.5)) / 2 + x * std::exp(-x * x / 2) * root / 2;
    case Activation::gelu_tanh: return (1 + inner + x * (1 - inner * inner) * root * (1 + 3 * cube * x * x)) / 2;
  }
  return 1;
}

// What both directions ask of a problem: its values as doubles, and where they stand.
template <class T>
struct Reference {
  const Problem& p;
  const Weights& weights;
  const Inputs& inputs;
  bool magnitude;
  const void* x = inputs.x;
  int64_t oh = out_height(p), ow = out_width(p), depth = p.channels * p.multiplier;

  double value(const void* pointer, int64_t index) const {
    const double v = pointer == nullptr ? 0 : static_cast<double>(static_cast<const T*>(pointer)[index]);
    return magnitude ? std::fabs(v) : v;
  }
  double finish(Activation activation, double v) const { return magnitude ? v : activate(activation, v); }
  double rise(Activation activation, double v) const { return magnitude ? 1 : slope(activation, v); }
  int64_t at(int64_t n, int64_t c, int64_t h, int64_t w, int64_t cs, int64_t hs, int64_t ws) const {
    return p.layout == Layout::nhwc ? ((n * hs + h) * ws + w) * cs + c : ((n * cs + c) * hs + h) * ws + w;
  }
  int64_t at_input(int64_t n, int64_t i, int64_t h, int64_t w) const {
    return at(n, i / p.multiplier, h, w, p.channels, p.height, p.width);
  }
  int64_t at_output(int64_t n, int64_t k, int64_t oy, int64_t ox) const {
    return at(n, k, oy, ox, p.out_channels > 0 ? p.out_channels : depth, oh, ow);
  }

  // f(index of the weight, input row, input column) for each tap of depthwise output i that lies inside the plane.
  template <class F>
  void for_taps(int64_t i, int64_t oy, int64_t ox, F f) const {
    for (int64_t r = 0; r < p.kernel_h; ++r) {
      for (int64_t s = 0; s < p.kernel_w; ++s) {
        const int64_t h = oy * p.stride_h - p.pad_top + r * p.dilation_h;
        const int64_t w = ox * p.stride_w - p.pad_left + s * p.dilation_w;
        if (h >= 0 && h < p.height && w >= 0 && w < p.width) f((i * p.kernel_h + r) * p.kernel_w + s, h, w);
      }
    }
  }

  // What the depthwise half sees, where that is not x.
  std::vector<double> expanded = expand();

  std::vector<double> expand() const {
    std::vector<double> e;
    if (p.expand.channels == 0) return e;
    e.resize(static_cast<size_t>(p.batch * p.height * p.width * p.channels));
    const Expansion& to = p.expand;
    for (size_t i = 0; i < e.size(); ++i) {
      const int64_t c = static_cast<int64_t>(i) % p.channels, pixel = static_cast<int64_t>(i) / p.channels;
      const int64_t n = pixel / (p.height * p.width), y = pixel / p.width % p.height, left = pixel % p.width;
      double sum = value(weights.expand_bias, c);
      for (int64_t r = 0; r < to.kernel_h; ++r) {
        for (int64_t s = 0; s < to.kernel_w; ++s) {
          const int64_t h = y * to.stride_h - to.pad_top + r, w = left * to.stride_w - to.pad_left + s;
          if (h < 0 || h >= to.height || w < 0 || w >= to.width) continue;
          for (int64_t k = 0; k < to.channels; ++k)
            sum += value(x, to.planar ? ((n * to.channels + k) * to.height + h) * to.width + w
                                      : ((n * to.height + h) * to.width + w) * to.channels + k) *
                   value(weights.expand_weight, ((c * to.channels + k) * to.kernel_h + r) * to.kernel_w + s);
        }
      }
      e[i] = finish(to.activation, sum);
    }
    return e;
  }
  double input(int64_t n, int64_t i, int64_t h, int64_t w) const {
    const int64_t index = at_input(n, i, h, w);
    return expanded.empty() ? value(x, index) : expanded[static_cast<size_t>(index)];
  }

  // Before the activation.
  double depthwise(int64_t n, int64_t i, int64_t oy, int64_t ox) const {
    double t = value(weights.depthwise_bias, i);
    for_taps(i, oy, ox, [&](int64_t weight, int64_t h, int64_t w) {
      t += input(n, i, h, w) * (p.gate ? value(inputs.gate, n * depth + i) : value(weights.depthwise_weight, weight));
    });
    return t;
  }

  template <class F>
  void for_pixels(F f) const {
    for (int64_t n = 0; n < p.batch; ++n)
      for (int64_t oy = 0; oy < oh; ++oy)
        for (int64_t ox = 0; ox < ow; ++ox) f(n, oy, ox);
  }

  void forward(double* y) const {
    for_pixels([&](int64_t n, int64_t oy, int64_t ox) {
      for (int64_t k = 0; k < p.out_channels; ++k) y[at_output(n, k, oy, ox)] = value(weights.bias, k);
      for (int64_t i = 0; i < depth; ++i) {
        const double u = finish(p.mid_activation, depthwise(n, i, oy, ox));
        if (p.out_channels == 0) y[at_output(n, i, oy, ox)] = u;
        for (int64_t k = 0; k < p.out_channels; ++k)
          y[at_output(n, k, oy, ox)] += u * value(weights.pointwise_weight, k * depth + i);
      }
      for (int64_t k = 0; k < p.out_channels; ++k) {
        double& out = y[at_output(n, k, oy, ox)];
        out = finish(p.activation, out);
        if (p.residual) out += value(inputs.residual != nullptr ? inputs.residual : x, at_output(n, k, oy, ox));
      }
    });
  }

  void backward(const T* grad_output, const Gradients& gradients) const {
    const auto clear = [](void* pointer, int64_t count) {
      double* const begin = static_cast<double*>(pointer);
      std::fill(begin, begin + count, 0.0);
      return begin;
    };
    double* const dx = clear(gradients.input, p.batch * p.channels * p.height * p.width);
    double* const ddw = clear(gradients.depthwise_weight, depth * p.kernel_h * p.kernel_w);
    double* const ddb = clear(gradients.depthwise_bias, depth);
    double* const dpw = clear(gradients.pointwise_weight, p.out_channels * depth);
    double* const db = clear(gradients.bias, p.out_channels);
    std::vector<double> t(static_cast<size_t>(depth)), u(t.size()), du(t.size());
    for_pixels([&](int64_t n, int64_t oy, int64_t ox) {
      for (int64_t i = 0; i < depth; ++i) {
        const auto index = static_cast<size_t>(i);
        t[index] = depthwise(n, i, oy, ox);
        u[index] = finish(p.mid_activation, t[index]);
        du[index] = p.out_channels == 0 ? value(grad_output, at_output(n, i, oy, ox)) : 0;
      }
      for (int64_t k = 0; k < p.out_channels; ++k) {
        double v = value(weights.bias, k);
        for (int64_t i = 0; i < depth; ++i)
          v += u[static_cast<size_t>(i)] * value(weights.pointwise_weight, k * depth + i);
        const double dv = value(grad_output, at_output(n, k, oy, ox)) * rise(p.activation, v);
        db[k] += dv;
        for (int64_t i = 0; i < depth; ++i) {
          dpw[k * depth + i] += dv * u[static_cast<size_t>(i)];
          du[static_cast<size_t>(i)] += dv * value(weights.pointwise_weight, k * depth + i);
        }
      }
      for (int64_t i = 0; i < depth; ++i) {
        const auto index = static_cast<size_t>(i);
        const double dt = du[index] * rise(p.mid_activation, t[index]);
        ddb[i] += dt;
        for_taps(i, oy, ox, [&](int64_t weight, int64_t h, int64_t w) {
          ddw[weight] += dt * value(x, at_input(n, i, h, w));
          dx[at_input(n, i, h, w)] += dt * value(weights.depthwise_weight, weight);
        });
      }
    });
  }
};

}  // namespace

void reference_forward(const Problem& problem, const Inputs& inputs, const Weights& weights, double* output,
                       bool magnitude) {
  if (problem.dtype == Dtype::f32)
    Reference<float>{problem, weights, inputs, magnitude}.forward(output);
  else
    Reference<double>{problem, weights, inputs, magnitude}.forward(output);
}

void reference_backward(const Problem& problem, const void* input, const Weights& weights, const void* grad_output,
                        const Gradients& gradients, bool magnitude) {
  const Inputs inputs(input);
  if (problem.dtype == Dtype::f32)
    Reference<float>{problem, weights, inputs, magnitude}.backward(static_cast<const float*>(grad_output), gradients);
  else
    Reference<double>{problem, weights, inputs, magnitude}.backward(static_cast<const double*>(grad_output), gradients);
}

}  // namespace fastsep
