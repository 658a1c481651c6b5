#include <chrono>
#include <cstring>

#include "fastsep.h"

namespace fastsep {
namespace {

struct Copy {
  char* buffer;
  size_t half;
  int64_t parts;
};

void copy_part(void* context, int64_t index) {
  const Copy& copy = *static_cast<const Copy*>(context);
  const size_t part = copy.half / static_cast<size_t>(copy.parts);
  const size_t begin = part * static_cast<size_t>(index);
  const size_t end = index + 1 == copy.parts ? copy.half : begin + part;
  std::memcpy(copy.buffer + begin, copy.buffer + copy.half + begin, end - begin);
}

}  // namespace

Status memory_bandwidth(void* buffer, size_t bytes, double seconds, const Executor& executor,
                        double* bytes_per_second) {
  if (bytes < memory_bandwidth_least) return Status::small_workspace;
  using clock = std::chrono::steady_clock;
  // The C library's copy knows each processor's way past the caches. One part for each thread, as long as can be.
  std::memset(buffer, 1, bytes);  // fresh pages are all the same page of zeros until they are written
  Copy copy{static_cast<char*>(buffer), bytes / 2, executor.run == nullptr ? 1 : executor.threads};
  *bytes_per_second = 0;
  double elapsed = 0;
  do {
    const auto start = clock::now();
    if (copy.parts == 1) {
      copy_part(&copy, 0);
    } else {
      executor.run(executor.state, copy.parts, copy_part, &copy);
    }
    const double trial = std::chrono::duration<double>(clock::now() - start).count();
    elapsed += trial;
    // The best of the trials: what disturbs one can only make it slower.
    const double speed = 2.0 * static_cast<double>(copy.half) / trial;
    if (speed > *bytes_per_second) *bytes_per_second = speed;
  } while (elapsed < seconds);
  return Status::ok;
}

}  // namespace fastsep
