#include <map>
#include <vector>

#include "shim.h"

namespace cuda_host {
namespace {

constexpr int most_threads = 1024, warpgroup = 128;

// Taken by one thread, of its own sums.
struct Pending {
  float (*sums)[128];
  Product product;
  bool half;
  int group;
};

struct OfThread {
  std::vector<Pending> pending;
  int group = 0;
  bool fenced = false;
  size_t steps = 0;  // taken so far
};

// What the first thread of a warpgroup to come there did; the others have to do the same.
struct Taken {
  Step step;
  int pending;
  Product product;
};

struct Meeting {
  int arrived = 0, rounds = 0;
};

std::vector<OfThread> threads(most_threads);
std::vector<std::vector<Taken>> taken(most_threads / warpgroup);
std::map<int, Meeting> meetings;

OfThread& this_one() { return threads[current.thread.x]; }

void together(const Taken& mine) {
  std::vector<Taken>& all = taken[current.thread.x / warpgroup];
  const size_t at = this_one().steps++;
  if (at == all.size()) all.push_back(mine);
  const Taken& first = all[at];
  if (first.step != mine.step || first.pending != mine.pending || first.product.a != mine.product.a ||
      first.product.b != mine.product.b || first.product.add != mine.product.add)
    fail("threads of a warpgroup take different steps of products");
}

// The block's shared memory begins behind what the system keeps for itself, and not always at a round address.
uint32_t window() { return order == Order::forward ? 1024 : 1024 + 3 * 128; }

// PTX ISA, "Matrix Descriptor Format" and "Canonical Layouts": K-major, 128-byte swizzle, ((8, m), (8, 2)) elements of
// 16 bits at ((64, stride), (1, 8)), then bits 4 to 6 of the address changed by bits 7 to 9.
class Matrix {
 public:
  explicit Matrix(uint64_t descriptor)
      : start_(static_cast<uint32_t>(descriptor & 0x3fff) << 4),
        stride_(static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4) {
    if (descriptor >> 62 != 1) fail("a matrix without the 128-byte swizzle, the one that the shim knows");
    if ((descriptor >> 49 & 7) != 0) fail("a matrix with a base offset, which the shim does not know");
    if ((descriptor & 0x3001c000c000c000) != 0) fail("a descriptor with bits that have no meaning");
  }

  template <class Half>
  float at(int row, int k) const {
    uint32_t address = start_ + static_cast<uint32_t>(row / 8) * stride_ +
                       static_cast<uint32_t>(row % 8 * 128 + k / 8 * 16 + k % 8 * 2);
    address ^= (address >> 7 & 7) << 4;
    const uint32_t offset = address - window();
    if (address < window() || offset + 2 > current.shared_bytes) fail("a product's operand beyond shared memory");
    Half half;
    std::memcpy(&half.bits, current.shared + offset, 2);
    if constexpr (std::is_same_v<Half, __half>)
      return __half2float(half);
    else
      return __bfloat162float(half);
  }

 private:
  uint32_t start_, stride_;
};

template <class Half>
void take(float (&sums)[128], const Product& product) {
  const Matrix a(product.a), b(product.b);
  const int thread = static_cast<int>(current.thread.x) % warpgroup, lane = thread % 32;
  float of_a[2][16];
  for (int i = 0; i < 2; ++i)
    for (int k = 0; k < 16; ++k) of_a[i][k] = a.at<Half>(thread / 32 * 16 + lane / 4 + 8 * i, k);
  for (int j = 0; j < 32; ++j)
    for (int e = 0; e < 2; ++e) {
      float sum[2] = {};
      for (int k = 0; k < 16; ++k) {
        const float of_b = b.at<Half>(8 * j + lane % 4 * 2 + e, k);
        for (int i = 0; i < 2; ++i) sum[i] += of_a[i][k] * of_b;
      }
      for (int i = 0; i < 2; ++i) {
        float& to = sums[4 * j + 2 * i + e];
        to = product.add ? to + sum[i] : sum[i];
      }
    }
}

void take(const Pending& pending) {
  if (pending.half)
    take<__half>(*pending.sums, pending.product);
  else
    take<__nv_bfloat16>(*pending.sums, pending.product);
}

}  // namespace

void begin_block() {
  for (OfThread& thread : threads) thread = {};
  for (std::vector<Taken>& steps : taken) steps.clear();
  meetings.clear();
}

void end_of_thread() {
  if (!this_one().pending.empty()) fail("products begun and never waited for");
}

void end_of_block() {
  for (unsigned i = 0; i < current.block_size.x; ++i)
    if (threads[i].steps != taken[i / warpgroup].size()) fail("a thread left its warpgroup alone with products");
}

void multiply(float (&sums)[128], const Product& product, bool half) {
  together({Step::product, 0, product});
  OfThread& self = this_one();
  if (!self.fenced) fail("a product without a fence before it");
  self.pending.push_back({&sums, product, half, self.group});
  if (order == Order::backward) {
    take(self.pending.back());
    self.pending.back().sums = nullptr;
  }
}

void take_step(Step step, int pending) {
  together({step, pending, {0, 0, false}});
  OfThread& self = this_one();
  if (step == Step::fence) self.fenced = true;
  if (step == Step::commit) {
    self.fenced = false;
    ++self.group;
  }
  if (step != Step::wait) return;
  size_t done = 0;
  for (; done < self.pending.size() && self.pending[done].group < self.group - pending; ++done)
    if (self.pending[done].sums != nullptr) take(self.pending[done]);
  self.pending.erase(self.pending.begin(), self.pending.begin() + static_cast<std::ptrdiff_t>(done));
}

void meet(int id, int count) {
  if (id < 1 || id > 15 || count % 32 != 0) fail("a barrier that the device does not have");
  Meeting& meeting = meetings[id];
  const int round = meeting.rounds;
  if (++meeting.arrived == count) {
    meeting.arrived = 0;
    ++meeting.rounds;
    return;
  }
  wait_until([&] { return meeting.rounds != round; });
}

}  // namespace cuda_host

namespace fastsep {
namespace cuda {
namespace {

// How the shim keeps a barrier: arrivals of a phase, those still to come, and phases that have ended.
struct Count {
  uint16_t expected, pending;
  uint32_t phases;
};
static_assert(sizeof(Count) == sizeof(Barrier), "in place of the device's");

Count& count_of(Barrier* barrier) {
  cuda_host::check_aligned(barrier, 8);
  Count& count = *reinterpret_cast<Count*>(barrier);
  if (count.expected == 0xffff) cuda_host::fail("a barrier that was not made");
  return count;
}

}  // namespace

uint32_t shared_address(const void* pointer) {
  const std::ptrdiff_t offset = static_cast<const char*>(pointer) - cuda_host::current.shared;
  return static_cast<uint32_t>(offset) + cuda_host::window();
}

void barrier_init(Barrier* barrier, int arrivals) {
  const Count count = {static_cast<uint16_t>(arrivals), static_cast<uint16_t>(arrivals), 0};
  std::memcpy(barrier, &count, sizeof(count));
}

void barrier_arrive(Barrier* barrier) {
  Count& count = count_of(barrier);
  if (--count.pending == 0) {
    count.pending = count.expected;
    ++count.phases;
  }
  // Those who waited may be quicker than whatever this thread does next.
  cuda_host::let_others_go_first();
}

void barrier_wait(Barrier* barrier, unsigned parity) {
  Count& count = count_of(barrier);
  cuda_host::wait_until([&] { return (count.phases & 1u) != parity; });
}

}  // namespace cuda
}  // namespace fastsep
