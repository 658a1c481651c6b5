// The backward pass on the host: see main.cpp for what is run on which case.
#include <cmath>
#include <cstring>

#include "harness.h"

namespace fastsep_tests {
namespace {

using namespace fastsep;

// The five gradients, by number.
constexpr unsigned parts = 5;
const char* const part_names[parts] = {"input", "depthwise_weight", "depthwise_bias", "pointwise_weight", "bias"};

template <class Address>
Gradients pointers(unsigned wanted, Address address) {
  void* at[parts];
  for (unsigned i = 0; i < parts; ++i) at[i] = wanted >> i & 1 ? address(i) : nullptr;
  return {at[0], at[1], at[2], at[3], at[4]};
}

// act'(at z), z the activation's value where derivative_from_output(), else its argument: in double, by the oracle.
double slope_at(Activation activation, double z) {
  if (activation == Activation::sigmoid) return z * (1 - z);
  if (activation == Activation::tanh) return 1 - z * z;
  // The others have the same slope at their value as at their argument.
  Problem one = {};
  one.batch = one.channels = one.height = one.width = one.out_channels = one.multiplier = 1;
  one.kernel_h = one.kernel_w = one.stride_h = one.stride_w = one.dilation_h = one.dilation_w = 1;
  one.dtype = Dtype::f64;
  one.activation = activation;
  double unit = 1, results[parts];
  const Weights weights = {&unit, nullptr, &unit, nullptr};
  reference_backward(one, &z, weights, &unit, pointers(31, [&](unsigned i) { return results + i; }), false);
  return results[0];
}

// The same numbers times a power of two.
void scale(Tensor& tensor, double by) {
  for (size_t i = 0; i < tensor.values.size(); ++i) {
    const float value = static_cast<float>(tensor.values[i] *= by);
    if (tensor.dtype == Dtype::f32)
      tensor.memory.as<float>()[i] = value;
    else if (tensor.dtype == Dtype::f16)
      tensor.memory.as<__half>()[i] = __float2half_rn(value);
    else
      tensor.memory.as<__nv_bfloat16>()[i] = __float2bfloat16_rn(value);
  }
}

struct Run {
  const Variant& variant;
  const Case& c;
  Problem p;
  bool integers, wide, subsets;

  int64_t depth() const { return p.channels * p.multiplier; }
  int64_t pixels() const { return p.batch * out_height(p) * out_width(p); }
  int64_t output_size() const { return pixels() * (p.out_channels > 0 ? p.out_channels : depth()); }
  int64_t size_of(unsigned part) const {
    switch (part) {
      case 0: return p.batch * p.channels * p.height * p.width;
      case 1: return depth() * p.kernel_h * p.kernel_w;
      case 2: return depth();
      case 3: return p.out_channels * depth();
      default: return p.out_channels;
    }
  }

  std::vector<Tensor> gradients_of(unsigned wanted, const Tensor& input, const Weights& weights, const Tensor& saved,
                                   const Tensor& grad_output) const {
    std::vector<Tensor> memory;
    for (unsigned i = 0; i < parts; ++i) memory.push_back(unwritten(p.dtype, size_of(i), wide));
    const Gradients gradients = pointers(wanted, [&](unsigned i) { return memory[i].memory.as(); });
    const cuda::Options options = {variant.tf32};
    size_t bytes = 0;
    expect(cuda::backward_workspace_bytes(p, options, gradients, &bytes) == Status::ok, variant, c, p, "no workspace");
    const Guarded workspace(bytes, Tight::end, 256);
    std::memset(workspace.as(), 0xff, bytes);
    const int64_t before = cuda_host::launches;
    const cuda::Outcome outcome = cuda::backward(p, options, input.memory.as(), weights, saved.memory.as(),
                                                 grad_output.memory.as(), gradients, workspace.as(), bytes, queue());
    expect(outcome.status == Status::ok && outcome.cuda_error == 0, variant, c, p, "backward refused");
    if (pixels() > 0) hold_launches(wanted, cuda_host::launches - before);
    return memory;
  }

