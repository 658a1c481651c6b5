// fastsep.h: the whole native contract.
//
//   y = act(pointwise(mid_act(depthwise(x) + depthwise_bias)) + bias)
//
//   t[n, c*m + j, oy, ox] = mid_act(depthwise_bias[c*m + j]
//       + sum over r < kernel_h, s < kernel_w of
//         x[n, c, oy*stride_h - pad_top + r*dilation_h, ox*stride_w - pad_left + s*dilation_w]
//         * depthwise_weight[c*m + j, r, s])
//   y[n, k, oy, ox] = act(bias[k] + sum over i < C*m of t[n, i, oy, ox] * pointwise_weight[k, i])
//
// Taps outside the plane are left out of the sum. x is [N, C, H, W] and y is [N, K, OH, OW], both dense in the
// same layout (nchw, or nhwc for PyTorch's channels_last); depthwise_weight is [C*m, kernel_h, kernel_w] and
// pointwise_weight is [K, C*m], both row-major whatever the layout of x.
//
// K = 0 stands for the depthwise half alone: y is t, [N, C*m, OH, OW], and `activation` must be the identity.
//
// With `gate` the depthwise half is a product with a factor for each image and channel, [N, C], as squeeze-and-excite
// has it: t[n, c, oy, ox] = mid_act(depthwise_bias[c] + x[n, c, oy*stride_h, ox*stride_w] * gate[n, c]). For nhwc, m =
// 1, a kernel of 1 x 1 and a pointwise half, without an expansion. With `residual` a tensor like y is added behind act,
// for nhwc and a pointwise half. Both in the forward pass only.
//
// With expand.channels = E > 0 a dense convolution goes before: the depthwise half sees
//
//   e[n, c, h, w] = expand_act(expand_bias[c] + sum over r, s and i < E of
//       x[n, i, h*expand.stride_h - expand.pad_top + r, w*expand.stride_w - expand.pad_left + s]
//       * expand_weight[c, i, r, s])
//
// instead of x, which is [N, E, expand.height, expand.width]; outside the plane of e there is still nothing. A kernel
// of 1 x 1 makes the inverted residual block of MobileNetV2, with x for a residual (E = K, same plane); a 3 x 3 of
// stride 2 on three channels the first layers of most networks, and there x may be NCHW, as images come: expand.planar.
// For nhwc and m = 1, and forward only.
//
// The gradients, for g = dL/dy, with t without mid_act, u = mid_act(t), v = pointwise(u) + bias:
//
//   dv = g * act'(v)               d bias = sum of dv                d pointwise_weight[k, i] = sum of dv[k] * u[i]
//   dt = (W' dv) * mid_act'(t)     d depthwise_bias = sum of dt      d depthwise_weight[i, r, s] = sum of dt[i] * x at
//   (r, s) dx[c, iy, ix] = sum over the taps (r, s) and filters j that reach (iy, ix) of dt[c*m + j] * depthwise_weight
//
// Of the forward pass they need x alone: u is computed again, tile by tile.
//
// Nothing here allocates, prints, throws or aborts, and nothing knows of PyTorch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastsep {

// f16 and bf16 have kernels on CUDA only, see fastsep_cuda.h.
enum class Dtype : int32_t { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };

enum class Layout : int32_t { nchw = 0, nhwc = 1 };

// The order is part of the contract: Python passes these numbers (see fastsep/_native.py).
enum class Activation : int32_t {
  identity = 0,
  relu = 1,
  relu6 = 2,
  leaky_relu = 3,  // negative slope 0.01
  silu = 4,
  hardswish = 5,
  hardsigmoid = 6,
  sigmoid = 7,
  tanh = 8,
  gelu = 9,        // x * Phi(x), by erf
  gelu_tanh = 10,  // the tanh approximation of gelu
};
constexpr int32_t activation_count = 11;

enum class Status : int32_t {
  ok = 0,
  bad_size,         // a size, stride, dilation or multiplier below 1, a negative padding or batch
  empty_output,     // the dilated kernel is larger than the padded plane
  overflow,         // a product of sizes is beyond all memory, or an output of more than 2^31 rows or columns
  bad_enum,         // a dtype, layout or activation outside its enumeration
  bad_expansion,    // an expansion where there is none, see above
  bad_operand,      // a gate or residual where there is none, see above, or without its address
  unsupported_isa,  // the named instruction set is not there on this machine
  small_workspace,  // less than workspace_bytes() asked for
  bad_packed,       // packed weights made for another problem or instruction set
  no_kernel,        // the kernel asked for is not there for the problem, the device or the addresses
};

// One sentence for each status, for error messages.
const char* describe(Status status);

struct Expansion {
  int64_t channels;  // 0: none
  Activation activation;
  int64_t height, width;  // of x; those of the problem are of e
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t pad_top, pad_left;
  bool planar;  // x is NCHW: of three channels, for a stride_w of 2
};

struct Problem {
  int64_t batch, channels, height, width;
  int64_t out_channels;  // 0: the depthwise half alone
  int64_t multiplier;    // depthwise filters per input channel
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t dilation_h, dilation_w;
  int64_t pad_top, pad_bottom, pad_left, pad_right;
  Dtype dtype;
  Layout layout;
  Activation mid_activation, activation;
  Expansion expand;
  bool residual, gate;
};

