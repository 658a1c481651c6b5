// Rows of a channels-last depthwise convolution in pieces of 4 to 8 pixels, whole vectors along channels: what
// channels_last_row() does, for kernels of 1, 2, 3 or 5 columns without dilation, with less to decide in each piece.
// Kernels of 1 and 2 columns are what a stride of 2 leaves of one of 3 in the gradient of the input.
//
// A tap beside the plane reads zeros instead of being left out, so the weights have to be finite. Pixels are put where
// a table says, so that a piece need not end where a group of the product does. 8 pixels of 3 columns, stride 1: 8 sums
// + 3 weights + 1 input are 12 registers; 10 + 3 loads for 24 FMAs.
#pragma once

#include "depthwise.h"

namespace fastsep {
namespace FASTSEP_ISA {
namespace {

constexpr int shortest_piece = 4, longest_piece = 8;

template <class T>
struct PlacedRow {
  const T* input;  // the first tap row inside the plane, at pixel 0's first tap, which may lie left of the row
  int64_t row_stride, pixel_stride;
  int64_t taps_h;                       // tap rows inside the plane
  int64_t outside_left, outside_right;  // columns that the first and the last pixel have beside the plane
  int64_t vectors;                      // of channels
  const T* weight;                      // [taps_h][Taps][weight_stride]
  int64_t weight_stride;
  const T* start;
  Clamp<T> clamp;
  int64_t pixels;
  T* output;             // pixel p, vector v at output + place[p] + v * vector_stride
  const int64_t* place;  // [pixels]
  int64_t vector_stride;
};

// Neighbouring pieces of Pixels pixels each, from one on.
template <class V, int Pixels, int Taps, int Stride>
FASTSEP_NOINLINE void placed_pieces(const PlacedRow<typename V::T>& row, int64_t begin, int64_t pieces) {
  using T = typename V::T;
  using Reg = typename V::Reg;
  constexpr int columns = (Pixels - 1) * Stride + Taps, edge = Taps / 2;
  alignas(64) static constexpr T zeros[V::width] = {};
  const Reg low = V::set1(row.clamp.low), high = V::set1(row.clamp.high);
  const int64_t row_stride = row.row_stride, pixel_stride = row.pixel_stride, weight_stride = row.weight_stride;
  const int64_t taps_h = row.taps_h, vectors = row.vectors, vector_stride = row.vector_stride;
  for (int64_t piece = 0; piece < pieces; ++piece, begin += Pixels) {
    const int64_t left = begin == 0 ? row.outside_left : 0;
    const int64_t right = begin + Pixels == row.pixels ? row.outside_right : 0;
    const T* input = row.input + begin * Stride * pixel_stride;
    const T *start = row.start, *all_weights = row.weight;
    const int64_t* const place = row.place + begin;
    T* output = row.output;
    for (int64_t v = 0; v < vectors; ++v) {
      Reg acc[Pixels];
      acc[0] = V::load(start);
      FASTSEP_UNROLL
      for (int p = 1; p < Pixels; ++p) acc[p] = acc[0];
      const T *x = input, *weight = all_weights;
      for (int64_t r = 0; r < taps_h; ++r, x += row_stride) {
        Reg w[Taps];
        FASTSEP_UNROLL
        for (int s = 0; s < Taps; ++s, weight += weight_stride) w[s] = V::load(weight);
        FASTSEP_UNROLL
        for (int column = 0; column < columns; ++column) {
          const T* at = x + column * pixel_stride;
          if (column < edge) at = column < left ? zeros : at;
          if (column >= columns - edge) at = columns - column <= right ? zeros : at;
          const Reg value = V::in_register(V::load(at));
          FASTSEP_UNROLL
          for (int s = Taps - 1; s >= 0; --s) {
            const int offset = column - s;
            if (offset >= 0 && offset % Stride == 0 && offset / Stride < Pixels)
              acc[offset / Stride] = V::fma(value, w[s], acc[offset / Stride]);
          }
        }
      }
      FASTSEP_UNROLL
      for (int p = 0; p < Pixels; ++p) V::store(output + place[p], V::min(high, V::max(low, acc[p])));
      input += V::width;
      start += V::width;
      all_weights += V::width;
      output += vector_stride;
    }
  }
}

template <class V, int Taps, int Stride, int Pixels = longest_piece>
void placed_pieces_of(int64_t pixels, const PlacedRow<typename V::T>& row, int64_t begin, int64_t pieces) {
  if constexpr (Pixels > shortest_piece) {
    if (pixels < Pixels) return placed_pieces_of<V, Taps, Stride, Pixels - 1>(pixels, row, begin, pieces);
  }
  placed_pieces<V, Pixels, Taps, Stride>(row, begin, pieces);
}

// As even as possible: no piece is shorter than 4 pixels where the row is not.
template <class V, int Taps, int Stride>
void placed_row(const PlacedRow<typename V::T>& row) {
  const int64_t pieces = (row.pixels + longest_piece - 1) / longest_piece;
  const int64_t pixels = row.pixels / pieces, longer = row.pixels % pieces;
  if (longer > 0) placed_pieces_of<V, Taps, Stride>(pixels + 1, row, 0, longer);
  placed_pieces_of<V, Taps, Stride>(pixels, row, longer * (pixels + 1), pieces - longer);
}

// Whether zeros times these weights are zeros: `rows` rows of `count`, `stride` apart.
template <class V>
bool all_finite(const typename V::T* weight, int64_t count, int64_t rows = 1, int64_t stride = 0) {
  using T = typename V::T;
  const auto zero = V::set1(0);
  auto sum = zero;
  for (int64_t row = 0; row < rows; ++row, weight += stride)
    for (int64_t i = 0; i < count; i += V::width)
      sum = V::fma(V::load_n(weight + i, static_cast<int>(smaller<int64_t>(V::width, count - i))), zero, sum);
  T lanes[V::width];
  V::store(lanes, sum);
  T total = 0;
  for (T lane : lanes) total += lane;
  return total == T(0);
}

// Whether placed_rows() takes rows like this one, weights aside. Not where 3 x 3 goes by sweeps.
template <class V>
bool takes_placed_rows(const ChannelsLastRow<typename V::T>& row) {
  const int64_t needed = (row.pixels - 1) * row.stride_w + row.taps_w;
  const bool few_taps = (row.taps_w == 1 || row.taps_w == 2) && row.stride_w == 1;
  return !V::sweeps_channels_last && (few_taps || row.taps_w == 3 || row.taps_w == 5) && row.dilation_w == 1 &&
         row.stride_w <= 2 && row.pixels >= shortest_piece && row.channels >= V::width && row.start_stride == 0 &&
         -row.left <= row.taps_w / 2 && row.left + needed - row.width <= row.taps_w / 2;
}

// The whole vectors of a row's channels.
template <class V>
void placed_rows(const ChannelsLastRow<typename V::T>& row, const int64_t* place) {
  const TapRows inside = tap_rows_inside(row);
  PlacedRow<typename V::T> placed;
  placed.input = row.plane + (row.top + inside.first * row.dilation_h) * row.row_stride + row.left * row.pixel_stride;
  placed.row_stride = row.dilation_h * row.row_stride;
  placed.pixel_stride = row.pixel_stride;
  placed.taps_h = inside.count;
  placed.outside_left = larger<int64_t>(0, -row.left);
  placed.outside_right = larger<int64_t>(0, row.left + (row.pixels - 1) * row.stride_w + row.taps_w - row.width);
  placed.vectors = row.channels / V::width;
  placed.weight = row.weight + inside.first * row.taps_w * row.weight_stride;
  placed.weight_stride = row.weight_stride;
  placed.start = row.start;
  placed.clamp = row.clamp;
  placed.pixels = row.pixels;
  placed.output = row.output;
  placed.place = place;
  placed.vector_stride = row.output_vector_stride;
  if (row.taps_w == 1)
    placed_row<V, 1, 1>(placed);
  else if (row.taps_w == 2)
    placed_row<V, 2, 1>(placed);
  else if (row.taps_w == 3)
    row.stride_w == 1 ? placed_row<V, 3, 1>(placed) : placed_row<V, 3, 2>(placed);
  else
    row.stride_w == 1 ? placed_row<V, 5, 1>(placed) : placed_row<V, 5, 2>(placed);
}

// A row by placed_rows() as far as that takes it, the rest by channels_last_row(); place[p] is p * output_stride.
template <class V, int Run>
void placed_or_plain_row(ChannelsLastRow<typename V::T> row, const int64_t* place, bool finite) {
  if (finite && takes_placed_rows<V>(row)) {
    placed_rows<V>(row, place);
    row = behind_whole_vectors<V>(row);
    if (row.channels == 0) return;
  }
  channels_last_row<V, Run>(row);
}

}  // namespace
}  // namespace FASTSEP_ISA
}  // namespace fastsep
