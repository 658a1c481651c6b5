// Weights rearranged for a kernel; the layout stands in kernel.h.
#include <algorithm>
#include <cstring>

#include "driver.h"

namespace fastsep {
namespace {

// What packed weights were made for, in front of them. 128 bytes keep the weights on a cache line.
struct Header {
  uint64_t magic;
  int32_t isa, dtype;
  int64_t channels, out_channels, multiplier, kernel_h, kernel_w;
  int64_t expand_channels, expand_kernel_h, expand_kernel_w;
  int64_t reserved[6];
};
constexpr size_t header_bytes = sizeof(Header);
static_assert(header_bytes == 128, "the weights behind the header are aligned to 64 bytes");
constexpr uint64_t magic = 0x3150455354534146;  // "FASTSEP1"

Header header_of(const Problem& p, const Kernel& kernel) {
  Header header = {};
  header.magic = magic;
  header.isa = static_cast<int32_t>(kernel.isa);
  header.dtype = static_cast<int32_t>(kernel.dtype);
  header.channels = p.channels;
  header.out_channels = p.out_channels;
  header.multiplier = p.multiplier;
  header.kernel_h = p.kernel_h;
  header.kernel_w = p.kernel_w;
  if (p.expand.channels > 0) {
    header.expand_channels = p.expand.channels;
    header.expand_kernel_h = p.expand.kernel_h;
    header.expand_kernel_w = p.expand.kernel_w;
  }
  return header;
}

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

template <class T>
struct Packing {
  const Problem& problem;
  const Kernel& kernel;
  PackedLayout layout;
  int64_t panel;
  Weights weights;
  T* packed;

  int64_t depth() const { return problem.multiplier * problem.channels; }

  void depthwise() const {
    const Problem& p = problem;
    const int64_t taps = p.kernel_h * p.kernel_w;
    const T* weight = static_cast<const T*>(weights.depthwise_weight);
    const T* bias = static_cast<const T*>(weights.depthwise_bias);
    for (int64_t filter = 0; filter < p.multiplier; ++filter) {
      for (int64_t c = 0; c < p.channels; ++c) {
        const int64_t from = c * p.multiplier + filter;
        packed[layout.depthwise_bias + filter * layout.padded_channels + c] = bias == nullptr ? T(0) : bias[from];
        std::copy_n(weight + from * taps, taps, packed + layout.depthwise_planar + (filter * p.channels + c) * taps);
      }
      T* const start = packed + layout.depthwise_bias + filter * layout.padded_channels;
      std::fill(start + p.channels, start + layout.padded_channels, T(0));
      // Some channels of all taps at a time: each cache line is filled at once, and a thousand channels, whose taps
      // stand 4 KB apart and all meet in the same cache set, take a quarter of the time.
      constexpr int64_t strip = 16;
      T* const out = packed + layout.depthwise_channels_last + filter * taps * layout.padded_channels;
      for (int64_t c = 0; c < p.channels; c += strip)
        kernel.transpose(weight + (c * p.multiplier + filter) * taps, std::min(strip, p.channels - c), taps,
                         p.multiplier * taps, out + c, layout.padded_channels);
      for (int64_t tap = 0; tap < taps; ++tap)
        std::fill(out + tap * layout.padded_channels + p.channels, out + (tap + 1) * layout.padded_channels, T(0));
    }
  }

  // One panel of a matrix [rows][columns]: out[i][k] = weight[k][i], zeros behind the last row.
  void transposed_panel(const T* weight, const T* bias, int64_t rows, int64_t columns, int64_t index, T* out,
                        T* out_bias) const {
    const int64_t first = index * panel, count = rows - first < panel ? rows - first : panel;
    for (int64_t k = 0; k < panel; ++k) out_bias[first + k] = bias != nullptr && k < count ? bias[first + k] : T(0);
    out += index * columns * panel;
    for (int64_t i = 0; i < columns; ++i)
      for (int64_t k = count; k < panel; ++k) out[i * panel + k] = T(0);
    kernel.transpose(weight + first * columns, count, columns, columns, out, panel);
  }

  void expand(int64_t index) const {
    const T* const weight = static_cast<const T*>(weights.expand_weight);
    const int64_t channels = problem.expand.channels, taps = problem.expand.kernel_h * problem.expand.kernel_w;
    transposed_panel(weight, static_cast<const T*>(weights.expand_bias), problem.channels, expansion_depth(problem),
                     index, packed + layout.expand, packed + layout.expand_bias);
    if (taps == 1) return;
    // The channels of a tap lie together here, as they do in x.
    T* const out = packed + layout.expand + index * taps * channels * panel;
    const int64_t first = index * panel, left = problem.channels - first;
    for (int64_t k = 0; k < (left < panel ? left : panel); ++k)
      for (int64_t i = 0; i < channels; ++i)
        for (int64_t tap = 0; tap < taps; ++tap)
          out[(tap * channels + i) * panel + k] = weight[((first + k) * channels + i) * taps + tap];
  }

