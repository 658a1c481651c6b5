// Sizes, packing and the partition of a problem over threads, for a kernel already chosen.
#pragma once

#include "kernel.h"

namespace fastsep {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t element_size(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 8; }

// Rounded up, so that what follows begins with a line.
inline int64_t whole_cache_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Where the i-th of some parts of [0, size) begins.
inline int64_t part(int64_t size, int64_t parts, int64_t i) { return size * i / parts; }

PackedLayout packed_layout(const Problem& problem, const Kernel& kernel);

// In bytes, multiples of 64. Packed weights begin with a header that says what they were made for.
size_t packed_size(const Problem& problem, const Kernel& kernel);
bool packed_for(const Problem& problem, const Kernel& kernel, const void* packed, size_t bytes);
void pack_weights(const Problem& problem, const Kernel& kernel, const Weights& weights, void* packed,
                  const Executor& executor);
// The weights themselves, behind the header.
const void* packed_weights(const void* packed);

// Runs body for every index in [0, count), on the executor's threads where there is more than one.
void run_on(const Executor& executor, int64_t count, void (*body)(void*, int64_t), void* context);

// Scratch of all threads.
size_t scratch_size(const Problem& problem, const Kernel& kernel, int threads);
void run_forward(const Problem& problem, const Kernel& kernel, const Inputs& inputs, const void* packed, void* output,
                 void* workspace, const Executor& executor);

size_t backward_size(const Problem& problem, const Kernel& kernel, const Gradients& gradients, int threads);
void run_backward(const Problem& problem, const Kernel& kernel, const void* input, const Weights& weights,
                  const void* saved, const void* grad_output, const Gradients& gradients, void* workspace,
                  const Executor& executor);

}  // namespace fastsep
