// Which kernel of depthwise.cuh or depthwise_general.cuh a problem takes, and its tiling.
#pragma once

#include "depthwise_general.cuh"

namespace fastsep {
namespace cuda {

// A grid is never that large in practice; where it would be, the launch is refused and not cut short.
constexpr int64_t most_blocks = 0x7fffffff;

inline int log_ceil(int64_t value, int most) {
  int log = 0;
  while (log < most && int64_t{1} << log < value) ++log;
  return log;
}

inline dim3 line_of_blocks(int64_t count) { return dim3(static_cast<unsigned>(count)); }

// The square kernels that are laid out, see depthwise.cuh.
inline bool laid_out(const DepthwiseParams& p) {
  const int64_t most = int64_t{1} << 24;
  for (int64_t size : {p.in_h, p.in_w, p.out_h, p.out_w, p.dilation_h, p.dilation_w})
    if (size > most) return false;
  for (int64_t pad : {p.pad_top, p.pad_left})
    if (pad > most || pad < -most) return false;
  const bool kernel = p.kernel_h == p.kernel_w && (p.kernel_h == 3 || p.kernel_h == 5 || p.kernel_h == 7);
  const bool dilated = p.dilation_h > 1 || p.dilation_w > 1;
  const bool stride = p.stride_h == p.stride_w && (p.stride_h == 1 || (p.stride_h == 2 && !dilated && p.kernel_h < 7));
  return p.multiplier == 1 && kernel && stride;
}

// Rows (or columns) of tiles of `results` each.
inline int64_t count_tiles(int64_t size, int64_t results, int64_t dilation) {
  return dilation * divide_up(divide_up(size, dilation), results);
}

struct DepthwiseGrid {
  int64_t blocks;
  int threads;
  size_t shared;
};

inline DepthwiseGrid plan_nhwc(DepthwiseParams* p, bool spreads) {
  const int64_t extra_y = spreads ? p->pad_top % p->stride_h : 0, extra_x = spreads ? p->pad_left % p->stride_w : 0;
  const int kernel = static_cast<int>(p->kernel_h), stride = static_cast<int>(p->stride_h);
  const int results_x = nhwc_x(kernel, stride);
  const int64_t tiles_y = count_tiles(p->out_h + extra_y, nhwc_y(kernel, stride, spreads), p->dilation_h);
  const int64_t tiles_x = count_tiles(p->out_w + extra_x, results_x, p->dilation_w);
  p->tiles_y = static_cast<int>(tiles_y);
  p->tiles_x = static_cast<int>(tiles_x);
  const int log_nhwc_lanes = log_ceil(nhwc_lanes, 5);
  p->log_lanes = log_ceil(divide_up(p->channels, nhwc_channels), log_nhwc_lanes);
  const int64_t width = int64_t{nhwc_channels} << p->log_lanes;
  p->groups = static_cast<int>(divide_up(p->channels, width));
  for (int log_threads = 8;; log_threads -= 2) {  // 256, or 64 where there is little to do
    const int log_strands = log_threads - p->log_lanes;
    const int log_wide = results_x == 8 ? 1 : 2;  // 16 columns
    p->log_x = log_ceil(tiles_x, log_strands < log_wide ? log_strands : log_wide);
    p->log_y = log_ceil(tiles_y, log_strands - p->log_x < 3 ? log_strands - p->log_x : 3);
    p->patches_x = static_cast<int>(divide_up(tiles_x, int64_t{1} << p->log_x));
    p->patches_y = static_cast<int>(divide_up(tiles_y, int64_t{1} << p->log_y));
    const int64_t images = int64_t{1} << (log_strands - p->log_x - p->log_y);
    const int64_t patches = static_cast<int64_t>(p->patches_x) * p->patches_y;
    const int64_t blocks = divide_up(p->batch, images) * patches * p->groups;
    if (blocks >= enough_blocks || log_threads == 6)
      return {blocks, 1 << log_threads, static_cast<size_t>((p->kernel_h * p->kernel_w + 1) * width) * sizeof(float)};
  }
}

// No blocks where the rows of one tile do not fit shared memory.
template <class T>
DepthwiseGrid plan_nchw(DepthwiseParams* p, bool spreads) {
  constexpr int64_t goal = 24 * 1024 / 4, most = 96 * 1024 / 4;  // numbers in shared memory
  const int64_t taps = p->kernel_h * p->kernel_w + 1, plane = p->in_h * p->in_w, all = p->batch * p->channels;
  const int64_t extra_y = spreads ? p->pad_top % p->stride_h : 0, extra_x = spreads ? p->pad_left % p->stride_w : 0;
  const int64_t unit = nchw_y * p->dilation_h, height = p->out_h + extra_y;
  const int64_t columns = divide_up(p->out_w + extra_x, spreads ? p->stride_w : 1);
  const auto rows_of = [&](int64_t band) {
    const int64_t rows = spreads ? (band - 1) / p->stride_h + (p->kernel_h - 1) / p->stride_h + 1
                                 : (band - 1) * p->stride_h + (p->kernel_h - 1) * p->dilation_h + 1;
    return rows < p->in_h ? rows : p->in_h;
  };
  int64_t band = divide_up(height, unit) * unit, planes = 1, staged = plane;
  p->bands = 1;
  if (plane <= goal) {
    const int64_t tiles = band / nchw_y * columns;
    planes = goal / (plane + taps);
    if (planes > divide_up(2 * depthwise_threads, tiles)) planes = divide_up(2 * depthwise_threads, tiles);
    if (planes > divide_up(all, enough_blocks)) planes = divide_up(all, enough_blocks);
    if (planes < 1) planes = 1;
    staged = planes * plane;
  } else if (plane > most || height > 2 * unit) {
    // As many rows as come near the goal, the halo at most half of them if that is possible.
    int64_t units = 1;
    while ((units + 1) * unit < height && rows_of((units + 1) * unit) * p->in_w <= goal) ++units;
    band = units * unit;
    p->bands = static_cast<int>(divide_up(height, band));
    staged = p->bands == 1 ? plane : rows_of(band) * p->in_w;
  }
  p->planes = static_cast<int>(planes);
  p->band = static_cast<int>(band);
  p->band_tiles = static_cast<int>(band / nchw_y);
  p->tiles_x = static_cast<int>(columns);
  const int64_t tiles = band / nchw_y * columns;
  if (staged > most || tiles * planes > 0xffff || tiles > 0xffff) return {0, 0, 0};
  p->by_tiles = Divisor(static_cast<uint32_t>(tiles));
  p->by_columns = Divisor(static_cast<uint32_t>(columns));
  const int64_t numbers = divide_up(planes * taps, 4) * 4 + divide_up(staged + widest<T>, 8) * 8;
  return {divide_up(all, planes) * p->bands, depthwise_threads, static_cast<size_t>(numbers) * sizeof(float)};
}

template <class T, int K, int S, bool spreads>
bool launch_laid_out(DepthwiseParams p, Queue queue, cudaError_t* error) {
  const DepthwiseGrid grid = p.nhwc ? plan_nhwc(&p, spreads) : plan_nchw<T>(&p, spreads);
  if (grid.threads == 0 || grid.blocks > most_blocks) return false;
  *error = launch(p.nhwc ? depthwise_nhwc<T, K, S, spreads> : depthwise_nchw<T, K, S, spreads>,
                  line_of_blocks(grid.blocks), grid.threads, grid.shared, p, queue);
  return true;
}

// Where `gradient`, p describes the sum of the input's gradient: input is dt, output dx; turned is set here.
template <class T>
cudaError_t launch_depthwise(DepthwiseParams p, bool gradient, Queue queue) {
  const int64_t out_channels = gradient ? p.channels / p.multiplier : p.channels;
  const int64_t results = p.batch * out_channels * p.out_h * p.out_w;
  if (results == 0) return cudaSuccess;
  p.vectors = aligned<T>(p.input, 0);
  p.from_output = derivative_from_output(p.activation);
  const size_t access = nhwc_channels * sizeof(T);
  const bool whole = !p.nhwc || (aligned<T>(p.input, p.channels, access) && aligned<T>(p.output, p.channels, access) &&
                                 aligned<T>(p.gradient, p.channels, access));
  cudaError_t error = cudaSuccess;
  if (laid_out(p) && whole) {
    const bool spreads = gradient && p.stride_h == 2;
    DepthwiseParams q = p;
    if (gradient && !spreads) {
      q.turned = true;
      q.pad_top = p.dilation_h * (p.kernel_h - 1) - p.pad_top;
      q.pad_left = p.dilation_w * (p.kernel_w - 1) - p.pad_left;
    }
    bool done = false;
    if (p.kernel_h == 3)
      done = spreads           ? launch_laid_out<T, 3, 2, true>(q, queue, &error)
             : p.stride_h == 2 ? launch_laid_out<T, 3, 2, false>(q, queue, &error)
                               : launch_laid_out<T, 3, 1, false>(q, queue, &error);
    else if (p.kernel_h == 5)
      done = spreads           ? launch_laid_out<T, 5, 2, true>(q, queue, &error)
             : p.stride_h == 2 ? launch_laid_out<T, 5, 2, false>(q, queue, &error)
                               : launch_laid_out<T, 5, 1, false>(q, queue, &error);
    else
      done = launch_laid_out<T, 7, 1, false>(q, queue, &error);
    if (done) return error;
  }
  const int64_t blocks = divide_up(results, depthwise_threads);
  if (blocks > most_blocks) return cudaErrorInvalidConfiguration;
  if (!gradient) return launch(depthwise_general<T>, line_of_blocks(blocks), depthwise_threads, 0, p, queue);
  const auto common = [](int64_t a, int64_t b) {
    while (b != 0) {
      const int64_t rest = a % b;
      a = b;
      b = rest;
    }
    return a;
  };
  const int64_t common_h = common(p.stride_h, p.dilation_h), common_w = common(p.stride_w, p.dilation_w);
  p.tap_step_h = p.stride_h / common_h;
  p.tap_step_w = p.stride_w / common_w;
  p.result_step_h = p.dilation_h / common_h;
  p.result_step_w = p.dilation_w / common_w;
  return launch(depthwise_gradient_general<T>, line_of_blocks(blocks), depthwise_threads, 0, p, queue);
}

inline DepthwiseParams depthwise_params(const Problem& problem) {
  DepthwiseParams p = {};
  p.batch = problem.batch;
  p.channels = problem.channels * problem.multiplier;
  p.multiplier = problem.multiplier;
  p.in_h = problem.height;
  p.in_w = problem.width;
  p.out_h = out_height(problem);
  p.out_w = out_width(problem);
  p.kernel_h = problem.kernel_h;
  p.kernel_w = problem.kernel_w;
  p.stride_h = problem.stride_h;
  p.stride_w = problem.stride_w;
  p.dilation_h = problem.dilation_h;
  p.dilation_w = problem.dilation_w;
  p.pad_top = problem.pad_top;
  p.pad_left = problem.pad_left;
  p.nhwc = problem.layout == Layout::nhwc;
  return p;
}

// output = mid_act(depthwise(input) + depthwise_bias): forward() of a problem with K = 0.
template <class T>
cudaError_t depthwise_forward(const Problem& problem, const void* input, const Weights& weights, void* output,
                              Queue queue) {
  DepthwiseParams p = depthwise_params(problem);
  p.input = input;
  p.weight = weights.depthwise_weight;
  p.bias = weights.depthwise_bias;
  p.output = output;
  p.activation = problem.mid_activation;
  return launch_depthwise<T>(p, false, queue);
}

// For the backward pass: z, that is output = u where mid_act' follows from u, else t = depthwise(input) +
// depthwise_bias. mid_act'(z) is mid_act'(t) but for rounding: where it jumps, z stays on t's side. (At 0 rounding
// keeps the sign.)
template <class T>
cudaError_t depthwise_before_slope(const Problem& problem, const void* input, const Weights& weights, void* output,
                                   Queue queue) {
  DepthwiseParams p = depthwise_params(problem);
  p.input = input;
  p.weight = weights.depthwise_weight;
  p.bias = weights.depthwise_bias;
  p.output = output;
  const Activation act = problem.mid_activation;
  p.activation = derivative_from_output(act) ? act : Activation::identity;
  if (sizeof(T) == 2) {
    const bool at_3 = act == Activation::hardswish || act == Activation::hardsigmoid;
    p.corner = at_3 ? 3.f : act == Activation::relu6 ? 6.f : 0.f;
    // Less a unit in the last place: of [2, 4) and [4, 8), with 10 or 7 bits behind the point.
    const float unit = std::is_same<T, __half>::value ? 0x1p-10f : 0x1p-7f;
    p.below = p.corner - unit * (at_3 ? 2.f : 4.f);
  }
  return launch_depthwise<T>(p, false, queue);
}

// dt = gradient * mid_act'(depthwise(input) + depthwise_bias). dt may be `gradient` itself.
template <class T>
cudaError_t depthwise_slope(const Problem& problem, const void* input, const Weights& weights, const void* gradient,
                            void* dt, Queue queue) {
  DepthwiseParams p = depthwise_params(problem);
  p.input = input;
  p.weight = weights.depthwise_weight;
  p.bias = weights.depthwise_bias;
  p.gradient = gradient;
  p.output = dt;
  p.activation = problem.mid_activation;
  return launch_depthwise<T>(p, false, queue);
}

// dx from dt, both of T.
template <class T>
cudaError_t depthwise_input_gradient(const Problem& problem, const void* dt, const void* depthwise_weight, void* dx,
                                     Queue queue) {
  DepthwiseParams p = depthwise_params(problem);
  p.input = dt;
  p.weight = depthwise_weight;
  p.output = dx;
  const int64_t out_h = p.out_h, out_w = p.out_w;
  p.out_h = p.in_h;
  p.out_w = p.in_w;
  p.in_h = out_h;
  p.in_w = out_w;
  p.activation = Activation::identity;
  return launch_depthwise<T>(p, true, queue);
}

}  // namespace cuda
}  // namespace fastsep
