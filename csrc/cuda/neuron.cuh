// The plain CUDA kernels: LIF neurons with the constants of the launch. No torch here, and no header of CUDA's own:
// nvcc brings the built-ins, and the tests compile this file as plain C++ against a stand-in for them.
#pragma once

#include <cstdint>
#include <cstring>

#include "../core/io.h"
#include "../core/number.h"
#include "launch.h"
#include "plan.h"

namespace stbp::cuda {

#if defined(__CUDACC__)
// Dynamic shared memory.
__device__ __forceinline__ unsigned char* shared_bytes() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}
#endif

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

  // Written as the instruction: nvcc splits some assignments into words of 4 bytes.
  __device__ __forceinline__ void store(T* to) const {
#pragma unroll
    for (int w = 0; w < kWords; ++w) __stwb(reinterpret_cast<WordType*>(to) + w, words[w]);
  }
  // Not read again for long: to leave the caches first.
  __device__ __forceinline__ void store_away(T* to) const {
#pragma unroll
    for (int w = 0; w < kWords; ++w) __stcs(reinterpret_cast<WordType*>(to) + w, words[w]);
  }
};

// The states of a thread's neurons, from `first` on; zero if `from` is null.
template <class State, int kWidth>
__device__ __forceinline__ void load_states(State (&v)[kWidth], const State* from, int64_t first) {
  const auto pack = from ? Pack<State, kWidth>::load(from + first) : Pack<State, kWidth>{};
#pragma unroll
  for (int i = 0; i < kWidth; ++i) v[i] = pack.get(i);
}

// Of the steps that are left, how many are done at once.
__device__ __forceinline__ int rows_of(int64_t left) { return left < kAtOnce ? int(left) : kAtOnce; }

// The first `count` of kRows rows, with the loads of all of them under way at once. At least `kFewest` rows are there,
// and are loaded without a test.
template <int kFewest, int kRows, class Row, class Load, class Scalar>
__device__ __forceinline__ void load_rows(Row (&rows)[kRows], const Load& load, const Scalar* from, int64_t stride,
                                          int count) {
#pragma unroll
  for (int k = 0; k < kRows; ++k)
    if (k < kFewest || k < count) rows[k] = load(from + k * stride);
}

// The potentials u of the first `count` of kRows steps; leaves the last v in `v`.
template <int kFewest, int kRows, int kWidth, class Row, class Neuron, class State>
__device__ __forceinline__ void recompute(const Neuron& neuron, const Row (&rows)[kRows], State (&v)[kWidth],
                                          State (&u)[kRows][kWidth], int count) {
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    if (k >= kFewest && k >= count) break;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      State unused;
      u[k][i] = neuron.step(v[i], rows[k].get(i), unused);
    }
  }
}

// The same steps back: dL/dx from dL/do in `gradient`.
template <int kFewest, int kRows, int kWidth, class Row, class Neuron, class State, class Scalar>
__device__ __forceinline__ void go_back(const Neuron& neuron, const State (&u)[kRows][kWidth],
                                        const Row (&gradient)[kRows], State (&grad_v)[kWidth], Scalar* grad_x,
                                        int64_t stride, int count) {
#pragma unroll
  for (int k = kRows - 1; k >= 0; --k) {
    if (k >= kFewest && k >= count) continue;
    State grad_u[kWidth];
    neuron.steps_back(u[k], [&](int i) { return gradient[k].get(i); }, grad_v, grad_u);
    Row::of(grad_u).store(grad_x + k * stride);
  }
}

// Minimum resident blocks for __launch_bounds__; bench/kernels.cu tries others.
constexpr int min_blocks(int blocks) {
#if defined(STBP_BLOCKS)
  return blocks > 0 ? STBP_BLOCKS : 0;
#else
  return blocks;
#endif
}

// T <= kRows: no loop, and as few registers as kRows rows take. A thread's neurons are few only where a GPU would not
// be filled otherwise; then one kernel serves every T, and no row but the first is sure to be there.
template <int kRows, int kWidth>
constexpr int kFewestRows = kWidth == 1 ? 1 : kRows / 2 + 1;