  // Against the table, where it has a line for such a pass.
  void hold_launches(unsigned wanted, int64_t count) const {
    std::string line = p.out_channels > 0 ? "pair" : "half";
    line += p.mid_activation == Activation::identity ? " flat" : " mid";
    char joint = ' ';
    for (unsigned i = 0; i < (p.out_channels > 0 ? parts : 3); ++i)
      if (wanted >> i & 1) {
        line += joint + std::string(part_names[i]);
        joint = '+';
      }
    const auto found = launches.find(line);
    if (found == launches.end()) return;
    launches_held.insert(line);
    expect(count == found->second, variant, c, p,
           std::to_string(count) + " kernels were launched, tests/cuda_launches.txt says: " + line + " " +
               std::to_string(found->second));
  }

  void compare_with_oracle(unsigned part, const Tensor& got, const std::vector<double>& oracle,
                           const std::vector<double>& magnitude) const {
    // Sums of n terms in fp32; the operands of the product (dv, and W or u) rounded for it; dt stored, stored again
    // times its activation's slope, and the result. Slopes are at most 1.13 and what is rounded loses half an eps.
    const double terms =
        static_cast<double>(p.kernel_h * p.kernel_w + depth() + p.out_channels + (part == 0 ? 0 : pixels()) + 16);
    const double products = p.out_channels > 0 ? 2 * variant.product_eps : 0;
    const double eps = 2 * (terms * 0x1p-23 + products + 3 * variant.storage_eps);
    int64_t bad = -1;
    for (int64_t i = 0; i < size_of(part); ++i) {
      const double want = oracle[static_cast<size_t>(i)], error = std::fabs(got.at(i) - want);
      if (integers ? rounded(p.dtype, want) != got.at(i)
                   : !(error <= eps * (magnitude[static_cast<size_t>(i)] + 0x1p-6)))
        bad = i;
    }
    expect(
        bad < 0, variant, c, p,
        std::string(integers ? "integers" : "reals") + ", gradient of " + part_names[part] + " differs at " +
            std::to_string(bad) + ": got " +
            (bad < 0 ? "" : std::to_string(got.at(bad)) + " for " + std::to_string(oracle[static_cast<size_t>(bad)])));
  }

  // Passes for every choice of gradients, for hold_launches() alone.
  void launches_of_each() {
    std::mt19937 random(20240609);
    const auto draw = [&](int64_t count) { return drawn(p.dtype, count, integers, wide, random); };
    const Tensor input = draw(size_of(0)), depthwise_weight = draw(size_of(1)), depthwise_bias = draw(size_of(2));
    const Tensor pointwise_weight = draw(size_of(3)), grad_output = draw(output_size()), saved = draw(output_size());
    const Weights weights = {depthwise_weight.memory.as(), depthwise_bias.memory.as(), pointwise_weight.memory.as(),
                             nullptr};
    for (unsigned wanted = 0; wanted < 1u << parts; ++wanted) gradients_of(wanted, input, weights, saved, grad_output);
  }

