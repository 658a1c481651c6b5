// The backward pass, any subset of the gradients, from launches of the kernels of product.cuh and depthwise*.cuh:
//
//   z                    depthwise(x) + bias to the workspace; mid_act of it where the slope follows from the value
//   d pointwise_weight,  dv' u with u = z or mid_act(z), and the sums of dv's rows: parts,
//   d bias               then added up
//   dt                   W' dv times mid_act'(z), written where z has been
//   dx                   from dt
//   d depthwise_*        from dt and x: parts, then added up
//
// Seven launches for all gradients. z and dt are kept in the storage type: u is what the forward pass hands its own
// matrix product, and t and dt what an unfused backward pass keeps between its two halves; f32 loses nothing. They
// share one tensor of the depthwise output's size, there only while backward() runs; of the forward pass nothing but x
// (and y or v) is kept.
//
// With X, Y and U the bytes of x, y and the depthwise output, and y saved, it moves
//   z  X + U    products  2 Y + U  and  2 Y + 2 U    dx  U + X    d depthwise  X + U
// in all 3 X + 4 Y + 6 U; one U less without mid_act, and 2 Y less without an activation.
//
// Parts: sums over all pixels are cut in parts that follow from the problem alone, in fp32, [part][...] in the
// workspace, added in order. Every choice of gradients gives the same bits: where d bias is asked for alone, it is the
// same product without columns.
#pragma once

#include "depthwise_weights_launch.cuh"
#include "product.cuh"

namespace fastsep {
namespace cuda {

inline int64_t round_to_256(int64_t bytes) { return divide_up(bytes, 256) * 256; }

template <class T, class Arithmetic, bool a_across, bool b_across, Role a_role, Role b_role, class Out>
cudaError_t launch_product(Product p, bool large, Queue queue) {
  p.tiles_m = divide_up(p.m, large ? LargeProduct::rows : SmallProduct::rows);
  p.tiles_n = p.n == 0 ? 1 : divide_up(p.n, large ? LargeProduct::columns : SmallProduct::columns);
  p.wide_output =
      aligned<Out>(p.output, p.output_pitch, 4 * sizeof(Out)) && aligned<Out>(p.output, p.output_part, 4 * sizeof(Out));
  const int64_t blocks = p.tiles_m * p.tiles_n * p.parts;
  if (blocks > most_blocks) return cudaErrorInvalidConfiguration;
  const auto launch_tile = [&](auto tile) {
    using Tile = decltype(tile);
    const bool saved = (a_role == Role::gradient && p.a.activation != Activation::identity) ||
                       (b_role == Role::gradient && p.b.activation != Activation::identity);
    return launch(product<T, Arithmetic, a_across, b_across, a_role, b_role, Out, Tile>, line_of_blocks(blocks),
                  Tile::threads, 2 * Tile::stage_bytes + (saved ? Tile::saved_bytes : 0), p, queue);
  };
  return large ? launch_tile(LargeProduct()) : launch_tile(SmallProduct());
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

  // The numbers of a part: of d pointwise_weight, then of d bias, each in whole vectors.
  int64_t bias_at() const { return divide_up(k * depth, 4) * 4; }
  int64_t weight_part_numbers() const { return bias_at() + divide_up(k, 4) * 4; }

  // Whether z is mid_act's value and not its argument.
  bool keeps_value() const { return derivative_from_output(problem.mid_activation); }
  bool wants_depthwise(const Gradients& g) const {
    return g.input != nullptr || g.depthwise_weight != nullptr || g.depthwise_bias != nullptr;
  }
  // z and dt; not for K = 0 without an activation, where dt is the gradient itself.
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
    if ((g.pointwise_weight != nullptr || g.bias != nullptr) && k > 0) need(weight_parts() * weight_part_numbers());
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

  // d pointwise_weight and d bias, either of which may be null; without the former z is not read.
  template <class Arithmetic>
  cudaError_t pointwise(const void* gradient, const void* saved, const void* z, const Gradients& g, float* parts,
                        Queue queue) const {
    AddParts add = {parts, 0, weight_part_numbers(), k, depth, g.pointwise_weight, false, bias_at(), k, g.bias};
    if (pixels > 0) {
      Product p = {};
      p.a = dv(gradient, saved);
      p.b = plain(z, nhwc ? depth : plane, nhwc ? 0 : depth * plane);
      p.b.activation = keeps_value() ? Activation::identity : problem.mid_activation;
      p.output = parts;
      p.row_sums = g.bias != nullptr ? parts + bias_at() : nullptr;
      p.output_pitch = depth;
      p.output_part = weight_part_numbers();
      p.m = k;
      p.n = g.pointwise_weight != nullptr ? depth : 0;
      p.r = nhwc ? pixels : plane;
      p.images = weight_images();
      p.chunks = weight_chunks();
      p.part_size = weight_part_size();
      p.parts = add.count = weight_parts();
      constexpr Role of_a = Role::gradient, of_b = Role::activated;
      const cudaError_t error =
          nhwc ? launch_product<T, Arithmetic, true, true, of_a, of_b, float>(p, large_weights(), queue)
               : launch_product<T, Arithmetic, false, false, of_a, of_b, float>(p, large_weights(), queue);
      if (error != cudaSuccess) return error;
    }
    return launch_add_parts<T>(add, queue);
  }

  // W' dv, times mid_act'(z) where `middle` holds z.
  template <class Arithmetic>
  cudaError_t depthwise_output(const void* gradient, const void* saved, const void* pointwise_weight, void* middle,
                               Queue queue) const {
    const Operand of_v = dv(gradient, saved), of_w = plain(pointwise_weight, depth, 0);
    Product p = {};
    p.output = middle;
    p.slope = problem.mid_activation;
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
    return nhwc ? launch_product<T, Arithmetic, false, true, Role::gradient, Role::plain, T>(p, large, queue)
                : launch_product<T, Arithmetic, true, true, Role::plain, Role::gradient, T>(p, large, queue);
  }

  template <class Arithmetic>
  cudaError_t all(const void* input, const Weights& weights, const void* saved, const void* gradient,
                  const Gradients& g, void* workspace, Queue queue) const {
    void* const middle = workspace;
    float* const parts = reinterpret_cast<float*>(static_cast<char*>(workspace) + middle_bytes(g));
    cudaError_t error = cudaSuccess;
    const bool slopes = wants_depthwise(g) && problem.mid_activation != Activation::identity;
    if (k > 0 && (g.pointwise_weight != nullptr || slopes))
      error = depthwise_before_slope<T>(problem, input, weights, middle, queue);
    if (error == cudaSuccess && k > 0 && (g.pointwise_weight != nullptr || g.bias != nullptr))
      error = pointwise<Arithmetic>(gradient, saved, middle, g, parts, queue);
    if (error != cudaSuccess || !wants_depthwise(g)) return error;
    const void* const dt = k > 0 || slopes ? middle : gradient;
    if (k > 0 && pixels > 0)
      error = depthwise_output<Arithmetic>(gradient, saved, weights.pointwise_weight, middle, queue);
    if (k == 0 && slopes) error = depthwise_slope<T>(problem, input, weights, gradient, middle, queue);
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
