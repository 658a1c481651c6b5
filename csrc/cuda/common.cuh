// What every CUDA kernel uses: element types, vectors of up to 16 bytes, activations, the launch.
//
// A kernel is `template <...> __global__ void name(Params params)` with one plain struct for its argument; its shared
// memory is dynamic, shared_memory() says where. The same source is compiled for the host, with FASTSEP_CUDA_ON_HOST,
// against tests/cuda_host/shim.h, which runs a block's threads as fibres: so the kernels' logic is tested where there
// is no GPU. This file is the only one that knows the difference.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../fastsep.h"
#include "../fastsep_cuda.h"

#ifdef FASTSEP_CUDA_ON_HOST
#include "cuda_host/shim.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "instructions.cuh"
#include "instructions_hopper.cuh"
#endif

namespace fastsep {
namespace cuda {

constexpr int warp_size = 32;
constexpr unsigned all_lanes = 0xffffffffu;

#ifndef FASTSEP_CUDA_ON_HOST
// The block's dynamic shared memory, aligned to 128 bytes.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(128) char fastsep_shared_memory[];
  return fastsep_shared_memory;
}

// Runs the kernel on the queue's stream; a grid without blocks is no launch. More than 48 KB of shared memory has to
// be asked for; the attribute is the kernel's alone, and asking again costs next to nothing.
template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, int threads, size_t shared_bytes, const Params& params,
                   Queue queue) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  Params copy = params;
  void* arguments[] = {&copy};
  return cudaLaunchKernel(function, grid, dim3(static_cast<unsigned>(threads)), arguments, shared_bytes,
                          static_cast<cudaStream_t>(queue.stream));
}

// Below this many blocks a device has idle processors: blocks get smaller. A fixed number, twice an H200's 132. (On the
// host the tests set it.)
constexpr int64_t enough_blocks = 264;

// Of vectors; the host's tests check it.
__device__ __forceinline__ void check_aligned(const void*, size_t) {}

// Streaming multiprocessors of the queue's device: what a grid has to fill.
inline int multiprocessors(Queue queue) {
  int count = queue.multiprocessors;
  if (count > 0) return count;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, queue.device) == cudaSuccess ? count : 1;
}
#endif

// ---- elements
// --------------------------------------------------------------------------------------------------------

template <class T>
struct Element;

template <>
struct Element<float> {
  static constexpr Dtype dtype = Dtype::f32;
  static __device__ __forceinline__ float to_float(float value) { return value; }
  static __device__ __forceinline__ float from_float(float value) { return value; }
};

template <>
struct Element<__half> {
  static constexpr Dtype dtype = Dtype::f16;
  static __device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
  static __device__ __forceinline__ __half from_float(float value) { return __float2half_rn(value); }
};

template <>
struct Element<__nv_bfloat16> {
  static constexpr Dtype dtype = Dtype::bf16;
  static __device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
  static __device__ __forceinline__ __nv_bfloat16 from_float(float value) { return __float2bfloat16_rn(value); }
};

template <class T>
__device__ __forceinline__ float to_float(T value) {
  return Element<T>::to_float(value);
}

template <class T>
__device__ __forceinline__ T from_float(float value) {
  return Element<T>::from_float(value);
}

// ---- vectors
// ---------------------------------------------------------------------------------------------------------

// The register type of one memory access.
template <size_t bytes>
struct Access;
template <>
struct Access<16> {
  using Type = uint4;
};
template <>
struct Access<8> {
  using Type = uint2;
};
template <>
struct Access<4> {
  using Type = uint32_t;
};
template <>
struct Access<2> {
  using Type = uint16_t;
};

// How many elements of T fit in the widest access.
template <class T>
constexpr int widest = static_cast<int>(16 / sizeof(T));

// to[0 .. count) = from[0 .. count), in accesses of up to 16 bytes; `from` is aligned to them.
template <int count, class T>
__device__ __forceinline__ void load(float (&to)[count], const T* from) {
  constexpr int step = count < widest<T> ? count : widest<T>;
  static_assert(count % step == 0, "whole accesses");
  check_aligned(from, step * sizeof(T));
#pragma unroll
  for (int i = 0; i < count; i += step) {
    const typename Access<step * sizeof(T)>::Type raw =
        *reinterpret_cast<const typename Access<step * sizeof(T)>::Type*>(from + i);
    T elements[step];
    memcpy(static_cast<void*>(elements), &raw, sizeof(raw));
#pragma unroll
    for (int j = 0; j < step; ++j) to[i + j] = to_float(elements[j]);
  }
}

// The first `valid` of them, element by element and from any address; the rest are 0.
template <int count, class T>
__device__ __forceinline__ void load_first(float (&to)[count], const T* from, int64_t valid) {
#pragma unroll
  for (int i = 0; i < count; ++i) to[i] = i < valid ? to_float(from[i]) : 0.f;
}

