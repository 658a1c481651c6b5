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

#include "forward_stages.cuh"

namespace fastsep {
namespace cuda {

namespace hopper {

constexpr int warpgroup_threads = 4 * warp_size;
constexpr int producers = warpgroup_threads, consumers = 2 * warpgroup_threads;
constexpr int producer_warps = producers / warp_size, consumer_warps = consumers / warp_size;
constexpr int threads = producers + consumers;
constexpr int rows = 128, columns = 256, depth = 64;  // of a tile, and of a chunk
constexpr int row_bytes = 128;
constexpr int a_bytes = rows * row_bytes, w_bytes = columns * row_bytes;
constexpr int stages = 3, stage_bytes = a_bytes + w_bytes;
constexpr int pattern_bytes = 1024;  // 8 rows: how often the swizzle repeats
constexpr int taps = 9, weight_bytes = depth * taps * 2, bias_bytes = depth * 2;
constexpr int lanes = 2;  // channels of a lane

// A patch of 2 x 4 pixels. At the tile's end it is moved up and left, to stay within its input; `valid` has a bit for
// each pixel that is to be written.
struct Patch {
  int halo;  // pixel of its first tap
  int row;   // of A, of its first pixel
  unsigned valid;
};

struct Forward {
  const void *input, *depthwise_weight, *depthwise_bias, *pointwise_weight, *bias;
  void* output;
  int batch, channels, height, width, out_channels, pad_top, pad_left, out_height, out_width;
  Activation mid_activation, activation;
  int tile_rows, tile_w, tiles_x, tiles_k, tiles;
  int halo_w, halo_pixels, patches_across, patches;
  int slots, slot_bytes, table_bytes;
};

__host__ __device__ inline int halo_bytes(const Forward& p) { return p.halo_pixels * row_bytes; }

// Addresses in shared memory.
struct Shared {
  char *ring, *slots, *tables;
  Barrier *full, *empty;

  __device__ __forceinline__ char* a(int stage) const { return ring + stage * stage_bytes; }
  __device__ __forceinline__ char* w(int stage) const { return a(stage) + a_bytes; }
  // Of a tile, by its number's parity: for each pixel of its input the pixel of the whole input, -1 outside; patches.
  __device__ __forceinline__ int* halo(const Forward& p, int set) const {
    return reinterpret_cast<int*>(tables + set * p.table_bytes);
  }
  __device__ __forceinline__ Patch* patches(const Forward& p, int set) const {
    return reinterpret_cast<Patch*>(halo(p, set) + p.halo_pixels);
  }
};

__device__ __forceinline__ Shared shared_of(const Forward& p) {
  char* memory = shared_memory();
  Shared shared;
  shared.ring = memory + (0u - shared_address(memory)) % pattern_bytes;
  shared.slots = shared.ring + stages * stage_bytes;
  shared.full = reinterpret_cast<Barrier*>(shared.slots + p.slots * p.slot_bytes);
  shared.empty = shared.full + stages;
  shared.tables = reinterpret_cast<char*>(shared.empty + stages);
  return shared;
}

// Where chunk n lies in the ring, and the parity of its round.
struct Turn {
  int stage = 0;
  unsigned parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage < stages) return;
    stage = 0;
    parity ^= 1u;
  }
};

// One chunk after the other, tile after tile.
struct Walk {
  unsigned tile;  // of the grid's
  int chunk = 0;
  int number = 0;  // of the tile, counted in this block

  __device__ __forceinline__ bool inside(const Forward& p) const { return tile < static_cast<unsigned>(p.tiles); }
  __device__ __forceinline__ void advance(int chunks) {
    if (++chunk < chunks) return;
    chunk = 0;
    tile += gridDim.x;
    ++number;
  }
};

// Of a tile's first output: row through the batch, column, output channel.
struct Place {
  int row, x, k;
};

__device__ __forceinline__ Place place_of(const Forward& p, unsigned tile) {
  Place at;
  at.k = static_cast<int>(tile % static_cast<unsigned>(p.tiles_k)) * columns;
  tile /= static_cast<unsigned>(p.tiles_k);
  at.x = static_cast<int>(tile % static_cast<unsigned>(p.tiles_x)) * p.tile_w;
  at.row = static_cast<int>(tile / static_cast<unsigned>(p.tiles_x)) * p.tile_rows;
  return at;
}

__device__ __forceinline__ uint32_t pack(__half, float x, float y) {
  const __half2 pair = __floats2half2_rn(x, y);
  uint32_t raw;
  memcpy(&raw, static_cast<const void*>(&pair), sizeof(raw));
  return raw;
}

__device__ __forceinline__ uint32_t pack(__nv_bfloat16, float x, float y) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  uint32_t raw;
  memcpy(&raw, static_cast<const void*>(&pair), sizeof(raw));
  return raw;
}

