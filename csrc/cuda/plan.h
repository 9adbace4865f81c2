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

}  // namespace stbp::cuda
