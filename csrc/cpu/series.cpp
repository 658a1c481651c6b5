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

size_t gate_bytes(const Problem& p) { return static_cast<size_t>(p.batch * p.channels) * element_size(p); }

size_t output_bytes(const Problem& p) {
  const int64_t channels = p.out_channels > 0 ? p.out_channels : p.channels * p.multiplier;
  return static_cast<size_t>(p.batch * channels * out_height(p) * out_width(p)) * element_size(p);
}

Series::Series(std::vector<Call> calls, int inputs, std::vector<int> outputs)
    : calls_(std::move(calls)), inputs_(static_cast<size_t>(inputs)), outputs_(std::move(outputs)) {
  while (by_images_ < calls_.size() && batch(calls_[by_images_]) == batch()) ++by_images_;
  place_values();
}

void Series::place_values() {
  // In calls behind which nobody reads a value.
  std::vector<size_t> last_use(inputs_ + calls_.size(), 0);
  values_.resize(last_use.size());
  for (size_t i = 0; i < inputs_; ++i) values_[i] = {Place::input, i, 0};
  for (size_t i = 0; i < calls_.size(); ++i) {
    for (const auto& [value, bytes] : reads(calls_[i])) {
      last_use[static_cast<size_t>(value)] = i;
      if (static_cast<size_t>(value) < inputs_) values_[static_cast<size_t>(value)].bytes = bytes;
    }
    values_[inputs_ + i] = {Place::group, 0, result_bytes(calls_[i])};
  }
  for (size_t i = inputs_; i < inputs_ + by_images_; ++i) {
    if (last_use[i] < by_images_) continue;
    values_[i].place = Place::whole;
    values_[i].at = whole_bytes_;
    whole_bytes_ += aligned(values_[i].bytes);
  }
  for (size_t i = 0; i < outputs_.size(); ++i) {
    Value& value = values_[static_cast<size_t>(outputs_[i])];
    value.place = Place::output;
    value.at = i;
  }
  image_bytes_ = place(0, by_images_, static_cast<size_t>(std::max<int64_t>(1, batch())), last_use);
  behind_bytes_ = place(by_images_, calls_.size(), 1, last_use);
}

// Places the results of calls [begin, end) that belong to a group, first come, each at the lowest offset that is free
// from its call to its last use. Returns the bytes that they take, of one of `batch` images.
size_t Series::place(size_t begin, size_t end, size_t batch, const std::vector<size_t>& last_use) {
  size_t total = 0;
  std::vector<size_t> living;  // by their offsets
  for (size_t i = begin; i < end; ++i) {
    Value& value = values_[inputs_ + i];
    living.erase(std::remove_if(living.begin(), living.end(), [&](size_t other) { return last_use[other] < i; }),
                 living.end());
    if (value.place != Place::group) continue;
    const size_t bytes = aligned(value.bytes / batch);
    auto before = living.begin();
    for (; before != living.end() && values_[*before].at < value.at + bytes; ++before)
      value.at = values_[*before].at + aligned(values_[*before].bytes / batch);
    living.insert(before, inputs_ + i);
    total = std::max(total, value.at + bytes);
  }
  return total;
}

int64_t Series::batch(const Call& call) {
  const auto* const forward = std::get_if<Forward>(&call.what);
  return forward != nullptr ? forward->problem.batch : std::get<Interleave>(call.what).batch;
}

std::vector<std::pair<int, size_t>> Series::reads(const Call& call) {
  std::vector<std::pair<int, size_t>> result;
  if (const auto* const forward = std::get_if<Forward>(&call.what)) {
    const Problem& p = forward->problem;
    result.emplace_back(call.first, input_bytes(p));
    if (p.gate) result.emplace_back(call.second, gate_bytes(p));
    if (call.third != none) result.emplace_back(call.third, output_bytes(p));
  } else {
    for (int value : {call.first, call.second})
      result.emplace_back(value, input_bytes(std::get<Interleave>(call.what)));
  }
  return result;
}

size_t Series::result_bytes(const Call& call) {
  const auto* const forward = std::get_if<Forward>(&call.what);
  return forward != nullptr ? output_bytes(forward->problem) : output_bytes(std::get<Interleave>(call.what));
}

