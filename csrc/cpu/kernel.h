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
struct PackedLayout {
  int64_t padded_channels;
  int64_t panels;
  int64_t depthwise_channels_last, depthwise_planar, depthwise_bias, pointwise, bias;
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
  const void* packed;
  void* output;
  PackedLayout layout;
  // The plane is cut into row_tiles x column_tiles, the panels into panel_tiles; tile i of n covers
  // [i * size / n, (i + 1) * size / n).
  int64_t row_tiles, column_tiles, panel_tiles;
  int64_t scratch_bytes;  // of one tile
};

// One unit of work: some output pixels of one image, and some panels of output channels.
struct Tile {
  int64_t image;
  int64_t row_begin, row_end, column_begin, column_end;
  int64_t panel_begin, panel_end;
};

struct Kernel {
  const char* name;
  Isa isa;
  Dtype dtype;
  KernelShape shape;
  // Scratch that forward_tile needs for a tile of at most rows x columns pixels, in bytes.
  int64_t (*scratch_bytes)(const ForwardPlan& plan, int64_t rows, int64_t columns);
  void (*forward_tile)(const ForwardPlan& plan, const Tile& tile, void* scratch);
  // to[i * to_stride + k] = from[k * from_stride + i] for k < rows, i < columns.
  void (*transpose)(const void* from, int64_t rows, int64_t columns, int64_t from_stride, void* to, int64_t to_stride);
  // Runs FMAs on registers alone; returns how many floating-point operations that were.
  double (*fma_chain)(int64_t rounds);
};

#define FASTSEP_KERNEL(isa, dtype) extern const Kernel separable_##dtype##_##isa;
#include "kernels.inc"
#undef FASTSEP_KERNEL

namespace {  // a copy for each file, see vector.h

// A part of the packed weights.
template <class T>
inline const T* packed(const ForwardPlan& plan, int64_t offset) {
  return static_cast<const T*>(plan.packed) + offset;
}

}  // namespace

// The kernel that serves an instruction set and a dtype; null where it was not compiled in.
const Kernel* find_kernel(Isa isa, Dtype dtype);

}  // namespace fastsep
