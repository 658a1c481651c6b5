#include "shim.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <type_traits>
#include <vector>

#include "fibre.h"

namespace cuda_host {

Order order = Order::forward;
int64_t enough_blocks = 264;
std::set<std::pair<const void*, int>> kernels;
int64_t launches = 0;
Thread current = {};

namespace {

enum class State { running, at_block_barrier, at_warp_barrier, waiting, done };

struct Copy {
  void* to;
  const void* from;  // null: zeros
  size_t bytes;
  int group;
};

// One lane's part of an exchange, twice: while a slow lane still reads one round, a quick one may write the next.
struct Slots {
  char bytes[2][32 * 32];
};

struct Worker {
  Fibre fibre;
  State state = State::done;
  unsigned round = 0;  // of exchanges
  int group = 0;       // of copies
  std::vector<Copy> copies;
  const std::function<bool()>* until = nullptr;  // what it waits for
};

constexpr size_t canary_bytes = 128;
constexpr unsigned char canary = 0xa5;
// The end of shared memory is where the canary begins; for the address sanitizer, where the allocation ends.
#ifdef __SANITIZE_ADDRESS__
constexpr size_t behind = 0;
#else
constexpr size_t behind = canary_bytes;
#endif

std::vector<std::unique_ptr<Worker>> workers;
std::vector<Slots> slots;  // of each warp
bool progress;             // of any thread, since it was last asked
bool waits;                // whether any thread of the block ever waited for another warp
const std::function<void()>* body = nullptr;

Worker& worker() { return *workers[current.thread.x]; }

void work(void* index) {
  (void)index;
  (*body)();
  if (!worker().copies.empty()) fail("copies begun and never waited for");
  end_of_thread();
  worker().state = State::done;
}

void wait(State state) {
  Worker& self = worker();
  self.state = state;
  self.fibre.yield();
}

// Runs the warp's threads until each is at a barrier of the block, or waits for other warps, or is done.
void run_warp(int first) {
  const bool backward = order == Order::backward;
  for (;;) {
    int warp_waiting = 0, waiting = 0;
    for (int i = 0; i < 32; ++i) {
      const int thread = first + (backward ? 31 - i : i);
      Worker& w = *workers[static_cast<size_t>(thread)];
      current.thread.x = static_cast<unsigned>(thread);
      if (w.state == State::waiting && (*w.until)()) w.state = State::running;
      if (w.state == State::running) {
        progress = true;
        w.fibre.resume();
      }
      warp_waiting += w.state == State::at_warp_barrier;
      waiting += w.state == State::waiting;
    }
    if (warp_waiting == 0 || waiting > 0) return;
    if (warp_waiting != 32) fail("some lanes are at a barrier of their warp, others are not");
    for (int i = 0; i < 32; ++i) workers[static_cast<size_t>(first + i)]->state = State::running;
  }
}

void run_block(int threads) {
  for (int i = 0; i < threads; ++i) {
    Worker& w = *workers[static_cast<size_t>(i)];
    w.state = State::running;
    w.copies.clear();
    w.fibre.prepare(work, nullptr);
  }
  waits = false;
  begin_block();
  const int warps = threads / 32;
  for (;;) {
    // Where warps wait for one another, the first that can go on does, until none can: so roles that come first are as
    // far ahead as they may be, with the other order those that come last.
    for (int i = 0; i < warps;) {
      progress = false;
      run_warp(32 * (order == Order::backward ? warps - 1 - i : i));
      i = waits && progress ? 0 : i + 1;
    }
    int waiting = 0;
    for (int i = 0; i < threads; ++i) {
      const Worker& w = *workers[static_cast<size_t>(i)];
      current.thread.x = static_cast<unsigned>(i);
      if (w.state == State::waiting) fail("a deadlock: threads wait for what no thread is left to do");
      waiting += w.state == State::at_block_barrier;
    }
    if (waiting == 0) return end_of_block();
    if (waiting != threads) fail("some threads are at a barrier of their block, others have ended");
    for (int i = 0; i < threads; ++i) workers[static_cast<size_t>(i)]->state = State::running;
  }
}

}  // namespace

void fail(const char* message) {
  std::fprintf(stderr, "cuda_host: %s (block %u of %u, thread %u of %u)\n", message, current.block.x, current.grid.x,
               current.thread.x, current.block_size.x);
  std::abort();
}

void check_aligned(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) fail("an access to an address that is not aligned to it");
}

