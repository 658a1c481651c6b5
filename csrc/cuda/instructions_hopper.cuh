// The instructions of sm_90a: barriers in shared memory, warpgroup products. For the host,
// tests/cuda_host/shim_hopper.h has the same functions. Everything here is from the PTX ISA, sections "mbarrier"
// and "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions".
//
// A Barrier counts arrivals. When all that it waits for have come, its phase ends and the next begins with the full
// count. Phases are known by their parity: the first is 0. barrier_wait(b, parity) returns when the phase of that
// parity has ended: at once if it was the one before the present. So on a fresh barrier a wait for parity 1 returns.
//
// A product is taken by a warpgroup, 4 warps of which the first has an index divisible by 4: sums += A B, A 64 x 16 and
// B 16 x 256, both read from shared memory through descriptors (describe_matrix()). Thread 32 w + lane has
//   sums[4 j], [4 j + 1] = C[16 w + lane / 4][8 j + 2 (lane % 4), +1]
//   sums[4 j + 2], [4 j + 3] = the same of row 16 w + lane / 4 + 8.
// It runs by itself: operands may not change, and sums are not there, before products_wait().
#pragma once

#include "instructions.cuh"

namespace fastsep {
namespace cuda {

// Only code for sm_90a may call these; the other architectures' share of a kernel that does is a trap. The pass for the
// host looks at names alone.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
#define FASTSEP_HOPPER_CODE 1
#else
#define FASTSEP_HOPPER_CODE 0
#endif

struct Barrier {
  uint64_t word;
};

// By one thread, before a barrier of the block.
__device__ __forceinline__ void barrier_init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Releases what this thread wrote, and what it knows of others' writes, to those who wait.
__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ bool barrier_passed(Barrier* barrier, unsigned parity) {
  uint32_t passed;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(passed)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return passed != 0;
}

__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
  return time;
}

// A wait of 20 seconds, where microseconds are usual, is an error of this code or a stopped device: then the kernel
// ends with one, rather than never.
__device__ __forceinline__ void barrier_wait(Barrier* barrier, unsigned parity) {
  if (barrier_passed(barrier, parity)) return;
  const uint64_t begin = nanoseconds();
  while (!barrier_passed(barrier, parity))
    if (nanoseconds() - begin > 20'000'000'000ull) __trap();
}

// A barrier of some of the block's warps, `threads` in all; 0 is __syncthreads().
template <int id, int threads>
__device__ __forceinline__ void barrier_among() {
  asm volatile("barrier.cta.sync %0, %1;" ::"n"(id), "n"(threads) : "memory");
}

// Orders what this thread wrote to shared memory, copies that it waited for included, before reads by products, once
// they know of it by a barrier.
__device__ __forceinline__ void publish_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Before the first product after other accesses to its sums.
__device__ __forceinline__ void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Ends a group of products.
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for all groups but the last `pending`.
template <int pending>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// 128 operands and their names.
#define FASTSEP_4(at) "+f"(sums[at]), "+f"(sums[at + 1]), "+f"(sums[at + 2]), "+f"(sums[at + 3])
#define FASTSEP_16(at) FASTSEP_4(at), FASTSEP_4(at + 4), FASTSEP_4(at + 8), FASTSEP_4(at + 12)
#define FASTSEP_64(at) FASTSEP_16(at), FASTSEP_16(at + 16), FASTSEP_16(at + 32), FASTSEP_16(at + 48)
#define FASTSEP_SUMS FASTSEP_64(0), FASTSEP_64(64)
#define FASTSEP_NAMES                                                              \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "         \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, "         \
  "%30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "         \
  "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, "         \
  "%58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, "         \
  "%72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, "         \
  "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, "         \
  "%100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, " \
  "%113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// The compiler sees no use of the sums by products that run: none of its accesses may cross this.
__device__ __forceinline__ void hold(float (&sums)[128]) { asm volatile("" : FASTSEP_SUMS::"memory"); }

// After the descriptors: whether to add to the sums, or to replace them; signs of A and B; both with the common
// dimension contiguous, not transposed.
#define FASTSEP_PRODUCT(type)                                                         \
  asm volatile(                                                                       \
      "{\n"                                                                           \
      ".reg .pred p;\n"                                                               \
      "setp.ne.b32 p, %130, 0;\n"                                                     \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {" FASTSEP_NAMES \
      "},"                                                                            \
      " %128, %129, p, 1, 1, 0, 0;\n"                                                 \
      "}"                                                                             \
      : FASTSEP_SUMS                                                                  \
      : "l"(a), "l"(b), "r"(add ? 1 : 0))

template <class T>
__device__ __forceinline__ void multiply_64x256(float (&sums)[128], uint64_t a, uint64_t b, bool add) {
  if constexpr (std::is_same<T, __half>::value)
    FASTSEP_PRODUCT("f16");
  else
    FASTSEP_PRODUCT("bf16");
}

#undef FASTSEP_4
#undef FASTSEP_16
#undef FASTSEP_64
#undef FASTSEP_SUMS
#undef FASTSEP_NAMES
#undef FASTSEP_PRODUCT

}  // namespace cuda
}  // namespace fastsep