template <int count, class T>
__device__ __forceinline__ void store(T* to, const float (&from)[count]) {
  constexpr int step = count < widest<T> ? count : widest<T>;
  static_assert(count % step == 0, "whole accesses");
  check_aligned(to, step * sizeof(T));
#pragma unroll
  for (int i = 0; i < count; i += step) {
    T elements[step];
#pragma unroll
    for (int j = 0; j < step; ++j) elements[j] = from_float<T>(from[i + j]);
    typename Access<step * sizeof(T)>::Type raw;
    memcpy(&raw, static_cast<const void*>(elements), sizeof(raw));
    *reinterpret_cast<typename Access<step * sizeof(T)>::Type*>(to + i) = raw;
  }
}

template <int count, class T>
__device__ __forceinline__ void store_first(T* to, const float (&from)[count], int64_t valid) {
#pragma unroll
  for (int i = 0; i < count; ++i)
    if (i < valid) to[i] = from_float<T>(from[i]);
}

// Whether rows of `stride` elements that begin at the address can be read and written in accesses of `bytes`.
template <class T>
bool aligned(const void* address, int64_t stride, size_t bytes = 16) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0 && static_cast<uint64_t>(stride) * sizeof(T) % bytes == 0;
}

__host__ __device__ inline int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// ---- activations
// -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

// x where it is NaN, as every activation has it.
__device__ __forceinline__ float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

constexpr float gelu_root = 0.79788456080286535588f;  // sqrt(2 / pi)
constexpr float gelu_cube = 0.044715f;
constexpr float half_root = 0.70710678118654752440f;  // sqrt(1 / 2)

__device__ __forceinline__ float activate_one(Activation activation, float x) {
  switch (activation) {
    case Activation::identity: return x;
    case Activation::relu: return x < 0.f ? 0.f : x;
    case Activation::relu6: return clamp(x, 0.f, 6.f);
    case Activation::leaky_relu: return x < 0.f ? 0.01f * x : x;
    case Activation::silu: return x * sigmoid(x);
    case Activation::hardswish: return x * (clamp(x + 3.f, 0.f, 6.f) / 6.f);
    case Activation::hardsigmoid: return clamp(x + 3.f, 0.f, 6.f) / 6.f;
    case Activation::sigmoid: return sigmoid(x);
    case Activation::tanh: return tanhf(x);
    case Activation::gelu: return 0.5f * x * erfcf(-x * half_root);
    case Activation::gelu_tanh: return 0.5f * x * (1.f + tanhf(gelu_root * (x + gelu_cube * x * x * x)));
  }
  return x;
}

// values[i] = activation(values[i]). The common clamps alone are laid out once for each value. For the others there is
// one loop with two values' worth of code: all kernels compile in 300 seconds of a processor instead of 500. Registers
// have no index that a loop could count, so the values move past: the first two are taken, the rest move up.
template <int count>
__device__ __forceinline__ void activate(Activation activation, float (&values)[count]) {
  if (activation == Activation::identity) return;
  if (activation == Activation::relu || activation == Activation::relu6) {
    const float high = activation == Activation::relu6 ? 6.f : INFINITY;
#pragma unroll
    for (int i = 0; i < count; ++i) values[i] = clamp(values[i], 0.f, high);
    return;
  }
  constexpr int together = count % 2 == 0 ? 2 : 1;
#pragma unroll 1
  for (int i = 0; i < count; i += together) {
    float done[together];
#pragma unroll
    for (int j = 0; j < together; ++j) done[j] = activate_one(activation, values[j]);
#pragma unroll
    for (int j = 0; j + together < count; ++j) values[j] = values[j + together];
#pragma unroll
    for (int j = 0; j < together; ++j) values[count - together + j] = done[j];
  }
}

// g times the activation's derivative. z is the activation's value where derivative_from_output(activation), else its
// argument. Where a derivative jumps it takes PyTorch's side.
__device__ __forceinline__ float slope(Activation activation, float g, float z) {
  switch (activation) {
    case Activation::identity: return g;
    case Activation::relu: return z <= 0.f ? 0.f : g;
    case Activation::relu6: return z <= 0.f || z >= 6.f ? 0.f : g;
    case Activation::leaky_relu: return z <= 0.f ? 0.01f * g : g;
    case Activation::silu: {
      const float s = sigmoid(z);
      return g * s * (1.f + z * (1.f - s));
    }
    case Activation::hardswish: return z <= -3.f ? 0.f : z >= 3.f ? g : g * (z / 3.f + 0.5f);
    case Activation::hardsigmoid: return z <= -3.f || z >= 3.f ? 0.f : g / 6.f;
    case Activation::sigmoid: return g * z * (1.f - z);
    case Activation::tanh: return g * (1.f - z * z);
    case Activation::gelu: return g * (0.5f * erfcf(-z * half_root) + 0.5f * gelu_root * z * expf(-0.5f * z * z));
    case Activation::gelu_tanh: {
      const float t = tanhf(gelu_root * (z + gelu_cube * z * z * z));
      const float inner_slope = gelu_root * (1.f + 3.f * gelu_cube * z * z);
      return g * 0.5f * (1.f + t + z * (1.f - t * t) * inner_slope);
    }
  }
  return g;
}

}  // namespace cuda
}  // namespace fastsep
