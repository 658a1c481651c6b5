// The channel shuffle of two tensors alike: their channels in turn, z[2i] = a[i] and z[2i + 1] = b[i], or a part of z.
#pragma once

#include <cstddef>

#include "fastsep.h"

namespace fastsep {

struct Interleave {
  Dtype dtype;
  int64_t batch, channels, pixels;  // of a and of b, channels-last
  int64_t begin, end;               // the channels of z that are wanted
};

Status validate(const Interleave& interleave);
size_t input_bytes(const Interleave& interleave);  // of a, and of b
size_t output_bytes(const Interleave& interleave);
void run_interleave(const Interleave& interleave, const void* a, const void* b, void* output, const Executor& executor);

}  // namespace fastsep
