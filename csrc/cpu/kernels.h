// The CPU kernels, compiled once per instruction set; ops.cpp chooses at run time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <fstream>

#include "../core/io.h"
#include "../neurons/registry.h"

namespace stbp::cpu {

// K: a state is kept every 32 steps. The potentials of a chunk of a tile (32 x 512 floats) stay in the L2 cache.
constexpr int kChunk = 32;

// Where a thread's share of the neurons may begin: a cache line of the smallest type, so that threads keep off each
// other's lines.
constexpr int kBlock = 64;

// The most bytes of State in a strip of positions: memory likes long rows.
constexpr int kNeuNormStrip = 1024;

// K of the neurons with normalisation. The potentials of a chunk of all features of a strip stay in the L2 cache.
constexpr int kNeuNormChunk = 16;

// The most bytes of State in a row of neurons with their features innermost, if that is more than one position.
constexpr int64_t kNeuNormRow = 2048;

// The positions of one sample, or of one group of samples, are the work of several threads in strips. All of it follows
// from the shape and the dtype, and so do the sums: for any number of threads, instruction set and memory order.
struct NeuNormPlan {
  int64_t length;  // of a strip, in positions; the last one may be longer
  int64_t strips;
  int64_t groups;

  // `rows` of all features are in scratch memory.
  NeuNormPlan(int64_t rows, int64_t batch, int64_t features, int64_t positions, int64_t state_size) {
    constexpr int64_t kLeast = 16;       // a strip begins where a cache line does, and has a whole vector
    constexpr int64_t kCache = 1 << 19;  // bytes of scratch memory that stay in the L2 cache
    constexpr int64_t kTasks = 64;       // enough for that many threads
    length = kNeuNormStrip / state_size;
    while (length > kLeast && rows * features * state_size * length > kCache) length /= 2;
    strips = std::max<int64_t>(1, (positions / kLeast * kLeast + length - 1) / length);
    groups = std::max<int64_t>(1, std::min(batch, (kTasks + strips - 1) / strips));
  }
};

// The rows of a thread's scratch memory, for each feature: forward, the weight, potentials and spikes; backward, the
// weight, its gradient, and where they are needed, the gradients of the potentials and of the decay.
constexpr int64_t kNeuNormForwardRows = 3;
STBP_FN int64_t neunorm_backward_rows(int64_t steps, bool decays) { return 2 + (steps > kNeuNormChunk) + decays; }

// The most bytes of State in a tile of the general kernels. Backward, the gradients of parameters need room in the L1
// cache, too.
constexpr int kGeneralTile = 2048;
constexpr int kGeneralTileBack = 1024;

// Over so many steps, and those of one more tile, the gradients of parameters are added up in float32.
constexpr int64_t kStepsInFloat = 64;

// How the general kernels share out N neurons. All of it follows from the shapes, and so do the sums.
//
// Where many neighbours have the same parameters, a tile lies within such a `run`, in `pieces`, and a task is some
// tiles one after the other.
//
// Elsewhere tiles begin at the same `blocks` places of a period again and again. A period is what the parameters repeat
// with; short ones are taken together, up to the width of a tile. Where a sample, or a row of the layout, ends, so does
// a tile. The tiles of one place are `strands`, split into groups: task i is group i / blocks at place i % blocks.
struct GeneralPlan {
  bool lean, uniform, past_caches;
  int64_t width, cut, run, pieces, tiles;
  int64_t period, blocks, tiles_of_cut, strands, groups;
  int64_t entries;  // of each parameter in a task, at most

  template <class State>
  GeneralPlan(const Layout& layout, const Extras<State>& extras, int tile_bytes) : past_caches(false) {
    constexpr int64_t kTasks = 64;                           // enough for that many threads
    constexpr int64_t kLongRun = 128;                        // neurons
    constexpr int64_t kLeast = 64 / int64_t(sizeof(State));  // a vector of any instruction set
    const int64_t tile = tile_bytes / int64_t(sizeof(State));
    const int64_t count = extras.count, group = extras.group;
    lean = extras.rows == 1 && !extras.constant && extras.potentials == nullptr;
    cut = extras.lengths ? extras.sample : layout.inner;
    run = count == 1 ? cut : group;
    uniform = lean && run >= (count == 1 ? kLeast : kLongRun);
    if (uniform) {
      width = tile;
      pieces = (run - kLeast + width) / width;
      tiles = layout.neurons() / run * pieces;
      blocks = 1;
      groups = std::min(tiles, kTasks);
      strands = tiles;
      entries = std::min(count, ((tiles + groups - 1) / groups - 1) / pieces + 2);
      return;
    }
    period = count == 1 ? 1 : group * count;
    if (period > tile) {
      width = tile;
      blocks = (period + tile - 1) / tile;
      cut = period;
      tiles_of_cut = 1;
      entries = std::min(count, tile / group + 2);
    } else {
      width = std::min(tile / period * period, cut);
      blocks = 1;
      tiles_of_cut = (cut + width - 1) / width;
      entries = count;
    }
    strands = layout.neurons() / cut * tiles_of_cut;
    groups = std::max<int64_t>(1, std::min(strands, (kTasks + blocks - 1) / blocks));
  }

