// The CUDA kernels. No torch here, and no header of CUDA's own: nvcc brings the built-ins, and the tests compile this
// file as plain C++ against a stand-in for them.
#pragma once

#include <cstdint>
#include <cstring>

#include "../lif.h"
#include "../number.h"
#include "launch.h"
#include "plan.h"

namespace stbp::cuda {

// One load or store instruction of 2 to 16 bytes.
template <int kBytes>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// Neighbouring neurons of one row, as they are in memory, in as few words as their bytes allow. Half types stay two to
// a register until they are wanted.
template <class T, int kWidth>
struct Pack {
  using State = state_t<T>;
  static constexpr int kBytes = int(sizeof(T)) * kWidth;
  static constexpr int kWordBytes = kBytes < 16 ? kBytes : 16;
  static constexpr int kWords = kBytes / kWordBytes;
  static constexpr bool kPairs = sizeof(T) == 2 && kWidth > 1;
  using WordType = typename Word<kWordBytes>::type;

  WordType words[kWords];

  __device__ __forceinline__ State get(int i) const {
    if constexpr (kPairs) {
      uint32_t pairs[kWidth / 2];
      memcpy(pairs, words, sizeof(words));
      return to_state(T{uint16_t(i % 2 ? pairs[i / 2] >> 16 : pairs[i / 2])});
    } else {
      T lanes[kWidth];
      memcpy(lanes, words, sizeof(words));
      return to_state(lanes[i]);
    }
  }
  static __device__ __forceinline__ Pack of(const State (&values)[kWidth]) {
    Pack pack;
    if constexpr (kPairs) {
      uint32_t pairs[kWidth / 2];
#pragma unroll
      for (int i = 0; i < kWidth / 2; ++i) pairs[i] = rounded_pair<T>(values[2 * i], values[2 * i + 1]);
      memcpy(pack.words, pairs, sizeof(pairs));
    } else {
      T lanes[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) lanes[i] = Rounded<T>::from(values[i]);
      memcpy(pack.words, lanes, sizeof(lanes));
    }
    return pack;
  }

  // Through the read-only path, which lets the compiler issue the loads of later steps before earlier stores.
  static __device__ __forceinline__ Pack load(const T* from) {
    Pack pack;
#pragma unroll
    for (int w = 0; w < kWords; ++w) pack.words[w] = __ldg(reinterpret_cast<const WordType*>(from) + w);
    return pack;
  }
  // Read for the last time: to leave the caches first.
  static __device__ __forceinline__ Pack load_last(const T* from) {
    Pack pack;
#pragma unroll
    for (int w = 0; w < kWords; ++w) pack.words[w] = __ldcs(reinterpret_cast<const WordType*>(from) + w);
    return pack;
  }
  // Of a row that this thread has written, which the read-only path might not show.
  static __device__ __forceinline__ Pack load_own(const T* from) {
    Pack pack;
#pragma unroll
    for (int w = 0; w < kWords; ++w) pack.words[w] = reinterpret_cast<const WordType*>(from)[w];
    return pack;
  }

