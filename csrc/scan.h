// The two loops over time, for a group of neighbouring neurons.
//
// Lanes is how a device holds such a group: a tile whose state lies in the L1 cache, or a few neurons in the registers
// of a thread. It gives kWidth, the most neurons it holds; width(), how many there are; kChunk, the K of "one state
// every K steps"; kStepsAtOnce, the steps of the forward pass that a neuron makes before the next one's turn; and rows:
// read(p) gives something indexable with the neurons at p, write(p) something to assign to, flush(p, row) ends the
// assignment.
//
// The scans take their neuron by value: its constants, reached through a reference, would be read again inside the
// loops, under conditions that GCC does not vectorise.
#pragma once

#include <cstdint>

#include "lif.h"
#include "number.h"

#if defined(__CUDACC__)
#define STBP_LANE_LOOP _Pragma("unroll")
#define STBP_CHUNK_LOOP _Pragma("unroll")
#define STBP_STEP_LOOP _Pragma("unroll")
#else
#define STBP_LANE_LOOP _Pragma("GCC ivdep")
#define STBP_CHUNK_LOOP
#define STBP_STEP_LOOP _Pragma("GCC unroll 8")
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

// A few steps of all neurons. The state is loaded and stored once for all of them.
template <int kSteps, class Lanes, class Neuron, class Scalar, class State = typename Neuron::State>
STBP_FN void advance(const Lanes& lanes, const Neuron& neuron, const Scalar* x, Scalar* spikes, int64_t neurons,
                     State* v) {
  const int width = lanes.width();
  decltype(lanes.read(x)) in[kSteps];
  decltype(lanes.write(spikes)) out[kSteps];
  STBP_STEP_LOOP
  for (int k = 0; k < kSteps; ++k) {
    in[k] = lanes.read(x + k * neurons);
    out[k] = lanes.write(spikes + k * neurons);
  }
  STBP_LANE_LOOP
  for (int i = 0; i < width; ++i) {
    // All loads before the first store: rows often lie a multiple of 4 KB apart, and a CPU that compares the low bits
    // of addresses lets a load wait for such a store.
    Scalar current[kSteps], fired[kSteps];
    STBP_STEP_LOOP
    for (int k = 0; k < kSteps; ++k) current[k] = in[k][i];
    State potential = v[i];
    STBP_STEP_LOOP
    for (int k = 0; k < kSteps; ++k) {
      const State u = neuron.charge(potential, to_state(current[k]));
      const State o = neuron.fire(u);
      potential = neuron.reset(u, o);
      fired[k] = Rounded<Scalar>::from(o);
    }
    v[i] = potential;
    STBP_STEP_LOOP
    for (int k = 0; k < kSteps; ++k) out[k][i] = fired[k];
  }
  STBP_STEP_LOOP
  for (int k = 0; k < kSteps; ++k) lanes.flush(spikes + k * neurons, out[k]);
}

template <class Lanes, class Neuron, class Scalar>
STBP_FN void forward_scan(const Lanes& lanes, const Neuron neuron, const LifForward<Scalar>& io, int64_t first) {
  using State = typename Neuron::State;
  constexpr int kChunk = Lanes::kChunk;
  constexpr int kSteps = Lanes::kStepsAtOnce;
  static_assert(kChunk % kSteps == 0, "a state is kept between two steps");
  State v[Lanes::kWidth];
  load_state(lanes, v, io.initial ? io.initial + first : nullptr);

  const Scalar* x = io.x + first;
  Scalar* spikes = io.spikes + first;
  State* states = io.states ? io.states + first : nullptr;
  for (int64_t start = 0; start < io.steps; start += kChunk) {
    // Whole chunks have a constant number of steps, so that a GPU's loads of all of them are issued together.
    const int64_t left = io.steps - start;
    STBP_CHUNK_LOOP
    for (int k = 0; k < kChunk; k += kSteps) {
      if (left - k >= kSteps) {
        advance<kSteps>(lanes, neuron, x, spikes, io.neurons, v);
        x += kSteps * io.neurons;
        spikes += kSteps * io.neurons;
      } else {
        for (int64_t last = left - k; last > 0; --last) {
          advance<1>(lanes, neuron, x, spikes, io.neurons, v);
          x += io.neurons;
          spikes += io.neurons;
        }
        break;
      }
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
STBP_FN void backward_scan(const Lanes& lanes, const Neuron neuron, const LifBackward<Scalar>& io, int64_t first) {
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
