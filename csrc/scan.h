// The two loops over time, for a group of neighbouring neurons.
//
// Lanes is how a device holds such a group: a tile whose state lies in the L1 cache, or a few neurons in the registers
// of a thread. It gives kWidth, the most neurons it holds; width(), how many there are; kChunk, the K of "one state
// every K steps"; and rows: read(p) gives something indexable with the neurons at p, write(p) something to assign to,
// flush(p, row) ends the assignment.
#pragma once

#include <cstdint>

#include "lif.h"
#include "number.h"

#if defined(__CUDACC__)
#define STBP_LANE_LOOP _Pragma("unroll")
#define STBP_CHUNK_LOOP _Pragma("unroll")
#else
#define STBP_LANE_LOOP _Pragma("GCC ivdep")
#define STBP_CHUNK_LOOP
#endif

namespace stbp {

template <class Lanes, class State>
STBP_FN void load_state(const Lanes& lanes, State* v, const State* from) {
  const int width = lanes.width();
  if (from == nullptr) {
    STBP_LANE_LOOP
    for (int i = 0; i < width; ++i) v[i] = State(0);
  } else {
    const auto row = lanes.read(from);
    STBP_LANE_LOOP
    for (int i = 0; i < width; ++i) v[i] = row[i];
  }
}

template <class Lanes, class State>
STBP_FN void store_state(const Lanes& lanes, State* to, const State* v) {
  const int width = lanes.width();
  auto row = lanes.write(to);
  STBP_LANE_LOOP
  for (int i = 0; i < width; ++i) row[i] = v[i];
  lanes.flush(to, row);
}

template <class Lanes, class Neuron, class Scalar>
STBP_FN void forward_scan(const Lanes& lanes, const Neuron& neuron, const LifForward<Scalar>& io, int64_t first) {
  using State = typename Neuron::State;
  constexpr int kChunk = Lanes::kChunk;
  const int width = lanes.width();
  State v[Lanes::kWidth];
  load_state(lanes, v, io.initial ? io.initial + first : nullptr);

  const Scalar* x = io.x + first;
  Scalar* spikes = io.spikes + first;
  State* states = io.states ? io.states + first : nullptr;
  for (int64_t start = 0; start < io.steps; start += kChunk) {
    // Whole chunks have a constant number of steps, so that a GPU's loads of all of them are issued together.
    const int64_t left = io.steps - start;
    STBP_CHUNK_LOOP
    for (int k = 0; k < kChunk; ++k) {
      if (k >= left) break;
      const auto current = lanes.read(x);
      auto out = lanes.write(spikes);
      STBP_LANE_LOOP
      for (int i = 0; i < width; ++i) {
        const State u = neuron.charge(v[i], to_state(current[i]));
        const State o = neuron.fire(u);
        v[i] = neuron.reset(u, o);
        out[i] = Rounded<Scalar>::from(o);
      }
      lanes.flush(spikes, out);
      x += io.neurons;
      spikes += io.neurons;
    }
    if (states && left > kChunk) {
      store_state(lanes, states, v);
      states += io.neurons;
    }
  }
  if (io.final_potential) store_state(lanes, io.final_potential + first, v);
}

// Walks back chunk by chunk: the potentials of a chunk are recomputed from the state before it, with the forward's own
// arithmetic, then used in reverse.
template <class Lanes, class Neuron, class Scalar>
STBP_FN void backward_scan(const Lanes& lanes, const Neuron& neuron, const LifBackward<Scalar>& io, int64_t first) {
  using State = typename Neuron::State;
  constexpr int kChunk = Lanes::kChunk;
  const int width = lanes.width();
  State v[Lanes::kWidth];
  State grad_v[Lanes::kWidth];
  State u[kChunk][Lanes::kWidth];
  load_state(lanes, grad_v, io.grad_final ? io.grad_final + first : nullptr);

  for (int64_t chunk = (io.steps - 1) / kChunk; chunk >= 0; --chunk) {
    const int64_t start = chunk * kChunk;
    const int64_t left = io.steps - start;
    if (chunk > 0) {
      load_state(lanes, v, io.states + (chunk - 1) * io.neurons + first);
    } else {
      load_state(lanes, v, io.initial ? io.initial + first : nullptr);
    }
    const int64_t offset = start * io.neurons + first;
    STBP_CHUNK_LOOP
    for (int k = 0; k < kChunk; ++k) {
      if (k >= left) break;
      const auto current = lanes.read(io.x + offset + k * io.neurons);
      STBP_LANE_LOOP
      for (int i = 0; i < width; ++i) {
        u[k][i] = neuron.charge(v[i], to_state(current[i]));
        v[i] = neuron.reset(u[k][i], neuron.fire(u[k][i]));
      }
    }
    STBP_CHUNK_LOOP
    for (int k = kChunk - 1; k >= 0; --k) {
      if (k >= left) continue;
      const auto grad_spikes = lanes.read(io.grad_spikes + offset + k * io.neurons);
      Scalar* const to = io.grad_x + offset + k * io.neurons;
      auto grad_x = lanes.write(to);
      STBP_LANE_LOOP
      for (int i = 0; i < width; ++i) {
        const State grad_u = neuron.adjoint(u[k][i], to_state(grad_spikes[i]), grad_v[i]);
        grad_x[i] = Rounded<Scalar>::from(grad_u);
        grad_v[i] = neuron.grad_previous(grad_u);
      }
      lanes.flush(to, grad_x);
    }
  }
  if (io.grad_initial) store_state(lanes, io.grad_initial + first, grad_v);
}

}  // namespace stbp
