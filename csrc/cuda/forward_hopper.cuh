// The fused forward pass on sm_90a, for channels-last layers of 16 bits where the matrix product bounds: 3 x 3, stride
// 1, one filter a channel. As forward.cuh, with the roles given to different warps, so that depthwise FMAs and tensor
// cores work at the same time, and tiles of 256 output channels, so that the depthwise half is made K / 256 times:
//
//   producers, 1 warpgroup:  input and weights -> shared memory; depthwise half -> A, rounded once
//   consumers, 2 warpgroups: sums[128 pixels][256 output channels] += A W', each 64 pixels; bias, activation, store
//
// A tile is tile_rows x tile_w output pixels. Rows count through the batch as if its images stood one below the other,
// so that small ones fill a tile: 9 rows of 14, or 18 of 7, in parts of neighbouring images. Their inputs then are
// rows of a stack of padded images, out_height + 2 rows each; a tile needs tile_rows + 2 of them for each image that it
// touches. A block stays and walks over tiles blockIdx.x, + gridDim.x ..., output channels first: producers go on
// with the next tile while consumers store this one. Chunks of 64 channels are counted through all tiles of the block:
// n = 0, 1, ...
//
// Shared memory, from an address that is a multiple of 1024:
//   3 stages of A [128][64] and W [256][64]     3 * (16384 + 32768) = 147456
//   2 or 3 slots of the input of a tile, with the depthwise weights and biases of the chunk behind it
//   2 sets of tables, and the barriers
// Rows of A and W are 128 bytes, 16-byte unit u of row r at unit u ^ (r % 8): the 128-byte swizzle of the products, and
// no bank is asked twice when 8 rows are read or written at one unit. In all at most 227 KB: one block on a
// multiprocessor. 384 threads may have 168 of its 65536 registers each; consumers need 128 for their sums. With more
// threads the compiler takes no product of 256 columns, whatever setmaxnreg promises it, and without setmaxnreg
// nobody waits for registers.
//
// Barriers, and why nobody waits for ever. n is in stage n % 3, in round n / 3; a round is a phase of both barriers.
//   full[stage], 4 arrivals, one of each producer warp: A and W of n are there. Consumers wait for parity
//     (n / 3) % 2: the phase of this round.
//   empty[stage], 8 arrivals, one of each consumer warp: the products of n are taken. Producers wait, before they
//     write n, for parity (n / 3) % 2 ^ 1: the phase of the round before, and in round 0 at once.
//   Named barrier 1, the 128 producers: once for each n before its depthwise half (its input, which all have copied, is
//     there, and the slot of n - 1 is free), and once more where the tables of a tile are written.
// Both sides count the same n up to the same end. Producers wait for consumers of n - 3 alone, consumers for producers
// of n alone, so the side that is behind can always go on. A wait of one parity cannot miss a phase: before full's
// next phase ends, consumers have to arrive at empty, and they do after their wait; and the reverse.
#pragma once

#include "forward_hopper_producers.cuh"

namespace fastsep {
namespace cuda {
namespace hopper {

// Of a matrix [rows][64 of 16 bits], swizzled as above, from the row that begins at `start` on; + 2 for each step of 16
// along its rows. PTX ISA, "Matrix Descriptor Format": bits 0-13 the address, 16-29 the leading offset, not used where
// rows are swizzled and as if 1, 32-45 from 8 rows to the next 8, these in units of 16 bytes; 49-51 where the pattern
// begins, 0 at multiples of 1024; 62-63 the swizzle, 1 for 128 bytes.
__device__ __forceinline__ uint64_t describe_matrix(const char* start) {
  return (shared_address(start) & 0x3ffffu) >> 4 | uint64_t{1} << 16 | uint64_t{pattern_bytes >> 4} << 32 |
         uint64_t{1} << 62;
}

// words[i] of lane q of four neighbours, and words[q] of lane i, change places.
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[4], int lane) {
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    const bool upper = (lane & step) != 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int low = step == 1 ? 2 * i : i, high = low + step;
      const uint32_t came = __shfl_xor_sync(all_lanes, upper ? words[low] : words[high], step);
      words[low] = upper ? came : words[low];
      words[high] = upper ? words[high] : came;
    }
  }
}

// Where this thread's two rows of the tile begin in the output; -1 for none.
__device__ __forceinline__ int64_t offset_of_row(const Forward& p, const Place& at, int row) {
  const int y = at.row + row / p.tile_w, x = at.x + row % p.tile_w;
  const bool inside = row / p.tile_w < p.tile_rows && y < p.batch * p.out_height && x < p.out_width;
  return inside ? (static_cast<int64_t>(y) * p.out_width + x) * p.out_channels : -1;
}