  int64_t tasks() const { return blocks * groups; }
  // Whether all tiles begin where streaming stores can, if the tensors do.
  bool aligned() const { return uniform ? run % kBlock == 0 : width % kBlock == 0 && cut % kBlock == 0; }
  int64_t first_tile(int64_t task) const { return tiles * task / groups; }
  int64_t first(int64_t block, int64_t strand) const {
    return strand / tiles_of_cut * cut + (blocks > 1 ? block : strand % tiles_of_cut) * width;
  }
  int64_t count(int64_t block, int64_t strand) const {
    return std::min(width, cut - (blocks > 1 ? block : strand % tiles_of_cut) * width);
  }
  // f(task, place) of the tasks with neurons of an entry, and where they have their sums for it.
  template <class F>
  void each_place(int64_t group, int64_t count, int64_t entry, const F& f) const {
    if (uniform) {
      for (int64_t task = 0; task < groups; ++task) {
        const int64_t first_run = first_tile(task) / pieces, runs = (first_tile(task + 1) - 1) / pieces - first_run + 1;
        const int64_t place = (entry - first_run % count + count) % count;
        if (place < runs) f(task, place);
      }
      return;
    }
    const int64_t start = entry * group, end = start + group;
    for (int64_t block = blocks > 1 ? start / width : 0; block <= (blocks > 1 ? (end - 1) / width : 0); ++block) {
      const int64_t place = entry - block * width / group % count;
      for (int64_t of = 0; of < groups; ++of) f(of * blocks + block, place);
    }
  }
  // Of the tiles of a task the longest.
  int64_t widest(int64_t task) const { return std::min(width, cut - task % blocks * width); }
};

template <class Scalar>
struct Kernels {
  // Run the neurons [first, last). With `past_caches`, results are written past the caches: where input and results do
  // not fit there, that saves reading what is about to be overwritten, a third of the traffic of a forward pass. Needs
  // aligned_for_streams.
  void (*forward)(const NeuronForward<Scalar>&, const LifOptions&, int64_t first, int64_t last, bool past_caches);
  void (*backward)(const NeuronBackward<Scalar>&, const LifOptions&, int64_t first, int64_t last, bool past_caches);
  // Run the tasks [first, last) of the plan.
  void (*general_forward)(const NeuronForward<Scalar>&, const Extras<state_t<Scalar>>&, const NeuronOptions&,
                          const GeneralPlan&, int64_t first, int64_t last);
  void (*general_backward)(const NeuronBackward<Scalar>&, const Extras<state_t<Scalar>>&, const NeuronOptions&,
                           const GeneralPlan&, int64_t first, int64_t last);
  // Run the tasks [first, last): task i is strip i % S of sample, or backward of group, i / S.
  void (*neunorm_forward)(const NeuNormForward<Scalar>&, const LifOptions&, const NeuNormPlan&, int64_t first,
                          int64_t last, bool past_caches);
  void (*neunorm_backward)(const NeuNormBackward<Scalar>&, const LifOptions&, const NeuNormPlan&, int64_t first,
                           int64_t last, bool past_caches);
};

// Whether every vector of a result whose rows are so many neurons long is aligned to its size, in every instruction
// set.
template <class Scalar>
bool aligned_for_streams(const Scalar* result, int64_t row) {
  return reinterpret_cast<uintptr_t>(result) % 64 == 0 && row % kBlock == 0;
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

// True if the working set exceeds 3/4 of the last cache and all outputs are aligned for streaming stores.
template <class Scalar>
bool past_caches(const NeuronForward<Scalar>& io) {
  const int64_t row = io.layout.inner;
  return io.layout.steps * io.layout.neurons() * int64_t(2 * sizeof(Scalar)) > last_cache_bytes() / 4 * 3 &&
         aligned_for_streams(io.output, row) && aligned_for_streams(io.final_state, row) &&
         aligned_for_streams(io.states, row);
}
template <class Scalar>
bool past_caches(const NeuronBackward<Scalar>& io) {
  const int64_t row = io.layout.inner;
  return io.layout.steps * io.layout.neurons() * int64_t(3 * sizeof(Scalar)) > last_cache_bytes() / 4 * 3 &&
         aligned_for_streams(io.grad_x, row) && aligned_for_streams(io.grad_initial, row);
}

template <class Scalar>
bool past_caches(const NeuNormForward<Scalar>& io) {
  return io.steps * io.batch * io.features * io.positions * int64_t(2 * sizeof(Scalar)) > last_cache_bytes() / 4 * 3 &&
         aligned_for_streams(io.normalised, io.channels_last ? io.features : io.positions);
}
template <class Scalar>
bool past_caches(const NeuNormBackward<Scalar>& io) {
  return io.steps * io.batch * io.features * io.positions * int64_t(3 * sizeof(Scalar)) > last_cache_bytes() / 4 * 3 &&
         aligned_for_streams(io.grad_x, io.channels_last ? io.features : io.positions);
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
