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

// One pixel of each plane: its mean, but for the weights.
Problem mean(int64_t batch, int64_t channels, int64_t size) {
  Problem p = pair(batch, channels, size, size, 1, 0);
  p.pad_top = p.pad_bottom = p.pad_left = p.pad_right = 0;
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
Program chain(const SeriesSize& s) {
  const int64_t half = (s.size + 1) / 2, a = 8 + s.more, b = 12 + s.more, c = 10 + s.more;
  Problem product = pair(1, c, 1, 1, 1, 7);
  product.height = s.batch;
  return {"a chain",
          1,
          {{pair(s.batch, a, s.size, 3, 1, b), 0, none, none},
           {pair(s.batch, b, s.size, 3, 2, c), 1, none, none},
           {mean(s.batch, c, half), 2, none, none},
           {product, 3, none, none}}};
}

// Squeeze-and-excite with a residual: a depthwise result that the mean and the gated product read, a second input that
// is added in the end, and behind the calls by images one that reads the first result of all images again.
Program gated(const SeriesSize& s) {
  const int64_t a = 8 + s.more, b = 10 + s.more;
  Problem whole = pair(1, b, 1, 1, 1, b);
  whole.height = s.batch * s.size, whole.width = s.size;
  return {"squeeze-and-excite",
          2,
          {{pair(s.batch, a, s.size, 1, 1, b), 0, none, none},
           {pair(s.batch, b, s.size, 3, 1, 0), 2, none, none},
           {mean(s.batch, b, s.size), 3, none, none},
           {pair(s.batch, b, 1, 1, 1, 3), 4, none, none},
           {pair(s.batch, 3, 1, 1, 1, b), 5, none, none},
           {with_gate(with_residual(pair(s.batch, b, s.size, 1, 1, b))), 3, 6, 2},
           {with_residual(pair(s.batch, b, s.size, 3, 1, a)), 7, none, 1},
           {with_residual(whole), 2, none, 7}}};
}

// The units of ShuffleNet: results in turn, in halves of an odd number of channels and whole.
Program shuffled(const SeriesSize& s) {
  const int64_t a = 8 + s.more, b = 9 + s.more;
  const auto interleave = [&](int x, int y, int64_t channels, int64_t begin, int64_t end) {
    return Line{{}, x, y, none, {Dtype::f32, s.batch, channels, s.size * s.size, begin, end}};
  };
  return {"shuffles",
          2,
          {interleave(0, 1, a, 0, a),
           interleave(0, 1, a, a, 2 * a),
           {pair(s.batch, a, s.size, 3, 1, b), 3, none, none},
           {pair(s.batch, a, s.size, 1, 1, b), 2, none, none},
           interleave(5, 4, b, 0, b),
           interleave(5, 4, b, b, 2 * b),
           {pair(s.batch, b, s.size, 1, 1, b), 7, none, none},
           interleave(6, 8, b, 0, 2 * b),
           interleave(6, 8, b, 3, 4)}};
}

template <class T>
void test(const Kernel& kernel, Program program, const SeriesSize& s) {
  const Case c = {program.name + (" of " + std::to_string(s.batch)) + " images of " + std::to_string(s.size) + ", " +
                      std::to_string(s.more) + " more channels",
                  {},
                  false,
                  false};
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
      for (int threads : {1, s.threads}) {
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

void test_series(const Kernel& kernel, const SeriesSize& s) {
  for (const Program& program : {chain(s), gated(s), shuffled(s)}) {
    if (kernel.dtype == Dtype::f32)
      test<float>(kernel, program, s);
    else
      test<double>(kernel, program, s);
  }
}

}  // namespace fastsep_tests