template <int kRows, int kWidth, class Scalar, class Neuron>
__global__ void __launch_bounds__(kMostThreads)
    lif_forward_rows(const NeuronForward<Scalar> io, const LifPlan plan, const Neuron neuron) {
  using State = state_t<Scalar>;
  using Row = Pack<Scalar, kWidth>;
  constexpr int kFewest = kFewestRows<kRows, kWidth>;
  const int64_t first = (int64_t(blockIdx.x) * plan.threads + threadIdx.x) * kWidth;
  if (first >= io.layout.neurons()) return;
  const int steps = int(io.layout.steps);
  const int64_t at = io.layout.at(first, steps), stride = io.layout.inner;
  Row rows[kRows];
  load_rows<kFewest>(rows, [](const Scalar* from) { return Row::load(from); }, io.x + at, stride, steps);
  State v[kWidth];
  load_states(v, io.initial, first);
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    if (k >= kFewest && k >= steps) break;
    State fired[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) neuron.step(v[i], rows[k].get(i), fired[i]);
    Row::of(fired).store(io.output + at + k * stride);
  }
  if (io.final_state) Pack<State, kWidth>::of(v).store(io.final_state + first);
}

// Minimum resident blocks: the most at which nothing spills. At 12 a thread has 40 registers, at 8 64, at 6 80, at 5
// 96. sm_75 holds no more than 8.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kMostBlocks = 8;
#else
constexpr int kMostBlocks = 12;
#endif
template <class Scalar, int kRows, int kWidth>
constexpr int kBackwardRowsBlocks = kWidth == 1                          ? 8
                                    : kRows * kWidth <= 8                ? kMostBlocks
                                    : kRows * kWidth <= 16               ? 8
                                    : sizeof(Scalar) == 2 && kWidth == 4 ? 6
                                                                         : 5;

template <int kRows, int kWidth, class Scalar, class Neuron>
__global__ void __launch_bounds__(kMostThreads, min_blocks(kBackwardRowsBlocks<Scalar, kRows, kWidth>))
    lif_backward_rows(const NeuronBackward<Scalar> io, const LifPlan plan, const Neuron neuron) {
  using State = state_t<Scalar>;
  using Row = Pack<Scalar, kWidth>;
  constexpr int kFewest = kFewestRows<kRows, kWidth>;
  const int64_t first = (int64_t(blockIdx.x) * plan.threads + threadIdx.x) * kWidth;
  if (first >= io.layout.neurons()) return;
  const int steps = int(io.layout.steps);
  const int64_t at = io.layout.at(first, steps), stride = io.layout.inner;
  const auto load = [](const Scalar* from) { return Row::load_last(from); };
  Row rows[kRows], gradient[kRows];
  load_rows<kFewest>(rows, load, io.x + at, stride, steps);
  load_rows<kFewest>(gradient, load, io.grad_output + at, stride, steps);
  State v[kWidth], grad_v[kWidth], u[kRows][kWidth];
  load_states(v, io.initial, first);
  load_states(grad_v, io.grad_final, first);
  recompute<kFewest>(neuron, rows, v, u, steps);
  go_back<kFewest>(neuron, u, gradient, grad_v, io.grad_x + at, stride, steps);
  if (io.grad_initial) Pack<State, kWidth>::of(grad_v).store(io.grad_initial + first);
}

// Minimum resident blocks of the kernels for longer T: the most at which nothing spills. At 4 a thread has 128
// registers, at 3 168, at 2 255.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kForwardBlocksOfSingles = 7;
#else
constexpr int kForwardBlocksOfSingles = 8;
#endif
template <class Scalar, int kWidth>
constexpr int kForwardBlocks = sizeof(Scalar) * kWidth == 16 || sizeof(Scalar) == 8 ? 4
                               : kWidth == 1                                        ? kForwardBlocksOfSingles
                                                                                    : 8;
template <class Scalar, int kWidth>
constexpr int kBackwardBlocks = sizeof(Scalar) == 8   ? 2
                                : kWidth == 1         ? 7
                                : sizeof(Scalar) == 4 ? 3
                                                      : 4;

template <int kWidth, class Scalar, class Neuron>
__global__ void __launch_bounds__(kMostThreads, min_blocks(kForwardBlocks<Scalar, kWidth>))
    lif_forward(const NeuronForward<Scalar> io, const LifPlan plan, const Neuron neuron) {
  using State = state_t<Scalar>;
  using Row = Pack<Scalar, kWidth>;
  const int64_t first = (int64_t(blockIdx.x) * plan.threads + threadIdx.x) * kWidth;
  if (first >= io.layout.neurons()) return;
  const auto load = [](const Scalar* from) { return Row::load(from); };
  State v[kWidth];
  load_states(v, io.initial, first);
  const int64_t steps = io.layout.steps, stride = io.layout.inner, at = io.layout.at(first, steps);
  const Scalar* x = io.x + at;
  Scalar* output = io.output + at;
  Row next[kAtOnce];
  load_rows<0>(next, load, x, stride, rows_of(steps));
  for (int64_t start = 0; start < steps; start += kAtOnce) {
    const int left = rows_of(steps - start);
    Row rows[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) rows[k] = next[k];
    // Under way while the neurons are busy with those before them.
    x += kAtOnce * stride;
    load_rows<0>(next, load, x, stride, rows_of(steps - start - kAtOnce));
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (k >= left) break;
      State fired[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) neuron.step(v[i], rows[k].get(i), fired[i]);
      Row::of(fired).store(output);
      output += stride;
    }
    if (io.states && start % kChunk == kChunk - kAtOnce && steps - start > kAtOnce) {
      const int64_t saved_at = io.layout.at(first, (steps - 1) / kChunk);  // in every round, to save registers
      Pack<State, kWidth>::of(v).store_away(io.states + saved_at + start / kChunk * stride);
    }
  }
  if (io.final_state) Pack<State, kWidth>::of(v).store(io.final_state + first);
}

