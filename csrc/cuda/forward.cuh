// The fused forward pass, K > 0: y = act(pointwise(mid_act(depthwise(x) + depthwise_bias)) + bias).
//
// A block makes a tile of output pixels x a tile of output channels. It walks over the depthwise channels in chunks of
// 128 bytes (64 of 16 bits, 32 of f32):
//
//   input of the tile, its halo too, and the chunk's weights  ->  shared memory        (asynchronous copies)
//   depthwise half, bias and mid_act in fp32, rounded once    ->  A [pixels][chunk], shared memory
//   sums [pixels][output channels] += A W'                    in registers, W [output channels][chunk] in shared memory
//
// and ends with bias, activation and store. The depthwise output never leaves the chip, and since the sums stay in
// registers there is no limit to the number of channels.
//
// One buffer of each is enough to overlap copies with work: H, the input of a chunk, is free as soon as A is made, and
// W as soon as the products are taken. So H of the next chunk is on its way during the products, and W of the next
// during the depthwise half; two blocks on a multiprocessor fill each other's gaps (the one's FMAs beside the other's
// tensor cores). Groups of copies are in the order H0 W0 H1 W1 ...; with a ring of S stages, S - 1 pairs more are on
// their way. Small tiles, where time is latency, have S = 3.
//
// Shared memory of 128 x 128, 3 x 3, 8 x 16 pixels: H 10 * 18 * 128 = 23040, W 128 * 144 = 18432, A 18432, weights
// 10 * 128 = 1280, tables 1024 + 1440 + 256: 63904 bytes, so two blocks on a multiprocessor of 128 KB or more. A tile
// may take up to 99 KB, which every device from compute capability 8.0 on has. Registers: 64 sums, at most 128 of them
// with 2 x 256 threads on a multiprocessor of 65536.
//
// More than 128 output channels take the depthwise half once for each 128 of them, with 128 x 256 for each 256: W is
// then 36864 bytes, 82335 in all, and 128 sums a thread leave room for one block on a multiprocessor.
#pragma once

#include "forward_depthwise.cuh"

