// The CPU kernels, compiled once per instruction set; ops.cpp chooses at run time.
#pragma once

#include <cstdint>
#include <fstream>

#include "../lif.h"

namespace stbp::cpu {

// K: a state is kept every 32 steps. The potentials of a chunk of a tile (32 x 512 floats) stay in the L2 cache.
constexpr int kChunk = 32;

// Where a thread's share of the neurons may begin: a cache line of the smallest type, so that threads keep off each
// other's lines.
constexpr int kBlock = 64;

template <class Scalar>
struct Kernels {
  // Run the neurons [first, last). With `past_caches`, results are written past the caches: where input and results do
  // not fit there, that saves reading what is about to be overwritten, a third of the traffic of a forward pass. Needs
  // aligned_for_streams.
  void (*forward)(const LifForward<Scalar>&, const LifOptions&, int64_t first, int64_t last, bool past_caches);
  void (*backward)(const LifBackward<Scalar>&, const LifOptions&, int64_t first, int64_t last, bool past_caches);
};

// Whether every vector of a result [T, N] is aligned to its size, in every instruction set.
template <class Scalar>
bool aligned_for_streams(const Scalar* result, int64_t neurons) {
  return reinterpret_cast<uintptr_t>(result) % 64 == 0 && neurons % kBlock == 0;
}

inline int64_t last_cache_bytes() {
  static const int64_t bytes = [] {
    // Not sysconf(): glibc takes the caches of all of an AMD machine's chiplets for one.
    int64_t kilobytes = 0;
    std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> kilobytes;
    return (kilobytes > 0 ? kilobytes : 32768) << 10;
  }();
  return bytes;
}

// Whether a call moves more than the last cache holds, which is never quite empty, to results that allow to pass it by.
template <class Scalar>
bool past_caches(const LifForward<Scalar>& io) {
  return io.steps * io.neurons * int64_t(2 * sizeof(Scalar)) > last_cache_bytes() / 4 * 3 &&
         aligned_for_streams(io.spikes, io.neurons) && aligned_for_streams(io.final_potential, io.neurons) &&
         aligned_for_streams(io.states, io.neurons);
}
template <class Scalar>
bool past_caches(const LifBackward<Scalar>& io) {
  return io.steps * io.neurons * int64_t(3 * sizeof(Scalar)) > last_cache_bytes() / 4 * 3 &&
         aligned_for_streams(io.grad_x, io.neurons) && aligned_for_streams(io.grad_initial, io.neurons);
}

namespace portable {
template <class Scalar>
Kernels<Scalar> kernels();
}
namespace avx2 {
template <class Scalar>
Kernels<Scalar> kernels();
}
namespace avx512 {
template <class Scalar>
Kernels<Scalar> kernels();
}

}  // namespace stbp::cpu
