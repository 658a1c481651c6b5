// What the driver knows of a kernel, and what a kernel knows of its work. Plain structs: this header is included
// both by the files of one instruction set and by the rest.
#pragma once

#include "../fastsep.h"

namespace fastsep {

// Where the parts of the packed weights begin, in elements of the problem's dtype. Channel i of the depthwise
// output is numbered j*C + c here (filter j of input channel c) instead of torch's c*m + j, so that m filters per
// channel are m passes over the same input vectors.
//
//   depthwise_channels_last  [m][kh*kw][padded C]   vectors along channels, zeros in the padding
//   depthwise_planar         [m*C][kh*kw]           one scalar broadcast per tap
//   depthwise_bias           [m][padded C]
//   pointwise                [panels][m*C][panel]   panel output channels side by side, zeros in the last
//   bias                     [panels*panel]
//   expand                   [expand_panels][expansion_depth][panel]
//                            panel depthwise channels side by side, zeros in the last; depth (r, s, i)
//   expand_bias              [expand_panels*panel]
struct PackedLayout {
  int64_t padded_channels;
  int64_t panels, expand_panels;
  int64_t depthwise_channels_last, depthwise_planar, depthwise_bias, pointwise, bias, expand, expand_bias;
  int64_t elements;
};

// The register tile and vector length of one kernel; the arithmetic behind the numbers stands in the ISA files.
struct KernelShape {
  int32_t vector;          // elements in a register
  int32_t rows;            // pixels of the channels-last matrix product's tile
  int32_t columns;         // its registers of output channels; a panel is vector * columns
  int32_t planar_rows;     // output channels of the NCHW product's tile; divides the panel
  int32_t planar_columns;  // its registers of pixels
  int32_t run;             // neighbouring pixels that the channels-last depthwise keeps in registers
};

struct ForwardPlan {
  Problem problem;
  int64_t out_height, out_width;
  const void* input;
  const void* gate;
  const void* residual;
  const void* packed;
  void* output;
  PackedLayout layout;
  // The plane is cut into row_tiles x column_tiles, the panels into panel_tiles; tile i of n covers
  // [i * size / n, (i + 1) * size / n).
  int64_t row_tiles, column_tiles, panel_tiles;
  int64_t band_rows;  // with an expansion: output rows of a tile worked on at a time
  // With an expansion: in how many parts of the expanded channels a first pass makes the depthwise output of all
  // pixels, in `shared`; 0 for one pass, in which each tile makes what it needs. Behind a first pass row_tiles are not
  // of rows, but of the product's groups of pixels.
  int64_t channel_tiles;
  int64_t scratch_bytes;  // of one tile
  int64_t shared_bytes;   // of one image
  void* shared;
};

// One unit of work: some output pixels of one image, and some panels of output channels.
struct Tile {
  int64_t image;
  int64_t row_begin, row_end, column_begin, column_end;
  int64_t panel_begin, panel_end;
  int64_t row_tile;                    // its number among the row_tiles
  int64_t channel_begin, channel_end;  // panels of expanded channels, in the first of two passes
};

// The packed weights of the backward pass, channels numbered and padded as in PackedLayout.
//
//   depthwise       [m][kh*kw][padded C]    as channels-last reads them in the forward pass
//   depthwise_bias  [m][padded C]
//   reversed        [m][kh*kw][padded C]    taps in the order of ReversedTaps
//   pointwise       [panels][m][K][panel]   a panel of channels side by side, zeros in the last
//   zeros           [panel]
//
// and the partial sums of one part of the pixels, all with whole panels:
//
//   pointwise_sums  [panels - direct_panels][m][K][panel]
//   depthwise_sums  [panels][m][kh*kw][panel]
//   depthwise_bias_sums  [panels][m][panel]
//   bias_sums       [padded K]
struct BackwardLayout {
  int64_t padded_channels;
  int64_t panel, panels;  // of input channels
  int64_t depthwise, depthwise_bias, reversed, pointwise, zeros, elements;
  int64_t pointwise_sums, depthwise_sums, depthwise_bias_sums, bias_sums, sums_elements;
};

struct BackwardPlan {
  Problem problem;
  int64_t out_height, out_width;
  const void* input;
  const void* saved;
  const void* grad_output;
  Gradients gradients;
  bool mid_from_output;  // derivative_from_output(mid_activation)
  bool need_inner;       // whether dt is wanted: for the gradients of the input or the depthwise half
  // Of the first so many panels, the one part sums up the pointwise weights' gradient where it belongs: of none, or of
  // all that consist of whole vectors.
  int64_t direct_panels;
  BackwardLayout layout;
  const void* packed;
  void* sums;  // [parts][layout.sums_elements]
  // All output rows of the batch are cut into `parts`, each with partial sums of its own; those into bands, the pixels
  // worked on at a time, of at most band_images whole images, or, where that is 0, of band_rows rows of one image. None
  // of them depends on the number of threads.
  int64_t parts, band_rows, band_images;
  // How many rows of dt above a band of rows the input's gradient reaches.
  int64_t halo;
  int64_t part_slots, panel_slots;  // units of work: of some parts, and of some panels
  int64_t scratch_bytes;            // of one unit
};

// One unit of work: consecutive parts, and some panels of input channels.
struct BackwardWork {
  int64_t part_begin, part_end;
  int64_t panel_begin, panel_end;
};

struct Kernel {
  const char* name;
  Isa isa;
  Dtype dtype;
  KernelShape shape;
  // The scratch that forward_tile lays out for a tile of rows x columns pixels, in bytes; more pixels may need less. Of
  // all pixels of an image, where forward_channels comes first: what that lays out, for forward_tile needs none then.
  int64_t (*scratch_bytes)(const ForwardPlan& plan, int64_t rows, int64_t columns);
  // What two passes share, of one image.
  int64_t (*shared_bytes)(const ForwardPlan& plan);
  void (*forward_tile)(const ForwardPlan& plan, const Tile& tile, void* scratch);
  // The first of two passes.
  void (*forward_channels)(const ForwardPlan& plan, const Tile& tile, void* scratch);
  // Scratch for backward_work() with that many panels, in bytes.
  int64_t (*backward_scratch_bytes)(const BackwardPlan& plan, int64_t panels);
  // The input's gradient, and the sums of the parts.
  void (*backward_work)(const BackwardPlan& plan, const BackwardWork& work, void* scratch);
  // The sums of all parts, added up, to the gradients of a panel's depthwise half, and to those of the pointwise half
  // for output channels [begin, end).
  void (*finish_depthwise)(const BackwardPlan& plan, int64_t panel);
  void (*finish_pointwise)(const BackwardPlan& plan, int64_t begin, int64_t end);
  // to[i * to_stride + k] = from[k * from_stride + i] for k < rows, i < columns.
  void (*transpose)(const void* from, int64_t rows, int64_t columns, int64_t from_stride, void* to, int64_t to_stride);
  // Runs FMAs on registers alone; returns how many floating-point operations that were.
  double (*fma_chain)(int64_t rounds);
};

#define FASTSEP_KERNEL(isa, dtype) extern const Kernel separable_##dtype##_##isa;
#include "kernels.inc"
#undef FASTSEP_KERNEL

namespace {  // a copy for each file, see vector.h

// How many products make one element of e; 0 without an expansion.
inline int64_t expansion_depth(const Problem& p) {
  return p.expand.channels > 0 ? p.expand.channels * p.expand.kernel_h * p.expand.kernel_w : 0;
}

// How long the parts are when [0, size) is cut into `parts` as evenly as can be: one of the two, which differ by one at
// most.
struct Lengths {
  int64_t shorter, longer;
};
inline Lengths lengths_of(int64_t size, int64_t parts) { return {size / parts, (size + parts - 1) / parts}; }

// A part of the packed weights.
template <class T, class Plan>
inline const T* packed(const Plan& plan, int64_t offset) {
  return static_cast<const T*>(plan.packed) + offset;
}

// The taps of one axis in classes: an input position p (counted from the padding's begin) is reached by tap r of the
// output at o if o*stride + r*dilation = p. The taps that reach one p are alike modulo stride / gcd(stride, dilation);
// class q are those with r = q modulo that. Inside a class they stand in reverse, so that o grows.
struct ReversedTaps {
  int64_t kernel, stride, dilation, divisor;

