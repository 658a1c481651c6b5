// What the warps of the Hopper kernel share, and its producers; see forward_hopper.cuh.
#pragma once

#include "forward_depthwise.cuh"

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

// Both tables of a tile: an entry of each for a producer at a time, with its divisions.
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

}  // namespace hopper
}  // namespace cuda
}  // namespace fastsep
