// The instructions of sm_90a on the host, for csrc/cuda/instructions_hopper.cuh, which explains them.
//
// Products read A and B through their descriptors, with the swizzle and the layout of sums that the PTX ISA defines:
// what was laid out otherwise comes out wrong. They are taken at the latest moment, when they are waited for, or with
// Order::backward at the earliest, at once: so where an operand is not yet there, or overwritten too early, the two
// give different results.
#pragma once

#define FASTSEP_HOPPER_CODE 1

struct cudaFuncAttributes {
  int numRegs;
};
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor };

// The device pretends to be of compute capability 9.0, with code for sm_90a, which has many registers.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 0;
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->numRegs = 168;
  return cudaSuccess;
}

namespace cuda_host {

void begin_block();
void end_of_thread();
void end_of_block();

// One step of the protocol of products, which all threads of a warpgroup take together.
enum class Step { fence, product, commit, wait };
struct Product {
  uint64_t a, b;
  bool add;
};

void multiply(float (&sums)[128], const Product& product, bool half);
void take_step(Step step, int pending);
void meet(int id, int threads);

}  // namespace cuda_host

namespace fastsep {
namespace cuda {

struct Barrier {
  uint64_t word;
};

// As the device has it: 18 bits, of which the block's own shared memory begins anywhere.
uint32_t shared_address(const void* pointer);

void barrier_init(Barrier* barrier, int arrivals);
void barrier_arrive(Barrier* barrier);
void barrier_wait(Barrier* barrier, unsigned parity);

template <int id, int threads>
void barrier_among() {
  cuda_host::meet(id, threads);
}

inline void publish_to_products() {}

inline void products_fence() { cuda_host::take_step(cuda_host::Step::fence, 0); }
inline void products_commit() { cuda_host::take_step(cuda_host::Step::commit, 0); }
template <int pending>
void products_wait() {
  cuda_host::take_step(cuda_host::Step::wait, pending);
}
inline void hold(float (&)[128]) {}

template <class T>
void multiply_64x256(float (&sums)[128], uint64_t a, uint64_t b, bool add) {
  cuda_host::multiply(sums, {a, b, add}, std::is_same_v<T, __half>);
}

}  // namespace cuda
}  // namespace fastsep
