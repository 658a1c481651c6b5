// Threads: PyTorch's own pool where it is lent, else a small pool of ours.
#pragma once

#include "../fastsep.h"

namespace fastsep {

// As torch/csrc/stable/c/shim.h declares them; plain C, so that nothing here needs a torch header.
using TorchParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                                     void* context);
using TorchNumThreads = int32_t (*)(uint32_t* count);

// Null pointers take the loan back.
void lend_torch_pool(TorchParallelFor parallel_for, TorchNumThreads num_threads);
bool torch_pool_lent();

// Size of the own pool, used while torch's is not lent.
void set_num_threads(int threads);

// The threads that a call made now would run on.
Executor current_executor();

}  // namespace fastsep
