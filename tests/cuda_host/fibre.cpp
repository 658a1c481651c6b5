#include "fibre.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#define FASTSEP_ADDRESS_SANITIZER
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FASTSEP_ADDRESS_SANITIZER
#endif
#endif
#ifdef FASTSEP_ADDRESS_SANITIZER
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace cuda_host {
namespace {

Fibre* starting = nullptr;  // whose first resume() is under way

#ifdef __x86_64__
// Saves the registers that a call keeps on this stack, and its pointer in *from; goes on with the stack `to`. A few
// nanoseconds, where swapcontext() makes a system call for the signal mask.
extern "C" void fastsep_switch_stack(void** from, void* to);
asm(R"(
.text
.globl fastsep_switch_stack
.type fastsep_switch_stack, @function
fastsep_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastsep_switch_stack, .-fastsep_switch_stack
)");
#endif

}  // namespace

Fibre::Fibre() {
  // Pages are touched only as far as a fibre needs them; the first is a fence.
  void* memory = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, 4096, PROT_NONE) != 0) {
    std::perror("fibre");
    std::abort();
  }
  stack_ = static_cast<char*>(memory);
#ifndef __x86_64__
  context_ = new ucontext_t;
  caller_ = new ucontext_t;
#endif
}

Fibre::~Fibre() {
#ifndef __x86_64__
  delete static_cast<ucontext_t*>(context_);
  delete static_cast<ucontext_t*>(caller_);
#endif
  munmap(stack_, stack_bytes);
}

void Fibre::run(Fibre* self) {
#ifdef FASTSEP_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(nullptr, &self->caller_bottom_, &self->caller_size_);
#endif
  self->entry_(self->argument_);
  self->done_ = true;
  self->yield();
  std::abort();
}

void Fibre::start() { run(starting); }

void Fibre::prepare(void (*entry)(void*), void* argument) {
  entry_ = entry;
  argument_ = argument;
  done_ = false;
#ifdef __x86_64__
  // As fastsep_switch_stack() leaves it: six registers, and start() to return to, at an address that is 16 n + 8 as
  // after a call.
  uintptr_t* top = reinterpret_cast<uintptr_t*>(stack_ + stack_bytes) - 2;
  *top = reinterpret_cast<uintptr_t>(&Fibre::start);
  for (int i = 1; i <= 6; ++i) top[-i] = 0;
  context_ = top - 6;
#else
  ucontext_t* context = static_cast<ucontext_t*>(context_);
  getcontext(context);
  context->uc_stack.ss_sp = stack_;
  context->uc_stack.ss_size = stack_bytes;
  context->uc_link = nullptr;
  makecontext(context, &Fibre::start, 0);
#endif
}

void Fibre::resume() {
  starting = this;
#ifdef FASTSEP_ADDRESS_SANITIZER
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, stack_, stack_bytes);
#endif
#ifdef __x86_64__
  fastsep_switch_stack(&caller_, context_);
#else
  swapcontext(static_cast<ucontext_t*>(caller_), static_cast<ucontext_t*>(context_));
#endif
#ifdef FASTSEP_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void Fibre::yield() {
#ifdef FASTSEP_ADDRESS_SANITIZER
  __sanitizer_start_switch_fiber(done_ ? nullptr : &sanitizer_stack_, caller_bottom_, caller_size_);
#endif
#ifdef __x86_64__
  fastsep_switch_stack(&context_, caller_);
#else
  swapcontext(static_cast<ucontext_t*>(context_), static_cast<ucontext_t*>(caller_));
#endif
#ifdef FASTSEP_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(sanitizer_stack_, &caller_bottom_, &caller_size_);
#endif
}

}  // namespace cuda_host