  ReversedTaps() = default;
  ReversedTaps(int64_t taps, int64_t stride_of_taps, int64_t dilation_of_taps)
      : kernel(taps), stride(stride_of_taps), dilation(dilation_of_taps), divisor(stride_of_taps) {
    for (int64_t b = dilation; b != 0;) {
      const int64_t rest = divisor % b;
      divisor = b;
      b = rest;
    }
  }
  int64_t step() const { return stride / divisor; }
  // Between the outputs that neighbouring taps of a class reach p from.
  int64_t output_dilation() const { return dilation / divisor; }
  // The class that reaches p; `kernel` where no tap does.
  int64_t class_of(int64_t p) const {
    for (int64_t q = 0; q < step() && q < kernel; ++q)
      if ((p - q * dilation) % stride == 0) return q;
    return kernel;
  }
  int64_t count(int64_t q) const { return q < kernel ? (kernel - q + step() - 1) / step() : 0; }
  // Taps in the classes before q.
  int64_t before(int64_t q) const {
    const int64_t rest = kernel % step();
    return q < kernel ? q * (kernel / step()) + (q < rest ? q : rest) : 0;
  }
  // The output that the first tap of the class, the largest, reaches p from.
  int64_t first(int64_t q, int64_t p) const {
    return q < kernel ? (p - q * dilation) / stride - (count(q) - 1) * output_dilation() : 0;
  }
};

}  // namespace

// The kernel that serves an instruction set and a dtype; null where it was not compiled in.
const Kernel* find_kernel(Isa isa, Dtype dtype);

}  // namespace fastsep
