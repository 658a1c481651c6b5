#include "parallel.h"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace fastsep {
namespace {

using Body = void (*)(void*, int64_t);

// Started at first use, grown when more threads are asked for. One parallel region at a time: a second caller, or a
// region inside a region, runs its work alone instead of waiting.
class Pool {
 public:
  void run(int threads, int64_t count, Body body, void* context) {
    std::unique_lock<std::mutex> region(region_, std::try_to_lock);
    if (!region.owns_lock()) {
      for (int64_t i = 0; i < count; ++i) body(context, i);
      return;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < threads - 1) workers_.emplace_back([this] { work(); });
      body_ = body;
      context_ = context;
      count_ = count;
      next_ = 0;
      idle_ = 0;
      ++generation_;
    }
    start_.notify_all();
    take();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return idle_ == workers_.size(); });
  }

 private:
  void take() {
    for (int64_t i = next_++; i < count_; i = next_++) body_(context_, i);
  }

  void work() {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      start_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      lock.unlock();
      take();
      lock.lock();
      if (++idle_ == workers_.size()) done_.notify_one();
    }
  }

  std::mutex region_, mutex_;
  std::condition_variable start_, done_;
  std::vector<std::thread> workers_;
  Body body_ = nullptr;
  void* context_ = nullptr;
  int64_t count_ = 0;
  std::atomic<int64_t> next_{0};
  size_t idle_ = 0;
  uint64_t generation_ = 0;
};

// Threads do not survive a fork, so a child process makes a pool of its own. Pools are never destroyed: their threads
// may still wait when the process ends.
Pool& own_pool() {
  static std::mutex mutex;
  static Pool* pool = nullptr;
  static pid_t owner = 0;
  std::lock_guard<std::mutex> lock(mutex);
  if (pool == nullptr || owner != getpid()) {
    pool = new Pool;
    owner = getpid();
  }
  return *pool;
}

std::atomic<TorchParallelFor> torch_parallel_for{nullptr};
std::atomic<TorchNumThreads> torch_num_threads{nullptr};
std::atomic<int> own_threads{1};

struct Call {
  Body body;
  void* context;
};

void run_in_torch(void*, int64_t count, Body body, void* context) {
  Call call = {body, context};
  const auto range = [](int64_t begin, int64_t end, void* pointer) {
    const Call& self = *static_cast<const Call*>(pointer);
    for (int64_t i = begin; i < end; ++i) self.body(self.context, i);
  };
  torch_parallel_for.load()(0, count, 1, range, &call);
}

void run_in_own(void*, int64_t count, Body body, void* context) {
  own_pool().run(own_threads.load(), count, body, context);
}

}  // namespace

void lend_torch_pool(TorchParallelFor parallel_for, TorchNumThreads num_threads) {
  const bool complete = parallel_for != nullptr && num_threads != nullptr;
  torch_num_threads = complete ? num_threads : nullptr;
  torch_parallel_for = complete ? parallel_for : nullptr;
}

bool torch_pool_lent() { return torch_parallel_for.load() != nullptr; }

void set_num_threads(int threads) { own_threads = threads < 1 ? 1 : threads; }

Executor current_executor() {
  Executor executor;
  const TorchNumThreads count_threads = torch_num_threads.load();
  if (count_threads != nullptr) {
    uint32_t count = 1;
    executor.threads = count_threads(&count) == 0 && count > 0 ? static_cast<int>(count) : 1;
    executor.run = run_in_torch;
  } else {
    executor.threads = own_threads.load();
    executor.run = run_in_own;
  }
  return executor;
}

}  // namespace fastsep