  __device__ __forceinline__ void store(T* to) const {
#pragma unroll
    for (int w = 0; w < kWords; ++w) reinterpret_cast<WordType*>(to)[w] = words[w];
  }
  // Not read again for long: to leave the caches first.
  __device__ __forceinline__ void store_away(T* to) const {
#pragma unroll
    for (int w = 0; w < kWords; ++w) __stcs(reinterpret_cast<WordType*>(to) + w, words[w]);
  }
};

// The states of a thread's neurons: zero where they come from nowhere.
template <class State, int kWidth>
__device__ __forceinline__ void load_states(State (&v)[kWidth], const State* from) {
  const auto pack = from ? Pack<State, kWidth>::load(from) : Pack<State, kWidth>{};
#pragma unroll
  for (int i = 0; i < kWidth; ++i) v[i] = pack.get(i);
}

// Of the steps that are left, how many are done at once.
__device__ __forceinline__ int rows_of(int64_t left) { return left < kAtOnce ? int(left) : kAtOnce; }

// kAtOnce rows, or as many as are left, with the loads of all of them under way at once.
template <class Row, class Load, class Scalar>
__device__ __forceinline__ void load_rows(Row (&rows)[kAtOnce], const Load& load, const Scalar* from, int64_t neurons,
                                          int left) {
#pragma unroll
  for (int k = 0; k < kAtOnce; ++k) rows[k] = k < left ? load(from + k * neurons) : Row{};
}

// Rows of gradients that are under way while a thread goes back: as it is done with a step's potentials, it has room
// for more of them.
constexpr int kAhead = 4;

// Blocks of a multiprocessor that the registers must do for: at 4 a thread has 128 of them, at 3 168, at 2 255. The
// fewest that no kernel spills with; the more a thread has under way, the fewer threads hide the latency of memory.
template <class Scalar, int kWidth>
constexpr int kForwardBlocks = sizeof(Scalar) * kWidth == 16 || sizeof(Scalar) == 8 ? 4 : 8;
template <class Scalar, int kWidth>
constexpr int kBackwardBlocks = sizeof(Scalar) == 8             ? 2
                                : sizeof(Scalar) * kWidth == 16 ? (sizeof(Scalar) == 2 ? 2 : 3)
                                : kWidth == 2                   ? 6
                                                                : 8;

template <int kWidth, class Scalar, class Neuron>
__global__ void __launch_bounds__(kMostThreads, (kForwardBlocks<Scalar, kWidth>))
    lif_forward(const LifForward<Scalar> io, const LifPlan plan, const Neuron neuron) {
  using State = state_t<Scalar>;
  using Row = Pack<Scalar, kWidth>;
  const int64_t first = (int64_t(blockIdx.x) * plan.threads + threadIdx.x) * kWidth;
  if (first >= io.neurons) return;
  const auto load = [](const Scalar* from) { return Row::load(from); };
  State v[kWidth];
  load_states(v, io.initial ? io.initial + first : nullptr);
  const Scalar* x = io.x + first;
  Scalar* spikes = io.spikes + first;
  State* states = io.states ? io.states + first : nullptr;
  Row next[kAtOnce];
  load_rows(next, load, x, io.neurons, rows_of(io.steps));
  for (int64_t start = 0; start < io.steps; start += kAtOnce) {
    const int left = rows_of(io.steps - start);
    Row rows[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) rows[k] = next[k];
    // Under way while the neurons are busy with those before them.
    x += kAtOnce * io.neurons;
    load_rows(next, load, x, io.neurons, rows_of(io.steps - start - kAtOnce));
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (k >= left) break;
      State fired[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) neuron.step(v[i], rows[k].get(i), fired[i]);
      Row::of(fired).store(spikes);
      spikes += io.neurons;
    }
    if (states && start % kChunk == kChunk - kAtOnce && io.steps - start > kAtOnce) {
      Pack<State, kWidth>::of(v).store_away(states);
      states += io.neurons;
    }
  }
  if (io.final_potential) Pack<State, kWidth>::of(v).store(io.final_potential + first);
}

