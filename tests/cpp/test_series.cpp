// A series of calls is the same calls one by one, to the bit: as one group of images and as several, for any number of
// threads, in a workspace between guard pages.
#include <cstring>
#include <utility>
#include <variant>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/series.h"
#include "harness.h"

namespace fastsep_tests {
namespace {

using namespace fastsep;

constexpr int none = Series::none;

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

Problem with_residual(Problem p) {
  p.residual = true;
  return p;
}

Problem with_gate(Problem p) {
  p.gate = true;
  return p;
}

// A call before its weights are packed.
struct Line {
  Problem problem;
  int x, gate, residual;
  Interleave interleave = {};  // with channels: the call is this, of x and `gate`
};

struct Program {
  const char* name;
  int inputs;
  std::vector<Line> lines;
};

// Two pairs, the mean over each plane, and a product over the batch, for which the images are pixels.
Program chain(int64_t batch, int64_t size) {
  const int64_t half = (size + 1) / 2;
  Problem product = pair(1, 10, 1, 1, 1, 7);
  product.height = batch;
  return {"a chain",
          1,
          {{pair(batch, 8, size, 3, 1, 12), 0, none, none},
           {pair(batch, 12, size, 3, 2, 10), 1, none, none},
           {pair(batch, 10, half, half, 1, 0), 2, none, none},
           {product, 3, none, none}}};
}

// Squeeze-and-excite with a residual: a depthwise result that the mean and the gated product read, a second input that
// is added in the end, and behind the calls by images one that reads the first result of all images again.
Program gated(int64_t batch, int64_t size) {
  Problem whole = pair(1, 10, 1, 1, 1, 10);
  whole.height = batch * size, whole.width = size;
  return {"squeeze-and-excite",
          2,
          {{pair(batch, 8, size, 1, 1, 10), 0, none, none},
           {pair(batch, 10, size, 3, 1, 0), 2, none, none},
           {pair(batch, 10, size, size, 1, 0), 3, none, none},
           {pair(batch, 10, 1, 1, 1, 3), 4, none, none},
           {pair(batch, 3, 1, 1, 1, 10), 5, none, none},
           {with_gate(with_residual(pair(batch, 10, size, 1, 1, 10))), 3, 6, 2},
           {with_residual(pair(batch, 10, size, 3, 1, 8)), 7, none, 1},
           {with_residual(whole), 2, none, 7}}};
}

// The units of ShuffleNet: results in turn, in halves of an odd number of channels and whole.
Program shuffled(int64_t batch, int64_t size) {
  const auto interleave = [&](int a, int b, int64_t channels, int64_t begin, int64_t end) {
    return Line{{}, a, b, none, {Dtype::f32, batch, channels, size * size, begin, end}};
  };
  return {"shuffles",
          2,
          {interleave(0, 1, 8, 0, 8),
           interleave(0, 1, 8, 8, 16),
           {pair(batch, 8, size, 3, 1, 9), 3, none, none},
           {pair(batch, 8, size, 1, 1, 9), 2, none, none},
           interleave(5, 4, 9, 0, 9),
           interleave(5, 4, 9, 9, 18),
           {pair(batch, 9, size, 1, 1, 9), 7, none, none},
           interleave(6, 8, 9, 0, 18),
           interleave(6, 8, 9, 3, 4)}};
}

template <class T>
void test(const Kernel& kernel, Program program, int64_t batch, int64_t size) {
  const Case c = {
      program.name + (" of " + std::to_string(batch)) + " images of " + std::to_string(size), {}, false, false};
  Numbers<T> numbers(false, Tight::end);
  std::vector<Guarded> packed;
  std::vector<Series::Call> calls;
  for (Line& line : program.lines) {
    if (line.interleave.channels > 0) {
      line.interleave.dtype = kernel.dtype;
      expect(validate(line.interleave) == Status::ok, kernel, c, line.problem, "validate");
      calls.push_back({line.interleave, line.x, line.gate});
      continue;
    }
    Problem& p = line.problem;
    p.dtype = kernel.dtype;
    expect(validate(p) == Status::ok, kernel, c, p, "validate");
    const Guarded depthwise = numbers.drawn(p.channels * p.kernel_h * p.kernel_w);
    const Guarded pointwise = numbers.drawn(p.channels * p.out_channels);
    size_t bytes = 0;
    expect(packed_bytes(p, kernel.isa, &bytes) == Status::ok, kernel, c, p, "packed_bytes");
    packed.emplace_back(bytes, Tight::end, 64);
    const Weights weights = {depthwise.as(), nullptr, pointwise.as(), nullptr};
    expect(pack(p, kernel.isa, weights, packed.back().as(), bytes, current_executor()) == Status::ok, kernel, c, p,
           "pack");
    calls.push_back({Series::Forward{p, packed.back().as(), bytes}, line.x, line.gate, line.residual});
  }
  std::vector<Guarded> values;
  for (int i = 0; i < program.inputs; ++i)
    values.push_back(numbers.drawn(int64_t(Series::reads(calls.front()).front().second / sizeof(T))));
  std::vector<const void*> inputs;
  for (const Guarded& value : values) inputs.push_back(value.as());

  set_num_threads(1);
  for (size_t i = 0; i < calls.size(); ++i) {
    const Series::Call& call = calls[i];
    const Line& line = program.lines[i];
    const auto at = [&](int value) { return value == none ? nullptr : values[static_cast<size_t>(value)].as(); };
    Guarded result = numbers.unwritten(int64_t(Series::result_bytes(call) / sizeof(T)));
    if (const auto* const forward = std::get_if<Series::Forward>(&call.what)) {
      const Problem& p = forward->problem;
      size_t bytes = 0;
      expect(workspace_bytes(p, kernel.isa, 1, false, &bytes) == Status::ok, kernel, c, p, "bytes");
      const Guarded workspace = spoilt_workspace(bytes, Tight::end);
      const Inputs operands(at(line.x), at(line.gate), at(line.residual));
      expect(fastsep::forward(p, kernel.isa, operands, forward->packed, forward->packed_size, result.as(),
                              workspace.as(), bytes, current_executor()) == Status::ok,
             kernel, c, p, "forward");
    } else {
      const Interleave& in = line.interleave;
      for (int64_t pixel = 0; pixel < in.batch * in.pixels; ++pixel)
        for (int64_t k = in.begin; k < in.end; ++k)
          result.as<T>()[pixel * (in.end - in.begin) + k - in.begin] =
              values[static_cast<size_t>(k % 2 == 0 ? line.x : line.gate)].as<T>()[pixel * in.channels + k / 2];
    }
    values.push_back(std::move(result));
  }
  // The last result alone, and with others beside it: all of the calls, and without the last ones, so that the results
  // are of images.
  for (size_t count = 1; count <= calls.size(); ++count) {
    const int last = program.inputs + static_cast<int>(count) - 1;
    for (int others : {0, 1, 2}) {
      std::vector<int> wanted = {last};
      for (int value = program.inputs + others - 1; others > 0 && value < last; value += others)
        wanted.push_back(value);
      const std::vector<Series::Call> part(calls.begin(), calls.begin() + static_cast<std::ptrdiff_t>(count));
      const Series series(part, program.inputs, wanted);
      for (int threads : {1, 3}) {
        set_num_threads(threads);
        const Problem& p = program.lines.front().problem;
        size_t bytes = 0;
        expect(series.workspace_bytes(kernel.isa, threads, &bytes) == Status::ok, kernel, c, p, "workspace_bytes");
        const Guarded workspace = spoilt_workspace(bytes, Tight::end);
        std::vector<Guarded> outputs;
        std::vector<void*> to;
        for (int value : wanted) {
          const Series::Call& call = calls[static_cast<size_t>(value - program.inputs)];
          outputs.push_back(numbers.unwritten(int64_t(Series::result_bytes(call) / sizeof(T))));
          to.push_back(outputs.back().as());
        }
        expect(
            series.run(kernel.isa, inputs.data(), to.data(), workspace.as(), bytes, current_executor()) == Status::ok,
            kernel, c, p, "run");
        for (size_t i = 0; i < wanted.size(); ++i)
          expect(std::memcmp(to[i], values[static_cast<size_t>(wanted[i])].as(), series.output_size(i)) == 0, kernel, c,
                 p, "another result than call by call, with " + std::to_string(threads) + " threads");
      }
    }
  }
}

}  // namespace

void test_series(const Kernel& kernel) {
  // A group is as many images as lie in 8 MB: all three of the small ones, some of the large ones.
  for (const auto& [batch, size] : {std::pair<int64_t, int64_t>{3, 9}, {1, 10}, {5, 175}}) {
    for (const Program& program : {chain(batch, size), gated(batch, size), shuffled(batch, size)}) {
      if (kernel.dtype == Dtype::f32)
        test<float>(kernel, program, batch, size);
      else
        test<double>(kernel, program, batch, size);
    }
  }
}

}  // namespace fastsep_tests
