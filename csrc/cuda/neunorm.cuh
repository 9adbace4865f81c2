// The CUDA kernels of neurons with normalisation. As kernels.cuh, without torch or a header of CUDA's own.
//
// A block has 32 neighbouring positions of a sample, one for each thread of a warp, and all features, shared out to its
// warps. A chunk of kNeuNormChunk steps is gone through twice, once to sum over the features, once to use the sum, so
// that the threads of a block meet once a chunk and not once a step. Between the two, spikes wait as bits in the
// block's shared memory.
#pragma once

#include "../neunorm.h"
#include "../neuron.h"
#include "kernels.cuh"

namespace stbp::cuda {

#if defined(__CUDACC__)
// What the plan asked for.
__device__ __forceinline__ unsigned char* shared_bytes() {
  extern __shared__ unsigned char bytes[];
  return bytes;
}
#endif

// Blocks of 256 threads: at 2 a thread has 128 registers, at 1 255.
template <class Scalar>
constexpr int kNeuNormBlocks = sizeof(Scalar) == 8 ? 1 : 2;

// A thread's view of its block.
template <class State, int kWarps>
struct Block {
  static constexpr int kScratch = kNeuNormChunk * kWarps * kStrip;

  State* scratch;  // [K, warps, 32], shared by the block
  bool inside;     // whether this thread's position exists; where not, it does the work of the last and keeps nothing

  static __device__ __forceinline__ int lane() { return int(threadIdx.x) % kStrip; }
  static __device__ __forceinline__ int warp() { return int(threadIdx.x) / kStrip; }

  template <class T>
  __device__ __forceinline__ State get(const T* from) const {
    return Pack<T, 1>::load(from).get(0);
  }
  // One position at each of the steps of a chunk, so many elements apart, with all loads under way at once.
  template <class T>
  __device__ __forceinline__ void get(State (&values)[kNeuNormChunk], const T* from, int64_t step, int steps) const {
#pragma unroll
    for (int k = 0; k < kNeuNormChunk; ++k) values[k] = k < steps ? get(from + k * step) : State(0);
  }
  // Of what this thread has written itself.
  template <class T>
  __device__ __forceinline__ State own(const T* from) const {
    return inside ? Pack<T, 1>::load_own(from).get(0) : State(0);
  }
  template <class T>
  __device__ __forceinline__ void set(T* to, State value) const {
    if (inside) Pack<T, 1>::of({value}).store(to);
  }

  // Adds values[k] up over the warps, in their order, for all of them.
  __device__ __forceinline__ void sum(State* values, int steps) const {
    __syncthreads();  // all are done with what was there before
#pragma unroll
    for (int k = 0; k < kNeuNormChunk; ++k)
      if (k < steps) scratch[(k * kWarps + warp()) * kStrip + lane()] = values[k];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kNeuNormChunk; ++k) {
      if (k >= steps) break;
      values[k] = 0;
      for (int w = 0; w < kWarps; ++w) values[k] += scratch[(k * kWarps + w) * kStrip + lane()];
    }
  }

  // Adds up over all threads with a position.
  __device__ __forceinline__ void store_total(State* to, State value) const {
    __syncthreads();
    scratch[threadIdx.x] = inside ? value : State(0);
    __syncthreads();
    if (threadIdx.x != 0) return;
    State total = 0;
    for (int thread = 0; thread < kWarps * kStrip; ++thread) total += scratch[thread];
    *to = total;
  }
};

// A block for every strip of every sample.
template <int kWarps, class Scalar, class Neuron>
__global__ void __launch_bounds__(kWarps* kStrip, kNeuNormBlocks<Scalar>)
    neunorm_forward(const NeuNormForward<Scalar> io, const NeuNormPlan plan, Neuron neuron) {
  using State = state_t<Scalar>;
  using Team = Block<State, kWarps>;
  static_assert(kNeuNormChunk == 8, "a byte has the spikes of a chunk");
  __shared__ State scratch[Team::kScratch];
  const bool held = Neuron::kBinary && plan.shared_bytes > 0;
  unsigned char* const spikes = shared_bytes() + Team::lane();  // [C, 32], if held
  const int64_t own = int64_t(blockIdx.x) % plan.strips * kStrip + Team::lane();
  const Team team{scratch, own < io.positions};
  const int64_t first = team.inside ? own : io.positions - 1;
  const NeuNormPlace at(io, int64_t(blockIdx.x) / plan.strips, first);
  const NeuNormConstants<State> norm(io);
  if (io.decays) neuron.c.decay = io.decays[0];
  State a = 0;
  for (int64_t start = 0, chunk = 0; start < io.steps; start += kNeuNormChunk, ++chunk) {
    const int steps = int(io.steps - start < kNeuNormChunk ? io.steps - start : kNeuNormChunk);
    State map[kNeuNormChunk] = {};  // S, then a
    for (int64_t c = Team::warp(); c < io.features; c += kWarps) {
      const int64_t row = at.neuron(start, c);
      State v = chunk ? team.own(io.states + at.neuron(chunk - 1, c)) : State(0), x[kNeuNormChunk], spike;
      unsigned bits = 0;
      team.get(x, io.x + row, at.step(), steps);
#pragma unroll
      for (int k = 0; k < kNeuNormChunk; ++k) {
        if (k >= steps) break;
        neuron.step(v, x[k], spike);
        map[k] += spike;
        if (held) {
          bits |= unsigned(spike != State(0)) << k;
        } else {
          team.set(io.normalised + row + k * at.step(), spike);
        }
      }
      if (held) spikes[c * kStrip] = static_cast<unsigned char>(bits);
      if (start + kNeuNormChunk < io.steps) team.set(io.states + at.neuron(chunk, c), v);
    }
    team.sum(map, steps);
#pragma unroll
    for (int k = 0; k < kNeuNormChunk; ++k) {
      if (k >= steps) break;
      if (Team::warp() == 0) team.set(io.sums + at.map(start + k), map[k]);
      map[k] = a = norm.decay * a + norm.gain * map[k];
      if (Team::warp() == 0) team.set(io.maps + at.map(start + k), a);
    }
    for (int64_t c = Team::warp(); c < io.features; c += kWarps) {
      Scalar* const row = io.normalised + at.neuron(start, c);
      const State weight = team.get(io.weight + at.weight(0, c));
      const unsigned bits = held ? spikes[c * kStrip] : 0;
#pragma unroll
      for (int k = 0; k < kNeuNormChunk; ++k) {
        if (k >= steps) break;
        const State spike = held ? State(bits >> k & 1u) : team.own(row + k * at.step());
        team.set(row + k * at.step(), spike - weight * map[k]);
      }
    }
  }
}

