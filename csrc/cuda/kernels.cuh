// The CUDA kernels. No torch here, and no header of CUDA's own: nvcc brings the built-ins, and the tests compile this
// file as plain C++ against a stand-in for them.
#pragma once

#include <cstdint>
#include <cstring>

#include "../scan.h"
#include "launch.h"

namespace stbp::cuda {

constexpr int kThreads = 128;
// At least 4 blocks on a multiprocessor allow 128 registers a thread; without a number ptxas aims at more and spills.
constexpr int kBlocksPerProcessor = 4;

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

// Neighbouring neurons of one row, moved in as few words as their bytes allow.
template <class T, int kWidth>
struct Pack {
  static constexpr int kWordBytes = sizeof(T) * kWidth < 16 ? int(sizeof(T)) * kWidth : 16;
  static constexpr int kWords = int(sizeof(T)) * kWidth / kWordBytes;
  using WordType = typename Word<kWordBytes>::type;

  T lane[kWidth];

  STBP_FN state_t<T> get(int i) const { return to_state(lane[i]); }
  STBP_FN void set(int i, state_t<T> value) { lane[i] = Rounded<T>::from(value); }
  STBP_FN void set_spike(int i, state_t<T> o) { set(i, o); }

  static __device__ __forceinline__ Pack load(const T* from) {
    WordType words[kWords];
    // Through the read-only path, which lets the compiler issue the loads of later steps before earlier stores.
#pragma unroll
    for (int w = 0; w < kWords; ++w) words[w] = __ldg(reinterpret_cast<const WordType*>(from) + w);
    Pack pack;
    memcpy(pack.lane, words, sizeof(pack.lane));
    return pack;
  }

  // Of a row that this thread has written, which the read-only path might not show.
  static __device__ __forceinline__ Pack load_own(const T* from) {
    static_assert(kWords == 1, "a row of one neuron a thread");
    const WordType word = *reinterpret_cast<const WordType*>(from);
    Pack pack;
    memcpy(pack.lane, &word, sizeof(pack.lane));
    return pack;
  }

  __device__ __forceinline__ void store(T* to) const {
    WordType words[kWords];
    memcpy(words, lane, sizeof(lane));
#pragma unroll
    for (int w = 0; w < kWords; ++w) reinterpret_cast<WordType*>(to)[w] = words[w];
  }
};

// The neurons of one thread, in its registers. More than one only where rows are aligned to a pack.
template <class State, int kWidth_>
struct Registers {
  using Value = State;
  static constexpr int kWidth = kWidth_;
  static constexpr int kChunk = cuda::kChunk;
  static constexpr int kStepsAtOnce = 1;  // the state is in registers anyway
  static constexpr bool kStateInMemory = false;

  static STBP_FN constexpr int width() { return kWidth; }
  template <class T>
  static STBP_FN void prefetch(const T*, int) {}  // the loads of a chunk are issued together
  template <class T>
  __device__ __forceinline__ Pack<T, kWidth> read(const T* from) const {
    return Pack<T, kWidth>::load(from);
  }
  template <class T>
  __device__ __forceinline__ Pack<T, kWidth> write(T*) const {
    return {};
  }
  template <class T>
  __device__ __forceinline__ void flush(T* to, const Pack<T, kWidth>& row) const {
    row.store(to);
  }
};

template <int kWidth>
__device__ __forceinline__ int64_t first_neuron() {
  return (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kWidth;
}

template <int kWidth, class Scalar, class Neuron>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    lif_forward(const LifForward<Scalar> io, const Neuron neuron) {
  const int64_t first = first_neuron<kWidth>();
  if (first < io.neurons) forward_scan(Registers<state_t<Scalar>, kWidth>(), neuron, io, first);
}

template <int kWidth, class Scalar, class Neuron>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    lif_backward(const LifBackward<Scalar> io, const Neuron neuron) {
  const int64_t first = first_neuron<kWidth>();
  if (first < io.neurons) backward_scan(Registers<state_t<Scalar>, kWidth>(), neuron, io, first);
}

// Whether rows of N elements at these pointers can be moved in packs of 16 bytes of Scalar (a null pointer can).
template <class Scalar, class... Pointer>
bool packs_fit(int64_t neurons, const Pointer*... pointers) {
  return neurons % (16 / int64_t(sizeof(Scalar))) == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

template <class Scalar>
bool packs_fit(const LifForward<Scalar>& io) {
  return packs_fit<Scalar>(io.neurons, io.x, io.initial, io.spikes, io.final_potential, io.states);
}

template <class Scalar>
bool packs_fit(const LifBackward<Scalar>& io) {
  return packs_fit<Scalar>(io.neurons, io.x, io.initial, io.states, io.grad_spikes, io.grad_final, io.grad_x,
                           io.grad_initial);
}

}  // namespace stbp::cuda