  void all() {
    std::mt19937 random(20240608);
    const auto draw = [&](int64_t count) { return drawn(p.dtype, count, integers, wide, random); };
    const Tensor input = draw(size_of(0)), depthwise_weight = draw(size_of(1)), depthwise_bias = draw(size_of(2));
    const Tensor pointwise_weight = draw(size_of(3)), grad_output = draw(output_size());
    // y or v: any numbers do, as long as the oracle's are the same; values of sigmoid and tanh within their range,
    // others beyond every corner of an activation.
    Tensor saved = draw(output_size());
    if (p.activation != Activation::sigmoid && p.activation != Activation::tanh) scale(saved, 4);
    const Weights weights = {depthwise_weight.memory.as(), c.depthwise_bias ? depthwise_bias.memory.as() : nullptr,
                             pointwise_weight.memory.as(), nullptr};
    Problem in_double = p;
    in_double.dtype = Dtype::f64;
    in_double.activation = Activation::identity;
    std::vector<double> dv = grad_output.values;
    if (p.activation != Activation::identity)
      for (size_t i = 0; i < dv.size(); ++i) dv[i] *= slope_at(p.activation, saved.values[i]);
    const Weights doubles = {depthwise_weight.values.data(), c.depthwise_bias ? depthwise_bias.values.data() : nullptr,
                             pointwise_weight.values.data(), nullptr};
    std::vector<double> oracle[parts], magnitude[parts];
    for (unsigned i = 0; i < parts; ++i) {
      oracle[i].resize(static_cast<size_t>(size_of(i)));
      magnitude[i].resize(static_cast<size_t>(size_of(i)));
    }
    const unsigned everything = (1u << parts) - 1;
    reference_backward(in_double, input.values.data(), doubles, dv.data(),
                       pointers(everything, [&](unsigned i) { return oracle[i].data(); }), false);
    if (!integers)
      reference_backward(in_double, input.values.data(), doubles, dv.data(),
                         pointers(everything, [&](unsigned i) { return magnitude[i].data(); }), true);

    const std::vector<Tensor> got = gradients_of(everything, input, weights, saved, grad_output);
    for (unsigned i = 0; i < parts; ++i) compare_with_oracle(i, got[i], oracle[i], magnitude[i]);
    if (integers) return;  // whose sums are exact in any order

    const auto same = [&](unsigned part, const std::vector<Tensor>& again, const std::string& what) {
      const size_t bytes = static_cast<size_t>(size_of(part)) * element_size(p.dtype);
      expect(bytes == 0 || std::memcmp(got[part].memory.as(), again[part].memory.as(), bytes) == 0, variant, c, p,
             what + " other bits, gradient of " + part_names[part]);
    };
    cuda_host::order = cuda_host::Order::backward;
    const std::vector<Tensor> reversed = gradients_of(everything, input, weights, saved, grad_output);
    cuda_host::order = cuda_host::Order::forward;
    for (unsigned i = 0; i < parts; ++i) same(i, reversed, "threads in reverse give");
    if (!subsets) return;
    for (unsigned wanted = 0; wanted < everything; ++wanted) {
      const std::vector<Tensor> some = gradients_of(wanted, input, weights, saved, grad_output);
      for (unsigned i = 0; i < parts; ++i)
        if (wanted >> i & 1) same(i, some, "asked for without the others it has");
    }
  }
};

}  // namespace

void test_backward(const Variant& variant, const Case& c, const Problem& p, bool integers, bool wide, bool subsets) {
  Run{variant, c, p, integers, wide, subsets}.all();
}

void test_backward_tilings(const Variant& variant) {
  struct Layer {
    const char* line;
    int64_t channels, size, out_channels, kernel, stride;
  };
  // A large d pointwise_weight in several parts; the depthwise kernels in blocks of 256 threads and of 64.
  const Layer layers[] = {{"large products, 3 x 3", 72, 19, 88, 3, 1},
                          {"large products, stride 2", 72, 21, 80, 3, 2},
                          {"5 x 5", 36, 19, 24, 5, 1},
                          {"5 x 5, stride 2", 36, 21, 24, 5, 2},
                          {"7 x 7", 36, 19, 24, 7, 1}};
  for (const Layer& layer : layers)
    for (const Layout layout : {Layout::nchw, Layout::nhwc})
      for (const Activation activation : {Activation::relu6, Activation::silu}) {
        Case c = {layer.line, {}, true, true};
        Problem& p = c.problem;
        p.batch = 3, p.channels = layer.channels, p.height = p.width = layer.size, p.out_channels = layer.out_channels;
        p.multiplier = 1, p.kernel_h = p.kernel_w = layer.kernel, p.stride_h = p.stride_w = layer.stride;
        p.dilation_h = p.dilation_w = 1;
        p.pad_top = p.pad_bottom = p.pad_left = p.pad_right = layer.kernel / 2;
        p.dtype = variant.dtype, p.layout = layout;
        p.mid_activation = p.activation = activation;
        cuda_host::enough_blocks = 1;
        test_backward(variant, c, p, false, true, false);
        cuda_host::enough_blocks = 264;
        p.batch = 1;
        if (activation == Activation::relu6) test_backward(variant, c, p, false, true, false);
      }
}

void test_launches(const Variant& variant) {
  Case c = {"launches", {}, true, true};
  Problem& p = c.problem;
  p.batch = p.multiplier = 1, p.channels = 3, p.height = p.width = 5, p.out_channels = 4;
  p.kernel_h = p.kernel_w = 3, p.stride_h = p.stride_w = p.dilation_h = p.dilation_w = 1;
  p.dtype = variant.dtype, p.layout = Layout::nhwc;
  for (const int64_t out_channels : {4, 0})
    for (const Activation mid : {Activation::identity, Activation::silu}) {
      p.out_channels = out_channels;
      p.mid_activation = mid;
      Run{variant, c, p, false, true, false}.launches_of_each();
    }
  for (const auto& line : launches)
    expect(launches_held.count(line.first) != 0,
           std::string(variant.name) + ": no pass was held against tests/cuda_launches.txt: " + line.first);
}

}  // namespace fastsep_tests
