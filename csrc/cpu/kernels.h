// The CPU kernels, compiled once per instruction set; ops.cpp chooses at run time.
#pragma once

#include <cstdint>

#include "../lif.h"

namespace stbp::cpu {

// K: a state is kept every 32 steps. The potentials of a chunk of a tile (32 x 512 floats) stay in the L2 cache.
constexpr int kChunk = 32;
// Neurons of a tile: long enough runs of memory for the prefetcher, and a state that stays in the L1 cache.
constexpr int kTile = 512;

template <class Scalar>
struct Kernels {
  // Run the neurons [first, last), one tile after the other.
  void (*forward)(const LifForward<Scalar>&, const LifOptions&, int64_t first, int64_t last);
  void (*backward)(const LifBackward<Scalar>&, const LifOptions&, int64_t first, int64_t last);
};

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
