// The matrix step: one warp's tile of sums += A W', whatever the arithmetic.
//
// A is [rows][chunk] and W is [columns][chunk], both in shared memory, with a chunk of depthwise channels as rows of
// chunk_bytes, chunk_pitch apart. Eight neighbouring rows then begin in eight different groups of four banks
// (144 / 16 = 9 = 1 mod 8), so that neither ldmatrix nor the reads of the FMA tile meet a conflict.
#pragma once

#include "common.cuh"

namespace fastsep {
namespace cuda {

constexpr int chunk_bytes = 128;
constexpr int chunk_pitch = chunk_bytes + 16;
constexpr int step_bytes = 32;  // of each row for one matrix instruction: k = 16 for 16-bit types, 8 for tf32
constexpr int block_rows = 16;  // rows of one matrix instruction

// How many depthwise channels make a chunk.
template <class T>
constexpr int chunk = static_cast<int>(chunk_bytes / sizeof(T));

// How the products of A and W are taken; A's elements as depthwise() hands them over.
struct Exact {};
struct Tf32 {};

template <class Arithmetic>
struct Multiply;

template <>
struct Multiply<__half> {
  static __device__ __forceinline__ uint32_t operand(uint32_t raw) { return raw; }
  static __device__ __forceinline__ void add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    multiply_f16(c, a, b);
  }
};

template <>
struct Multiply<__nv_bfloat16> {
  static __device__ __forceinline__ uint32_t operand(uint32_t raw) { return raw; }
  static __device__ __forceinline__ void add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    multiply_bf16(c, a, b);
  }
};

template <>
struct Multiply<Tf32> {
  // W comes as it lies in memory.
  static __device__ __forceinline__ uint32_t operand(uint32_t raw) {
    float value;
    memcpy(&value, &raw, sizeof(raw));
    value = round_to_tf32(value);
    memcpy(&raw, &value, sizeof(raw));
    return raw;
  }
  static __device__ __forceinline__ void add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    multiply_tf32(c, a, b);
  }
};

// On the tensor cores. ldmatrix moves rows of 16 bytes and knows nothing of types: to 16-bit elements and to tf32 it
// gives the fragments of their instruction alike (instructions.cuh).
template <class Arithmetic, int rows, int columns>
struct WarpTile {
  static_assert(rows % 16 == 0 && columns % 16 == 0, "whole matrices");
  float sums[rows / 16][columns / 8][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < rows / 16; ++i)
#pragma unroll
      for (int j = 0; j < columns / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[i][j][e] = 0.f;
  }

  // The first `steps` steps of the chunk.
  __device__ __forceinline__ void add(const char* a, const char* w, int steps, int lane) {
    const char* a_row = a + lane % 16 * chunk_pitch + lane / 16 * 16;
    const char* w_row = w + (lane / 16 * 8 + lane % 8) * chunk_pitch + lane / 8 % 2 * 16;
#pragma unroll 1
    for (int step = 0; step < steps; ++step, a_row += step_bytes, w_row += step_bytes) {
      uint32_t of_a[rows / 16][4];
#pragma unroll
      for (int i = 0; i < rows / 16; ++i) load_matrices(of_a[i], a_row + i * 16 * chunk_pitch);
#pragma unroll
      for (int j = 0; j < columns / 16; ++j) {
        uint32_t of_w[4];
        load_matrices(of_w, w_row + j * 16 * chunk_pitch);
        const uint32_t first[2] = {Multiply<Arithmetic>::operand(of_w[0]), Multiply<Arithmetic>::operand(of_w[1])};
        const uint32_t second[2] = {Multiply<Arithmetic>::operand(of_w[2]), Multiply<Arithmetic>::operand(of_w[3])};
#pragma unroll
        for (int i = 0; i < rows / 16; ++i) {
          Multiply<Arithmetic>::add(sums[i][2 * j], of_a[i], first);
          Multiply<Arithmetic>::add(sums[i][2 * j + 1], of_a[i], second);
        }
      }
    }
  }

  // Rows [16 block, +16) to to[row][column], rows `pitch` apart.
  __device__ __forceinline__ void lay_out(float* to, int pitch, int block, int lane) const {
    float* at = to + lane / 4 * pitch + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < columns / 8; ++j) {
      at[8 * j] = sums[block][j][0];
      at[8 * j + 1] = sums[block][j][1];
      at[8 * j + 8 * pitch] = sums[block][j][2];
      at[8 * j + 8 * pitch + 1] = sums[block][j][3];
    }
  }
};

// With FMAs: lane has rows lane / 8 + 4 i and columns lane % 8 + 8 j. For 32 x 64 that is 8 x 8 sums, 16 reads of 16
// bytes for 256 FMAs; a warp's reads touch 4 or 8 rows, without a conflict.
template <int rows, int columns>
struct WarpTile<Exact, rows, columns> {
  static_assert(rows % 16 == 0 && columns % 8 == 0, "whole rows of lanes");
  float sums[rows / 4][columns / 8];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < rows / 4; ++i)
#pragma unroll
      for (int j = 0; j < columns / 8; ++j) sums[i][j] = 0.f;
  }

  __device__ __forceinline__ void add(const char* a, const char* w, int steps, int lane) {
    const char* a_row = a + lane / 8 * chunk_pitch;
    const char* w_row = w + lane % 8 * chunk_pitch;
#pragma unroll 1
    for (int four = 0; four < steps * step_bytes / 16; ++four, a_row += 16, w_row += 16) {
      float4 of_w[columns / 8];
#pragma unroll
      for (int j = 0; j < columns / 8; ++j) of_w[j] = *reinterpret_cast<const float4*>(w_row + j * 8 * chunk_pitch);
#pragma unroll
      for (int i = 0; i < rows / 4; ++i) {
        const float4 of_a = *reinterpret_cast<const float4*>(a_row + i * 4 * chunk_pitch);
#pragma unroll
        for (int j = 0; j < columns / 8; ++j) {
          sums[i][j] = fmaf(of_a.x, of_w[j].x, sums[i][j]);
          sums[i][j] = fmaf(of_a.y, of_w[j].y, sums[i][j]);
          sums[i][j] = fmaf(of_a.z, of_w[j].z, sums[i][j]);
          sums[i][j] = fmaf(of_a.w, of_w[j].w, sums[i][j]);
        }
      }
    }
  }

  __device__ __forceinline__ void lay_out(float* to, int pitch, int block, int lane) const {
    float* at = to + lane / 8 * pitch + lane % 8;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < columns / 8; ++j) at[4 * i * pitch + 8 * j] = sums[4 * block + i][j];
  }
};

}  // namespace cuda
}  // namespace fastsep