namespace fastsep {
namespace cuda {

// rows x columns of a tile, by warps_m x warps_n warps.
template <int rows_, int columns_, int warps_m_, int warps_n_, int stages_, int blocks_>
struct Tiling {
  static constexpr int rows = rows_, columns = columns_, warps_m = warps_m_, warps_n = warps_n_, stages = stages_;
  static constexpr int blocks = blocks_;  // on a multiprocessor, for __launch_bounds__
  static constexpr int warps = warps_m * warps_n, threads = warps * warp_size;
  static constexpr int warp_rows = rows / warps_m, warp_columns = columns / warps_n;
  static constexpr int staging_bytes = warps * block_rows * (warp_columns + 4) * 4;
};

using LargeTiling = Tiling<128, 128, 4, 2, 1, 2>;
using WideTiling = Tiling<128, 256, 2, 4, 1, 1>;   // for many output channels
using NarrowTiling = Tiling<128, 64, 4, 2, 1, 2>;  // for few output channels
using ShortTiling = Tiling<64, 128, 2, 4, 1, 2>;   // where a tile has much input: stride 2, large kernels
using SmallTiling = Tiling<32, 64, 2, 2, 3, 4>;    // where there are few pixels

// One warp's sums to the output: 16 rows at a time through shared memory of its own, so that neighbouring lanes store
// neighbouring addresses.
template <class T, class Tile, class Sums>
__device__ __forceinline__ void write_output(const Forward& p, const Sums& sums, const int64_t* out_offset,
                                             float* staging, int k, int lane) {
  constexpr int columns = Tile::warp_columns;
  T* output = static_cast<T*>(p.output);
  const T* biases = static_cast<const T*>(p.bias);
  const int pitch = p.planar ? columns + 1 : columns + 4;
  constexpr int vector = 8, vectors = columns / vector;
  const int column = lane % vectors * vector;
  float bias[vector] = {};
  if (p.bias != nullptr && !p.planar) load_first(bias, biases + k + column, p.out_channels - k - column);
#pragma unroll
  for (int block = 0; block < Tile::warp_rows / block_rows; ++block) {
    sums.lay_out(staging, pitch, block, lane);
    __syncwarp();
    if (p.planar) {
      constexpr int together = 4, lanes_of_rows = warp_size / block_rows;
      const int64_t out_plane = static_cast<int64_t>(p.out_height) * p.out_width;
      const int row = lane % block_rows;
      const int64_t offset = out_offset[block * block_rows + row];
#pragma unroll 1
      for (int c = lane / block_rows; c < columns && k + c < p.out_channels; c += together * lanes_of_rows) {
        float values[together];
#pragma unroll
        for (int i = 0; i < together; ++i) {
          const int at = c + i * lanes_of_rows;
          values[i] = staging[row * pitch + at];
          if (p.bias != nullptr && k + at < p.out_channels) values[i] += to_float(biases[k + at]);
        }
        activate(p.activation, values);
#pragma unroll
        for (int i = 0; i < together; ++i) {
          const int at = k + c + i * lanes_of_rows;
          if (offset >= 0 && at < p.out_channels) output[offset + at * out_plane] = from_float<T>(values[i]);
        }
      }
    } else if (k + column < p.out_channels) {
#pragma unroll 1
      for (int row = lane / vectors; row < block_rows; row += warp_size / vectors) {
        const int64_t offset = out_offset[block * block_rows + row];
        if (offset < 0) continue;
        float values[vector];
        load(values, staging + row * pitch + column);
#pragma unroll
        for (int i = 0; i < vector; ++i) values[i] += bias[i];
        activate(p.activation, values);
        T* to = output + offset + k + column;
        if (p.wide_output && k + column + vector <= p.out_channels)
          store(to, values);
        else
          store_first(to, values, p.out_channels - k - column);
      }
    }
    __syncwarp();
  }
}

template <class T, class Arithmetic, class Tile, Taps taps>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks) separable_forward(Forward p) {
  const int of_stage = stage_bytes(p, Tile::columns), before_w = p.halo_bytes + p.weight_bytes;
  char* memory = shared_memory();
  Shared shared;
  shared.out_offset = reinterpret_cast<int64_t*>(memory);
  shared.halo_offset = shared.out_offset + Tile::rows;
  shared.patches = reinterpret_cast<int4*>(memory + table_bytes(p, Tile::rows)) - p.patches;
  shared.ring = memory + table_bytes(p, Tile::rows);
  shared.a = shared.ring + Tile::stages * of_stage;

  const Place at = place_of(p, Tile::columns);
  fill_tables(p, at, shared, Tile::rows, Tile::threads);
  __syncthreads();

  const int chunks = (p.depth + chunk<T> - 1) / chunk<T>;
  const auto copy_h = [&](int index) {
    if (index < chunks)
      copy_input<T, Tile::threads>(p, shared, shared.ring + index % Tile::stages * of_stage, index * chunk<T>);
    copy_commit();
  };
  const auto copy_w = [&](int index) {
    if (index < chunks)
      copy_pointwise<T, Tile::threads, Tile::columns>(p, shared.ring + index % Tile::stages * of_stage + before_w, at.k,
                                                      index * chunk<T>);
    copy_commit();
  };
  constexpr int ahead = 2 * (Tile::stages - 1);  // groups that may still be under way
#pragma unroll
  for (int i = 0; i < Tile::stages; ++i) {
    copy_h(i);
    if (i + 1 < Tile::stages) copy_w(i);
  }

  WarpTile<Arithmetic, Tile::warp_rows, Tile::warp_columns> sums;
  sums.clear();
#pragma unroll 1
  for (int i = 0; i < chunks; ++i) {
    const char* stage = shared.ring + i % Tile::stages * of_stage;
    copy_wait<ahead>();
    __syncthreads();  // H of this chunk is there, and nobody reads A and W of the last one any more
    copy_w(i + Tile::stages - 1);
    depthwise<T, Arithmetic, Tile::threads, taps>(p, at, shared, stage, i * chunk<T>);
    copy_wait<ahead>();
    __syncthreads();  // A and W are there, and H is free
    copy_h(i + Tile::stages);
    const int thread = this_thread(), warp = thread / warp_size;
    const int warp_m = warp % Tile::warps_m, warp_n = warp / Tile::warps_m;
    const int left = (p.depth - i * chunk<T>)*static_cast<int>(sizeof(T));
    sums.add(shared.a + warp_m * Tile::warp_rows * chunk_pitch,
             stage + before_w + warp_n * Tile::warp_columns * chunk_pitch,
             (min(left, chunk_bytes) + step_bytes - 1) / step_bytes, thread % warp_size);
  }
  copy_wait<0>();
  __syncthreads();  // the ring and A become the staging area
  const int thread = this_thread(), warp = thread / warp_size;
  const int warp_m = warp % Tile::warps_m, warp_n = warp / Tile::warps_m;
  const int k = at.k + warp_n * Tile::warp_columns;
  float* staging = reinterpret_cast<float*>(shared.ring + warp * (Tile::staging_bytes / Tile::warps));
  write_output<T, Tile>(p, sums, shared.out_offset + warp_m * Tile::warp_rows, staging, k, thread % warp_size);
}

}  // namespace cuda
}  // namespace fastsep
