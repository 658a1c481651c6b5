#include <chrono>

#include "driver.h"
#include "isa.h"
#include "kernel.h"

namespace fastsep {
namespace {

const Kernel* const kernels[] = {
#define FASTSEP_KERNEL(isa, dtype) &separable_##dtype##_##isa,
#include "kernels.inc"
#undef FASTSEP_KERNEL
};

// Resolves `best` and asks whether the machine has what the kernel needs.
Status select(Isa isa, Dtype dtype, const Kernel** kernel) {
  if (isa == Isa::best) {
    const Status status = best_isa(&isa);
    if (status != Status::ok) return status;
  }
  *kernel = isa_supported(isa) ? find_kernel(isa, dtype) : nullptr;
  return *kernel != nullptr ? Status::ok : Status::unsupported_isa;
}

// Whether what a problem asks for beside x is there.
bool has_operands(const Problem& p, const Inputs& inputs) {
  if (p.gate && inputs.gate == nullptr) return false;
  if (!p.residual || inputs.residual != nullptr) return true;
  const Expansion& e = p.expand;
  const bool expands = e.channels > 0;
  return (expands ? e.channels : p.channels) == p.out_channels && (expands ? e.height : p.height) == out_height(p) &&
         (expands ? e.width : p.width) == out_width(p);
}

}  // namespace

const Kernel* find_kernel(Isa isa, Dtype dtype) {
  for (const Kernel* kernel : kernels)
    if (kernel->isa == isa && kernel->dtype == dtype) return kernel;
  return nullptr;
}

int32_t kernel_count() { return static_cast<int32_t>(sizeof(kernels) / sizeof(kernels[0])); }

const char* kernel_name(int32_t index) { return kernels[index]->name; }

Status packed_bytes(const Problem& problem, Isa isa, size_t* bytes) {
  const Kernel* kernel;
  const Status status = select(isa, problem.dtype, &kernel);
  if (status == Status::ok) *bytes = packed_size(problem, *kernel);
  return status;
}

Status pack(const Problem& problem, Isa isa, const Weights& weights, void* packed, size_t bytes,
            const Executor& executor) {
  const Kernel* kernel;
  const Status status = select(isa, problem.dtype, &kernel);
  if (status != Status::ok) return status;
  if (bytes < packed_size(problem, *kernel)) return Status::bad_packed;
  pack_weights(problem, *kernel, weights, packed, executor);
  return Status::ok;
}

Status workspace_bytes(const Problem& problem, Isa isa, int threads, bool with_packed, size_t* bytes) {
  const Kernel* kernel;
  const Status status = select(isa, problem.dtype, &kernel);
  if (status == Status::ok)
    *bytes = scratch_size(problem, *kernel, threads) + (with_packed ? packed_size(problem, *kernel) : 0);
  return status;
}

Status forward(const Problem& problem, Isa isa, const Inputs& inputs, const void* packed, size_t packed_size,
               void* output, void* workspace, size_t workspace_size, const Executor& executor) {
  const Kernel* kernel;
  const Status status = select(isa, problem.dtype, &kernel);
  if (status != Status::ok) return status;
  if (!has_operands(problem, inputs)) return Status::bad_operand;
  if (!packed_for(problem, *kernel, packed, packed_size)) return Status::bad_packed;
  if (workspace_size < scratch_size(problem, *kernel, executor.threads)) return Status::small_workspace;
  run_forward(problem, *kernel, inputs, packed, output, workspace, executor);
  return Status::ok;
}

Status forward_unpacked(const Problem& problem, Isa isa, const Inputs& inputs, const Weights& weights, void* output,
                        void* workspace, size_t workspace_size, const Executor& executor) {
  const Kernel* kernel;
  const Status status = select(isa, problem.dtype, &kernel);
  if (status != Status::ok) return status;
  if (!has_operands(problem, inputs)) return Status::bad_operand;
  const size_t scratch = scratch_size(problem, *kernel, executor.threads);
  if (workspace_size < scratch + packed_size(problem, *kernel)) return Status::small_workspace;
  void* packed = static_cast<char*>(workspace) + scratch;
  pack_weights(problem, *kernel, weights, packed, executor);
  run_forward(problem, *kernel, inputs, packed, output, workspace, executor);
  return Status::ok;
}

Status backward_workspace_bytes(const Problem& problem, Isa isa, int threads, const Gradients& gradients,
                                size_t* bytes) {
  const Kernel* kernel;
  const Status status = select(isa, problem.dtype, &kernel);
  if (status == Status::ok) *bytes = backward_size(problem, *kernel, gradients, threads);
  return status;
}

Status backward(const Problem& problem, Isa isa, const void* input, const Weights& weights, const void* saved,
                const void* grad_output, const Gradients& gradients, void* workspace, size_t workspace_size,
                const Executor& executor) {
  const Kernel* kernel;
  const Status status = select(isa, problem.dtype, &kernel);
  if (status != Status::ok) return status;
  if (problem.expand.channels > 0) return Status::bad_expansion;
  if (problem.gate || problem.residual) return Status::bad_operand;
  if (workspace_size < backward_size(problem, *kernel, gradients, executor.threads)) return Status::small_workspace;
  run_backward(problem, *kernel, input, weights, saved, grad_output, gradients, workspace, executor);
  return Status::ok;
}

Status fma_peak(Isa isa, Dtype dtype, double seconds, double* flops_per_second) {
  const Kernel* kernel;
  const Status status = select(isa, dtype, &kernel);
  if (status != Status::ok) return status;
  using clock = std::chrono::steady_clock;
  // The best of short trials: what disturbs a trial can only make it slower.
  constexpr int64_t rounds = 100000;
  *flops_per_second = 0;
  double elapsed = 0;
  do {
    const auto start = clock::now();
    const double flops = kernel->fma_chain(rounds);
    const double trial = std::chrono::duration<double>(clock::now() - start).count();
    elapsed += trial;
    if (flops / trial > *flops_per_second) *flops_per_second = flops / trial;
  } while (elapsed < seconds);
  return Status::ok;
}

}  // namespace fastsep
