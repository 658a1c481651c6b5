// Which kernel of depthwise_weights.cuh a problem takes, its tiling and its parts.
#pragma once

#include "depthwise_launch.cuh"
#include "depthwise_weights.cuh"

namespace fastsep {
namespace cuda {

// Blocks that fill any device of today (eight for each of an H200's 132 processors); parts are made to come near it.
constexpr int64_t part_blocks = 1056;

inline int64_t parts_of(int64_t work, int64_t least, int64_t blocks_each) {
  int64_t parts = divide_up(part_blocks, blocks_each);
  if (parts > divide_up(work, least)) parts = divide_up(work, least);
  return parts < 1 ? 1 : parts;
}

enum class WeightsKernel { nhwc, nchw, general };

struct WeightsPlan {
  WeightsKernel kernel;
  int64_t blocks;
  size_t shared;
};

// Sets the tiling of p, also where pointers are not known yet: `whole`, whether they allow vectors. The parts are the
// same for both, so that a workspace is.
template <class T>
WeightsPlan plan_weights(DepthwiseParams* p, bool whole) {
  const int64_t taps = p->kernel_h * p->kernel_w;
  const int kernel = static_cast<int>(p->kernel_h);
  const int64_t results = weights_y(kernel), unit = results * p->dilation_h;
  if (laid_out(*p) && p->nhwc && p->channels % weights_channels(kernel) == 0 && whole) {
    const int vector = weights_channels(kernel);
    const int64_t tiles_y = p->out_h;
    const int64_t tiles_x = count_tiles(p->out_w, weights_x(kernel, static_cast<int>(p->stride_w)), p->dilation_w);
    p->log_lanes = log_ceil(divide_up(p->channels, vector), 5 - (vector == 4));  // up to 64 channels
    p->groups = static_cast<int>(divide_up(p->channels, int64_t{vector} << p->log_lanes));
    const int64_t strands = weights_threads >> p->log_lanes, all = p->batch * tiles_y * tiles_x;
    if (tiles_y <= most_blocks && tiles_x <= most_blocks && all <= most_blocks) {
      p->tiles_y = static_cast<int>(tiles_y);
      p->tiles_x = static_cast<int>(tiles_x);
      p->part_size = divide_up(divide_up(all, parts_of(all, 4 * strands, p->groups)), strands) * strands;
      p->parts = divide_up(all, p->part_size);
      const size_t numbers = static_cast<size_t>(weights_threads / 2 * taps * vector);
      return {WeightsKernel::nhwc, p->parts * p->groups, numbers * sizeof(float)};
    }
  }
  const int64_t row = p->in_w, plane = p->in_h * row, goal = 24 * 1024 / 4, most = 96 * 1024 / 4;
  const auto rows_of = [&](int64_t band) {
    const int64_t rows = (band - 1) * p->stride_h + (p->kernel_h - 1) * p->dilation_h + 1;
    return rows < p->in_h ? rows : p->in_h;
  };
  if (laid_out(*p) && !p->nhwc) {
    int64_t band = divide_up(p->out_h, unit) * unit, images = 1, units = 1;
    if (plane <= goal) {
      images = goal / (plane + widest<T>);
      if (images > divide_up(2 * weights_threads, band / results * p->out_w))
        images = divide_up(2 * weights_threads, band / results * p->out_w);
      if (images > p->batch) images = p->batch;
      if (images < 1) images = 1;
    } else {
      while ((units + 1) * unit < p->out_h && rows_of((units + 1) * unit) * row <= goal) ++units;
      band = units * unit;
    }
    const int64_t tiles = band / results * p->out_w;
    const int64_t numbers = divide_up(rows_of(band) * row + widest<T> - 1, widest<T>) * widest<T>;
    if (numbers * images <= most && tiles * images <= 0xffff) {
      p->planes = static_cast<int>(images);
      p->bands = static_cast<int>(divide_up(p->out_h, band));
      p->band = static_cast<int>(band);
      p->band_tiles = static_cast<int>(band / results);
      p->tiles_x = static_cast<int>(p->out_w);
      p->row_numbers = static_cast<int>(numbers);
      p->by_tiles = Divisor(static_cast<uint32_t>(tiles));
      p->by_columns = Divisor(static_cast<uint32_t>(p->out_w));
      const int64_t all = divide_up(p->batch, images) * p->bands;
      p->part_size = divide_up(all, parts_of(all, 1, p->channels));
      p->parts = divide_up(all, p->part_size);
      const int64_t sums = weights_threads / warp_size * (taps + 1);
      const int64_t shared = divide_up(numbers * images > sums ? numbers * images : sums, 4) * 4;
      return {WeightsKernel::nchw, p->parts * p->channels, static_cast<size_t>(shared) * sizeof(float)};
    }
  }
  const int64_t all = p->batch * p->out_h * p->out_w;
  p->log_lanes = p->nhwc ? log_ceil(p->channels, 5) : 0;
  p->groups = static_cast<int>(divide_up(p->channels, int64_t{1} << p->log_lanes));
  p->chunks = static_cast<int>(divide_up(taps + 1, general_taps));
  const int64_t strands = weights_threads >> p->log_lanes;
  p->part_size = divide_up(all, parts_of(all, 16 * strands, static_cast<int64_t>(p->groups) * p->chunks));
  p->parts = divide_up(all, p->part_size);
  return {WeightsKernel::general, p->parts * p->groups * p->chunks,
          static_cast<size_t>(weights_threads / 2 * general_taps) * sizeof(float)};
}

template <class T>
int64_t weights_part_numbers(const Problem& problem) {
  DepthwiseParams p = depthwise_params(problem);
  if (p.batch == 0) return 0;
  const int64_t numbers = (p.kernel_h * p.kernel_w + 1) * p.channels;
  DepthwiseParams q = p;
  plan_weights<T>(&p, true);
  plan_weights<T>(&q, false);
  return numbers * (p.parts > q.parts ? p.parts : q.parts);
}

template <class T>
cudaError_t launch_add_parts(AddParts p, Queue queue) {
  if (p.output == nullptr) p.rows = 0;
  if (p.tail_output == nullptr) p.tail = 0;
  const int64_t blocks = divide_up(p.rows * p.columns + p.tail, add_columns);
  if (blocks > most_blocks) return cudaErrorInvalidConfiguration;
  const int threads = add_columns * add_strands_count;
  return launch(add_parts<T>, line_of_blocks(blocks), threads, static_cast<size_t>(threads) * sizeof(float), p, queue);
}

template <class T, int K, int S>
cudaError_t launch_weights(const DepthwiseParams& p, const WeightsPlan& plan, Queue queue) {
  return launch(p.nhwc ? depthwise_weights_nhwc<T, K, S> : depthwise_weights_nchw<T, K, S>, line_of_blocks(plan.blocks),
                weights_threads, plan.shared, p, queue);
}

// d depthwise_weight and d depthwise_bias, either of which may be null, from dt; `scratch` has room for
// weights_part_numbers().
template <class T>
cudaError_t depthwise_weight_gradient(const Problem& problem, const void* input, const void* dt, void* weight_gradient,
                                      void* bias_gradient, float* scratch, Queue queue) {
  DepthwiseParams p = depthwise_params(problem);
  p.input = input;
  p.gradient = dt;
  p.output = scratch;
  p.vectors = aligned<T>(input, 0);
  const int64_t taps = p.kernel_h * p.kernel_w;
  cudaError_t error = cudaSuccess;
  p.parts = 0;
  if (p.batch > 0) {
    const size_t access = static_cast<size_t>(weights_channels(static_cast<int>(p.kernel_h))) * sizeof(T);
    const WeightsPlan plan =
        plan_weights<T>(&p, aligned<T>(input, p.channels, access) && aligned<T>(dt, p.channels, access));
    if (plan.blocks > most_blocks) return cudaErrorInvalidConfiguration;
    const bool strided = p.stride_h == 2;
    if (plan.kernel == WeightsKernel::general)
      error = launch(depthwise_weights_general<T>, line_of_blocks(plan.blocks), weights_threads, plan.shared, p, queue);
    else if (p.kernel_h == 3)
      error = strided ? launch_weights<T, 3, 2>(p, plan, queue) : launch_weights<T, 3, 1>(p, plan, queue);
    else if (p.kernel_h == 5)
      error = strided ? launch_weights<T, 5, 2>(p, plan, queue) : launch_weights<T, 5, 1>(p, plan, queue);
    else
      error = launch_weights<T, 7, 1>(p, plan, queue);
  }
  const int64_t stride = (taps + 1) * p.channels;
  if (error != cudaSuccess) return error;
  return launch_add_parts<T>(
      {scratch, p.parts, stride, taps, p.channels, weight_gradient, true, taps * p.channels, p.channels, bias_gradient},
      queue);
}

}  // namespace cuda
}  // namespace fastsep
