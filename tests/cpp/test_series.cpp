// A series of calls is the same calls one by one, to the bit: as one group of images and as several, for any number of
// threads, in a workspace between guard pages.
#include <cstring>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/series.h"
#include "harness.h"

namespace fastsep_tests {
namespace {

using namespace fastsep;

Problem pair(int64_t batch, int64_t channels, int64_t size, int64_t kernel, int64_t stride, int64_t out_channels) {
  Problem p = {};
  p.batch = batch, p.channels = channels, p.height = p.width = size;
  p.out_channels = out_channels, p.multiplier = 1;
  p.kernel_h = p.kernel_w = kernel;
  p.stride_h = p.stride_w = stride;
  p.dilation_h = p.dilation_w = 1;
  p.pad_top = p.pad_bottom = p.pad_left = p.pad_right = kernel == 3 ? 1 : 0;
  p.layout = Layout::nhwc;
  return p;
}

// Two pairs, the mean over each plane, and a product over the batch, for which the images are pixels.
std::vector<Problem> network(int64_t batch, int64_t size) {
  const int64_t half = (size + 1) / 2;
  Problem mean = pair(batch, 10, half, half, 1, 0);
  Problem product = pair(1, 10, 1, 1, 1, 7);
  product.height = batch;
  return {pair(batch, 8, size, 3, 1, 12), pair(batch, 12, size, 3, 2, 10), mean, product};
}

template <class T>
void test(const Kernel& kernel, int64_t batch, int64_t size) {
  const Case c = {"a series of " + std::to_string(batch) + " images of " + std::to_string(size), {}, false, false};
  std::vector<Problem> problems = network(batch, size);
  Numbers<T> numbers(false, Tight::end);
  std::vector<Guarded> packed;
  std::vector<Series::Call> calls;
  for (Problem& p : problems) {
    p.dtype = kernel.dtype;
    const Guarded depthwise = numbers.drawn(p.channels * p.kernel_h * p.kernel_w);
    const Guarded pointwise = numbers.drawn(p.channels * p.out_channels);
    size_t bytes = 0;
    expect(packed_bytes(p, kernel.isa, &bytes) == Status::ok, kernel, c, p, "packed_bytes");
    packed.emplace_back(bytes, Tight::end, 64);
    const Weights weights = {depthwise.as(), nullptr, pointwise.as(), nullptr};
    expect(pack(p, kernel.isa, weights, packed.back().as(), bytes, current_executor()) == Status::ok, kernel, c, p,
           "pack");
    calls.push_back({p, packed.back().as(), bytes});
  }
  const Series series(calls);
  const Guarded input = numbers.drawn(int64_t(input_bytes(problems.front()) / sizeof(T)));
  const auto result_of = [](const Problem& p) { return int64_t(output_bytes(p) / sizeof(T)); };

  std::vector<Guarded> results;
  const void* from = input.as();
  set_num_threads(1);
  for (const Series::Call& call : calls) {
    results.push_back(numbers.unwritten(result_of(call.problem)));
    size_t bytes = 0;
    expect(workspace_bytes(call.problem, kernel.isa, 1, false, &bytes) == Status::ok, kernel, c, call.problem, "bytes");
    const Guarded workspace = spoilt_workspace(bytes, Tight::end);
    expect(forward(call.problem, kernel.isa, from, call.packed, call.packed_size, results.back().as(), workspace.as(),
                   bytes, current_executor()) == Status::ok,
           kernel, c, call.problem, "forward");
    from = results.back().as();
  }
  // All of it, and without the product, so that the last result is of images.
  for (size_t count : {calls.size(), calls.size() - 1, size_t{1}}) {
    const Series part(std::vector<Series::Call>(calls.begin(), calls.begin() + static_cast<std::ptrdiff_t>(count)));
    const Problem& last = part.last();
    for (int threads : {1, 3}) {
      set_num_threads(threads);
      size_t bytes = 0;
      expect(part.workspace_bytes(kernel.isa, threads, &bytes) == Status::ok, kernel, c, last, "workspace_bytes");
      const Guarded workspace = spoilt_workspace(bytes, Tight::end), output = numbers.unwritten(result_of(last));
      expect(part.run(kernel.isa, input.as(), output.as(), workspace.as(), bytes, current_executor()) == Status::ok,
             kernel, c, last, "run");
      expect(std::memcmp(output.as(), results[count - 1].as(), output_bytes(last)) == 0, kernel, c, last,
             "another result than call by call, with " + std::to_string(threads) + " threads");
    }
  }
}

}  // namespace

void test_series(const Kernel& kernel) {
  // A group is as many images as lie in 8 MB: all three of the small ones, some of the large ones.
  for (const auto& [batch, size] : {std::pair<int64_t, int64_t>{3, 9}, {1, 10}, {5, 175}}) {
    if (kernel.dtype == Dtype::f32)
      test<float>(kernel, batch, size);
    else
      test<double>(kernel, batch, size);
  }
}

}  // namespace fastsep_tests
