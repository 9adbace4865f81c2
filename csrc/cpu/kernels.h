// The CPU kernels, compiled once per instruction set; ops.cpp chooses at run time.
#pragma once

#include <cstdint>

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
