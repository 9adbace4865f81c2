// The CUDA kernels of neurons with normalisation. As kernels.cuh, without torch or a header of CUDA's own.
//
// A block has a strip of neighbouring positions of a sample and all features. Its threads are teams with one thread for
// each position, to which the features are shared out. A chunk of kNeuNormChunk steps is gone through twice, once to
// sum over the features, once to use the sum, so that the teams meet once a chunk and not once a step. Between the two,
// spikes wait as bits, and gradients as they came, in the block's shared memory.
#pragma once

#include <type_traits>

#include "../neunorm.h"
#include "../neuron.h"
#include "kernels.cuh"

namespace stbp::cuda {

#if defined(__CUDACC__)
// What the plan asked for.
__device__ __forceinline__ unsigned char* shared_bytes() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}
#endif

// Blocks of kNeuNormThreads: at 3 a thread has 80 registers, at 2 128, at 1 255. The most that no kernel spills with.
template <class Scalar>
constexpr int kNeuNormForwardBlocks = sizeof(Scalar) == 8 ? 2 : 3;
template <class Scalar>
constexpr int kNeuNormBackwardBlocks = sizeof(Scalar) == 8 ? 1 : 2;

// Features that a thread has under way where it only adds them up: as soon as it is done with one, it loads what the
// one after the next needs. Without shared memory there is less to win by it. Forward and backward have that loop each:
// from a function for both, inlined, ptxas spilled registers on sm_100.
template <bool kHeld>
constexpr int kFeaturesAhead = kHeld ? 2 : 1;

// A thread's view of its block.
template <class State, int kThreads>
struct Block {
  // Of how many teams a thread adds up the values at one step and position: so all threads have a part in it.
  static constexpr int kTogether = kNeuNormChunk;

  State* scratch;  // [K, threads] values, then [K, parts, strip] of their sums, shared by the block
  int strip;       // threads of a team
  bool inside;     // whether this thread's position exists; where not, it does the work of the last and keeps nothing

  __device__ __forceinline__ int lane() const { return int(threadIdx.x) % strip; }
  __device__ __forceinline__ int team() const { return int(threadIdx.x) / strip; }
  __device__ __forceinline__ int teams() const { return kThreads / strip; }

  template <class T>
  __device__ __forceinline__ State get(const T* from) const {
    return Pack<T, 1>::load(from).get(0);
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

  // Adds values[k] up over the teams, in an order of their own, for all of them. The two barriers are enough for one
  // call after the other: when the last threads read the parts, the first can have come no further than the values.
  __device__ __forceinline__ void sum(State (&values)[kNeuNormChunk]) const {
    const int parts = (teams() + kTogether - 1) / kTogether;
    State* const part = scratch + kNeuNormChunk * kThreads;
#pragma unroll
    for (int k = 0; k < kNeuNormChunk; ++k) scratch[k * kThreads + int(threadIdx.x)] = values[k];
    __syncthreads();
    for (int i = int(threadIdx.x); i < kNeuNormChunk * parts * strip; i += kThreads) {
      const int k = i / (parts * strip), first = i / strip % parts * kTogether;
      const State* const of_team = scratch + k * kThreads + first * strip + i % strip;
      State total = 0;
#pragma unroll
      for (int t = 0; t < kTogether; ++t)
        if (first + t < teams()) total += of_team[t * strip];
      part[i] = total;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kNeuNormChunk; ++k) values[k] = 0;
#pragma unroll 1
    for (int p = 0; p < parts; ++p)
#pragma unroll
      for (int k = 0; k < kNeuNormChunk; ++k) values[k] += part[(k * parts + p) * strip + lane()];
  }

  // Adds up over all threads with a position.
  __device__ __forceinline__ void store_total(State* to, State value) const {
    __syncthreads();
    scratch[threadIdx.x] = inside ? value : State(0);
    __syncthreads();
    if (threadIdx.x != 0) return;
    State total = 0;
    for (int thread = 0; thread < kThreads; ++thread) total += scratch[thread];
    *to = total;
  }
};

// The rows of a chunk for one neuron, so many elements apart, or as many of them as there are steps and then zeros,
// with all loads under way at once.
template <class Scalar>
struct ChunkRows {
  using State = state_t<Scalar>;
  Pack<Scalar, 1> rows[kNeuNormChunk];

