// The instructions of sm_90a on the host, and the forward kernel that is made of them, on layers that give it tiles of
// every kind.
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>

#include "cuda/forward_hopper_launch.cuh"
#include "cuda/launchers.h"
#include "harness.h"

namespace fastsep_tests {
namespace {

using namespace fastsep;
using namespace fastsep::cuda;

// ---- the instructions
// ---------------------------------------------------------------------------------------------------

struct Product {
  const __half* a;  // [128][32]
  const __half* b;  // [256][32]
  float* c;         // [128][256]
};

// Where element (row, k) lies, in halves: as TMA swizzles rows of 128 bytes.
int swizzled(int row, int k) {
  const int bytes = row * 128 + k * 2;
  return (bytes ^ (bytes & 0x380) >> 3) / 2;
}

// Two warpgroups, two groups of products that replace and add; the first warpgroup is the one that copies.
__global__ void one_product(Product p) {
  char* memory = shared_memory();
  memory += (0u - shared_address(memory)) % 1024;
  __half* a = reinterpret_cast<__half*>(memory);
  __half* b = a + 128 * 64;
  Barrier* there = reinterpret_cast<Barrier*>(b + 256 * 64);
  const int thread = this_thread();
  if (thread == 0) barrier_init(there, 2);
  __syncthreads();
  if (thread < 2) {
    for (int i = thread; i < 384 * 32; i += 2) {
      const int row = i / 32, k = i % 32;
      if (row < 128)
        a[swizzled(row, k)] = p.a[i];
      else
        b[swizzled(row - 128, k)] = p.b[i - 128 * 32];
    }
    publish_to_products();
    barrier_arrive(there);
  }
  barrier_wait(there, 0);
  float sums[128];
  for (int step = 0; step < 2; ++step) {
    products_fence();
    multiply_64x256<__half>(sums, hopper::describe_matrix(memory + thread / 128 * 64 * 128) + 2 * step,
                            hopper::describe_matrix(memory + 128 * 128) + 2 * step, step > 0);
    products_commit();
  }
  products_wait<0>();
  for (int i = 0; i < 128; ++i) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
    p.c[row * 256 + i / 4 * 8 + thread % 4 * 2 + i % 2] = sums[i];
  }
}

void test_products() {
  std::vector<__half> a(128 * 32), b(256 * 32);
  std::vector<float> c(128 * 256);
  for (size_t i = 0; i < a.size(); ++i) a[i] = __float2half_rn(static_cast<float>(i * 7 % 11) - 5);
  for (size_t i = 0; i < b.size(); ++i) b[i] = __float2half_rn(static_cast<float>(i * 5 % 13) - 6);
  for (const cuda_host::Order order : {cuda_host::Order::forward, cuda_host::Order::backward}) {
    cuda_host::order = order;
    std::fill(c.begin(), c.end(), NAN);
    launch(one_product, dim3(1), 256, 1024 + 384 * 128 + 8, Product{a.data(), b.data(), c.data()}, Queue{0, nullptr});
    bool right = true;
    for (size_t m = 0; m < 128; ++m)
      for (size_t n = 0; n < 256; ++n) {
        float sum = 0;
        for (size_t k = 0; k < 32; ++k) sum += __half2float(a[m * 32 + k]) * __half2float(b[n * 32 + k]);
        right = right && sum == c[m * 256 + n];
      }
    expect(right, "products of a warpgroup on the host");
  }
  cuda_host::order = cuda_host::Order::forward;
}

// Warp 0 fills one cell again and again, warp 1 empties it: each waits for the other's phases.
struct Relay {
  int rounds, arrivals;
  int* sum;
};

__global__ void relay(Relay p) {
  int* cell = reinterpret_cast<int*>(shared_memory());
  Barrier* full = reinterpret_cast<Barrier*>(shared_memory() + 8);
  Barrier* empty = full + 1;
  const int thread = this_thread();
  if (thread == 0) {
    barrier_init(full, p.arrivals);
    barrier_init(empty, 32);
  }
  __syncthreads();
  for (int round = 0; round < p.rounds; ++round) {
    const unsigned parity = static_cast<unsigned>(round) % 2;
    if (thread < 32) {
      barrier_wait(empty, parity ^ 1u);
      if (thread == 0) *cell = round;
      barrier_arrive(full);
    } else {
      barrier_wait(full, parity);
      p.sum[thread - 32] += *cell;
      barrier_arrive(empty);
    }
  }
}

__global__ void product_without_fence(Product) {
  float sums[128];
  multiply_64x256<__half>(sums, 0, 0, false);
}

// Whether the program ends with a complaint.
template <class Call>
bool ends(Call call) {
  const pid_t child = fork();
  if (child == 0) {
    if (std::freopen("/dev/null", "w", stderr) == nullptr) std::_Exit(1);
    std::signal(SIGABRT, SIG_DFL);
    call();
    std::_Exit(0);
  }
  int status = 0;
  return waitpid(child, &status, 0) == child && WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT;
}

void test_barriers() {
  const auto run = [](int arrivals) {
    int sum[32] = {};
    launch(relay, dim3(1), 64, 32, Relay{10, arrivals, sum}, Queue{0, nullptr});
    for (int of_thread : sum)
      if (of_thread != 45) return false;
    return true;
  };
  for (const cuda_host::Order order : {cuda_host::Order::forward, cuda_host::Order::backward}) {
    cuda_host::order = order;
    expect(run(32), "barriers with phases");
    expect(ends([&] { run(33); }), "a deadlock ends the program");
  }
  cuda_host::order = cuda_host::Order::forward;
  expect(ends([] { launch(product_without_fence, dim3(1), 128, 0, Product{}, Queue{0, nullptr}); }),
         "a product without a fence ends the program");
}

// ---- the kernel
// ---------------------------------------------------------------------------------------------------

struct Layer {
  const char* what;
  int64_t batch, channels, height, width, out_channels, pad;
  int processors;
};

// Chunks of 64 channels and tiles of 256 outputs, with and without rests; rows of 14 and 7 that share tiles with those
// of other images; blocks with one tile and with several.
const Layer layers[] = {{"14 x 14, tiles across images", 2, 72, 14, 14, 264, 1, 1},
                        {"7 x 7, four images in a tile", 5, 136, 7, 7, 40, 1, 2},
                        {"one chunk", 3, 64, 14, 14, 256, 1, 1},
                        {"less than a step of channels", 1, 8, 9, 30, 512, 1, 1},
                        {"two columns of tiles", 1, 128, 28, 28, 24, 1, 3},
                        {"as many blocks as tiles", 3, 200, 5, 9, 520, 1, 100},
                        {"images of two rows", 7, 24, 4, 6, 8, 0, 1},
                        {"images of one row", 9, 80, 1, 4, 16, 1, 1},
                        {"wide rows", 1, 40, 3, 150, 32, 1, 2},
                        {"more padding than kernel", 2, 16, 4, 5, 16, 3, 1}};

// Copies and stores are of 16 bytes: with an address between them the kernel is refused, and no other runs for it.
void test_addresses(const Problem& p, const Variant& variant, const Case& c) {
  alignas(16) static const char memory[32] = {};
  for (size_t odd = 0; odd <= 6; ++odd) {
    const auto address = [&](size_t index) { return static_cast<const void*>(memory + (index == odd ? 2 : 0)); };
    const Weights weights = {address(0), address(1), address(2), address(3)};
    expect(hopper_takes_addresses(p, address(4), weights, address(5)) == (odd == 6), variant, c, p,
           "takes addresses that it cannot have, or not those that it can");
    if (odd == 6) continue;
    const Options options = {variant.tf32, ForwardKernel::hopper};
    const Outcome outcome =
        forward(p, options, address(4), weights, const_cast<void*>(address(5)), nullptr, 0, queue());
    expect(outcome.status == Status::no_kernel, variant, c, p, "computes with addresses that it cannot have");
  }
}

// Of strides of 2 there is no such kernel.
void test_refused(Problem p, const Variant& variant, const Case& c) {
  p.stride_h = p.stride_w = 2;
  alignas(16) static char memory[16] = {};
  const Options options = {variant.tf32, ForwardKernel::hopper};
  const Outcome outcome = forward(p, options, memory, {memory, nullptr, memory, nullptr}, memory, nullptr, 0, queue());
  expect(outcome.status == Status::no_kernel, variant, c, p, "computes what it does not take");
  expect(!has_hopper_kernel(p, 0), variant, c, p, "is there for what it does not take");
}

}  // namespace

void test_hopper_instructions() {
  test_products();
  test_barriers();
}

void test_hopper(const Variant& variant) {
  if (variant.dtype == Dtype::f32) return;
  bool reals = true;
  for (const Layer& layer : layers) {
    Case c = {layer.what, {}, true, true};
    Problem& p = c.problem;
    p.batch = layer.batch, p.channels = layer.channels, p.height = layer.height, p.width = layer.width;
    p.out_channels = layer.out_channels, p.multiplier = 1;
    p.kernel_h = p.kernel_w = 3, p.stride_h = p.stride_w = p.dilation_h = p.dilation_w = 1;
    p.pad_top = p.pad_left = layer.pad, p.pad_bottom = p.pad_right = layer.pad;
    p.dtype = variant.dtype, p.layout = Layout::nhwc;
    p.mid_activation = reals ? Activation::silu : Activation::relu6,
    p.activation = reals ? Activation::leaky_relu : Activation::relu;
    multiprocessors = layer.processors;
    test_forward(variant, c, p, !reals, true, ForwardKernel::hopper);
    test_addresses(p, variant, c);
    test_refused(p, variant, c);
    reals = !reals;
  }
}

}  // namespace fastsep_tests
