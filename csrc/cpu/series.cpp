#include "series.h"

#include <algorithm>
#include <utility>

namespace fastsep {
namespace {

// Half of a last-level cache of 16 MB. MobileNetV1's widest pair of results takes 4.8 MB an image.
constexpr size_t cache_bytes = size_t{8} << 20;

size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

size_t element_size(const Problem& p) { return p.dtype == Dtype::f32 ? 4 : 8; }

}  // namespace

size_t input_bytes(const Problem& p) {
  const Expansion& e = p.expand;
  const int64_t image = e.channels > 0 ? e.channels * e.height * e.width : p.channels * p.height * p.width;
  return static_cast<size_t>(p.batch * image) * element_size(p);
}

size_t output_bytes(const Problem& p) {
  const int64_t channels = p.out_channels > 0 ? p.out_channels : p.channels * p.multiplier;
  return static_cast<size_t>(p.batch * channels * out_height(p) * out_width(p)) * element_size(p);
}

Series::Series(std::vector<Call> calls) : calls_(std::move(calls)) {
  while (by_images_ < calls_.size() && calls_[by_images_].problem.batch == batch()) ++by_images_;
}

Series::Call Series::part(size_t call, int64_t images) const {
  Call result = calls_[call];
  if (call < by_images_) result.problem.batch = images;
  return result;
}

// Of calls [begin, end), the most that two neighbouring results take which lie between two calls.
size_t Series::between_bytes(size_t begin, size_t end, int64_t images) const {
  size_t most = 0;
  for (size_t i = begin; i + 1 < end; ++i) {
    const size_t next = i + 2 < end ? output_bytes(part(i + 1, images).problem) : 0;
    most = std::max(most, aligned(output_bytes(part(i, images).problem)) + aligned(next));
  }
  return most;
}

Series::Room Series::room(int threads) const {
  const size_t image = std::max<size_t>(1, between_bytes(0, by_images_, 1));
  const int64_t fitting = static_cast<int64_t>(cache_bytes / image);
  const int64_t images = std::min(batch(), std::max<int64_t>(threads, fitting));
  if (images >= batch()) return {images, 0, between_bytes(0, calls_.size(), images)};
  const size_t behind = between_bytes(by_images_, calls_.size(), images);
  const bool whole_behind = by_images_ < calls_.size();
  return {images, whole_behind ? aligned(output_bytes(calls_[by_images_ - 1].problem)) : 0,
          std::max(between_bytes(0, by_images_, images), behind)};
}

Status Series::workspace_bytes(Isa isa, int threads, size_t* bytes) const {
  const Room room = this->room(threads);
  const int64_t rest = room.images > 0 ? batch() % room.images : 0;
  size_t largest = 0;
  for (size_t i = 0; i < calls_.size(); ++i) {
    // Fewer images may be cut into more tiles, which take more scratch.
    for (int64_t images : {room.images, rest > 0 ? rest : room.images}) {
      const Status status = fastsep::workspace_bytes(part(i, images).problem, isa, threads, false, bytes);
      if (status != Status::ok) return status;
      largest = std::max(largest, *bytes);
    }
  }
  *bytes = room.joined + room.between + aligned(largest);
  return Status::ok;
}

Status Series::run(Isa isa, const void* input, void* output, void* memory, size_t bytes,
                   const Executor& executor) const {
  const Room room = this->room(executor.threads);
  char* const base = static_cast<char*>(memory);
  const auto calls = [&](size_t begin, size_t end, int64_t images, const void* from, void* to) {
    return run_calls(begin, end, images, isa, from, to, base + room.joined, bytes - room.joined, room.between,
                     executor);
  };
  if (room.images >= batch()) return calls(0, calls_.size(), batch(), input, output);

  const bool whole_behind = by_images_ < calls_.size();
  char* const results = whole_behind ? base : static_cast<char*>(output);
  const size_t taken = input_bytes(calls_[0].problem) / static_cast<size_t>(batch());
  const size_t given = output_bytes(calls_[by_images_ - 1].problem) / static_cast<size_t>(batch());
  for (int64_t first = 0; first < batch(); first += room.images) {
    const int64_t images = std::min(room.images, batch() - first);
    const char* const from = static_cast<const char*>(input) + static_cast<size_t>(first) * taken;
    const Status status = calls(0, by_images_, images, from, results + static_cast<size_t>(first) * given);
    if (status != Status::ok) return status;
  }
  return whole_behind ? calls(by_images_, calls_.size(), batch(), results, output) : Status::ok;
}

Status Series::run_calls(size_t begin, size_t end, int64_t images, Isa isa, const void* input, void* output,
                         char* memory, size_t bytes, size_t between, const Executor& executor) const {
  for (size_t i = begin; i < end; ++i) {
    const Call call = part(i, images);
    // Results lie at the beginning and at the end in turn, so that none is written over what it is made of.
    void* to = output;
    if (i + 1 < end) to = (i - begin) % 2 == 0 ? memory : memory + between - aligned(output_bytes(call.problem));
    const Status status = forward(call.problem, isa, input, call.packed, call.packed_size, to, memory + between,
                                  bytes - between, executor);
    if (status != Status::ok) return status;
    input = to;
  }
  return Status::ok;
}

}  // namespace fastsep
