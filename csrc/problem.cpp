// Checks of a problem, and the words for what can be wrong with it.
#include <initializer_list>

#include "fastsep.h"

namespace fastsep {
namespace {

int64_t out_size(int64_t size, int64_t before, int64_t after, int64_t kernel, int64_t dilation, int64_t stride) {
  const int64_t room = size + before + after - dilation * (kernel - 1) - 1;
  return room < 0 ? 0 : room / stride + 1;
}

// A product of sizes that remembers whether it has left the range in which nothing that kernels form of it overflows: a
// thread's scratch is less than 2^3 such parts of up to 8 bytes an element, so 2^9 threads take less than 2^63 bytes.
// No memory holds as many elements.
class Checked {
 public:
  explicit Checked(int64_t value) : value_(value) {}
  Checked times(int64_t factor) const {
    Checked result = *this;
    if (__builtin_mul_overflow(value_, factor, &result.value_) || result.value_ > limit) result.overflow_ = true;
    return result;
  }
  Checked times(const Checked& factor) const {
    Checked result = times(factor.value_);
    result.overflow_ |= factor.overflow_;
    return result;
  }
  Checked plus(int64_t summand) const {
    Checked result = *this;
    if (__builtin_add_overflow(value_, summand, &result.value_) || result.value_ > limit) result.overflow_ = true;
    return result;
  }
  bool overflow() const { return overflow_; }

