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
  static constexpr uint32_t ones = 0x3c003c00u;
  static __device__ __forceinline__ uint32_t operand(uint32_t raw) { return raw; }
  static __device__ __forceinline__ void add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    multiply_f16(c, a, b);
  }
};

template <>
struct Multiply<__nv_bfloat16> {
  static constexpr uint32_t ones = 0x3f803f80u;
  static __device__ __forceinline__ uint32_t operand(uint32_t raw) { return raw; }
  static __device__ __forceinline__ void add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    multiply_bf16(c, a, b);
  }
};

template <>
struct Multiply<Tf32> {
  static constexpr uint32_t ones = 0x3f800000u;
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

// How the operands of a WarpTile lie: across the sum or along it, from one row to the next, and whether A is as it lies
// in memory, not yet rounded to tf32.
template <bool a_across_, int a_pitch_, bool w_across_, int w_pitch_, bool a_raw_>
struct LaidOut {
  static constexpr bool a_across = a_across_, w_across = w_across_, a_raw = a_raw_;
  static constexpr int a_pitch = a_pitch_, w_pitch = w_pitch_;
};
using AlongTheSum = LaidOut<false, chunk_pitch, false, chunk_pitch, false>;

template <bool across>
__device__ __forceinline__ void load_fragments(uint32_t (&to)[4], const void* row) {
  if constexpr (across)
    load_matrices_transposed(to, row);
  else
    load_matrices(to, row);
}

// On the tensor cores. ldmatrix moves rows of 16 bytes and knows nothing of types: to 16-bit elements and to tf32 it
// gives the fragments of their instruction alike (instructions.cuh).
template <class Arithmetic, int rows, int columns>
struct WarpTile {
  static_assert(rows % 16 == 0 && columns % 32 == 0, "whole matrices, an even number of them in a step");
  float sums[rows / 16][columns / 8][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < rows / 16; ++i)
#pragma unroll
      for (int j = 0; j < columns / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[i][j][e] = 0.f;
  }

  // The first `steps` steps of the chunk. An operand that lies `across` the sum is [chunk][rows], with a pitch that
  // spreads eight rows over the banks as well, and is turned as ldmatrix reads it (16-bit elements only). The fragments
  // of the next columns, and of the next step, are asked for before the products of these; with 64 sums, beside which
  // 128 registers, of two blocks on a multiprocessor, have no room for them, that is left to the compiler and to the
  // other warps. also(i, a) sees the fragments of A.
  template <class Of, class Also>
  __device__ __forceinline__ void add_laid_out(const char* a, const char* w, int steps, int lane, Also also) {
    constexpr int a_step = Of::a_across ? block_rows * Of::a_pitch : step_bytes;
    constexpr int w_step = Of::w_across ? block_rows * Of::w_pitch : step_bytes;
    constexpr int a_block = Of::a_across ? step_bytes : block_rows * Of::a_pitch;
    constexpr int w_block = Of::w_across ? step_bytes : block_rows * Of::w_pitch;
    const int upper = lane / 16, odd = lane / 8 % 2, eighth = lane % 8;
    a += Of::a_across ? (upper * 8 + eighth) * Of::a_pitch + odd * 16 : (odd * 8 + eighth) * Of::a_pitch + upper * 16;
    w += Of::w_across ? (odd * 8 + eighth) * Of::w_pitch + upper * 16 : (upper * 8 + eighth) * Of::w_pitch + odd * 16;
    constexpr bool ahead = rows * columns != 64 * warp_size;
    uint32_t of_a[2][rows / 16][4], of_w[2][4];
    const auto load_a = [&](int step) {
#pragma unroll
      for (int i = 0; i < rows / 16; ++i)
        load_fragments<Of::a_across>(of_a[step % 2][i], a + step * a_step + i * a_block);
    };
    const auto load_w = [&](int step, int j) {
      load_fragments<Of::w_across>(of_w[ahead ? j % 2 : 0], w + step * w_step + j * w_block);
    };
    if (ahead) {
      load_a(0);
      load_w(0, 0);
    }
#pragma unroll
    for (int step = 0; step < chunk_bytes / step_bytes; ++step) {
      if (step >= steps) break;
      const bool last = step + 1 == chunk_bytes / step_bytes;
      if (!ahead) load_a(step);
      uint32_t (&mine)[rows / 16][4] = of_a[step % 2];
#pragma unroll
      for (int i = 0; i < rows / 16; ++i) {
        if (Of::a_raw) {
#pragma unroll
          for (int e = 0; e < 4; ++e) mine[i][e] = Multiply<Arithmetic>::operand(mine[i][e]);
        }
        also(i, mine[i]);
      }
      if (ahead && !last) load_a(step + 1);
#pragma unroll
      for (int j = 0; j < columns / 16; ++j) {
        if (!ahead) load_w(step, j);
        const uint32_t (&here)[4] = of_w[ahead ? j % 2 : 0];
        const uint32_t first[2] = {Multiply<Arithmetic>::operand(here[0]), Multiply<Arithmetic>::operand(here[1])};
        const uint32_t second[2] = {Multiply<Arithmetic>::operand(here[2]), Multiply<Arithmetic>::operand(here[3])};
        if (ahead && j + 1 < columns / 16)
          load_w(step, j + 1);
        else if (ahead && !last)
          load_w(step + 1, 0);
#pragma unroll
        for (int i = 0; i < rows / 16; ++i) {
          Multiply<Arithmetic>::add(sums[i][2 * j], mine[i], first);
          Multiply<Arithmetic>::add(sums[i][2 * j + 1], mine[i], second);
        }
      }
    }
  }