// Goes back chunk by chunk: reads a chunk's currents once, recomputes its potentials, kAtOnce of them at a time, from
// the state before it, and uses them in reverse.
template <int kWidth, class Scalar, class Neuron>
__global__ void __launch_bounds__(kMostThreads, min_blocks(kBackwardBlocks<Scalar, kWidth>))
    lif_backward(const NeuronBackward<Scalar> io, const LifPlan plan, const Neuron neuron) {
  using State = state_t<Scalar>;
  using Row = Pack<Scalar, kWidth>;
  static_assert(kChunk == 2 * kAtOnce);
  const int64_t first = (int64_t(blockIdx.x) * plan.threads + threadIdx.x) * kWidth;
  if (first >= io.layout.neurons()) return;
  const auto load = [](const Scalar* from) { return Row::load_last(from); };
  State grad_v[kWidth];
  load_states(grad_v, io.grad_final, first);
  const int64_t steps = io.layout.steps, stride = io.layout.inner, rows_at = io.layout.at(first, steps);
  const int64_t states_at = io.layout.at(first, (steps - 1) / kChunk);
  for (int64_t chunk = (steps - 1) / kChunk; chunk >= 0; --chunk) {
    const bool two = steps - chunk * kChunk > kAtOnce;
    int64_t at = rows_at + chunk * kChunk * stride;
    // The first half of two waits in registers, as it came.
    Row rows[kAtOnce], earlier[kAtOnce], gradient[kAtOnce];
    if (two) {
      load_rows<kAtOnce>(earlier, load, io.x + at, stride, kAtOnce);
      at += kAtOnce * stride;
    }
    int left = rows_of(steps - chunk * kChunk - (two ? kAtOnce : 0));
    load_rows<1>(rows, load, io.x + at, stride, left);
    State v[kWidth], v_earlier[kWidth], u[kAtOnce][kWidth];
    load_states(v, chunk > 0 ? io.states : io.initial, chunk > 0 ? states_at + (chunk - 1) * stride : first);
    if (two) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) v_earlier[i] = v[i];
      recompute<kAtOnce>(neuron, earlier, v, u, kAtOnce);
    }
#pragma unroll 1
    for (int half = two ? 1 : 0; half >= 0; --half) {
      load_rows<1>(gradient, load, io.grad_output + at, stride, left);
      recompute<1>(neuron, rows, v, u, left);
      go_back<1>(neuron, u, gradient, grad_v, io.grad_x + at, stride, left);
      if (half > 0) {
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) rows[k] = earlier[k];
#pragma unroll
        for (int i = 0; i < kWidth; ++i) v[i] = v_earlier[i];
        at -= kAtOnce * stride;
        left = kAtOnce;
      }
    }
  }
  if (io.grad_initial) Pack<State, kWidth>::of(grad_v).store(io.grad_initial + first);
}

// The widest pack in which rows of so many neighbours, and their states, can be moved at these addresses (a null
// pointer can).
template <class Scalar>
class WidestPack {
 public:
  explicit WidestPack(int64_t neighbours) {
    while (width_ > 1 && neighbours % width_ != 0) width_ /= 2;
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
int widest_pack(const NeuronForward<Scalar>& io) {
  return WidestPack<Scalar>(io.layout.inner).at(io.x).at(io.initial).at(io.output).at(io.final_state).at(io.states);
}

template <class Scalar>
int widest_pack(const NeuronBackward<Scalar>& io) {
  WidestPack<Scalar> pack(io.layout.inner);
  pack.at(io.x).at(io.initial).at(io.states).at(io.grad_output).at(io.grad_final).at(io.grad_x).at(io.grad_initial);
  return pack;
}

}  // namespace stbp::cuda
