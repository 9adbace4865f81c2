// The two loops over time, for a group of neighbouring neurons.
//
// Lanes is such a group: a tile whose state lies in the L1 cache, or what is left of one. It gives Value, the vector
// that is computed with at once; kWidth, the most Values it holds, and width(), how many there are; kChunk, the K of
// "one state every K steps"; kStepsAtOnce, the steps that a Value makes before the next one's turn; kStateInMemory,
// whether it costs anything to load and store a state; and rows: read(p) of the neurons at p, with get(i), which is a
// Value; write(p), with set(i, Value) and set_spike(i, Value); prefetch(p, i), told what get(i) will soon want.
//
// The scans take their neuron by value: its constants, reached through a reference, would be read again inside the
// loops.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../core/io.h"
#include "../core/number.h"

#define STBP_STEP_LOOP _Pragma("GCC unroll 8")

namespace stbp {

template <class Lanes, class Value, class State>
STBP_FN void load_state(const Lanes& lanes, Value* v, const State* from) {
  const int width = lanes.width();
  if (from == nullptr) {
    for (int i = 0; i < width; ++i) v[i] = Value{};
  } else {
    const auto row = lanes.read(from);
    for (int i = 0; i < width; ++i) v[i] = row.get(i);
  }
}

template <class Lanes, class Value, class State>
STBP_FN void store_state(const Lanes& lanes, State* to, const Value* v) {
  const int width = lanes.width();
  auto row = lanes.write(to);
  for (int i = 0; i < width; ++i) row.set(i, v[i]);
}

// The rows of a few neighbouring steps.
template <int kSteps, class Lanes, class T>
struct ReadRows {
  decltype(Lanes().read(static_cast<const T*>(nullptr))) row[kSteps];

  STBP_FN ReadRows(const Lanes& lanes, const T* from, int64_t stride) {
    STBP_STEP_LOOP
    for (int k = 0; k < kSteps; ++k) row[k] = lanes.read(from + k * stride);
  }
};
template <int kSteps, class Lanes, class T>
struct WrittenRows {
  decltype(Lanes().write(static_cast<T*>(nullptr))) row[kSteps];