void block_barrier() { wait(State::at_block_barrier); }
void warp_barrier() { wait(State::at_warp_barrier); }

void wait_until(const std::function<bool()>& condition) {
  if (condition()) return;
  worker().until = &condition;
  waits = true;
  wait(State::waiting);
}

void let_others_go_first() {
  static const std::function<bool()> at_once = [] { return true; };
  worker().until = &at_once;
  waits = true;
  wait(State::waiting);
}

const char* exchange(const void* value, size_t bytes) {
  if (bytes > 32) fail("an exchange of more than 32 bytes");
  Worker& self = worker();
  char* round = slots[current.thread.x / 32].bytes[self.round++ % 2];
  std::memcpy(round + current.thread.x % 32 * bytes, value, bytes);
  warp_barrier();
  return round;
}

cudaError_t run(dim3 grid, int threads, size_t shared_bytes, const std::function<void()>& kernel) {
  // What a device of compute capability 8.0 to 9.0 refuses, and what the shim cannot do.
  if (threads < 1 || threads > 1024 || grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu)
    return cudaErrorInvalidConfiguration;
  if (shared_bytes > 227 * 1024) return cudaErrorInvalidValue;
  if (threads % 32 != 0) fail("a block that is not made of whole warps");
  while (workers.size() < static_cast<size_t>(threads)) workers.push_back(std::make_unique<Worker>());
  slots.resize(static_cast<size_t>(threads) / 32);
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, shared_bytes + behind) != 0) fail("no memory");
  char* shared = static_cast<char*>(memory);
  std::memset(shared + shared_bytes, canary, behind);
  body = &kernel;
  current.grid = grid;
  current.block_size = dim3(static_cast<unsigned>(threads));
  current.shared = shared;
  current.shared_bytes = shared_bytes;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t block = order == Order::backward ? blocks - 1 - i : i;
    current.block = dim3(static_cast<unsigned>(block % grid.x), static_cast<unsigned>(block / grid.x % grid.y),
                         static_cast<unsigned>(block / grid.x / grid.y));
    std::memset(shared, 0xff, shared_bytes);
    run_block(threads);
    for (size_t j = 0; j < behind; ++j)
      if (static_cast<unsigned char>(shared[shared_bytes + j]) != canary) fail("a write beyond shared memory");
  }
  std::free(memory);
  return cudaSuccess;
}

}  // namespace cuda_host

// ---- numbers
// ---------------------------------------------------------------------------------------------------------

namespace {

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

}  // namespace

__nv_bfloat16 __float2bfloat16_rn(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

float __half2float(__half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t exponent = value.bits >> 10 & 0x1fu, fraction = value.bits & 0x3ffu;
  if (exponent == 31) return float_of(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) return (sign != 0 ? -1.f : 1.f) * static_cast<float>(fraction) * 0x1p-24f;
  return float_of(sign | (exponent + 112) << 23 | fraction << 13);
}

__half __float2half_rn(float value) {
  const uint32_t bits = bits_of(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {0x7fff};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and beyond
  if (magnitude < 0x38800000u)  // below 2^-14: a multiple of 2^-24, rounded to even by the FPU
    return {static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(float_of(magnitude) * 0x1p24f)))};
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return {static_cast<uint16_t>(sign | (rounded - (112u << 23)) >> 13)};
}

// ---- instructions
// ----------------------------------------------------------------------------------------------------

namespace fastsep {
namespace cuda {
namespace {

using cuda_host::exchange;

int lane() { return static_cast<int>(threadIdx.x % 32); }

// c += A B, each lane its own four elements; element(k) of a lane's fragments is in register and part of it as the
// instruction lays them out (csrc/cuda/instructions.cuh).
template <int depth, class FromA, class FromB>
void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], FromA from_a, FromB from_b) {
  uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  uint32_t all[32][6];
  std::memcpy(all, exchange(mine, sizeof(mine)), sizeof(all));
  const int group = lane() / 4, part = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = group + (i < 2 ? 0 : 8), column = 2 * part + i % 2;
    float sum = 0;
    for (int k = 0; k < depth; ++k) sum += from_a(all, row, k) * from_b(all, k, column);
    c[i] += sum;
  }
}

