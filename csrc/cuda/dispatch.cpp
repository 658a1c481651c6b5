// fastsep_cuda.h by dtype: checks, and a table of launchers.
#include <initializer_list>

#include "launchers.h"

namespace fastsep {
namespace cuda {
namespace {

// Kernels count pixels and channels along one axis in 32 bits, with room for the sum of two such numbers.
constexpr int64_t most_along_an_axis = int64_t{1} << 30;

bool axis_fits(int64_t size, int64_t before, int64_t after, int64_t kernel, int64_t dilation, int64_t stride,
               int64_t outputs) {
  return size + before + after < most_along_an_axis && kernel * dilation < most_along_an_axis &&
         stride < most_along_an_axis && outputs * stride < most_along_an_axis;
}

const Launchers& launchers_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::f16: return launchers_f16;
    case Dtype::bf16: return launchers_bf16;
    default: return launchers_f32;
  }
}

}  // namespace

Status validate(const Problem& problem) {
  const Dtype dtype = problem.dtype;
  if (dtype != Dtype::f32 && dtype != Dtype::f16 && dtype != Dtype::bf16) return Status::bad_enum;
  Problem p = problem;
  p.dtype = Dtype::f32;  // the one that both know
  const Status status = fastsep::validate(p);
  if (status != Status::ok) return status;
  if (p.expand.channels > 0) return Status::bad_expansion;
  if (p.residual || p.gate) return Status::bad_operand;
  const int64_t oh = out_height(p), ow = out_width(p);
  if (!axis_fits(p.height, p.pad_top, p.pad_bottom, p.kernel_h, p.dilation_h, p.stride_h, oh) ||
      !axis_fits(p.width, p.pad_left, p.pad_right, p.kernel_w, p.dilation_w, p.stride_w, ow))
    return Status::overflow;
  for (int64_t size :
       {p.batch, p.channels, p.multiplier, p.channels * p.multiplier, p.out_channels, p.kernel_h * p.kernel_w})
    if (size >= most_along_an_axis) return Status::overflow;
  return Status::ok;
}

Status forward_workspace_bytes(const Problem& problem, Options, size_t* bytes) {
  *bytes = 0;
  return cuda::validate(problem);
}

Outcome forward(const Problem& problem, Options options, const void* input, const Weights& weights, void* output, void*,
                size_t, Queue queue) {
  const Status status = cuda::validate(problem);
  if (status != Status::ok) return {status, 0};
  if (problem.batch == 0) return {Status::ok, 0};
  if (options.kernel == ForwardKernel::hopper) {
    if (!hopper_takes(problem, queue.device) || !hopper_takes_addresses(problem, input, weights, output))
      return {Status::no_kernel, 0};
    return {Status::ok, hopper_forward(problem, input, weights, output, queue)};
  }
  const Launchers& launchers = launchers_of(problem.dtype);
  return {Status::ok, problem.out_channels == 0 ? launchers.depthwise(problem, input, weights, output, queue)
                                                : launchers.forward(problem, options, input, weights, output, queue)};
}

bool has_hopper_kernel(const Problem& problem, int device) {
  return cuda::validate(problem) == Status::ok && hopper_takes(problem, device);
}

Status backward_workspace_bytes(const Problem& problem, Options, const Gradients& gradients, size_t* bytes) {
  const Status status = cuda::validate(problem);
  *bytes = status == Status::ok ? launchers_of(problem.dtype).backward_bytes(problem, gradients) : 0;
  return status;
}

Outcome backward(const Problem& problem, Options options, const void* input, const Weights& weights, const void* saved,
                 const void* grad_output, const Gradients& gradients, void* workspace, size_t workspace_size,
                 Queue queue) {
  size_t bytes = 0;
  const Status status = backward_workspace_bytes(problem, options, gradients, &bytes);
  if (status != Status::ok) return {status, 0};
  if (workspace_size < bytes) return {Status::small_workspace, 0};
  return {Status::ok, launchers_of(problem.dtype)
                          .backward(problem, options, input, weights, saved, grad_output, gradients, workspace, queue)};
}

const char* forward_kernel_name(const Problem& problem, Options options) {
  const Launchers& launchers = launchers_of(problem.dtype);
  if (problem.out_channels == 0) return launchers.depthwise_name;
  return options.tf32 ? launchers.forward_name_tf32 : launchers.forward_name;
}

}  // namespace cuda
}  // namespace fastsep