 private:
  static constexpr int64_t limit = int64_t{1} << 48;
  int64_t value_;
  bool overflow_ = false;
};

// A side of the output, whose square is formed.
constexpr int64_t most_side = int64_t{1} << 31;

// Everything that the kernels form along one axis: the padded size, the reach of the taps, and the copied input of a
// tile, with room for a block of rows or a vector behind the last tap.
bool axis_overflows(int64_t size, int64_t before, int64_t after, int64_t kernel, int64_t dilation, int64_t stride) {
  const Checked padded = Checked(size).plus(before).plus(after);
  const Checked reach = Checked(kernel).times(dilation);
  const Checked copied = padded.plus(stride).plus(kernel).plus(64).times(64);
  const Checked stepped = Checked(stride).times(64);
  return padded.overflow() || reach.overflow() || copied.overflow() || stepped.overflow();
}

}  // namespace

const char* describe(Status status) {
  switch (status) {
    case Status::ok: return "ok";
    case Status::bad_size:
      return "sizes, stride, dilation and multiplier must be at least 1, batch, output channels and padding at least 0";
    case Status::empty_output: return "the dilated kernel is larger than the padded input, so there is no output";
    case Status::overflow: return "a product of sizes does not fit in 64 bits";
    case Status::bad_enum: return "unknown dtype, layout or activation number, or one behind an absent pointwise half";
    case Status::bad_expansion:
      return "an expansion needs channels-last, one filter per channel, and of NCHW 3 channels by a stride of 2";
    case Status::bad_operand:
      return "a gate needs channels-last, one filter per channel, a kernel of 1 x 1 and a pointwise half; a residual "
             "channels-last, a pointwise half and, where it is the input, an output like it";
    case Status::unsupported_isa: return "the instruction set is not compiled in or not supported by this processor";
    case Status::small_workspace: return "the workspace is smaller than workspace_bytes() asks for";
    case Status::bad_packed: return "the packed weights were made for another problem or instruction set";
    case Status::no_kernel: return "the kernel asked for is not there for this problem, this device or these addresses";
  }
  return "unknown status";
}

int64_t out_height(const Problem& p) {
  return out_size(p.height, p.pad_top, p.pad_bottom, p.kernel_h, p.dilation_h, p.stride_h);
}

int64_t out_width(const Problem& p) {
  return out_size(p.width, p.pad_left, p.pad_right, p.kernel_w, p.dilation_w, p.stride_w);
}

bool derivative_from_output(Activation activation) {
  switch (activation) {
    case Activation::identity:
    case Activation::relu:
    case Activation::relu6:
    case Activation::leaky_relu:
    case Activation::sigmoid:
    case Activation::tanh: return true;
    // hardsigmoid rounds to 1 a little below its corner; the others take a value twice.
    case Activation::silu:
    case Activation::hardswish:
    case Activation::hardsigmoid:
    case Activation::gelu:
    case Activation::gelu_tanh: return false;
  }
  return false;
}

namespace {

Status validate_expansion(const Problem& p) {
  const Expansion& e = p.expand;
  for (int64_t size : {e.height, e.width, e.kernel_h, e.kernel_w, e.stride_h, e.stride_w})
    if (size < 1) return Status::bad_size;
  if (e.pad_top < 0 || e.pad_left < 0) return Status::bad_size;
  if (e.planar && (e.channels != 3 || e.stride_w != 2)) return Status::bad_expansion;
  // The rows that the plane of e sees, and a vector behind; x; and the patches of the plane.
  const Checked rows = Checked(p.height).times(e.stride_h).plus(e.kernel_h).plus(e.pad_top).plus(e.height);
  const Checked columns = Checked(p.width).times(e.stride_w).plus(e.kernel_w).plus(e.pad_left).plus(e.width);
  const Checked patch = Checked(e.channels).plus(64).times(e.kernel_h).times(e.kernel_w);
  if (rows.overflow() || columns.overflow() || patch.overflow()) return Status::overflow;
  const Checked input = Checked(p.batch < 1 ? 1 : p.batch).times(e.channels).times(e.height).times(e.width);
  const Checked patches = Checked(p.height).plus(64).times(p.width).times((e.channels + 64) * e.kernel_h * e.kernel_w);
  const Checked copied = rows.times(columns).times(e.channels);
  return input.overflow() || patches.overflow() || copied.overflow() ? Status::overflow : Status::ok;
}

}  // namespace

Status validate(const Problem& p) {
  const auto in_range = [](int32_t value, int32_t count) { return value >= 0 && value < count; };
  if (!in_range(static_cast<int32_t>(p.dtype), 2) || !in_range(static_cast<int32_t>(p.layout), 2) ||
      !in_range(static_cast<int32_t>(p.mid_activation), activation_count) ||
      !in_range(static_cast<int32_t>(p.activation), activation_count))
    return Status::bad_enum;
  if (!in_range(static_cast<int32_t>(p.expand.activation), activation_count)) return Status::bad_enum;
  if (p.out_channels == 0 && p.activation != Activation::identity) return Status::bad_enum;
  for (int64_t size : {p.channels, p.height, p.width, p.multiplier, p.kernel_h, p.kernel_w, p.stride_h, p.stride_w,
                       p.dilation_h, p.dilation_w})
    if (size < 1) return Status::bad_size;
  for (int64_t size : {p.batch, p.out_channels, p.pad_top, p.pad_bottom, p.pad_left, p.pad_right})
    if (size < 0) return Status::bad_size;
  if (axis_overflows(p.height, p.pad_top, p.pad_bottom, p.kernel_h, p.dilation_h, p.stride_h) ||
      axis_overflows(p.width, p.pad_left, p.pad_right, p.kernel_w, p.dilation_w, p.stride_w))
    return Status::overflow;
  if (p.expand.channels < 0) return Status::bad_size;
  if (p.expand.channels > 0 && (p.layout != Layout::nhwc || p.multiplier != 1)) return Status::bad_expansion;
  const bool is_pair = p.layout == Layout::nhwc && p.out_channels > 0, is_1x1 = p.kernel_h == 1 && p.kernel_w == 1;
  if ((p.residual || p.gate) && !is_pair) return Status::bad_operand;
  if (p.gate && (p.multiplier != 1 || !is_1x1 || p.expand.channels > 0)) return Status::bad_operand;
  if (p.expand.channels > 0 && validate_expansion(p) != Status::ok) return validate_expansion(p);
  const int64_t oh = out_height(p), ow = out_width(p);
  if (oh < 1 || ow < 1) return Status::empty_output;
  const int64_t batch = p.batch < 1 ? 1 : p.batch;
  // Within the limits of axis_overflows() these sums fit.
  const int64_t reach_h = p.kernel_h * p.dilation_h, reach_w = p.kernel_w * p.dilation_w;
  if (Checked(p.channels).plus(64).overflow() || Checked(p.out_channels).plus(64).overflow()) return Status::overflow;
  const int64_t padded_channels = p.channels + 64, padded_out_channels = p.out_channels + 64;
  const Checked expand =
      Checked(p.expand.channels + 64).times(padded_channels).times(p.expand.kernel_h + 1).times(p.expand.kernel_w + 1);
  const Checked input = Checked(batch).times(padded_channels).times(p.height).times(p.width);
  const Checked output = Checked(batch).times(padded_out_channels).times(oh).times(ow);
  const Checked inner = Checked(batch).times(padded_channels).times(p.multiplier).times(oh).times(ow);
  // The backward pass keeps up to 32 partial sums of each weight.
  const Checked depthwise = Checked(padded_channels).times(p.multiplier).times(p.kernel_h).times(p.kernel_w).times(32);
  const Checked pointwise = Checked(padded_out_channels).times(p.multiplier).times(padded_channels).times(32);
  // The largest scratch: the depthwise output of a whole image, or the copied rows of a plane.
  const Checked tile = Checked(oh).times(ow).plus(4096).times(p.multiplier).times(padded_channels);
  const int64_t phases = p.stride_w < reach_w ? p.stride_w : reach_w;
  const Checked copies = Checked(oh)
                             .plus(64)
                             .times(p.stride_h)
                             .plus(reach_h)
                             .plus(64 * p.dilation_h)
                             .times(Checked(ow).plus(64).times(phases).plus(reach_w));
  // Where the i-th of n parts begins is size * i / n.
  if (oh > most_side || ow > most_side) return Status::overflow;
  for (const Checked& product : {input, output, inner, expand, depthwise, pointwise, tile, copies})
    if (product.overflow()) return Status::overflow;
  return Status::ok;
}

}  // namespace fastsep
