// The two loops over time, for a group of neighbouring neurons.
//
// Lanes is how a device holds such a group: a tile whose state lies in the L1 cache, or a few neurons in the registers
// of a thread. It gives Value, what is computed with at once: a number or a vector of them; kWidth, the most Values it
// holds, and width(), how many there are; kChunk, the K of "one state every K steps"; kStepsAtOnce, the steps that a
// Value makes before the next one's turn; and rows: read(p) of the neurons at p, with get(i), which is a Value;
// write(p), with set(i, Value) and set_spike(i, Value), and flush(p, row), which ends the writing; prefetch(p, i), told
// what get(i) will soon want.
//
// The scans take their neuron by value: its constants, reached through a reference, would be read again inside the
// loops.
#pragma once

#include <cstdint>

#include "lif.h"
#include "number.h"

#if defined(__CUDACC__)
#define STBP_LANE_LOOP _Pragma("unroll")
#define STBP_CHUNK_LOOP _Pragma("unroll")
#define STBP_STEP_LOOP _Pragma("unroll")
#else
#define STBP_LANE_LOOP
#define STBP_CHUNK_LOOP
#define STBP_STEP_LOOP _Pragma("GCC unroll 8")
#endif

namespace stbp {

template <class Lanes, class Value, class State>
STBP_FN void load_state(const Lanes& lanes, Value* v, const State* from) {
  const int width = lanes.width();
  if (from == nullptr) {
    STBP_LANE_LOOP
    for (int i = 0; i < width; ++i) v[i] = Value{};
  } else {
    const auto row = lanes.read(from);
    STBP_LANE_LOOP
    for (int i = 0; i < width; ++i) v[i] = row.get(i);
  }
}

template <class Lanes, class Value, class State>
STBP_FN void store_state(const Lanes& lanes, State* to, const Value* v) {
  const int width = lanes.width();
  auto row = lanes.write(to);
  STBP_LANE_LOOP
  for (int i = 0; i < width; ++i) row.set(i, v[i]);
  lanes.flush(to, row);
}

// The rows of a few neighbouring steps.
template <int kSteps, class Lanes, class T>
struct ReadRows {
  decltype(Lanes().read(static_cast<const T*>(nullptr))) row[kSteps];

  STBP_FN ReadRows(const Lanes& lanes, const T* from, int64_t neurons) {
    STBP_STEP_LOOP
    for (int k = 0; k < kSteps; ++k) row[k] = lanes.read(from + k * neurons);
  }
};
template <int kSteps, class Lanes, class T>
struct WrittenRows {
  decltype(Lanes().write(static_cast<T*>(nullptr))) row[kSteps];