template <class Half>
float half_of(uint32_t pair, int index) {
  Half half;
  half.bits = static_cast<uint16_t>(pair >> 16 * index);
  if constexpr (std::is_same_v<Half, __half>)
    return __half2float(half);
  else
    return __bfloat162float(half);
}

template <class Half>
void multiply_16_bit(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply<16>(
      c, a, b,
      [](const uint32_t (&all)[32][6], int row, int k) {
        return half_of<Half>(all[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)], k % 2);
      },
      [](const uint32_t (&all)[32][6], int k, int column) {
        return half_of<Half>(all[column * 4 + k % 8 / 2][4 + k / 8], k % 2);
      });
}

void matrices(uint32_t (&to)[4], const void* row, bool transposed) {
  cuda_host::check_aligned(row, 16);
  const char* rows[32];
  std::memcpy(rows, exchange(&row, sizeof(row)), sizeof(rows));
  const int group = lane() / 4, part = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int j = 0; j < 2; ++j) {
      const int r = transposed ? 2 * part + j : group, column = transposed ? group : 2 * part + j;
      std::memcpy(&pair[j], rows[8 * i + r] + 2 * column, 2);
    }
    to[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
  // The device reads at once for all lanes: nobody may overwrite what another has yet to read.
  cuda_host::warp_barrier();
}

void begin_copy(void* to, const void* from, bool whole, size_t bytes) {
  cuda_host::check_aligned(to, bytes);
  if (whole) cuda_host::check_aligned(from, bytes);
  cuda_host::Worker& self = cuda_host::worker();
  self.copies.push_back({to, whole ? from : nullptr, bytes, self.group});
}

}  // namespace

void copy_async(void* to, const void* from, bool whole) { begin_copy(to, from, whole, 16); }
void copy_async_word(void* to, const void* from, bool whole) { begin_copy(to, from, whole, 4); }

void copy_commit() { ++cuda_host::worker().group; }

void copy_wait_for(int pending) {
  cuda_host::Worker& self = cuda_host::worker();
  size_t done = 0;
  for (; done < self.copies.size() && self.copies[done].group < self.group - pending; ++done) {
    const cuda_host::Copy& copy = self.copies[done];
    if (copy.from != nullptr)
      std::memcpy(copy.to, copy.from, copy.bytes);
    else
      std::memset(copy.to, 0, copy.bytes);
  }
  self.copies.erase(self.copies.begin(), self.copies.begin() + static_cast<std::ptrdiff_t>(done));
}

void load_matrices(uint32_t (&to)[4], const void* row) { matrices(to, row, false); }
void load_matrices_transposed(uint32_t (&to)[4], const void* row) { matrices(to, row, true); }

void multiply_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { multiply_16_bit<__half>(c, a, b); }
void multiply_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply_16_bit<__nv_bfloat16>(c, a, b);
}

void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  // The device looks at the upper 19 bits only; kernels round beforehand.
  for (uint32_t bits : {a[0], a[1], a[2], a[3], b[0], b[1]})
    if ((bits & 0x1fffu) != 0 && (bits & 0x7f800000u) != 0x7f800000u) cuda_host::fail("an operand not rounded to tf32");
  multiply<8>(
      c, a, b,
      [](const uint32_t (&all)[32][6], int row, int k) {
        return float_of(all[row % 8 * 4 + k % 4][row / 8 + 2 * (k / 4)]);
      },
      [](const uint32_t (&all)[32][6], int k, int column) { return float_of(all[column * 4 + k % 4][4 + k / 4]); });
}

float round_to_tf32(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return value;
  return float_of((bits + 0x1000u) & ~0x1fffu);
}

}  // namespace cuda
}  // namespace fastsep