Series::Call Series::part(size_t call, int64_t images) const {
  Call result = calls_[call];
  if (call >= by_images_) return result;
  if (auto* const forward = std::get_if<Forward>(&result.what))
    forward->problem.batch = images;
  else
    std::get<Interleave>(result.what).batch = images;
  return result;
}

// How many go through together.
int64_t Series::images(int threads) const {
  const int64_t fitting = static_cast<int64_t>(cache_bytes / std::max<size_t>(1, image_bytes_));
  return std::min(batch(), std::max<int64_t>(threads, fitting));
}

size_t Series::group_bytes(int64_t images) const {
  return std::max(image_bytes_ * static_cast<size_t>(images), behind_bytes_);
}

Status Series::workspace_bytes(Isa isa, int threads, size_t* bytes) const {
  const int64_t images = this->images(threads), rest = images > 0 ? batch() % images : 0;
  size_t largest = 0;
  for (size_t i = 0; i < calls_.size(); ++i) {
    // Fewer images may be cut into more tiles, which take more scratch.
    for (int64_t count : {images, rest}) {
      const Call call = part(i, count);
      const auto* const forward = std::get_if<Forward>(&call.what);
      if (forward == nullptr || (count == 0 && images > 0)) continue;
      const Status status = fastsep::workspace_bytes(forward->problem, isa, threads, false, bytes);
      if (status != Status::ok) return status;
      largest = std::max(largest, *bytes);
    }
  }
  *bytes = whole_bytes_ + group_bytes(images) + aligned(largest);
  return Status::ok;
}

Status Series::run(Isa isa, const void* const* inputs, void* const* outputs, void* memory, size_t bytes,
                   const Executor& executor) const {
  const int64_t images = this->images(executor.threads);
  const size_t before = whole_bytes_ + group_bytes(images);
  char* const base = static_cast<char*>(memory);
  const Memory parts = {inputs, outputs, base, base + whole_bytes_, base + before, bytes - before};
  for (int64_t first = 0; first < batch(); first += images) {
    const int64_t count = std::min(images, batch() - first);
    const Status status = run_calls(0, by_images_, first, count, isa, parts, executor);
    if (status != Status::ok) return status;
  }
  return run_calls(by_images_, calls_.size(), 0, 1, isa, parts, executor);
}

// Of images from `first` on, where the value is of images and in the whole batch; `images` go through together.
char* Series::address(int value, int64_t first, int64_t images, const Memory& memory) const {
  if (value == none) return nullptr;
  const auto index = static_cast<size_t>(value);
  const Value& v = values_[index];
  const size_t offset =
      is_by_images(index) && first > 0 ? v.bytes / static_cast<size_t>(batch()) * static_cast<size_t>(first) : 0;
  switch (v.place) {
    case Place::input: return const_cast<char*>(static_cast<const char*>(memory.inputs[v.at])) + offset;
    case Place::output: return static_cast<char*>(memory.outputs[v.at]) + offset;
    case Place::whole: return memory.whole + v.at + offset;
    case Place::group: return memory.group + v.at * static_cast<size_t>(images);
  }
  return nullptr;
}

Status Series::run_calls(size_t begin, size_t end, int64_t first, int64_t images, Isa isa, const Memory& memory,
                         const Executor& executor) const {
  const auto at = [&](int value) { return address(value, first, images, memory); };
  for (size_t i = begin; i < end; ++i) {
    const Call call = part(i, images);
    void* const to = at(static_cast<int>(inputs_ + i));
    const auto* const forward = std::get_if<Forward>(&call.what);
    if (forward == nullptr) {
      run_interleave(std::get<Interleave>(call.what), at(call.first), at(call.second), to, executor);
      continue;
    }
    const Inputs inputs(at(call.first), at(call.second), at(call.third));
    const Status status = fastsep::forward(forward->problem, isa, inputs, forward->packed, forward->packed_size, to,
                                           memory.scratch, memory.scratch_bytes, executor);
    if (status != Status::ok) return status;
  }
  return Status::ok;
}

}  // namespace fastsep
