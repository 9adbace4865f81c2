// How the CUDA kernels are launched: pure functions of a call and a GPU, which the tests run on a CPU, and whose
// results the kernels are given by value.
#pragma once

#include <cstdint>

#include "launch.h"

namespace stbp::cuda {

// What the plans ask of a GPU.
struct DeviceProperties {
  int processors;
  int shared_bytes;  // that a block may have if it asks for them
};

struct LifPlan {
  int rows;        // of the kernel for T <= rows, or 0 of the one for any T
  int width;       // neurons of a thread
  int threads;     // of a block
  int64_t blocks;  // enough for all neurons
};

constexpr int kMostThreads = 128;  // of a block
constexpr int kMostRows = 8;

// The smallest number of rows that LIF kernels are compiled for and that is enough for T steps, or 0.
constexpr int lif_rows(int64_t steps, int scalar_bytes) {
  if (scalar_bytes == 8 || steps > kMostRows) return 0;  // double is for checking gradients
  return steps <= 1 ? 1 : steps <= 2 ? 2 : steps <= 4 ? 4 : kMostRows;
}

// Neurons of a thread where there are many: a pack of 16 bytes, which takes the fewest instructions. Of half types
// going back over 8 steps and more, 8 bytes, whose potentials in float32 take half the registers: 20 warps a
// multiprocessor in place of 12, which the latency of memory needs. (Of double one neuron.)
constexpr int lif_pack(int rows, int scalar_bytes, bool backward) {
  if (scalar_bytes == 8) return 1;
  return (backward && scalar_bytes == 2 && (rows == 0 || rows == kMostRows) ? 8 : 16) / scalar_bytes;
}

// T steps of N neurons of so many bytes each, which pointers and N allow to be moved in packs of at most `widest`.
//
// Below two blocks of packs for each multiprocessor, single neurons spread the same loads over more threads and
// multiprocessors; and below one block for each, smaller blocks do.
inline LifPlan plan_lif(int64_t steps, int64_t neurons, int scalar_bytes, bool backward, int widest,
                        const DeviceProperties& device) {
  LifPlan plan{lif_rows(steps, scalar_bytes), 1, kMostThreads, 0};
  const int pack = lif_pack(plan.rows, scalar_bytes, backward);
  if (pack <= widest && neurons / pack >= int64_t(device.processors) * 2 * kMostThreads) {
    plan.width = pack;
  } else if (plan.rows > 0) {
    plan.rows = kMostRows;  // one kernel of single neurons for every small T
  }
  const int64_t threads = (neurons + plan.width - 1) / plan.width;
  while (plan.threads > 32 && threads < int64_t(device.processors) * plan.threads) plan.threads /= 2;
  plan.blocks = (threads + plan.threads - 1) / plan.threads;
  return plan;
}

struct NeuNormPlan {
  int strip;         // neighbouring positions of a block, a power of 2
  int64_t strips;    // of all positions
  int64_t blocks;    // strips x samples, or strips x groups of them
  int shared_bytes;  // for what waits for a sum over the features; 0 where that waits in global memory
};

// Two barriers for each chunk: with fewer threads a block does more of its work between them, with more it hides more
// of the latency of memory.
constexpr int kNeuNormThreads = 256;
constexpr int kMostStrip = 32;

// What a block of so many threads has in shared memory anyway: the values that it adds up, and the parts of their sums.
template <int kThreads>
constexpr int kNeuNormScratch = kNeuNormChunk * (kThreads + kMostStrip);

// Positions of a block: as many as a warp has threads, or as there are, but not so many that what it holds backward, a
// chunk's gradients for all features, takes more than 64 KB, with which an A100's multiprocessor has room for two
// blocks; down to 8, as 32 bytes, 8 float32, are the least that memory moves. Follows from the shape and the dtype
// alone, for the sums over a strip are rounded by themselves.
inline int neunorm_strip(int64_t features, int64_t positions, int scalar_bytes) {
  constexpr int64_t kMostHeld = 64 * 1024;
  const int64_t of_position = features * kNeuNormChunk * scalar_bytes;
  int strip = kMostStrip;
  while (strip > 1 && strip / 2 >= positions) strip /= 2;
  while (strip > 8 && of_position * strip > kMostHeld) strip /= 2;
  return strip;
}

inline int64_t neunorm_strips(int64_t features, int64_t positions, int scalar_bytes) {
  const int strip = neunorm_strip(features, positions, scalar_bytes);
  return (positions + strip - 1) / strip;
}

// Enough blocks for any GPU, and the same number on all of them, as the sums over a group are rounded by themselves.
inline int64_t neunorm_groups(int64_t batch, int64_t strips) {
  constexpr int64_t kBlocks = 1024;
  const int64_t groups = strips > 0 ? (kBlocks + strips - 1) / strips : 1;
  return groups < batch ? groups : batch > 0 ? batch : 1;
}

// So many bytes beside the scratch memory, or none.
inline int shared_if_it_fits(int64_t bytes, int scalar_bytes, const DeviceProperties& device) {
  const int64_t left = device.shared_bytes - kNeuNormScratch<kNeuNormThreads> * (scalar_bytes == 8 ? 8 : 4);
  return bytes <= left ? int(bytes) : 0;
}

// A byte for each feature and position, with a bit for the spike of each step of a chunk.
inline NeuNormPlan plan_neunorm_forward(int64_t batch, int64_t features, int64_t positions, int scalar_bytes,
                                        const DeviceProperties& device) {
  const int strip = neunorm_strip(features, positions, scalar_bytes);
  const int64_t strips = neunorm_strips(features, positions, scalar_bytes);
  return {strip, strips, strips * batch, shared_if_it_fits(features * strip, scalar_bytes, device)};
}

// The gradients of a chunk.
inline NeuNormPlan plan_neunorm_backward(int64_t groups, int64_t features, int64_t positions, int scalar_bytes,
                                         const DeviceProperties& device) {
  const int strip = neunorm_strip(features, positions, scalar_bytes);
  const int64_t strips = neunorm_strips(features, positions, scalar_bytes);
  const int64_t wanted = features * strip * kNeuNormChunk * scalar_bytes;
  return {strip, strips, strips * groups, shared_if_it_fits(wanted, scalar_bytes, device)};
}

}  // namespace stbp::cuda
