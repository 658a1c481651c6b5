// Forward calls one after the other, each on the result of the one before.
//
// What lies between them stays in the workspace, which is warm, where fresh tensors would be written to colder memory.
// A batch goes through in groups of images, as few as cache asks for and every thread needs. Calls are by images as
// long as they have the first one's batch; those behind are of the whole, such as a matrix product over the batch.
#pragma once

#include <cstddef>
#include <vector>

#include "fastsep.h"

namespace fastsep {

size_t input_bytes(const Problem& problem);
size_t output_bytes(const Problem& problem);

class Series {
 public:
  struct Call {
    Problem problem;
    const void* packed;
    size_t packed_size;
  };

  // At least one call, each valid, each taking as many bytes as the one before gives, in the layout that it gives.
  explicit Series(std::vector<Call> calls);

  const Problem& last() const { return calls_.back().problem; }
  Status workspace_bytes(Isa isa, int threads, size_t* bytes) const;
  // `memory` at a multiple of 64, of the size that workspace_bytes() says for the executor's threads.
  Status run(Isa isa, const void* input, void* output, void* memory, size_t bytes, const Executor& executor) const;

 private:
  // Parts of the workspace.
  struct Room {
    int64_t images;  // that go through together
    size_t joined;   // the result of all images, where calls on the whole follow
    size_t between;  // results that the next call takes
  };

  int64_t batch() const { return calls_[0].problem.batch; }
  Call part(size_t call, int64_t images) const;
  size_t between_bytes(size_t begin, size_t end, int64_t images) const;
  Room room(int threads) const;
  Status run_calls(size_t begin, size_t end, int64_t images, Isa isa, const void* input, void* output, char* memory,
                   size_t bytes, size_t between, const Executor& executor) const;

  std::vector<Call> calls_;
  size_t by_images_ = 0;  // calls that have the first one's batch
};

}  // namespace fastsep