  void pointwise(int64_t index) const {
    const Problem& p = problem;
    transposed_panel(static_cast<const T*>(weights.pointwise_weight), static_cast<const T*>(weights.bias),
                     p.out_channels, depth(), index, packed + layout.pointwise, packed + layout.bias);
    if (p.multiplier == 1) return;
    // Channels of the depthwise half are numbered otherwise here, see kernel.h.
    const int64_t first = index * panel;
    const int64_t count = p.out_channels - first < panel ? p.out_channels - first : panel;
    const T* weight = static_cast<const T*>(weights.pointwise_weight) + first * depth();
    T* out = packed + layout.pointwise + index * depth() * panel;
    for (int64_t c = 0; c < p.channels; ++c)
      for (int64_t filter = 0; filter < p.multiplier; ++filter)
        for (int64_t k = 0; k < count; ++k)
          out[(filter * p.channels + c) * panel + k] = weight[k * depth() + c * p.multiplier + filter];
  }
};

template <class T>
void pack_as(const Problem& problem, const Kernel& kernel, const Weights& weights, void* packed,
             const Executor& executor) {
  const Packing<T> packing = {problem,
                              kernel,
                              packed_layout(problem, kernel),
                              kernel.shape.vector * kernel.shape.columns,
                              weights,
                              static_cast<T*>(packed)};
  const auto body = [](void* context, int64_t index) {
    const auto& self = *static_cast<const Packing<T>*>(context);
    if (index == 0)
      self.depthwise();
    else if (index <= self.layout.panels)
      self.pointwise(index - 1);
    else
      self.expand(index - 1 - self.layout.panels);
  };
  run_on(executor, 1 + packing.layout.panels + packing.layout.expand_panels, body, const_cast<Packing<T>*>(&packing));
}

}  // namespace

PackedLayout packed_layout(const Problem& p, const Kernel& kernel) {
  const int64_t line = 64 / element_size(p.dtype), taps = p.kernel_h * p.kernel_w;
  const int64_t panel = kernel.shape.vector * kernel.shape.columns;
  PackedLayout layout;
  layout.padded_channels = round_up(p.channels, kernel.shape.vector);
  layout.panels = (p.out_channels + panel - 1) / panel;
  layout.depthwise_channels_last = 0;
  layout.depthwise_planar = round_up(p.multiplier * taps * layout.padded_channels, line);
  layout.depthwise_bias = layout.depthwise_planar + round_up(p.multiplier * p.channels * taps, line);
  layout.pointwise = layout.depthwise_bias + round_up(p.multiplier * layout.padded_channels, line);
  layout.bias = layout.pointwise + round_up(layout.panels * p.multiplier * p.channels * panel, line);
  layout.expand_panels = p.expand.channels > 0 ? (p.channels + panel - 1) / panel : 0;
  layout.expand = layout.bias + round_up(layout.panels * panel, line);
  layout.expand_bias = layout.expand + round_up(layout.expand_panels * expansion_depth(p) * panel, line);
  layout.elements = layout.expand_bias + round_up(layout.expand_panels * panel, line);
  return layout;
}

size_t packed_size(const Problem& problem, const Kernel& kernel) {
  return header_bytes + static_cast<size_t>(packed_layout(problem, kernel).elements * element_size(problem.dtype));
}

bool packed_for(const Problem& problem, const Kernel& kernel, const void* packed, size_t bytes) {
  const Header header = header_of(problem, kernel);
  return bytes >= packed_size(problem, kernel) && std::memcmp(packed, &header, header_bytes) == 0;
}

void pack_weights(const Problem& problem, const Kernel& kernel, const Weights& weights, void* packed,
                  const Executor& executor) {
  const Header header = header_of(problem, kernel);
  std::memcpy(packed, &header, header_bytes);
  void* const behind = static_cast<char*>(packed) + header_bytes;
  if (problem.dtype == Dtype::f32)
    pack_as<float>(problem, kernel, weights, behind, executor);
  else
    pack_as<double>(problem, kernel, weights, behind, executor);
}

const void* packed_weights(const void* packed) { return static_cast<const char*>(packed) + header_bytes; }

}  // namespace fastsep
