// Fibres: functions that hand the processor to one another, each on a stack of its own.
#pragma once

#include <cstddef>

namespace cuda_host {

class Fibre {
 public:
  Fibre();
  ~Fibre();
  Fibre(const Fibre&) = delete;
  Fibre& operator=(const Fibre&) = delete;

  // Lets entry(argument) begin at the next resume(). Not while it is running.
  void prepare(void (*entry)(void*), void* argument);
  // From the main stack: runs the fibre until it yields or ends.
  void resume();
  // From the fibre: back to where resume() was called.
  void yield();
  bool done() const { return done_; }

 private:
  static void run(Fibre* self);
  static void start();

  static constexpr size_t stack_bytes = 256 * 1024;
  char* stack_;
  void* context_ = nullptr;  // the saved stack pointer, or what stands for it
  void* caller_ = nullptr;
  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
  bool done_ = true;
  void* sanitizer_stack_ = nullptr;
  const void* caller_bottom_ = nullptr;
  size_t caller_size_ = 0;
};

}  // namespace cuda_host
