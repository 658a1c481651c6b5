// Memory between two pages that may not be touched: reading or writing one byte outside ends the program, in any
// instruction set.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <utility>

namespace fastsep_tests {

// The side on which not even a byte of padding is left; the other has less than a page.
enum class Tight { end, begin };

class Guarded {
 public:
  Guarded(size_t bytes, Tight tight, size_t alignment) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t room = (bytes + page - 1) / page * page;
    mapped_ = room + 2 * page;
    base_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_, page, PROT_NONE) != 0 ||
        mprotect(base_ + page + room, page, PROT_NONE) != 0) {
      std::perror("mmap");
      std::abort();
    }
    const size_t gap = tight == Tight::end ? (room - bytes) / alignment * alignment : 0;
    data_ = base_ + page + gap;
  }
  Guarded(Guarded&& other) noexcept
      : base_(std::exchange(other.base_, nullptr)), data_(other.data_), mapped_(other.mapped_) {}
  Guarded& operator=(Guarded&& other) noexcept {
    std::swap(base_, other.base_);
    std::swap(data_, other.data_);
    std::swap(mapped_, other.mapped_);
    return *this;
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() {
    if (base_ != nullptr) munmap(base_, mapped_);
  }

  template <class T = void>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  char* base_;
  char* data_;
  size_t mapped_;
};

}  // namespace fastsep_tests
