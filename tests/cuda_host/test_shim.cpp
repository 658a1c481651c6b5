// The shim itself: barriers, shuffles, copies, matrix instructions, conversions.
#include <cmath>

#include "harness.h"

namespace fastsep_tests {
namespace {

using namespace fastsep;
using namespace fastsep::cuda;

constexpr int threads = 64;

struct Sums {
  const float* values;  // [blocks][threads]
  float* reversed;      // of each block
  float* sums;          // [blocks][threads], of each warp
};

__global__ void sum_and_reverse(Sums p) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x), first = static_cast<int>(blockIdx.x) * threads;
  copy_async(shared + 4 * (thread % 16), p.values + first + 4 * (thread % 16), true);
  copy_commit();
  copy_wait<0>();
  __syncthreads();
  p.reversed[first + thread] = shared[threads - 1 - thread];
  float sum = shared[thread];
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(all_lanes, sum, lanes);
  p.sums[first + thread] = sum;
}

void test_blocks() {
  constexpr int blocks = 3;
  alignas(16) float values[blocks * threads];
  float reversed[blocks * threads], sums[blocks * threads];
  for (int i = 0; i < blocks * threads; ++i) values[i] = static_cast<float>(i * i % 101);
  for (const cuda_host::Order order : {cuda_host::Order::forward, cuda_host::Order::backward}) {
    cuda_host::order = order;
    const Sums p = {values, reversed, sums};
    expect(launch(sum_and_reverse, dim3(blocks), threads, threads * sizeof(float), p, Queue{0, nullptr}) == cudaSuccess,
           "a launch");
    bool right = true;
    for (int i = 0; i < blocks * threads; ++i) {
      float sum = 0;
      for (int j = 0; j < 32; ++j) sum += values[i / 32 * 32 + j];
      right = right && sums[i] == sum && reversed[i] == values[i / threads * threads + threads - 1 - i % threads];
    }
    expect(right, "a block's barrier, shuffles and copies");
  }
  cuda_host::order = cuda_host::Order::forward;
}

struct Matrices {
  const __half* a;  // [16][16]
  const __half* b;  // [16][16], transposed on the way: B[k][n] = b[k][n], n < 8 used
  float* c;         // [16][8]
};

__global__ void one_product(Matrices p) {
  __half* a = reinterpret_cast<__half*>(shared_memory());
  __half* b = a + 256;
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 256; i += 32) {
    a[i] = p.a[i];
    b[i] = p.b[i];
  }
  __syncthreads();
  uint32_t of_a[4], of_b[4];
  load_matrices(of_a, a + lane % 16 * 16 + lane / 16 * 8);
  load_matrices_transposed(of_b, b + lane % 16 * 16 + lane / 16 * 8);
  const uint32_t first_columns[2] = {of_b[0], of_b[1]};
  float c[4] = {};
  multiply_f16(c, of_a, first_columns);
  for (int i = 0; i < 4; ++i) p.c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = c[i];
}

void test_matrices() {
  __half a[256], b[256];
  float c[128];
  for (int i = 0; i < 256; ++i) {
    a[i] = __float2half_rn(static_cast<float>(i * 7 % 11 - 5));
    b[i] = __float2half_rn(static_cast<float>(i * 5 % 13 - 6));
  }
  const Matrices p = {a, b, c};
  launch(one_product, dim3(1), 32, 2 * sizeof(a), p, Queue{0, nullptr});
  bool right = true;
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += __half2float(a[m * 16 + k]) * __half2float(b[k * 16 + n]);
      right = right && sum == c[m * 8 + n];
    }
  expect(right, "ldmatrix and mma on the host");
}

void test_conversions() {
  bool there_and_back = true, between = true;
  for (uint32_t bits = 0; bits < 0x7c00; ++bits) {
    const float value = __half2float({static_cast<uint16_t>(bits)});
    const float next = bits == 0x7bff ? 65536.f : __half2float({static_cast<uint16_t>(bits + 1)});
    there_and_back =
        there_and_back && __float2half_rn(value).bits == bits && __float2half_rn(-value).bits == (bits | 0x8000u);
    const float middle = (value + next) / 2;
    const uint16_t even = static_cast<uint16_t>(bits + bits % 2);
    between = between && __float2half_rn(middle).bits == even &&
              __float2half_rn(std::nextafter(middle, 0.f)).bits == bits &&
              __float2half_rn(std::nextafter(middle, 1e30f)).bits == bits + 1;
  }
  expect(there_and_back, "f16 to float and back");
  expect(between, "f16 rounds to nearest even");
  expect(__bfloat162float(__float2bfloat16_rn(1.f + 0x1p-8f)) == 1.f, "bf16 rounds to even below");
  expect(__bfloat162float(__float2bfloat16_rn(1.f + 3 * 0x1p-8f)) == 1.f + 0x1p-6f, "bf16 rounds to even above");
  expect(std::isinf(__bfloat162float(__float2bfloat16_rn(3.4e38f))), "bf16 overflows");
  expect(std::isnan(__half2float(__float2half_rn(NAN))) && std::isnan(__bfloat162float(__float2bfloat16_rn(NAN))),
         "NaN");
  expect(round_to_tf32(1.f + 0x1p-11f) == 1.f + 0x1p-10f && round_to_tf32(1.f + 0x1p-12f) == 1.f, "tf32 rounds");
}

}  // namespace

void test_shim() {
  test_blocks();
  test_matrices();
  test_conversions();
}

}  // namespace fastsep_tests
