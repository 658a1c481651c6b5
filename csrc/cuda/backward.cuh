// The backward pass, any subset of the gradients, from launches of the kernels of product.cuh and depthwise*.cuh:
//
//   d bias              column sums of dv
//   d pointwise_weight  u = mid_act(depthwise(x) + bias) to the workspace, then dv' u
//   dt                  W' dv to the workspace, where u has been, times mid_act'(t) in place
//   d depthwise_*, dx   from dt
//
// u and dt are kept in the storage type: u is what the forward pass hands its own matrix product, and dt what an
// unfused backward pass keeps between its two halves; f32 loses nothing. Each is one tensor of the depthwise output's
// size, and there only while backward() runs; of the forward pass nothing but x (and y or v) is kept.
//
// Parts: sums over all pixels are cut in parts that follow from the problem alone, in fp32, [part][...] in the
// workspace, added in order.
#pragma once

#include "depthwise_weights_launch.cuh"
#include "product.cuh"

namespace fastsep {
namespace cuda {

inline int64_t round_to_256(int64_t bytes) { return divide_up(bytes, 256) * 256; }

template <class T, class Arithmetic, bool a_across, bool b_across, bool a_slopes, class Out>
cudaError_t launch_product(Product p, bool large, Queue queue) {
  p.tiles_m = divide_up(p.m, large ? LargeProduct::rows : SmallProduct::rows);
  p.tiles_n = divide_up(p.n, large ? LargeProduct::columns : SmallProduct::columns);
  p.wide_output =
      aligned<Out>(p.output, p.output_pitch, 4 * sizeof(Out)) && aligned<Out>(p.output, p.output_part, 4 * sizeof(Out));
  const int64_t blocks = p.tiles_m * p.tiles_n * p.parts;
  if (blocks > most_blocks) return cudaErrorInvalidConfiguration;
  if (large)
    return launch(product<T, Arithmetic, a_across, b_across, a_slopes, Out, LargeProduct>, line_of_blocks(blocks),
                  LargeProduct::threads, LargeProduct::shared_bytes, p, queue);
  return launch(product<T, Arithmetic, a_across, b_across, a_slopes, Out, SmallProduct>, line_of_blocks(blocks),
                SmallProduct::threads, SmallProduct::shared_bytes, p, queue);
}

// What the launches of one backward pass share.
template <class T>
struct Backward {
  const Problem& problem;
  int64_t depth = problem.channels * problem.multiplier, plane = out_height(problem) * out_width(problem);
  int64_t pixels = problem.batch * plane, k = problem.out_channels;
  bool nhwc = problem.layout == Layout::nhwc;

  // d pointwise_weight
  bool large_weights() const { return k > 64 && depth > 64; }
  int64_t weight_images() const { return nhwc ? 1 : problem.batch; }
  int64_t weight_chunks() const { return divide_up(nhwc ? pixels : plane, chunk<T>); }
  int64_t weight_part_size() const {
    const int64_t side = large_weights() ? 128 : 64, tiles = divide_up(k, side) * divide_up(depth, side);
    const int64_t all = weight_images() * weight_chunks();
    return divide_up(all, parts_of(all, 8, 2 * tiles));
  }
  int64_t weight_parts() const { return divide_up(weight_images() * weight_chunks(), weight_part_size()); }

  // d bias
  int column_log_lanes() const { return nhwc ? log_ceil(k, 5) : 0; }
  int64_t column_groups() const { return divide_up(k, int64_t{1} << column_log_lanes()); }
  int64_t column_part_size() const {
    return divide_up(pixels, parts_of(pixels, 16 * (column_threads >> column_log_lanes()), column_groups()));
  }
  int64_t column_parts() const { return divide_up(pixels, column_part_size()); }

  bool wants_depthwise(const Gradients& g) const {
    return g.input != nullptr || g.depthwise_weight != nullptr || g.depthwise_bias != nullptr;
  }
  // u and dt; not for K = 0 without an activation, where dt is the gradient itself.
  int64_t middle_bytes(const Gradients& g) const {
    const bool needed = k > 0 ? wants_depthwise(g) || g.pointwise_weight != nullptr
                              : wants_depthwise(g) && problem.mid_activation != Activation::identity;
    return needed ? round_to_256(pixels * depth * static_cast<int64_t>(sizeof(T))) : 0;
  }
  int64_t part_bytes(const Gradients& g) const {
    int64_t numbers = 0;
    if (pixels == 0) return 0;
    const auto need = [&](int64_t count) { numbers = count > numbers ? count : numbers; };
    if (g.depthwise_weight != nullptr || g.depthwise_bias != nullptr) need(weights_part_numbers<T>(problem));
    if (g.pointwise_weight != nullptr && k > 0) need(weight_parts() * k * depth);
    if (g.bias != nullptr && k > 0) need(column_parts() * k);
    return round_to_256(numbers * static_cast<int64_t>(sizeof(float)));
  }

  Operand dv(const void* gradient, const void* saved) const {
    const bool flat = problem.activation == Activation::identity;
    Operand o = {gradient, flat ? nullptr : saved, problem.activation, nhwc ? k : plane, nhwc ? 0 : k * plane, false};
    o.wide = aligned<T>(gradient, o.pitch) && aligned<T>(saved, 0);
    return o;
  }
  Operand plain(const void* data, int64_t pitch, int64_t image) const {
    return {data, nullptr, Activation::identity, pitch, image, aligned<T>(data, pitch)};
  }