// ---- producers
// -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void fill_tables(const Forward& p, const Shared& shared, unsigned tile, int set) {
  const Place at = place_of(p, tile);
  const int image = at.row / p.out_height, y = at.row % p.out_height;
  const int padded = p.out_height + 2;  // rows of an image in the stack
  int* halo = shared.halo(p, set);
  for (int i = this_thread(); i < p.halo_pixels; i += producers) {
    const int row = y + i / p.halo_w;
    const int of_image = image + row / padded, in_y = row % padded - p.pad_top;
    const int in_x = at.x - p.pad_left + i % p.halo_w;
    const bool inside = of_image < p.batch && in_y >= 0 && in_y < p.height && in_x >= 0 && in_x < p.width;
    halo[i] = inside ? (of_image * p.height + in_y) * p.width + in_x : -1;
  }
  const int tile_rows = min(p.tile_rows, p.batch * p.out_height - at.row);
  const int tile_w = min(p.tile_w, p.out_width - at.x), halo_rows = p.halo_pixels / p.halo_w;
  // Pairs of rows begin anew with each image: the first one has what is left of it.
  const int first_rows = min(tile_rows, p.out_height - y);
  const int of_first = (first_rows + 1) / 2, of_image = (p.out_height + 1) / 2;
  Patch* patches = shared.patches(p, set);
  for (int i = this_thread(); i < p.patches; i += producers) {
    const int pair = i / p.patches_across, x = i % p.patches_across * patch_w;
    int segment = 0, row = 2 * pair, end = first_rows;
    if (pair >= of_first) {
      segment = 1 + (pair - of_first) / of_image;
      const int begin = first_rows + (segment - 1) * p.out_height;
      row = begin + (pair - of_first) % of_image * 2;
      end = min(begin + p.out_height, tile_rows);
    }
    const int halo_row = row + 2 * segment;
    const int up = max(0, halo_row + patch_h + 2 - halo_rows), back = max(0, x + patch_w + 2 - p.halo_w);
    Patch made;
    made.halo = (halo_row - up) * p.halo_w + x - back;
    made.row = (row - up) * p.tile_w + x - back;
    made.valid = 0;
    for (int j = 0; j < patch; ++j) {
      const int patch_row = j / patch_w - up, patch_x = j % patch_w - back;
      if (patch_row >= 0 && row + patch_row < end && patch_x >= 0 && x + patch_x < tile_w) made.valid |= 1u << j;
    }
    patches[i] = made;
  }
}

// The input of the tile for the channels from `first` on, their weights and biases; zeros where there is no input.
template <class T>
__device__ __forceinline__ void copy_halo(const Forward& p, const int* table, char* slot, int first) {
  constexpr int units = row_bytes / 16;
  const int thread = this_thread(), unit = thread % units, here = min(depth, p.channels - first);
  const T* input = static_cast<const T*>(p.input) + first + unit * widest<T>;
#pragma unroll 4
  for (int i = thread / units; i < p.halo_pixels; i += producers / units) {
    const int pixel = table[i];
    const bool inside = pixel >= 0 && unit * widest<T> < here;
    copy_async(slot + i * row_bytes + unit * 16,
               inside ? input + static_cast<int64_t>(pixel) * p.channels : static_cast<const T*>(p.input), inside);
  }
  char* weights = slot + halo_bytes(p);
  if (thread * widest<T> < here * taps)
    copy_async(weights + thread * 16,
               static_cast<const T*>(p.depthwise_weight) + static_cast<int64_t>(first) * taps + thread * widest<T>,
               true);
  if (p.depthwise_bias != nullptr && thread * widest<T> < here)
    copy_async(weights + weight_bytes + thread * 16,
               static_cast<const T*>(p.depthwise_bias) + first + thread * widest<T>, true);
}

// W: rows of the pointwise weights from output channel k on, channels from `first` on; zeros beyond both ends.
template <class T>
__device__ __forceinline__ void copy_pointwise(const Forward& p, char* w, int k, int first) {
  constexpr int units = row_bytes / 16, step = producers / units;
  static_assert(step % 8 == 0, "a thread's rows are swizzled alike");
  const int thread = this_thread(), unit = thread % units, row = thread / units;
  const int part = first + unit * widest<T>;
  const T* weights = static_cast<const T*>(p.pointwise_weight);
  const T* from = weights + static_cast<int64_t>(k + row) * p.channels + part;
  char* to = w + row * row_bytes + (unit ^ row % 8) * 16;
#pragma unroll
  for (int i = 0; i < columns; i += step) {
    const bool inside = k + row + i < p.out_channels && part < p.channels;
    copy_async(to + i * row_bytes, inside ? from + static_cast<int64_t>(i) * p.channels : weights, inside);
  }
}