  STBP_FN WrittenRows(const Lanes& lanes, T* to, int64_t neurons) {
    STBP_STEP_LOOP
    for (int k = 0; k < kSteps; ++k) row[k] = lanes.write(to + k * neurons);
  }
  STBP_FN void flush(const Lanes& lanes, T* to, int64_t neurons) {
    STBP_STEP_LOOP
    for (int k = 0; k < kSteps; ++k) lanes.flush(to + k * neurons, row[k]);
  }
};

// kSteps steps of all neurons; the state is loaded and stored once for all of them. In this and the next two, all loads
// come before the first store: rows often lie a multiple of 4 KB apart, and a CPU that compares the low bits of
// addresses lets a load wait for such a store.
template <int kSteps, class Lanes, class Neuron, class Scalar, class Value = typename Lanes::Value>
STBP_FN void advance(const Lanes& lanes, const Neuron& neuron, const Scalar* x, Scalar* spikes, int64_t neurons,
                     Value* v) {
  const int width = lanes.width();
  const ReadRows<kSteps, Lanes, Scalar> in(lanes, x, neurons);
  WrittenRows<kSteps, Lanes, Scalar> out(lanes, spikes, neurons);
  STBP_LANE_LOOP
  for (int i = 0; i < width; ++i) {
    Value current[kSteps], fired[kSteps];
    STBP_STEP_LOOP
    for (int k = 0; k < kSteps; ++k) current[k] = in.row[k].get(i);
    Value potential = v[i];
    STBP_STEP_LOOP
    for (int k = 0; k < kSteps; ++k) neuron.step(potential, current[k], fired[k]);
    v[i] = potential;
    STBP_STEP_LOOP
    for (int k = 0; k < kSteps; ++k) out.row[k].set_spike(i, fired[k]);
  }
  out.flush(lanes, spikes, neurons);
}

// The same, keeping the charged potentials of each step in u[k] and no spikes.
template <int kSteps, class Lanes, class Neuron, class Scalar, class Value = typename Lanes::Value>
STBP_FN void recompute(const Lanes& lanes, const Neuron& neuron, const Scalar* x, int64_t neurons, Value* v,
                       Value (*u)[Lanes::kWidth]) {
  const int width = lanes.width();
  const ReadRows<kSteps, Lanes, Scalar> in(lanes, x, neurons);
  STBP_LANE_LOOP
  for (int i = 0; i < width; ++i) {
    Value current[kSteps], unused;
    STBP_STEP_LOOP
    for (int k = 0; k < kSteps; ++k) current[k] = in.row[k].get(i);
    Value potential = v[i];
    STBP_STEP_LOOP
    for (int k = 0; k < kSteps; ++k) {
      u[k][i] = neuron.step(potential, current[k], unused);
      lanes.prefetch(x + (kSteps + k) * neurons, i);
    }
    v[i] = potential;
  }
}

// kSteps steps back of all neurons, from the last of them to the first.
template <int kSteps, class Lanes, class Neuron, class Scalar, class Value = typename Lanes::Value>
STBP_FN void go_back(const Lanes& lanes, const Neuron& neuron, const Value (*u)[Lanes::kWidth],
                     const Scalar* grad_spikes, Scalar* grad_x, int64_t neurons, Value* grad_v) {
  const int width = lanes.width();
  const ReadRows<kSteps, Lanes, Scalar> in(lanes, grad_spikes, neurons);
  WrittenRows<kSteps, Lanes, Scalar> out(lanes, grad_x, neurons);
  STBP_LANE_LOOP
  for (int i = 0; i < width; ++i) {
    Value gradient[kSteps];
    STBP_STEP_LOOP
    for (int k = 0; k < kSteps; ++k) gradient[k] = in.row[k].get(i);
    Value carried = grad_v[i];
    STBP_STEP_LOOP
    for (int k = kSteps - 1; k >= 0; --k) {
      gradient[k] = neuron.step_back(u[k][i], gradient[k], carried);
      lanes.prefetch(grad_spikes - (kSteps - k) * neurons, i);
    }
    grad_v[i] = carried;
    STBP_STEP_LOOP
    for (int k = 0; k < kSteps; ++k) out.row[k].set(i, gradient[k]);
  }
  out.flush(lanes, grad_x, neurons);
}

template <class Lanes, class Neuron, class Scalar>
STBP_FN void forward_scan(const Lanes& lanes, const Neuron neuron, const LifForward<Scalar>& io, int64_t first) {
  using State = typename Neuron::State;
  constexpr int kChunk = Lanes::kChunk;
  constexpr int kSteps = Lanes::kStepsAtOnce;
  static_assert(kChunk % kSteps == 0, "a state is kept between two steps");
  typename Lanes::Value v[Lanes::kWidth];
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
  using Value = typename Lanes::Value;
  constexpr int kChunk = Lanes::kChunk;
  constexpr int kSteps = Lanes::kStepsAtOnce;
  Value v[Lanes::kWidth];
  Value grad_v[Lanes::kWidth];
  Value u[kChunk][Lanes::kWidth];
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
    const auto at = [&](int64_t k) { return offset + k * io.neurons; };
    STBP_CHUNK_LOOP
    for (int k = 0; k < kChunk; k += kSteps) {
      if (k >= left) break;
      if (left - k >= kSteps) {
        recompute<kSteps>(lanes, neuron, io.x + at(k), io.neurons, v, u + k);
      } else if constexpr (kSteps > 1) {
        for (int last = k; last < left; ++last) recompute<1>(lanes, neuron, io.x + at(last), io.neurons, v, u + last);
      }
    }
    STBP_CHUNK_LOOP
    for (int k = kChunk - kSteps; k >= 0; k -= kSteps) {
      if (k >= left) continue;
      if (left - k >= kSteps) {
        go_back<kSteps>(lanes, neuron, u + k, io.grad_spikes + at(k), io.grad_x + at(k), io.neurons, grad_v);
      } else if constexpr (kSteps > 1) {
        for (int last = int(left) - 1; last >= k; --last)
          go_back<1>(lanes, neuron, u + last, io.grad_spikes + at(last), io.grad_x + at(last), io.neurons, grad_v);
      }
    }
  }
  if (io.grad_initial) store_state(lanes, io.grad_initial + first, grad_v);
}

}  // namespace stbp
