// The fused forward pass on the host: see main.cpp for what is run on which case.
#include <cmath>
#include <cstring>
#include <set>

#include "cuda/forward_hopper.cuh"
#include "harness.h"

namespace fastsep_tests {
namespace {

using namespace fastsep;

struct Run {
  const Variant& variant;
  const Case& c;
  Problem p;
  bool integers, wide;
  cuda::ForwardKernel kernel;

  int64_t channels() const { return p.out_channels > 0 ? p.out_channels : p.channels * p.multiplier; }
  int64_t output_size() const { return p.batch * channels() * out_height(p) * out_width(p); }

  bool forward_to(const Tensor& output, const Tensor& input, const Weights& weights) const {
    const cuda::Options options = {variant.tf32, kernel};
    size_t bytes = 1;
    if (cuda::forward_workspace_bytes(p, options, &bytes) != Status::ok) return false;
    const Guarded workspace(bytes, Tight::end, 256);
    // Of this call alone, and then of all.
    std::set<std::pair<const void*, int>> before;
    before.swap(cuda_host::kernels);
    const cuda::Outcome outcome =
        cuda::forward(p, options, input.memory.as(), weights, output.memory.as(), workspace.as(), bytes, queue());
    if (kernel == cuda::ForwardKernel::hopper)
      expect(cuda_host::kernels.size() == 1 && cuda_host::kernels.begin()->first == hopper_kernel(), variant, c, p,
             "not the kernel asked for");
    cuda_host::kernels.insert(before.begin(), before.end());
    return outcome.status == Status::ok && outcome.cuda_error == 0;
  }

  const void* hopper_kernel() const {
    return p.dtype == Dtype::f16 ? reinterpret_cast<const void*>(cuda::hopper::separable_forward_hopper<__half>)
                                 : reinterpret_cast<const void*>(cuda::hopper::separable_forward_hopper<__nv_bfloat16>);
  }

  void compare_with_oracle(const Tensor& got, const std::vector<double>& oracle,
                           const std::vector<double>& magnitude) const {
    // As in tests/cpp: sums of n terms in fp32, and an activation that stretches by less than 2. On top of them the
    // roundings to the storage type: of the output once, and of each operand of the matrix product.
    const double terms = static_cast<double>(p.kernel_h * p.kernel_w + p.channels * p.multiplier + 8);
    const double products = p.out_channels > 0 ? 2 * variant.product_eps : 0;
    const double eps = 2 * (terms * 0x1p-23 + products + variant.storage_eps);
    int64_t bad = -1, zeros = 0;
    for (int64_t i = 0; i < output_size(); ++i) {
      const double error = std::fabs(got.at(i) - oracle[static_cast<size_t>(i)]);
      zeros += oracle[static_cast<size_t>(i)] == 0;
      if (integers ? rounded(p.dtype, oracle[static_cast<size_t>(i)]) != got.at(i)
                   : !(error <= eps * (magnitude[static_cast<size_t>(i)] + 1)))
        bad = i;
    }
    expect(
        bad < 0, variant, c, p,
        std::string(integers ? "integers" : "reals") + " differ at " + std::to_string(bad) + ": got " +
            (bad < 0 ? "" : std::to_string(got.at(bad)) + " for " + std::to_string(oracle[static_cast<size_t>(bad)])));
    if (output_size() > 64) expect(zeros * 10 < output_size() * 9, variant, c, p, "nearly all zeros: proves nothing");
  }

