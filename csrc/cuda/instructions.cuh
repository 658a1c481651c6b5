// The few instructions that CUDA C++ has no name for. tests/cuda_host/shim.h has the same functions for the host.
//
// The matrix instructions work on fragments spread over the 32 lanes of a warp. With group = lane / 4 and
// part = lane % 4, for m16n8k16 of 16-bit elements (two to a register, the lower index in the lower half):
//   a[0] = A[group][2 part, +1]      a[1] = A[group + 8][2 part, +1]
//   a[2] = A[group][2 part + 8, +9]  a[3] = A[group + 8][2 part + 8, +9]
//   b[0] = B[2 part, +1][group]      b[1] = B[2 part + 8, +9][group]
//   c[0], c[1] = C[group][2 part, +1]      c[2], c[3] = C[group + 8][2 part, +1]
// and for m16n8k8 of tf32 (one to a register):
//   a[0] = A[group][part]   a[1] = A[group + 8][part]   a[2] = A[group][part + 4]   a[3] = A[group + 8][part + 4]
//   b[0] = B[part][group]   b[1] = B[part + 4][group]   c as above.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastsep {
namespace cuda {

// threadIdx.x, read anew each time: what a stage derives from it is then not kept in registers through other stages.
__device__ __forceinline__ int this_thread() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Begins to copy 16 bytes from global to shared memory, both aligned to 16; without `whole` it writes zeros, and
// `from` is not read.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool whole) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(whole ? 16 : 0)
               : "memory");
}

// The same for 4 bytes, aligned to 4.
__device__ __forceinline__ void copy_async_word(void* to, const void* from, bool whole) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(whole ? 4 : 0)
               : "memory");
}

// Ends a group of copies.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's groups but the last `pending`. What other threads copied is there after a barrier.
template <int pending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements: lane 8 i + r gives the address of row r (16 bytes, aligned to 16) of matrix
// i; to[i] becomes elements 2 part and 2 part + 1 of row `group` of matrix i.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// As load_matrices(), each matrix transposed: rows 2 part and 2 part + 1 of column `group`.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b
__device__ __forceinline__ void multiply_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void multiply_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// To the nearest number with 10 bits behind the point, ties away from zero.
__device__ __forceinline__ float round_to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
}

}  // namespace cuda
}  // namespace fastsep