// A block for every strip of every group of samples, one after the other.
template <int kWarps, class Scalar, class Neuron>
__global__ void __launch_bounds__(kWarps* kStrip, kNeuNormBlocks<Scalar>)
    neunorm_backward(const NeuNormBackward<Scalar> io, const NeuNormPlan plan, Neuron neuron) {
  using State = state_t<Scalar>;
  using Team = Block<State, kWarps>;
  __shared__ State scratch[Team::kScratch];
  const int64_t strip = int64_t(blockIdx.x) % plan.strips, group = int64_t(blockIdx.x) / plan.strips;
  const int64_t own = strip * kStrip + Team::lane();
  const Team team{scratch, own < io.positions};
  const int64_t first = team.inside ? own : io.positions - 1;
  const NeuNormConstants<State> norm(io);
  if (io.decays) neuron.c.decay = io.decays[0];
  const int64_t from = io.batch * group / io.groups, to = io.batch * (group + 1) / io.groups;
  State grad_decay = 0, grad_norm_decay = 0;
  for (int64_t sample = from; sample < to; ++sample) {
    const NeuNormPlace at(io, sample, first);
    State carried = 0;  // norm_decay A[t+1]
    for (int64_t chunk = (io.steps - 1) / kNeuNormChunk; chunk >= 0; --chunk) {
      const int64_t start = chunk * kNeuNormChunk;
      const int steps = int(io.steps - start < kNeuNormChunk ? io.steps - start : kNeuNormChunk);
      const bool last = start + kNeuNormChunk >= io.steps;
      State grad_map[kNeuNormChunk] = {};  // the sum of U g, then gain A
      for (int64_t c = Team::warp(); c < io.features; c += kWarps) {
        const State weight = team.get(io.weight + at.weight(0, c));
        State upstream[kNeuNormChunk];
        team.get(upstream, io.grad_normalised + at.neuron(start, c), at.step(), steps);
#pragma unroll
        for (int k = 0; k < kNeuNormChunk; ++k) grad_map[k] += weight * upstream[k];
      }
      team.sum(grad_map, steps);

      State map[kNeuNormChunk];
#pragma unroll
      for (int k = kNeuNormChunk - 1; k >= 0; --k) {
        if (k >= steps) continue;
        const int64_t t = start + k;
        map[k] = team.get(io.maps + at.map(t));
        const State grad = carried - grad_map[k];
        grad_map[k] = norm.gain * grad;
        carried = norm.decay * grad;
        if (io.grad_decays && Team::warp() == 0) {
          const State before = t > 0 ? team.get(io.maps + at.map(t - 1)) : State(0);
          grad_norm_decay += grad * (before - team.get(io.sums + at.map(t)) / norm.share);
        }
      }

      for (int64_t c = Team::warp(); c < io.features; c += kWarps) {
        const int64_t row = at.neuron(start, c);
        State* const sum = io.grad_weight + at.weight(group, c);
        State x[kNeuNormChunk], upstream[kNeuNormChunk], u[kNeuNormChunk], before[kNeuNormChunk], unused;
        team.get(x, io.x + row, at.step(), steps);
        team.get(upstream, io.grad_normalised + row, at.step(), steps);
        State v = chunk ? team.get(io.states + at.neuron(chunk - 1, c)) : State(0);
        State grad_v = last ? State(0) : team.own(io.carried + at.weight(group, c));
        State grad_weight = last && sample == from ? State(0) : team.own(sum);
#pragma unroll
        for (int k = 0; k < kNeuNormChunk; ++k) {
          if (k >= steps) break;
          before[k] = v;
          u[k] = neuron.step(v, x[k], unused);
        }
#pragma unroll
        for (int k = kNeuNormChunk - 1; k >= 0; --k) {
          if (k >= steps) continue;
          grad_weight = grad_weight - upstream[k] * map[k];
          const State grad_u = neuron.step_back(u[k], upstream[k] + grad_map[k], grad_v);
          if (io.grad_decays) grad_decay += grad_u * before[k];
          team.set(io.grad_x + row + k * at.step(), grad_u);
        }
        team.set(sum, grad_weight);
        if (chunk > 0) team.set(io.carried + at.weight(group, c), grad_v);
      }
    }
  }
  if (io.grad_decays) {
    State* const slot = io.grad_decays + (group * plan.strips + strip) * 2;
    team.store_total(slot, grad_decay);
    team.store_total(slot + 1, grad_norm_decay);
  }
}

}  // namespace stbp::cuda
