// A straight-line program of forward calls and channel shuffles: each reads inputs of the series and results of calls
// before it.
//
// What lies between them stays in the workspace, which is warm, where fresh tensors would be written to colder memory,
// and a result gives its place to later ones once nobody reads it any more. A batch goes through in groups of images,
// as few as cache asks for and every thread needs. Calls are by images as long as they have the first one's batch;
// those behind are of the whole, such as a matrix product over the batch.
#pragma once

#include <cstddef>
#include <utility>
#include <variant>
#include <vector>

#include "fastsep.h"
#include "interleave.h"

namespace fastsep {

size_t input_bytes(const Problem& problem);
size_t gate_bytes(const Problem& problem);
size_t output_bytes(const Problem& problem);

class Series {
 public:
  // Values are numbered: the inputs of the series, then the results of its calls in their order.
  static constexpr int none = -1;
  struct Forward {
    Problem problem;
    const void* packed;
    size_t packed_size;
  };
  struct Call {
    std::variant<Forward, Interleave> what;
    // Earlier values: x, gate and residual, as the problem asks for them, or the two that are interleaved.
    int first, second = none, third = none;
  };
  // What a call reads, and how many bytes of it.
  static std::vector<std::pair<int, size_t>> reads(const Call& call);
  static size_t result_bytes(const Call& call);

  // At least one call, each valid, reading values of as many bytes as it takes, in the layout that it takes. `outputs`
  // are results of calls.
  Series(std::vector<Call> calls, int inputs, std::vector<int> outputs);

  // Bytes of an output, by its place among the outputs.
  size_t output_size(size_t output) const { return values_[static_cast<size_t>(outputs_[output])].bytes; }
  size_t inputs() const { return inputs_; }
  size_t outputs() const { return outputs_.size(); }

  Status workspace_bytes(Isa isa, int threads, size_t* bytes) const;
  // As many inputs and outputs as the series has. `memory` at a multiple of 64, of the size that workspace_bytes() says
  // for the executor's threads.
  Status run(Isa isa, const void* const* inputs, void* const* outputs, void* memory, size_t bytes,
             const Executor& executor) const;

 private:
  enum class Place {
    input,   // of the series, by its number
    output,  // of the series, by its number
    whole,   // in the workspace, with the results of all images
    group,   // in the workspace, with those of the images that go through together
  };
  struct Value {
    Place place;
    size_t at;     // the number, or the offset: of a group of one image, which those of several are a multiple of
    size_t bytes;  // of the whole batch
  };
  // Where the values are in one run.
  struct Memory {
    const void* const* inputs;
    void* const* outputs;
    char* whole;
    char* group;
    char* scratch;
    size_t scratch_bytes;
  };

  int64_t batch() const { return batch(calls_[0]); }
  static int64_t batch(const Call& call);
  int64_t images(int threads) const;
  size_t group_bytes(int64_t images) const;
  bool is_by_images(size_t value) const { return value < inputs_ || value - inputs_ < by_images_; }
  Call part(size_t call, int64_t images) const;
  void place_values();
  size_t place(size_t begin, size_t end, size_t batch, const std::vector<size_t>& last_use);
  char* address(int value, int64_t first, int64_t images, const Memory& memory) const;
  Status run_calls(size_t begin, size_t end, int64_t first, int64_t images, Isa isa, const Memory& memory,
                   const Executor& executor) const;

  std::vector<Call> calls_;
  size_t inputs_;
  std::vector<int> outputs_;
  size_t by_images_ = 0;  // calls that have the first one's batch
  std::vector<Value> values_;
  size_t whole_bytes_ = 0;   // of the results in the workspace that are of all images
  size_t image_bytes_ = 0;   // of those of one image
  size_t behind_bytes_ = 0;  // of those behind the calls by images
};

}  // namespace fastsep