// A of a chunk. A warp has a patch, its lanes two neighbouring channels each.
template <class T>
__device__ __forceinline__ void depthwise(const Forward& p, const Patch* patches, const char* slot, char* a,
                                          int first) {
  const int lane = this_thread() % warp_size;
  const T* halo = reinterpret_cast<const T*>(slot) + lane * lanes;
  const T* copied = reinterpret_cast<const T*>(slot + halo_bytes(p));
  float weights[taps * lanes], bias[lanes] = {};
#pragma unroll
  for (int i = 0; i < taps * lanes; i += lanes) {  // two filters of 9, one behind the other
    float pair[lanes];
    load(pair, copied + lane * lanes * taps + i);
#pragma unroll
    for (int v = 0; v < lanes; ++v) weights[(i + v) % taps * lanes + (i + v) / taps] = pair[v];
  }
  if (p.depthwise_bias != nullptr) load(bias, copied + depth * taps + lane * lanes);
  const bool real = first + lane * lanes < p.channels;  // beyond the last channel A is 0
#pragma unroll 1
  for (int i = this_thread() / warp_size; i < p.patches; i += producer_warps) {
    const Patch at = patches[i];
    if (at.valid == 0) continue;
    float sums[patch * lanes] = {};
    add_window<T, 1, true>(sums, halo + at.halo * depth, 0, p.halo_w * depth, depth, weights);
#pragma unroll
    for (int j = 0; j < patch * lanes; ++j) sums[j] += bias[j % lanes];
    activate(p.mid_activation, sums);
#pragma unroll
    for (int j = 0; j < patch; ++j) {
      if ((at.valid >> j & 1u) == 0) continue;
      const int row = at.row + j / patch_w * p.tile_w + j % patch_w;
      const uint32_t pair = pack(T(), real ? sums[j * lanes] : 0.f, real ? sums[j * lanes + 1] : 0.f);
      *reinterpret_cast<uint32_t*>(a + row * row_bytes + (lane / 4 ^ row % 8) * 16 + lane % 4 * 4) = pair;
    }
  }
}

template <class T>
__device__ __forceinline__ void produce(const Forward& p, const Shared& shared) {
  const int chunks = (p.channels + depth - 1) / depth, ahead = p.slots - 1;
  Walk now = {blockIdx.x}, next = now;
  int slot = 0, next_slot = 0;
  const auto copy_next = [&] {
    if (next.inside(p))
      copy_halo<T>(p, shared.halo(p, next.number % 2), shared.slots + next_slot * p.slot_bytes, next.chunk * depth);
    copy_commit();
    next.advance(chunks);
    if (++next_slot == p.slots) next_slot = 0;
  };
  fill_tables(p, shared, now.tile, 0);
  barrier_among<1, producers>();
  for (int i = 0; i < ahead; ++i) copy_next();
  Turn turn;
#pragma unroll 1
  for (; now.inside(p); now.advance(chunks), turn.advance()) {
    if (ahead == 1)
      copy_wait<0>();
    else
      copy_wait<1>();
    barrier_among<1, producers>();
    // The set that is written was last read for the chunk before `now`, at the latest: there are `ahead` chunks.
    if (next.chunk == 0 && next.inside(p)) {
      fill_tables(p, shared, next.tile, next.number % 2);
      barrier_among<1, producers>();
    }
    barrier_wait(shared.empty + turn.stage, turn.parity ^ 1u);
    copy_pointwise<T>(p, shared.w(turn.stage), place_of(p, now.tile).k, now.chunk * depth);
    copy_commit();
    copy_next();
    depthwise<T>(p, shared.patches(p, now.number % 2), shared.slots + slot * p.slot_bytes, shared.a(turn.stage),
                 now.chunk * depth);
    copy_wait<1>();  // W, and not the input
    publish_to_products();
    __syncwarp();
    if (this_thread() % warp_size == 0) barrier_arrive(shared.full + turn.stage);
    if (++slot == p.slots) slot = 0;
  }
  copy_wait<0>();
}

// ---- consumers
// -------------------------------------------------------------------------------------------------------

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