  __device__ __forceinline__ void add(const char* a, const char* w, int steps, int lane) {
    add_laid_out<AlongTheSum>(a, w, steps, lane, [](int, const uint32_t (&)[4]) {});
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

  template <class Of, class Also>
  __device__ __forceinline__ void add_laid_out(const char* a, const char* w, int steps, int lane, Also also) {
    static_assert(!Of::a_across && !Of::w_across, "f32 is turned where it is copied");
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
        also(i, of_a);
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

  __device__ __forceinline__ void add(const char* a, const char* w, int steps, int lane) {
    add_laid_out<AlongTheSum>(a, w, steps, lane, [](int, const float4&) {});
  }

  __device__ __forceinline__ void lay_out(float* to, int pitch, int block, int lane) const {
    float* at = to + lane / 8 * pitch + lane % 8;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < columns / 8; ++j) at[4 * i * pitch + 8 * j] = sums[4 * block + i][j];
  }
};

// The sums of A's rows: one more product, with a matrix of ones.
template <class Arithmetic, int rows>
struct RowSums {
  float sums[rows / 16][4] = {};

  __device__ __forceinline__ void add(int i, const uint32_t (&a)[4]) {
    const uint32_t ones[2] = {Multiply<Arithmetic>::ones, Multiply<Arithmetic>::ones};
    Multiply<Arithmetic>::add(sums[i], a, ones);
  }
  // put(row, sum), by one lane for each row.
  template <class Put>
  __device__ __forceinline__ void write(int lane, Put put) const {
    if (lane % 4 != 0) return;
#pragma unroll
    for (int i = 0; i < rows / 16; ++i) {
      put(16 * i + lane / 4, sums[i][0]);
      put(16 * i + lane / 4 + 8, sums[i][2]);
    }
  }
};

template <int rows>
struct RowSums<Exact, rows> {
  float sums[rows / 4] = {};

  __device__ __forceinline__ void add(int i, const float4& a) { sums[i] += (a.x + a.y) + (a.z + a.w); }
  template <class Put>
  __device__ __forceinline__ void write(int lane, Put put) const {
    if (lane % 8 != 0) return;
#pragma unroll
    for (int i = 0; i < rows / 4; ++i) put(4 * i + lane / 8, sums[i]);
  }
};

}  // namespace cuda
}  // namespace fastsep