  __device__ __forceinline__ void load(const Scalar* from, int64_t step, int steps) {
#pragma unroll
    for (int k = 0; k < kNeuNormChunk; ++k) {
      rows[k] = k < steps ? Pack<Scalar, 1>::load(from) : Pack<Scalar, 1>{};
      from += step;
    }
  }
  __device__ __forceinline__ State operator[](int k) const { return rows[k].get(0); }
};

// Calls work(whether anything waits in shared memory), as a constant for each of the two.
template <bool kMay, class Work>
__device__ __forceinline__ void visit_held(const NeuNormPlan& plan, const Work& work) {
  if constexpr (kMay) {
    if (plan.shared_bytes > 0) return work(std::true_type());
  }
  work(std::false_type());
}

// A block for every strip of every sample.
template <int kThreads, class Scalar, class Neuron>
__global__ void __launch_bounds__(kThreads, kNeuNormForwardBlocks<Scalar>)
    neunorm_forward(const NeuNormForward<Scalar> io, const NeuNormPlan plan, Neuron neuron) {
  using State = state_t<Scalar>;
  static_assert(kNeuNormChunk == 8, "a byte has the spikes of a chunk");
  __shared__ State scratch[kNeuNormScratch<kThreads>];
  const int lane = int(threadIdx.x) % plan.strip;
  const int64_t own = int64_t(blockIdx.x) % plan.strips * plan.strip + lane;
  const Block<State, kThreads> block{scratch, plan.strip, own < io.positions};
  const NeuNormPlace at(io, int64_t(blockIdx.x) / plan.strips, block.inside ? own : io.positions - 1);
  if (io.decays) neuron.c.decay = io.decays[0];
  const int team = block.team(), teams = block.teams();
  const int64_t step = at.step();
  unsigned char* const spikes = shared_bytes() + lane;  // [C, strip], if held
  State a = 0;
  for (int64_t start = 0, chunk = 0; start < io.steps; start += kNeuNormChunk, ++chunk) {
    const int steps = int(io.steps - start < kNeuNormChunk ? io.steps - start : kNeuNormChunk);
    const bool last = start + kNeuNormChunk >= io.steps;
    State map[kNeuNormChunk] = {};  // S, then a
    visit_held<Neuron::kBinary>(plan, [&](auto held) {
      constexpr bool kHeld = decltype(held)::value;
      constexpr int kBuffers = kFeaturesAhead<kHeld>;
      ChunkRows<Scalar> rows[kBuffers];
      State v[kBuffers] = {};
      const auto fetch = [&](int64_t c, int j) {
        if (c >= io.features) return;
        rows[j].load(io.x + at.neuron(start, c), step, steps);
        v[j] = chunk == 0 ? State(0) : block.own(io.states + at.neuron(chunk - 1, c));
      };
#pragma unroll
      for (int j = 0; j < kBuffers; ++j) fetch(team + j * teams, j);
      for (int64_t c = team; c < io.features; c += kBuffers * teams) {
#pragma unroll
        for (int j = 0; j < kBuffers; ++j) {
          if (c + j * teams >= io.features) break;
          State spike;
          unsigned bits = 0;
          Scalar* to = io.normalised + at.neuron(start, c + j * teams);
#pragma unroll
          for (int k = 0; k < kNeuNormChunk; ++k) {
            if (k >= steps) break;
            neuron.step(v[j], rows[j][k], spike);
            map[k] += spike;
            if constexpr (kHeld) {
              bits |= unsigned(spike != State(0)) << k;
            } else {
              block.set(to, spike);
              to += step;
            }
          }
          if constexpr (kHeld) spikes[(c + j * teams) * plan.strip] = static_cast<unsigned char>(bits);
          if (!last) block.set(io.states + at.neuron(chunk, c + j * teams), v[j]);
          fetch(c + (j + kBuffers) * teams, j);
        }
      }
    });
    const NeuNormConstants<State> norm(io);  // here, as registers are short
    block.sum(map);
#pragma unroll
    for (int k = 0; k < kNeuNormChunk; ++k) {
      if (k >= steps) break;
      if (team == 0) block.set(io.sums + at.map(start + k), map[k]);
      map[k] = a = norm.decay * a + norm.gain * map[k];
      if (team == 0) block.set(io.maps + at.map(start + k), a);
    }
    visit_held<Neuron::kBinary>(plan, [&](auto held) {
      constexpr bool kHeld = decltype(held)::value;
      State next_u = 0;
      const auto fetch = [&](int64_t c) {
        if (c >= io.features) return;
        next_u = block.get(io.weight + at.weight(0, c));
      };
      fetch(team);
      for (int64_t c = team; c < io.features; c += teams) {
        const State u = next_u;
        fetch(c + teams);
        const unsigned bits = kHeld ? spikes[c * plan.strip] : 0;
        Scalar* to = io.normalised + at.neuron(start, c);
#pragma unroll
        for (int k = 0; k < kNeuNormChunk; ++k) {
          if (k >= steps) break;
          const State spike = kHeld ? State(bits >> k & 1u) : block.own(to);
          block.set(to, spike - u * map[k]);
          to += step;
        }
      }
    });
  }
}

// A block for every strip of every group of samples, one after the other.
template <int kThreads, class Scalar, class Neuron>
__global__ void __launch_bounds__(kThreads, kNeuNormBackwardBlocks<Scalar>)
    neunorm_backward(const NeuNormBackward<Scalar> io, const NeuNormPlan plan, Neuron neuron) {
  using State = state_t<Scalar>;
  using Row = Pack<Scalar, 1>;
  __shared__ State scratch[kNeuNormScratch<kThreads>];
  const int lane = int(threadIdx.x) % plan.strip;
  const int64_t group = int64_t(blockIdx.x) / plan.strips;
  const int64_t own = int64_t(blockIdx.x) % plan.strips * plan.strip + lane;
  const Block<State, kThreads> block{scratch, plan.strip, own < io.positions};
  if (io.decays) neuron.c.decay = io.decays[0];
  const int team = block.team(), teams = block.teams();
  Row* const gradients = reinterpret_cast<Row*>(shared_bytes()) + lane;  // [K, C, strip], if held
  // What this thread has of the scratch memory holds a of a chunk before the sum, and after it u of a feature, as
  // registers are short.
  State* const mine = scratch + threadIdx.x;
  const int held_step = int(io.features) * plan.strip;
  const int64_t from = io.batch * group / io.groups, to = io.batch * (group + 1) / io.groups;
  State grad_decay = 0, grad_norm_decay = 0;
  for (int i = 0; i < int(to - from); ++i) {
    const NeuNormPlace at(io, from + i, block.inside ? own : io.positions - 1);
    const int64_t step = at.step();
    State carried = 0;  // norm_decay A[t+1]
    for (int64_t chunk = (io.steps - 1) / kNeuNormChunk; chunk >= 0; --chunk) {
      const int64_t start = chunk * kNeuNormChunk;
      const int steps = int(io.steps - start < kNeuNormChunk ? io.steps - start : kNeuNormChunk);
      const bool last = start + kNeuNormChunk >= io.steps;
      {
        ChunkRows<State> map;
        map.load(io.maps + at.map(start), at.map(1) - at.map(0), steps);
#pragma unroll
        for (int k = 0; k < kNeuNormChunk; ++k) mine[k * kThreads] = map[k];
      }
      State grad_map[kNeuNormChunk] = {};  // the sum of U g, then gain A
      visit_held<true>(plan, [&](auto held) {
        constexpr bool kHeld = decltype(held)::value;
        constexpr int kBuffers = kFeaturesAhead<kHeld>;
        ChunkRows<Scalar> upstream[kBuffers];
        State u[kBuffers] = {}, grad_weight[kBuffers] = {};
        const auto fetch = [&](int64_t c, int j) {
          if (c >= io.features) return;
          upstream[j].load(io.grad_normalised + at.neuron(start, c), step, steps);
          u[j] = block.get(io.weight + at.weight(0, c));
          grad_weight[j] = last && i == 0 ? State(0) : block.own(io.grad_weight + at.weight(group, c));
        };
#pragma unroll
        for (int j = 0; j < kBuffers; ++j) fetch(team + j * teams, j);
        for (int64_t c = team; c < io.features; c += kBuffers * teams) {
#pragma unroll
          for (int j = 0; j < kBuffers; ++j) {
            if (c + j * teams >= io.features) break;
#pragma unroll
            for (int k = kNeuNormChunk - 1; k >= 0; --k) {  // zeros from the last step on
              grad_map[k] += u[j] * upstream[j][k];
              grad_weight[j] = grad_weight[j] - upstream[j][k] * mine[k * kThreads];
            }
            if constexpr (kHeld) {
              Row* slot = gradients + (c + j * teams) * plan.strip;
#pragma unroll
              for (int k = 0; k < kNeuNormChunk; ++k) {
                *slot = upstream[j].rows[k];
                slot += held_step;
              }
            }
            block.set(io.grad_weight + at.weight(group, c + j * teams), grad_weight[j]);
            fetch(c + (j + kBuffers) * teams, j);
          }
        }
      });
      // The same to go back with. The first feature's is under way while the teams meet.
      ChunkRows<Scalar> rows;
      State v = 0, next_grad_v = 0;
      const auto fetch = [&](int64_t c) {
        if (c >= io.features) return;
        rows.load(io.x + at.neuron(start, c), step, steps);
        v = chunk == 0 ? State(0) : block.get(io.states + at.neuron(chunk - 1, c));
        if (!last) next_grad_v = block.own(io.carried + at.weight(group, c));
      };
      fetch(team);
      const NeuNormConstants<State> norm(io);  // here, as registers are short
      block.sum(grad_map);

#pragma unroll
      for (int k = kNeuNormChunk - 1; k >= 0; --k) {
        if (k >= steps) continue;
        const State grad = carried - grad_map[k];
        grad_map[k] = norm.gain * grad;
        carried = norm.decay * grad;
        if (io.grad_decays && team == 0) {
          const int64_t t = start + k;
          const State before = t > 0 ? block.get(io.maps + at.map(t - 1)) : State(0);
          grad_norm_decay += grad * (before - block.get(io.sums + at.map(t)) * norm.share);
        }
      }

      visit_held<true>(plan, [&](auto held) {
        constexpr bool kHeld = decltype(held)::value;
        for (int64_t c = team; c < io.features; c += teams) {
          State grad_v = next_grad_v;
          ChunkRows<Scalar> upstream;
          if constexpr (kHeld) {
            const Row* slot = gradients + c * plan.strip;
#pragma unroll
            for (int k = 0; k < kNeuNormChunk; ++k) {
              upstream.rows[k] = *slot;
              slot += held_step;
            }
          } else {
            upstream.load(io.grad_normalised + at.neuron(start, c), step, steps);
          }
          const State before = v;
#pragma unroll
          for (int k = 0; k < kNeuNormChunk; ++k) {  // those past the last step are of no use, and no harm
            State unused;
            mine[k * kThreads] = neuron.step(v, rows[k], unused);
          }
          if constexpr (kHeld) fetch(c + teams);
          Scalar* grad_at = io.grad_x + at.neuron(start + steps - 1, c);
#pragma unroll
          for (int k = kNeuNormChunk - 1; k >= 0; --k) {
            if (k >= steps) continue;
            const State grad_u = neuron.step_back(mine[k * kThreads], upstream[k] + grad_map[k], grad_v);
            if (io.grad_decays) grad_decay += grad_u * (k > 0 ? neuron.after(mine[(k - 1) * kThreads]) : before);
            block.set(grad_at, grad_u);
            grad_at -= step;
          }
          if (chunk > 0) block.set(io.carried + at.weight(group, c), grad_v);
          if constexpr (!kHeld) fetch(c + teams);  // before, the gradients of this feature need the registers
        }
      });
    }
  }
  if (io.grad_decays) {
    State* const slot = io.grad_decays + int64_t(blockIdx.x) * 2;  // [G, strips, 2]
    block.store_total(slot, grad_decay);
    block.store_total(slot + 1, grad_norm_decay);
  }
}

}  // namespace stbp::cuda
