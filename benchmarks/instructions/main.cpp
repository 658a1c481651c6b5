// Runs one layer once, for callgrind to count its instructions: fastsep_instructions LAYER forward|backward nchw|nhwc
//
//   valgrind --tool=callgrind --toggle-collect=measured fastsep_instructions block5 forward nhwc
//
// A layer without a name is CHANNELSxSIZExOUT_CHANNELSxKERNELxSTRIDE.
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <vector>

#include "fastsep.h"

using namespace fastsep;

namespace {

struct Layer {
  const char* name;
  int64_t channels, size, out_channels, kernel, stride;
};

// Of benchmarks/shapes/: two of MobileNetV1, and one with a larger kernel.
constexpr Layer layers[] = {
    {"block5", 256, 28, 256, 3, 1},
    {"block12", 512, 14, 1024, 3, 2},
    {"kernel5_14x512", 512, 14, 512, 5, 1},
};

Problem problem_of(const Layer& layer, Layout layout) {
  Problem p{};
  p.batch = 1;
  p.channels = layer.channels;
  p.height = p.width = layer.size;
  p.out_channels = layer.out_channels;
  p.multiplier = 1;
  p.kernel_h = p.kernel_w = layer.kernel;
  p.stride_h = p.stride_w = layer.stride;
  p.dilation_h = p.dilation_w = 1;
  p.pad_top = p.pad_bottom = p.pad_left = p.pad_right = layer.kernel / 2;
  p.dtype = Dtype::f32;
  p.layout = layout;
  p.mid_activation = p.activation = Activation::relu;
  return p;
}

std::vector<float> numbers(int64_t count) {
  std::vector<float> made(static_cast<size_t>(count));
  uint32_t state = 1;
  for (float& number : made) {
    state = state * 1664525u + 1013904223u;
    number = static_cast<float>(state >> 8) / (1 << 23) - 1.0f;
  }
  return made;
}

void* aligned(std::vector<char>& room, size_t bytes) {
  room.resize(bytes + 64);
  const auto address = reinterpret_cast<uintptr_t>(room.data());
  return room.data() + (64 - address % 64) % 64;
}

}  // namespace

// By this name callgrind knows where to begin and to end.
extern "C" __attribute__((noinline)) Status measured(const Problem& problem, bool is_backward, const void* input,
                                                     const void* packed, size_t packed_size, const Weights& weights,
                                                     void* output, const void* grad_output, const Gradients& gradients,
                                                     void* workspace, size_t workspace_size) {
  const Executor alone{};
  if (is_backward)
    return backward(problem, Isa::best, input, weights, output, grad_output, gradients, workspace, workspace_size,
                    alone);
  return forward(problem, Isa::best, input, packed, packed_size, output, workspace, workspace_size, alone);
}

int main(int argc, char** argv) {
  const Layer* layer = nullptr;
  Layer sizes = {"by its sizes", 0, 0, 0, 0, 0};
  if (argc == 4 && std::sscanf(argv[1], "%" SCNd64 "x%" SCNd64 "x%" SCNd64 "x%" SCNd64 "x%" SCNd64, &sizes.channels,
                               &sizes.size, &sizes.out_channels, &sizes.kernel, &sizes.stride) == 5)
    layer = &sizes;
  for (const Layer& each : layers)
    if (argc == 4 && std::strcmp(argv[1], each.name) == 0) layer = &each;
  if (layer == nullptr) {
    std::fprintf(stderr, "usage: fastsep_instructions LAYER forward|backward nchw|nhwc, with LAYER one of");
    for (const Layer& each : layers) std::fprintf(stderr, " %s", each.name);
    std::fprintf(stderr, "\n");
    return 2;
  }
  const bool is_backward = std::strcmp(argv[2], "backward") == 0;
  const Problem p = problem_of(*layer, std::strcmp(argv[3], "nhwc") == 0 ? Layout::nhwc : Layout::nchw);
  const int64_t in = p.channels * p.height * p.width, out = p.out_channels * out_height(p) * out_width(p);
  const int64_t taps = p.channels * p.kernel_h * p.kernel_w, products = p.out_channels * p.channels;
  const std::vector<float> x = numbers(in), dw = numbers(taps), pw = numbers(products), g = numbers(out);
  const std::vector<float> db = numbers(p.channels), b = numbers(p.out_channels);
  std::vector<float> y = numbers(out), gx(x.size()), gdw(dw.size()), gpw(pw.size()), gdb(db.size()), gb(b.size());
  const Weights weights{dw.data(), db.data(), pw.data(), b.data()};
  const Gradients gradients{gx.data(), gdw.data(), gdb.data(), gpw.data(), gb.data()};

  size_t packed_size = 0, workspace_size = 0;
  Status status = packed_bytes(p, Isa::best, &packed_size);
  std::vector<char> packed_room, workspace_room;
  void* packed = aligned(packed_room, packed_size);
  if (status == Status::ok) status = pack(p, Isa::best, weights, packed, packed_size, Executor{});
  if (status == Status::ok)
    status = is_backward ? backward_workspace_bytes(p, Isa::best, 1, gradients, &workspace_size)
                         : workspace_bytes(p, Isa::best, 1, false, &workspace_size);
  void* workspace = aligned(workspace_room, workspace_size);
  if (status == Status::ok)
    status = measured(p, is_backward, x.data(), packed, packed_size, weights, y.data(), g.data(), gradients, workspace,
                      workspace_size);
  if (status != Status::ok) std::fprintf(stderr, "%s\n", describe(status));
  return status == Status::ok ? 0 : 1;
}