  STBP_FN WrittenRows(const Lanes& lanes, T* to, int64_t stride) {
    STBP_STEP_LOOP
    for (int k = 0; k < kSteps; ++k) row[k] = lanes.write(to + k * stride);
  }
};

// kSteps steps of all neurons; the state is loaded once for all of them, unless it is zero, and stored once, if it is
// still needed. In this and the next three, all loads come before the first store: rows often lie a multiple of 4 KB
// apart, and a CPU that compares the low bits of addresses lets a load wait for such a store.
template <int kSteps, class Lanes, class Neuron, class Scalar, class Value = typename Lanes::Value>
STBP_FN void advance(const Lanes& lanes, const Neuron& neuron, const Scalar* x, Scalar* spikes, int64_t stride,
                     Value* v, bool from_zero, bool needed) {
  const int width = lanes.width();
  const ReadRows<kSteps, Lanes, Scalar> in(lanes, x, stride);
  WrittenRows<kSteps, Lanes, Scalar> out(lanes, spikes, stride);
  for (int i = 0; i < width; ++i) {
    Value current[kSteps], fired[kSteps];
    STBP_STEP_LOOP
    for (int k = 0; k < kSteps; ++k) current[k] = in.row[k].get(i);
    Value potential = from_zero ? Value{} : v[i];
    STBP_STEP_LOOP
    for (int k = 0; k < kSteps; ++k) neuron.step(potential, current[k], fired[k]);
    if (needed) v[i] = potential;
    STBP_STEP_LOOP
    for (int k = 0; k < kSteps; ++k) out.row[k].set_spike(i, fired[k]);
  }
}

// The same, keeping the charged potentials of each step in u[k] and no spikes.
template <int kSteps, class Lanes, class Neuron, class Scalar, class Value = typename Lanes::Value>
STBP_FN void recompute(const Lanes& lanes, const Neuron& neuron, const Scalar* x, int64_t stride, Value* v,
                       bool from_zero, Value (*u)[Lanes::kWidth]) {
  const int width = lanes.width();
  const ReadRows<kSteps, Lanes, Scalar> in(lanes, x, stride);
  for (int i = 0; i < width; ++i) {
    Value current[kSteps], unused;
    STBP_STEP_LOOP
    for (int k = 0; k < kSteps; ++k) current[k] = in.row[k].get(i);
    Value potential = from_zero ? Value{} : v[i];
    STBP_STEP_LOOP
    for (int k = 0; k < kSteps; ++k) {
      u[k][i] = neuron.step(potential, current[k], unused);
      lanes.prefetch(x + (kSteps + k) * stride, i);
    }
    v[i] = potential;
  }
}

// kSteps steps back of all neurons, from the last of them to the first.
template <int kSteps, class Lanes, class Neuron, class Scalar, class Value = typename Lanes::Value>
STBP_FN void go_back(const Lanes& lanes, const Neuron& neuron, const Value (*u)[Lanes::kWidth],
                     const Scalar* grad_spikes, Scalar* grad_x, int64_t stride, Value* grad_v, bool needed) {
  const int width = lanes.width();
  const ReadRows<kSteps, Lanes, Scalar> in(lanes, grad_spikes, stride);
  WrittenRows<kSteps, Lanes, Scalar> out(lanes, grad_x, stride);
  for (int i = 0; i < width; ++i) {
    Value gradient[kSteps];
    STBP_STEP_LOOP
    for (int k = 0; k < kSteps; ++k) gradient[k] = in.row[k].get(i);
    Value carried = grad_v[i];
    STBP_STEP_LOOP
    for (int k = kSteps - 1; k >= 0; --k) {
      gradient[k] = neuron.step_back(u[k][i], gradient[k], carried);
      lanes.prefetch(grad_spikes - (kSteps - k) * stride, i);
    }
    if (needed) grad_v[i] = carried;
    STBP_STEP_LOOP
    for (int k = 0; k < kSteps; ++k) out.row[k].set(i, gradient[k]);
  }
}

// The last kSteps of a chunk, there and back at once: their potentials never leave the registers.
template <int kSteps, class Lanes, class Neuron, class Scalar, class Value = typename Lanes::Value>
STBP_FN void turn(const Lanes& lanes, const Neuron& neuron, const Scalar* x, const Scalar* grad_spikes, Scalar* grad_x,
                  int64_t stride, const Value* v, bool from_zero, Value* grad_v, bool grad_from_zero,
                  bool grad_needed) {
  const int width = lanes.width();
  const ReadRows<kSteps, Lanes, Scalar> in(lanes, x, stride), grad_in(lanes, grad_spikes, stride);
  WrittenRows<kSteps, Lanes, Scalar> out(lanes, grad_x, stride);
  for (int i = 0; i < width; ++i) {
    Value u[kSteps], gradient[kSteps], unused;
    STBP_STEP_LOOP
    for (int k = 0; k < kSteps; ++k) {
      u[k] = in.row[k].get(i);
      gradient[k] = grad_in.row[k].get(i);
    }
    Value potential = from_zero ? Value{} : v[i];
    Value carried = grad_from_zero ? Value{} : grad_v[i];
    STBP_STEP_LOOP
    for (int k = 0; k < kSteps; ++k) u[k] = neuron.step(potential, u[k], unused);
    STBP_STEP_LOOP
    for (int k = kSteps - 1; k >= 0; --k) {
      gradient[k] = neuron.step_back(u[k], gradient[k], carried);
      lanes.prefetch(grad_spikes - (kSteps - k) * stride, i);
    }
    if (grad_needed) grad_v[i] = carried;
    STBP_STEP_LOOP
    for (int k = 0; k < kSteps; ++k) out.row[k].set(i, gradient[k]);
  }
}

template <class Lanes, class Neuron, class Scalar>
STBP_FN void forward_scan(const Lanes& lanes, const Neuron neuron, const NeuronForward<Scalar>& io, int64_t first) {
  using State = typename Neuron::State;
  constexpr int kChunk = Lanes::kChunk;
  constexpr int kSteps = Lanes::kStepsAtOnce;
  static_assert(kChunk % kSteps == 0, "a state is kept between two steps");
  typename Lanes::Value v[Lanes::kWidth];
  bool from_zero = Lanes::kStateInMemory && io.initial == nullptr;
  if (!from_zero) load_state(lanes, v, io.initial ? io.initial + first : nullptr);
  const auto needed_after = [&](int64_t steps) {
    return !Lanes::kStateInMemory || io.final_state != nullptr || steps < io.layout.steps;
  };

  const int64_t at = io.layout.at(first, io.layout.steps);
  const Scalar* x = io.x + at;
  Scalar* spikes = io.output + at;
  State* states = io.states ? io.states + io.layout.at(first, (io.layout.steps - 1) / kChunk) : nullptr;
  for (int64_t start = 0; start < io.layout.steps; start += kChunk) {
    const int64_t left = io.layout.steps - start;
    for (int k = 0; k < kChunk; k += kSteps) {
      if (left - k >= kSteps) {
        advance<kSteps>(lanes, neuron, x, spikes, io.layout.inner, v, from_zero, needed_after(start + k + kSteps));
        from_zero = false;
        x += kSteps * io.layout.inner;
        spikes += kSteps * io.layout.inner;
      } else {
        for (int64_t last = left - k; last > 0; --last) {
          advance<1>(lanes, neuron, x, spikes, io.layout.inner, v, from_zero, needed_after(io.layout.steps - last + 1));
          from_zero = false;
          x += io.layout.inner;
          spikes += io.layout.inner;
        }
        break;
      }
    }
    if (states && left > kChunk) {
      store_state(lanes, states, v);
      states += io.layout.inner;
    }
  }
  if (io.final_state) store_state(lanes, io.final_state + first, v);
}

// Walks back chunk by chunk: the potentials of a chunk are recomputed from the state before it, with the forward's own
// arithmetic, then used in reverse.
template <class Lanes, class Neuron, class Scalar>
STBP_FN void backward_scan(const Lanes& lanes, const Neuron neuron, const NeuronBackward<Scalar>& io, int64_t first) {
  using Value = typename Lanes::Value;
  constexpr int kChunk = Lanes::kChunk;
  constexpr int kSteps = Lanes::kStepsAtOnce;
  Value v[Lanes::kWidth];
  Value grad_v[Lanes::kWidth];
  Value u[kChunk][Lanes::kWidth];
  bool grad_from_zero = Lanes::kStateInMemory && io.grad_final == nullptr;
  if (!grad_from_zero) load_state(lanes, grad_v, io.grad_final ? io.grad_final + first : nullptr);

  const int64_t rows = io.layout.at(first, io.layout.steps);
  const int64_t saved = io.layout.at(first, (io.layout.steps - 1) / kChunk);
  for (int64_t chunk = (io.layout.steps - 1) / kChunk; chunk >= 0; --chunk) {
    const int64_t start = chunk * kChunk;
    const int64_t left = io.layout.steps - start;
    const auto* before = chunk > 0    ? io.states + saved + (chunk - 1) * io.layout.inner
                         : io.initial ? io.initial + first
                                      : nullptr;
    bool from_zero = Lanes::kStateInMemory && before == nullptr;
    if (!from_zero) load_state(lanes, v, before);

    const int64_t offset = rows + start * io.layout.inner;
    const auto recompute_at = [&](auto steps, int k) {
      recompute<decltype(steps)::value>(lanes, neuron, io.x + offset + k * io.layout.inner, io.layout.inner, v,
                                        from_zero, u + k);
      from_zero = false;
    };
    const auto turn_at = [&](auto steps, int k) {
      const int64_t at = offset + k * io.layout.inner;
      turn<decltype(steps)::value>(lanes, neuron, io.x + at, io.grad_output + at, io.grad_x + at, io.layout.inner, v,
                                   from_zero, grad_v, grad_from_zero, start + k > 0 || io.grad_initial);
      grad_from_zero = false;
    };
    const auto go_back_at = [&](auto steps, int k) {
      const int64_t at = offset + k * io.layout.inner;
      const bool needed = !Lanes::kStateInMemory || start + k > 0 || io.grad_initial;
      go_back<decltype(steps)::value>(lanes, neuron, u + k, io.grad_output + at, io.grad_x + at, io.layout.inner,
                                      grad_v, needed);
    };
    if constexpr (Lanes::kStateInMemory) {
      constexpr std::integral_constant<int, 1> one;
      constexpr std::integral_constant<int, kSteps> several;
      const int steps = int(left < kChunk ? left : kChunk);
      const int singles = steps % kSteps;  // they come first
      int k = 0;
      for (; k < (steps < kSteps ? steps - 1 : singles); ++k) recompute_at(one, k);
      for (; k < steps - kSteps; k += kSteps) recompute_at(several, k);
      if (steps < kSteps) {
        turn_at(one, k);
      } else {
        turn_at(several, k);
        while (k > singles) go_back_at(several, k -= kSteps);
      }
      while (k > 0) go_back_at(one, --k);
    } else {
      static_assert(kSteps == 1);
      constexpr std::integral_constant<int, 1> one;
      for (int k = 0; k < kChunk; ++k) {
        if (k >= left) break;
        recompute_at(one, k);
      }
      for (int k = kChunk - 1; k >= 0; --k) {
        if (k >= left) continue;
        go_back_at(one, k);
      }
    }
  }
  if (io.grad_initial) store_state(lanes, io.grad_initial + first, grad_v);
}

}  // namespace stbp
