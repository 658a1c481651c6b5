// CUDA on the host, as far as csrc/cuda uses it: the kernels' source, compiled by a plain C++ compiler, runs here block
// after block, each thread of a block as a fibre. csrc/cuda/common.cuh includes this in place of CUDA's headers.
//
// What it finds: a deadlock; a barrier or a warp's instruction that not all threads reach; two kinds of them at once; a
// read of shared memory that nobody wrote (each block begins with all bits set: NaN in every type); an access beyond
// its end (a canary, or the address sanitizer); a copy_async() used before copy_wait(): the bytes move only then; an
// address not aligned to the access. Threads run in order, or in reverse (order = Order::backward): where a barrier is
// missing, the two give different results.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <set>
#include <type_traits>
#include <utility>

#include "fastsep_cuda.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

// ---- types of CUDA
// ---------------------------------------------------------------------------------------------------

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };

inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "an error"; }

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

float __half2float(__half value);
__half __float2half_rn(float value);
inline float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
__nv_bfloat16 __float2bfloat16_rn(float value);
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {__bfloat162float(v.x), __bfloat162float(v.y)}; }

// ---- the machine
// -----------------------------------------------------------------------------------------------------

namespace cuda_host {

enum class Order { forward, backward };
extern Order order;            // in which threads and blocks run
extern int64_t enough_blocks;  // as csrc/cuda/common.cuh explains it

// Launched so far: the kernel, and the threads of its blocks; and how often.
extern std::set<std::pair<const void*, int>> kernels;
extern int64_t launches;

struct Thread {
  dim3 thread, block, block_size, grid;
  char* shared;
  size_t shared_bytes;
};
extern Thread current;  // of the fibre that runs

// Runs body() once for every thread of every block.
cudaError_t run(dim3 grid, int threads, size_t shared_bytes, const std::function<void()>& body);

void block_barrier();
void warp_barrier();
// Until it is true, by what threads of other warps do. Where it never will be, the program ends.
void wait_until(const std::function<bool()>& condition);
// If they can, and come before this thread's warp.
void let_others_go_first();
// Lays `value` out for the warp's other lanes, waits for all of them, and returns what each laid out: [32][bytes].
const char* exchange(const void* value, size_t bytes);

// Ends the program with the message and the thread at which it happened.
[[noreturn]] void fail(const char* message);

void check_aligned(const void* address, size_t bytes);

}  // namespace cuda_host

#define threadIdx (::cuda_host::current.thread)
#define blockIdx (::cuda_host::current.block)
#define blockDim (::cuda_host::current.block_size)
#define gridDim (::cuda_host::current.grid)

inline void __syncthreads() { cuda_host::block_barrier(); }

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  if (mask != 0xffffffffu) cuda_host::fail("the shim knows whole warps only");
  cuda_host::warp_barrier();
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  if (mask != 0xffffffffu) cuda_host::fail("the shim knows whole warps only");
  const int lane = static_cast<int>(threadIdx.x % 32), first = lane / width * width;
  T result;
  std::memcpy(&result, cuda_host::exchange(&value, sizeof(T)) + (first + (source & (width - 1))) * sizeof(T),
              sizeof(T));
  return result;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ lanes, width);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const int place = static_cast<int>(threadIdx.x) % width + static_cast<int>(by);
  return __shfl_sync(mask, value, place < width ? place : static_cast<int>(threadIdx.x) % width, width);
}

template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}

// ---- what common.cuh and instructions.cuh define for the device
// ------------------------------------------------------

namespace fastsep {
namespace cuda {

inline char* shared_memory() { return cuda_host::current.shared; }

template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, int threads, size_t shared_bytes, const Params& params, Queue) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  cuda_host::kernels.insert({reinterpret_cast<const void*>(kernel), threads});
  ++cuda_host::launches;
  return cuda_host::run(grid, threads, shared_bytes, [&] { kernel(params); });
}

using cuda_host::check_aligned;
using cuda_host::enough_blocks;

inline int this_thread() { return static_cast<int>(threadIdx.x); }
inline int multiprocessors(Queue queue) { return queue.multiprocessors; }

void copy_async(void* to, const void* from, bool whole);
void copy_async_word(void* to, const void* from, bool whole);
void copy_commit();
void copy_wait_for(int pending);
template <int pending>
void copy_wait() {
  copy_wait_for(pending);
}

void load_matrices(uint32_t (&to)[4], const void* row);
void load_matrices_transposed(uint32_t (&to)[4], const void* row);
void multiply_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void multiply_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
float round_to_tf32(float value);

}  // namespace cuda
}  // namespace fastsep

#include "shim_hopper.h"