  void all() {
    std::mt19937 random(20240607);
    const int64_t depth = p.channels * p.multiplier;
    const auto draw = [&](int64_t count) { return drawn(p.dtype, count, integers, wide, random); };
    const Tensor input = draw(p.batch * p.channels * p.height * p.width);
    const Tensor depthwise_weight = draw(depth * p.kernel_h * p.kernel_w), depthwise_bias = draw(depth);
    const Tensor pointwise_weight = draw(p.out_channels * depth), bias = draw(p.out_channels);
    const Weights weights = {depthwise_weight.memory.as(), c.depthwise_bias ? depthwise_bias.memory.as() : nullptr,
                             pointwise_weight.memory.as(), c.bias && p.out_channels > 0 ? bias.memory.as() : nullptr};
    Problem in_double = p;
    in_double.dtype = Dtype::f64;
    const Weights doubles = {depthwise_weight.values.data(), c.depthwise_bias ? depthwise_bias.values.data() : nullptr,
                             pointwise_weight.values.data(), weights.bias != nullptr ? bias.values.data() : nullptr};
    std::vector<double> oracle(static_cast<size_t>(output_size())), magnitude(oracle.size());
    reference_forward(in_double, input.values.data(), doubles, oracle.data(), false);
    reference_forward(in_double, input.values.data(), doubles, magnitude.data(), true);

    const Tensor output = unwritten(p.dtype, output_size(), wide), again = unwritten(p.dtype, output_size(), wide);
    expect(forward_to(output, input, weights), variant, c, p, "forward refused");
    compare_with_oracle(output, oracle, magnitude);
    cuda_host::order = cuda_host::Order::backward;
    expect(forward_to(again, input, weights), variant, c, p, "forward refused");
    cuda_host::order = cuda_host::Order::forward;
    expect(std::memcmp(output.memory.as(), again.memory.as(),
                       static_cast<size_t>(output_size()) * element_size(p.dtype)) == 0,
           variant, c, p, "threads in reverse give other bits");
  }
};

}  // namespace

void test_forward(const Variant& variant, const Case& c, const Problem& p, bool integers, bool wide,
                  cuda::ForwardKernel kernel) {
  Run{variant, c, p, integers, wide, kernel}.all();
}

void test_tilings(const Variant& variant) {
  struct Layer {
    const char* line;
    int64_t channels, size, out_channels, stride, dilation;
    int multiprocessors = 1;
  };
  const Layer layers[] = {{"128 x 256", 40, 17, 136, 1, 1},
                          {"128 x 128", 40, 17, 120, 1, 1},
                          {"128 x 64", 40, 17, 56, 1, 1},
                          {"64 x 128, stride 2", 40, 33, 128, 2, 1},
                          {"64 x 128, dilation 2", 40, 17, 128, 1, 2},
                          {"64 x 128, dilation 24", 40, 17, 128, 1, 24},
                          // What patches hang over one pixel's tile would be 2^32 bytes, where 32 bits count.
                          {"a stride far beyond the input", 8, 9, 64, 5554773, 1}};
  for (const Layer& layer : layers)
    for (const Layout layout : {Layout::nchw, Layout::nhwc}) {
      Case c = {layer.line, {}, true, true};
      Problem& p = c.problem;
      p.batch = 1, p.channels = layer.channels, p.height = p.width = layer.size, p.out_channels = layer.out_channels;
      p.multiplier = 1, p.kernel_h = p.kernel_w = 3, p.stride_h = p.stride_w = layer.stride;
      p.dilation_h = p.dilation_w = layer.dilation;
      p.pad_top = p.pad_bottom = p.pad_left = p.pad_right = layer.stride <= 2 ? layer.dilation : 0;
      p.dtype = variant.dtype, p.layout = layout;
      p.mid_activation = Activation::relu6, p.activation = Activation::hardswish;
      multiprocessors = layer.multiprocessors;
      test_forward(variant, c, p, false, true);
    }
}

void test_refusals(const Variant& variant) {
  // More tiles than a grid has blocks, of an output that is not too large to be counted: an error, and nothing is
  // launched, so that there need be no tensors.
  for (const int64_t kernel : {3, 4}) {
    Case c = {"more tiles than blocks", {}, false, false};
    Problem& p = c.problem;
    p.batch = int64_t{1} << 20, p.channels = p.multiplier = 1, p.out_channels = int64_t{1} << 27;
    p.height = p.width = p.kernel_h = p.kernel_w = kernel;
    p.stride_h = p.stride_w = p.dilation_h = p.dilation_w = 1;
    p.dtype = variant.dtype, p.layout = Layout::nhwc;
    const cuda::Outcome outcome = cuda::forward(p, {variant.tf32}, nullptr, {}, nullptr, nullptr, 0, queue());
    expect(outcome.status == Status::ok && outcome.cuda_error == cudaErrorInvalidConfiguration, variant, c, p,
           "not refused");
  }
}

}  // namespace fastsep_tests
