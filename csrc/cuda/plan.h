// How the CUDA kernels are launched: pure functions of a call and a GPU, which the tests run on a CPU, and whose
// results the kernels are given by value.
#pragma once

#include <cstdint>

namespace stbp::cuda {

// What the plans ask of a GPU.
struct DeviceProperties {
  int processors;
};

struct LifPlan {
  int width;       // neurons of a thread
  int threads;     // of a block
  int64_t blocks;  // enough for all neurons
};

constexpr int kMostThreads = 128;  // of a block

// N neurons of so many bytes each, which pointers and N allow to be moved in packs of at most `widest`.
//
// Packs of 16 bytes need the fewest instructions. Two blocks of them for each multiprocessor have, with 8 steps' loads
// under way in each thread, 32 KB under way, which is what hides the latency of memory; where there are fewer, narrower
// packs spread the same loads over more threads and multiprocessors, and in the end smaller blocks do.
inline LifPlan plan_lif(int64_t neurons, int scalar_bytes, int widest, const DeviceProperties& device) {
  LifPlan plan{1, kMostThreads, 0};
  const int packs[] = {16 / scalar_bytes, 4 / scalar_bytes};  // as launch.cu compiles them; of double one neuron
  for (const int width : packs) {
    if (scalar_bytes <= 4 && width <= widest && neurons / width >= int64_t(device.processors) * 2 * kMostThreads) {
      plan.width = width;
      break;
    }
  }
  const int64_t threads = (neurons + plan.width - 1) / plan.width;
  while (plan.threads > 32 && threads < int64_t(device.processors) * plan.threads) plan.threads /= 2;
  plan.blocks = (threads + plan.threads - 1) / plan.threads;
  return plan;
}

struct NeuNormPlan {
  int64_t strips;    // of positions
  int64_t blocks;    // strips x samples, or strips x groups of them
  int shared_bytes;  // for the spikes of a chunk, a bit for each step; 0 where they wait in the output itself
};

// Positions that a block has: one for each thread of a warp.
constexpr int kStrip = 32;

// Two barriers for each chunk: with fewer warps a block does more of its work between them, with more it hides more of
// the latency of memory.
constexpr int kNeuNormWarps = 8;

inline int64_t neunorm_strips(int64_t positions) { return (positions + kStrip - 1) / kStrip; }

// Enough blocks for any GPU, and the same number on all of them, as the sums over a group are rounded by themselves.
inline int64_t neunorm_groups(int64_t batch, int64_t positions) {
  constexpr int64_t kBlocks = 1024;
  const int64_t strips = neunorm_strips(positions);
  const int64_t groups = strips > 0 ? (kBlocks + strips - 1) / strips : 1;
  return groups < batch ? groups : batch > 0 ? batch : 1;
}

// Of F features. What a block may have without asking for more is 48 KB, of which the sums take up to 16.
inline NeuNormPlan plan_neunorm_forward(int64_t batch, int64_t features, int64_t positions) {
  constexpr int64_t kMostShared = 32 * 1024;
  const int64_t strips = neunorm_strips(positions), bytes = features * kStrip;
  return {strips, strips * batch, bytes <= kMostShared ? int(bytes) : 0};
}

inline NeuNormPlan plan_neunorm_backward(int64_t groups, int64_t positions) {
  const int64_t strips = neunorm_strips(positions);
  return {strips, strips * groups, 0};
}

}  // namespace stbp::cuda
