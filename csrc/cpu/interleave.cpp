#include "interleave.h"

#include <algorithm>

#include "driver.h"

namespace fastsep {
namespace {

// What a thread takes at least: calling one costs as much as a few thousand elements do.
constexpr int64_t least_elements = 16 * 1024;

struct Job {
  const Interleave& interleave;
  const void* a;
  const void* b;
  void* output;
  int64_t parts;
};

size_t element_size(const Interleave& interleave) { return interleave.dtype == Dtype::f32 ? 4 : 8; }

template <class T>
void interleave_pixels(const Job& job, int64_t first, int64_t last) {
  const Interleave& in = job.interleave;
  const int64_t odd = in.begin % 2, pairs = (in.end - in.begin - odd) / 2, rest = (in.end - in.begin - odd) % 2;
  for (int64_t pixel = first; pixel < last; ++pixel) {
    const T* __restrict a = static_cast<const T*>(job.a) + pixel * in.channels + in.begin / 2;
    const T* __restrict b = static_cast<const T*>(job.b) + pixel * in.channels + in.begin / 2;
    T* __restrict out = static_cast<T*>(job.output) + pixel * (in.end - in.begin);
    if (odd != 0) {
      *out++ = *b++;
      ++a;
    }
    for (int64_t i = 0; i < pairs; ++i) {
      out[2 * i] = a[i];
      out[2 * i + 1] = b[i];
    }
    if (rest != 0) out[2 * pairs] = a[pairs];
  }
}

void interleave_part(void* context, int64_t index) {
  const Job& job = *static_cast<const Job*>(context);
  const int64_t pixels = job.interleave.batch * job.interleave.pixels;
  const int64_t first = pixels * index / job.parts, last = pixels * (index + 1) / job.parts;
  if (job.interleave.dtype == Dtype::f32)
    interleave_pixels<float>(job, first, last);
  else
    interleave_pixels<double>(job, first, last);
}

}  // namespace

Status validate(const Interleave& in) {
  if (in.dtype != Dtype::f32 && in.dtype != Dtype::f64) return Status::bad_enum;
  if (in.batch < 0 || in.channels < 1 || in.pixels < 1) return Status::bad_size;
  int64_t elements;
  if (__builtin_mul_overflow(std::max<int64_t>(1, in.batch), in.pixels, &elements) ||
      __builtin_mul_overflow(elements, in.channels, &elements) || elements > INT64_MAX / 64)
    return Status::overflow;
  return 0 <= in.begin && in.begin < in.end && in.end <= 2 * in.channels ? Status::ok : Status::bad_size;
}

size_t input_bytes(const Interleave& in) {
  return static_cast<size_t>(in.batch * in.pixels * in.channels) * element_size(in);
}

size_t output_bytes(const Interleave& in) {
  return static_cast<size_t>(in.batch * in.pixels * (in.end - in.begin)) * element_size(in);
}

void run_interleave(const Interleave& in, const void* a, const void* b, void* output, const Executor& executor) {
  const int64_t elements = in.batch * in.pixels * (in.end - in.begin);
  Job job = {in, a, b, output, std::max<int64_t>(1, std::min<int64_t>(executor.threads, elements / least_elements))};
  run_on(executor, job.parts, interleave_part, &job);
}

}  // namespace fastsep
