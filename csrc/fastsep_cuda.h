// fastsep_cuda.h: the native contract of the CUDA kernels.
//
// Formulas, shapes, layouts and the meaning of a Problem are those of fastsep.h; pointers are device addresses of one
// device. Kernels exist for f32, f16 and bf16, without an expansion (expand.channels = 0) and without a residual. All
// sums are kept in fp32; the depthwise output is rounded once, to the storage type (to tf32 where f32 may use it),
// where the matrix product takes it over. Whatever the kernels need beyond their arguments comes as a workspace:
// nothing here allocates, synchronises, prints, throws or aborts, so that calls can be captured in a CUDA graph.
//
// Equal arguments on an equal device give equal bits: no floating-point atomics, every sum in an order of its own.
#pragma once

#include "fastsep.h"

namespace fastsep {
namespace cuda {

// Where to run: device is CUDA's index of it, and the device must be current; stream is a cudaStream_t of it. Tilings
// are chosen as for so many multiprocessors, 0 for those of the device; with another number a test reaches each with
// little.
struct Queue {
  int device;
  void* stream;
  int multiprocessors = 0;
};

// Of the fused forward pass: the portable one, which takes all, and the one for sm_90a. What is asked for runs or is
// refused with no_kernel, so that who asked knows what ran.
enum class ForwardKernel : int32_t { portable, hopper };

struct Options {
  bool tf32;  // f32 products may be rounded to tf32, as torch.backends.cudnn.allow_tf32 says
  ForwardKernel kernel = ForwardKernel::portable;
};

// What a call came to. cuda_error is a cudaError_t, 0 for success, and only looked at where status is ok.
struct Outcome {
  Status status;
  int32_t cuda_error;
};

// As fastsep::validate(), for these dtypes; bad_enum or bad_expansion for what has no kernel here.
Status validate(const Problem& problem);

// Aligned to 256 bytes, as every allocator of CUDA aligns. 0 where no kernel of the call needs any.
Status forward_workspace_bytes(const Problem& problem, Options options, size_t* bytes);
Outcome forward(const Problem& problem, Options options, const void* input, const Weights& weights, void* output,
                void* workspace, size_t workspace_size, Queue queue);

// Whether ForwardKernel::hopper is there for a problem on a device, which must be current: channels-last f16 or bf16, a
// 3 x 3 kernel of stride 1, multiples of 8 channels, an `activation` without exp or a division. All addresses of a call
// have to be aligned to 16 bytes too.
bool has_hopper_kernel(const Problem& problem, int device);

// As fastsep::backward(): `saved` is y where derivative_from_output(activation), else v, and not read for the identity;
// gradients are written, not added to what is there, and those that are null are not computed.
Status backward_workspace_bytes(const Problem& problem, Options options, const Gradients& gradients, size_t* bytes);
Outcome backward(const Problem& problem, Options options, const void* input, const Weights& weights, const void* saved,
                 const void* grad_output, const Gradients& gradients, void* workspace, size_t workspace_size,
                 Queue queue);

// The name of the kernel that forward() would launch, for reports; a constant.
const char* forward_kernel_name(const Problem& problem, Options options);

// What is there. device_count is 0 where there is no driver.
int32_t device_count();
const char* describe_cuda(int32_t cuda_error);

}  // namespace cuda
}  // namespace fastsep