  cudaError_t bias(const void* gradient, const void* saved, float* parts, void* result, Queue queue) const {
    ColumnSums p = {gradient, saved, problem.activation, parts, k, plane, pixels, 0, 0, 0, nhwc};
    AddParts add = {parts, 0, k, 1, k, result, false};
    if (pixels > 0) {
      p.log_lanes = column_log_lanes();
      p.groups = column_groups();
      p.part_size = column_part_size();
      add.count = column_parts();
      const int64_t blocks = p.groups * add.count;
      if (blocks > most_blocks) return cudaErrorInvalidConfiguration;
      const cudaError_t error =
          launch(column_sums<T>, line_of_blocks(blocks), column_threads, column_threads / 2 * sizeof(float), p, queue);
      if (error != cudaSuccess) return error;
    }
    return launch_add_parts<T>(add, queue);
  }

  template <class Arithmetic>
  cudaError_t pointwise_weight(const void* gradient, const void* saved, const void* u, float* parts, void* result,
                               Queue queue) const {
    AddParts add = {parts, 0, k * depth, k, depth, result, false};
    if (pixels > 0) {
      Product p = {};
      p.a = dv(gradient, saved);
      p.b = plain(u, nhwc ? depth : plane, nhwc ? 0 : depth * plane);
      p.output = parts;
      p.output_pitch = depth;
      p.output_part = k * depth;
      p.m = k;
      p.n = depth;
      p.r = nhwc ? pixels : plane;
      p.images = weight_images();
      p.chunks = weight_chunks();
      p.part_size = weight_part_size();
      p.parts = add.count = weight_parts();
      const cudaError_t error =
          nhwc ? launch_product<T, Arithmetic, true, true, true, float>(p, large_weights(), queue)
               : launch_product<T, Arithmetic, false, false, true, float>(p, large_weights(), queue);
      if (error != cudaSuccess) return error;
    }
    return launch_add_parts<T>(add, queue);
  }

  // W' dv
  template <class Arithmetic>
  cudaError_t depthwise_output(const void* gradient, const void* saved, const void* pointwise_weight, void* dt,
                               Queue queue) const {
    const Operand of_v = dv(gradient, saved), of_w = plain(pointwise_weight, depth, 0);
    Product p = {};
    p.output = dt;
    p.r = k;
    p.chunks = p.part_size = divide_up(k, chunk<T>);
    p.images = p.parts = nhwc ? 1 : problem.batch;
    p.m = nhwc ? pixels : depth;
    p.n = nhwc ? depth : plane;
    p.output_pitch = p.n;
    p.output_part = nhwc ? 0 : depth * plane;
    p.a = nhwc ? of_v : of_w;
    p.b = nhwc ? of_w : of_v;
    const bool large = p.m > 64 && p.n > 64 && divide_up(p.m, 128) * divide_up(p.n, 128) * p.parts >= enough_blocks / 2;
    return nhwc ? launch_product<T, Arithmetic, false, true, true, T>(p, large, queue)
                : launch_product<T, Arithmetic, true, true, false, T>(p, large, queue);
  }

  template <class Arithmetic>
  cudaError_t all(const void* input, const Weights& weights, const void* saved, const void* gradient,
                  const Gradients& g, void* workspace, Queue queue) const {
    void* const middle = workspace;
    float* const parts = reinterpret_cast<float*>(static_cast<char*>(workspace) + middle_bytes(g));
    cudaError_t error = cudaSuccess;
    if (k > 0 && g.bias != nullptr) error = bias(gradient, saved, parts, g.bias, queue);
    if (k > 0 && g.pointwise_weight != nullptr) {
      if (error == cudaSuccess) error = depthwise_forward<T>(problem, input, weights, middle, queue);
      if (error == cudaSuccess)
        error = pointwise_weight<Arithmetic>(gradient, saved, middle, parts, g.pointwise_weight, queue);
    }
    if (error != cudaSuccess || !wants_depthwise(g)) return error;
    const void* dt = gradient;
    if (k > 0) {
      if (pixels > 0) error = depthwise_output<Arithmetic>(gradient, saved, weights.pointwise_weight, middle, queue);
      dt = middle;
    }
    if (error == cudaSuccess && problem.mid_activation != Activation::identity) {
      error = depthwise_slope<T>(problem, input, weights, dt, middle, queue);
      dt = middle;
    }
    if (error == cudaSuccess && g.input != nullptr)
      error = depthwise_input_gradient<T>(problem, dt, weights.depthwise_weight, g.input, queue);
    if (error == cudaSuccess && (g.depthwise_weight != nullptr || g.depthwise_bias != nullptr))
      error = depthwise_weight_gradient<T>(problem, input, dt, g.depthwise_weight, g.depthwise_bias, parts, queue);
    return error;
  }
};

// For Launchers.
template <class T>
int32_t depthwise_of(const Problem& problem, const void* input, const Weights& weights, void* output, Queue queue) {
  return depthwise_forward<T>(problem, input, weights, output, queue);
}

template <class T>
size_t backward_bytes_of(const Problem& problem, const Gradients& gradients) {
  const Backward<T> backward = {problem};
  return static_cast<size_t>(backward.middle_bytes(gradients) + backward.part_bytes(gradients));
}

template <class T>
int32_t backward_of(const Problem& problem, Options options, const void* input, const Weights& weights,
                    const void* saved, const void* grad_output, const Gradients& gradients, void* workspace,
                    Queue queue) {
  const Backward<T> backward = {problem};
  if constexpr (sizeof(T) == 4) {
    return options.tf32 ? backward.template all<Tf32>(input, weights, saved, grad_output, gradients, workspace, queue)
                        : backward.template all<Exact>(input, weights, saved, grad_output, gradients, workspace, queue);
  } else {
    (void)options;
    return backward.template all<T>(input, weights, saved, grad_output, gradients, workspace, queue);
  }
}

}  // namespace cuda
}  // namespace fastsep