// The activations of an output: those without exp, its kin or a division, as the code of each stands here once for each
// of 128 sums.
__host__ __device__ inline bool is_simple(Activation activation) {
  return activation == Activation::identity || activation == Activation::relu || activation == Activation::relu6 ||
         activation == Activation::leaky_relu;
}

template <Activation activation, int count>
__device__ __forceinline__ void activate_as(float (&values)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) values[i] = activate_one(activation, values[i]);
}

template <int count>
__device__ __forceinline__ void activate_simple(Activation activation, float (&values)[count]) {
  switch (activation) {
    case Activation::relu: return activate_as<Activation::relu>(values);
    case Activation::relu6: return activate_as<Activation::relu6>(values);
    case Activation::leaky_relu: return activate_as<Activation::leaky_relu>(values);
    default: return;  // the identity
  }
}

// Four blocks of 8 columns at a time: a lane has two neighbouring ones of each, and gets all of one, to store 16 bytes.
template <class T>
__device__ __forceinline__ void write_output(const Forward& p, const Place& at, const float (&sums)[128]) {
  const int thread = this_thread() - producers;
  const int lane = thread % warp_size, first_row = thread / warp_size * 16 + lane / 4;
  const T* biases = static_cast<const T*>(p.bias);
  T* output = static_cast<T*>(p.output);
  const int64_t offsets[2] = {offset_of_row(p, at, first_row), offset_of_row(p, at, first_row + 8)};
#pragma unroll
  for (int block = 0; block < columns / 8; block += 4) {
    const int k = at.k + 8 * block;
    if (k >= p.out_channels) break;
    float values[16];  // [block][row][column]
#pragma unroll
    for (int i = 0; i < 16; ++i) values[i] = sums[4 * block + i];
    if (biases != nullptr) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = k + 8 * j + lane % 4 * 2;
        float bias[2] = {};
        if (column < p.out_channels) load(bias, biases + column);
#pragma unroll
        for (int i = 0; i < 4; ++i) values[4 * j + i] += bias[i % 2];
      }
    }
    activate_simple(p.activation, values);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) words[j] = pack(T(), values[4 * j + 2 * row], values[4 * j + 2 * row + 1]);
      transpose_quad(words, lane);
      const int column = k + lane % 4 * 8;
      if (offsets[row] < 0 || column >= p.out_channels) continue;
      uint4 vector;
      vector.x = words[0], vector.y = words[1], vector.z = words[2], vector.w = words[3];
      *reinterpret_cast<uint4*>(output + offsets[row] + column) = vector;
    }
  }
}

template <class T>
__device__ __forceinline__ void consume(const Forward& p, const Shared& shared) {
  const int rows_from = (this_thread() - producers) / warpgroup_threads * 64;
  const int chunks = (p.channels + depth - 1) / depth;
  const auto release = [&](int stage) {
    __syncwarp();
    if (this_thread() % warp_size == 0) barrier_arrive(shared.empty + stage);
  };
  float sums[128] = {};
  Turn turn;
#pragma unroll 1
  for (unsigned tile = blockIdx.x; tile < static_cast<unsigned>(p.tiles); tile += gridDim.x) {
    int before = 0;
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      barrier_wait(shared.full + turn.stage, turn.parity);
      const uint64_t a = describe_matrix(shared.a(turn.stage) + rows_from * row_bytes);
      const uint64_t w = describe_matrix(shared.w(turn.stage));
      hold(sums);
      products_fence();
#pragma unroll
      for (int step = 0; step < depth / 16; ++step)
        multiply_64x256<T>(sums, a + 2 * step, w + 2 * step, chunk + step > 0);
      products_commit();
      products_wait<1>();  // those of the chunk before
      if (chunk > 0) release(before);
      before = turn.stage;
      turn.advance();
    }
    products_wait<0>();
    hold(sums);
    release(before);
    write_output<T>(p, place_of(p, tile), sums);
  }
}

template <class T>
__global__ void __launch_bounds__(threads, 1) separable_forward_hopper(Forward p) {
#if FASTSEP_HOPPER_CODE
  const Shared shared = shared_of(p);
  if (this_thread() < stages) {
    barrier_init(shared.full + this_thread(), producer_warps);
    barrier_init(shared.empty + this_thread(), consumer_warps);
  }
  __syncthreads();
  // Alike in the whole warp, and known to the compiler as such.
  if (__shfl_sync(all_lanes, this_thread() / warpgroup_threads, 0) < producers / warpgroup_threads) {
    produce<T>(p, shared);
  } else {
    consume<T>(p, shared);
  }
#else
  __trap();
#endif
}

}  // namespace hopper
}  // namespace cuda
}  // namespace fastsep
