// What the tests of both directions share: the kernels, the count of checks, numbers in guarded memory.
#pragma once

#include <cstring>
#include <limits>
#include <random>
#include <string>

#include "cases.h"
#include "cpu/kernel.h"
#include "guarded.h"

namespace fastsep_tests {

struct Tally {
  int checks = 0, failures = 0;
};
extern Tally tally;

// Counts, and complains where not good.
void expect(bool good, const fastsep::Kernel& kernel, const Case& c, const fastsep::Problem& p,
            const std::string& what);

constexpr unsigned plain_seed = 20240607;

// Memory for `count` numbers between guard pages: drawn ones, small integers or reals in [-1, 1], or NaN.
template <class T>
class Numbers {
 public:
  Numbers(bool integers, Tight tight, unsigned seed = plain_seed) : integers_(integers), tight_(tight), random_(seed) {}

  Guarded drawn(int64_t count) {
    Guarded memory(static_cast<size_t>(count) * sizeof(T), tight_, sizeof(T));
    std::uniform_int_distribution<int> whole(-2, 2);
    // Not std::uniform_real_distribution, which takes logarithms in long double for each number: on ARM those are
    // numbers of 128 bits, in software.
    const auto real = [&] { return static_cast<double>(random_()) / (int64_t{1} << 31) - 1; };
    for (int64_t i = 0; i < count; ++i) memory.as<T>()[i] = static_cast<T>(integers_ ? whole(random_) : real());
    return memory;
  }
  Guarded unwritten(int64_t count) const {
    Guarded memory(static_cast<size_t>(count) * sizeof(T), tight_, sizeof(T));
    for (int64_t i = 0; i < count; ++i) memory.as<T>()[i] = std::numeric_limits<T>::quiet_NaN();
    return memory;
  }

 private:
  bool integers_;
  Tight tight_;
  std::mt19937 random_;
};

// A workspace between guard pages, full of NaN: what a kernel does not write there it may not read.
inline Guarded spoilt_workspace(size_t bytes, Tight tight) {
  Guarded memory(bytes, tight, 64);
  std::memset(memory.as(), 0xff, bytes);
  return memory;
}

// All checks of one kernel on one case, in its own dtype and the problem's layout; small integers or reals.
void test_forward(const fastsep::Kernel& kernel, const Case& c, const fastsep::Problem& p, bool integers, Tight tight);
void test_backward(const fastsep::Kernel& kernel, const Case& c, const fastsep::Problem& p, bool integers, Tight tight);

// Images of size x size, and channels beyond the least.
struct SeriesSize {
  int64_t batch, size, more;
  int threads;
};
void test_series(const fastsep::Kernel& kernel, const SeriesSize& size);

void test_validate(fastsep::Problem good);

}  // namespace fastsep_tests