// Goes back chunk by chunk: reads a chunk's currents once, recomputes its potentials, kAtOnce of them at a time, from
// the state before it, and uses them in reverse.
template <int kWidth, class Scalar, class Neuron>
__global__ void __launch_bounds__(kMostThreads, (kBackwardBlocks<Scalar, kWidth>))
    lif_backward(const LifBackward<Scalar> io, const LifPlan plan, const Neuron neuron) {
  using State = state_t<Scalar>;
  using Row = Pack<Scalar, kWidth>;
  static_assert(kChunk == 2 * kAtOnce);
  const int64_t first = (int64_t(blockIdx.x) * plan.threads + threadIdx.x) * kWidth;
  if (first >= io.neurons) return;
  const auto load = [](const Scalar* from) { return Row::load_last(from); };
  State grad_v[kWidth];
  load_states(grad_v, io.grad_final ? io.grad_final + first : nullptr);
  for (int64_t chunk = (io.steps - 1) / kChunk; chunk >= 0; --chunk) {
    const State* before = chunk > 0 ? io.states + (chunk - 1) * io.neurons : io.initial;
    const bool two = io.steps - chunk * kChunk > kAtOnce;
    int64_t at = chunk * kChunk * io.neurons + first;
    // The first half of two waits in registers, as it came.
    Row rows[kAtOnce], earlier[kAtOnce];
    if (two) {
      load_rows(earlier, load, io.x + at, io.neurons, kAtOnce);
      at += kAtOnce * io.neurons;
    }
    int left = rows_of(io.steps - chunk * kChunk - (two ? kAtOnce : 0));
    load_rows(rows, load, io.x + at, io.neurons, left);
    State v[kWidth], v_earlier[kWidth];
    load_states(v, before ? before + first : nullptr);
    if (two) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        v_earlier[i] = v[i];
        State unused;
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) neuron.step(v[i], earlier[k].get(i), unused);
      }
    }
#pragma unroll 1
    for (int half = two ? 1 : 0; half >= 0; --half) {
      const Scalar* const grad_spikes = io.grad_spikes + at;
      Scalar* const grad_x = io.grad_x + at;
      Row gradient[kAtOnce];  // of which kAhead are there at a time
#pragma unroll
      for (int k = kAtOnce - 1; k >= kAtOnce - kAhead; --k)
        gradient[k] = k < left ? load(grad_spikes + k * io.neurons) : Row{};
      State u[kAtOnce][kWidth];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        if (k >= left) break;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          State unused;
          u[k][i] = neuron.step(v[i], rows[k].get(i), unused);
        }
      }
#pragma unroll
      for (int k = kAtOnce - 1; k >= 0; --k) {
        if (k >= kAhead)
          gradient[k - kAhead] = k - kAhead < left ? load(grad_spikes + (k - kAhead) * io.neurons) : Row{};
        if (k >= left) continue;
        State grad_u[kWidth];
#pragma unroll
        for (int i = 0; i < kWidth; ++i) grad_u[i] = neuron.step_back(u[k][i], gradient[k].get(i), grad_v[i]);
        Row::of(grad_u).store(grad_x + k * io.neurons);
      }
      if (half > 0) {
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) rows[k] = earlier[k];
#pragma unroll
        for (int i = 0; i < kWidth; ++i) v[i] = v_earlier[i];
        at -= kAtOnce * io.neurons;
        left = kAtOnce;
      }
    }
  }
  if (io.grad_initial) Pack<State, kWidth>::of(grad_v).store(io.grad_initial + first);
}

// The widest pack in which N neurons of Scalar, and their states, can be moved at these addresses (a null pointer can).
template <class Scalar>
class WidestPack {
 public:
  explicit WidestPack(int64_t neurons) {
    while (width_ > 1 && neurons % width_ != 0) width_ /= 2;
  }
  template <class T>
  WidestPack& at(const T* pointer) {
    const auto fits = [&] {
      const int bytes = width_ * int(sizeof(T));
      return reinterpret_cast<uintptr_t>(pointer) % uintptr_t(bytes < 16 ? bytes : 16) == 0;
    };
    while (width_ > 1 && !fits()) width_ /= 2;
    return *this;
  }
  operator int() const { return width_; }

 private:
  int width_ = 16 / sizeof(Scalar);
};

template <class Scalar>
int widest_pack(const LifForward<Scalar>& io) {
  return WidestPack<Scalar>(io.neurons).at(io.x).at(io.initial).at(io.spikes).at(io.final_potential).at(io.states);
}

template <class Scalar>
int widest_pack(const LifBackward<Scalar>& io) {
  WidestPack<Scalar> pack(io.neurons);
  pack.at(io.x).at(io.initial).at(io.states).at(io.grad_spikes).at(io.grad_final).at(io.grad_x).at(io.grad_initial);
  return pack;
}

}  // namespace stbp::cuda