// Checks every field and every product that the kernels form; the other calls expect a problem that passed.
Status validate(const Problem& problem);

int64_t out_height(const Problem& problem);
int64_t out_width(const Problem& problem);

// An instruction set, best first. `best` asks for the first that runs here
// (or the one that the environment variable FASTSEP_ISA names).
enum class Isa : int32_t { best = -1, avx512 = 0, avx2 = 1, neon = 2, scalar = 3 };
constexpr int32_t isa_count = 4;

const char* isa_name(Isa isa);
// False where the name is unknown.
bool isa_from_name(const char* name, Isa* isa);
bool isa_compiled(Isa isa);
// Compiled in, and supported by this processor and operating system.
bool isa_available(Isa isa);
// The one that `best` stands for; unsupported_isa where FASTSEP_ISA names none that runs here.
Status best_isa(Isa* isa);

// Runs body(context, index) for every index in [0, count), on any threads, and returns when all are done.
struct Executor {
  int threads = 1;
  void (*run)(void* state, int64_t count, void (*body)(void* context, int64_t index), void* context) = nullptr;
  void* state = nullptr;  // of the executor itself
};

// Every kernel that was compiled in, `op_dtype_isa`.
int32_t kernel_count();
const char* kernel_name(int32_t index);

// Weights rearranged for the kernels of one instruction set, so that a frozen layer does it once.
Status packed_bytes(const Problem& problem, Isa isa, size_t* bytes);
struct Weights {
  const void* depthwise_weight;
  const void* depthwise_bias;  // may be null
  const void* pointwise_weight;
  const void* bias;                     // may be null
  const void* expand_weight = nullptr;  // [C, E, kernel_h, kernel_w] of the expansion; null without
  const void* expand_bias = nullptr;    // may be null
};
Status pack(const Problem& problem, Isa isa, const Weights& weights, void* packed, size_t bytes,
            const Executor& executor);

// Room for the scratch tiles of all threads, and for the packed weights where the caller has none.
Status workspace_bytes(const Problem& problem, Isa isa, int threads, bool with_packed, size_t* bytes);

// What a call reads beside its weights. A residual of null is x itself, which then must be like the output.
struct Inputs {
  const void* x;
  const void* gate;
  const void* residual;
  Inputs(const void* input, const void* gate_of_problem = nullptr, const void* residual_of_problem = nullptr)
      : x(input), gate(gate_of_problem), residual(residual_of_problem) {}
};

// Inputs and output as described above; `packed` as pack() made it. Workspace aligned to 64 bytes.
// The result is the same to the bit for every number of threads.
Status forward(const Problem& problem, Isa isa, const Inputs& inputs, const void* packed, size_t packed_size,
               void* output, void* workspace, size_t workspace_size, const Executor& executor);

// As forward(), from plain weights: packs them into the workspace first.
Status forward_unpacked(const Problem& problem, Isa isa, const Inputs& inputs, const Weights& weights, void* output,
                        void* workspace, size_t workspace_size, const Executor& executor);

// Whether an activation's derivative can be had from its value, so that nothing else need be kept.
bool derivative_from_output(Activation activation);

// dL/d each, in the shapes and layouts of what they belong to; null where not asked for.
struct Gradients {
  void* input;
  void* depthwise_weight;
  void* depthwise_bias;
  void* pointwise_weight;
  void* bias;
};

Status backward_workspace_bytes(const Problem& problem, Isa isa, int threads, const Gradients& gradients,
                                size_t* bytes);

// grad_output in the layout of y. `saved`, in the same layout, is y where derivative_from_output(activation), else v;
// it is not read for the identity. weights.bias is not read. Gradients are written, not added to what is there. The
// result is the same to the bit for every number of threads and every choice of gradients.
Status backward(const Problem& problem, Isa isa, const void* input, const Weights& weights, const void* saved,
                const void* grad_output, const Gradients& gradients, void* workspace, size_t workspace_size,
                const Executor& executor);

// The oracle: plain loops, sums in double. With `magnitude`, of absolute values throughout (activations left
// out): the sum |a||b| that an error bound is made of.
void reference_forward(const Problem& problem, const Inputs& inputs, const Weights& weights, double* output,
                       bool magnitude);
// The gradients, all of them and in double. With `magnitude`, of absolute values, each activation's derivative
// taken for 1.
void reference_backward(const Problem& problem, const void* input, const Weights& weights, const void* grad_output,
                        const Gradients& gradients, bool magnitude);

// Multiply-adds times two per second that one thread reaches with nothing but FMAs in registers, over about
// `seconds`.
Status fma_peak(Isa isa, Dtype dtype, double seconds, double* flops_per_second);

// Bytes read and written per second, added together, by all threads that copy one half of the buffer over the other,
// over about `seconds`. The buffer should be a few times the last-level cache; its contents are lost.
// small_workspace where it is less than memory_bandwidth_least bytes.
constexpr size_t memory_bandwidth_least = size_t{1} << 20;
Status memory_bandwidth(void* buffer, size_t bytes, double seconds, const Executor& executor, double* bytes_per_second);

}  // namespace fastsep
