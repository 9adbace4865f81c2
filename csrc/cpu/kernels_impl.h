// The bodies of the CPU kernels, for the one instruction set that STBP_ISA names and the compiler's flags enable.

#include <type_traits>

#include "../dispatch.h"
#include "../neunorm.h"
#include "../scan.h"
#include "kernels.h"
#include "vector.h"

namespace stbp::cpu::STBP_ISA {
namespace {

// Neighbouring neurons, vector by vector. Their number need not be a multiple of a vector's: the last vector then
// overlaps the one before, and what they share is computed twice, to the same result.
template <class State, int kStateBytes, int kStepsAtOnce_, bool kStream>
struct Tile {
  using Value = Vector<State>;
  static constexpr int kLanes = kVectorBytes / sizeof(State);
  static constexpr int kWidth = kStateBytes / kVectorBytes;
  static constexpr int kChunk = cpu::kChunk;
  static constexpr int kStepsAtOnce = kStepsAtOnce_;
  static constexpr bool kStateInMemory = true;

  int count;  // of neurons; at least kLanes

  STBP_FN int width() const { return (count + kLanes - 1) / kLanes; }

  template <class T>
  struct Row {
    T* at;
    int64_t last;  // where the last vector begins

    STBP_FN T* place(int64_t i) const { return at + (i * kLanes < last ? i * kLanes : last); }
    STBP_FN Value get(int i) const {
      using Stored = std::remove_const_t<T>;
      return widen(load<decltype(narrow(Value(), Stored()))>(place(i)), Stored());
    }
    STBP_FN void set(int i, Value value) { store(place(i), narrow(value, T())); }
    STBP_FN void set_spike(int i, Value o) { store(place(i), narrow_spike(o, T())); }

    template <class Stored>
    static STBP_FN void store(T* to, Stored stored) {
      if constexpr (kStream) {
        stream(to, stored);
      } else {
        memcpy(to, &stored, sizeof(stored));
      }
    }
  };

  template <class T>
  STBP_FN Row<const T> read(const T* from) const {
    return {from, count - kLanes};
  }
  template <class T>
  STBP_FN Row<T> write(T* to) const {
    return {to, count - kLanes};
  }
  template <class T>
  STBP_FN void flush(T*, Row<T>) const {}
  // Where the data come from memory: the hardware itself foresees the rest of a row, but not the next row.
  template <class T>
  STBP_FN void prefetch(const T* row, int i) const {
    if constexpr (kStream) __builtin_prefetch(row + i * kLanes, 0, 2);
  }
};

// Fewer neurons than a vector has.
template <class State>
struct Remainder {
  using Value = Vector<State>;
  static constexpr int kLanes = kVectorBytes / sizeof(State);
  static constexpr int kWidth = 1;
  static constexpr int kChunk = cpu::kChunk;
  static constexpr int kStepsAtOnce = 1;
  static constexpr bool kStateInMemory = false;

  int count;

  STBP_FN int width() const { return 1; }

  template <class T>
  struct Row {
    T* at;
    int count;

    STBP_FN Value get(int) const {
      using Stored = std::remove_const_t<T>;
      Stored lanes[kLanes] = {};
      for (int i = 0; i < count; ++i) lanes[i] = at[i];
      return widen(load<decltype(narrow(Value(), Stored()))>(lanes), Stored());
    }
    STBP_FN void set(int, Value value) {
      T lanes[kLanes];
      const auto stored = narrow(value, T());
      memcpy(lanes, &stored, sizeof(stored));
      for (int i = 0; i < count; ++i) at[i] = lanes[i];
    }
    STBP_FN void set_spike(int, Value o) { set(0, o); }
  };

  template <class T>
  STBP_FN Row<const T> read(const T* from) const {
    return {from, count};
  }
  template <class T>
  STBP_FN Row<T> write(T* to) const {
    return {to, count};
  }
  template <class T>
  STBP_FN void flush(T*, Row<T>) const {}
  template <class T>
  STBP_FN void prefetch(const T*, int) const {}
};

// Tile after tile of [first, last); scan(lanes, n) runs the neurons that lanes hold, from n on.
template <class Tile, class State, class Scan>
STBP_FN void each_tile(int64_t first, int64_t last, const Scan& scan) {
  constexpr int64_t kNeurons = Tile::kWidth * Tile::kLanes;
  for (int64_t n = first; n < last; n += kNeurons) {
    const int count = int(last - n < kNeurons ? last - n : kNeurons);
    if (count >= Tile::kLanes) {
      scan(Tile{count}, n);
    } else {
      scan(Remainder<State>{count}, n);
    }
  }
}

// In the caches, rows of one tile crowd each other out: they often lie a multiple of 4 KB apart. So two steps at once,
// of tiles that leave the state, and backward the potentials of a chunk, their room. Memory itself likes long rows.
template <class Scalar>
void forward(const LifForward<Scalar>& io, const LifOptions& options, int64_t first, int64_t last, bool past_caches) {
  using State = state_t<Scalar>;
  visit_forward_neuron<Scalar>(options, [&](const auto& neuron) {
    const auto scan = [&](const auto& lanes, int64_t n) { forward_scan(lanes, neuron, io, n); };
    if (past_caches) {
      each_tile<Tile<State, 8192, 4, true>, State>(first, last, scan);
    } else {
      each_tile<Tile<State, 4096, 2, false>, State>(first, last, scan);
    }
  });
  if (past_caches) end_of_streams();
}

template <class Scalar>
void backward(const LifBackward<Scalar>& io, const LifOptions& options, int64_t first, int64_t last, bool past_caches) {
  using State = state_t<Scalar>;
  visit_backward_neuron<Scalar>(options, [&](const auto& neuron) {
    const auto scan = [&](const auto& lanes, int64_t n) { backward_scan(lanes, neuron, io, n); };
    if (past_caches) {
      each_tile<Tile<State, 4096, 2, true>, State>(first, last, scan);
    } else {
      each_tile<Tile<State, 2048, 2, false>, State>(first, last, scan);
    }
  });
  if (past_caches) end_of_streams();
}

// Teams of one thread, with all features: a strip of whole vectors of positions, or the positions that are left.
template <class State>
struct Alone {
  using Value = Vector<State>;
  static constexpr int kLanes = kVectorBytes / sizeof(State);
  static constexpr int kChunk = kNeuNormChunk;

  template <class F>
  STBP_FN void each_feature(int64_t features, const F& f) const {
    for (int64_t c = 0; c < features; ++c) f(c);
  }
  template <class Values>
  STBP_FN void sum(const Values&, int) const {}
  STBP_FN bool leads() const { return true; }
};

template <class State>
struct Strip : Alone<State> {
  using Value = Vector<State>;
  using Alone<State>::kLanes;
  static constexpr int kWidth = kNeuNormStrip / kVectorBytes;

  int vectors;

  STBP_FN int width() const { return vectors; }
  template <class T>
  STBP_FN Value get(const T* row, int i) const {
    return widen(load<decltype(narrow(Value(), T()))>(row + i * kLanes), T());
  }
  template <class T>
  STBP_FN Value own(const T* row, int i) const {
    return get(row, i);
  }
  template <class T>
  STBP_FN void set(T* row, int i, Value value) const {
    const auto stored = narrow(value, T());
    memcpy(row + i * kLanes, &stored, sizeof(stored));
  }
  template <class T>
  STBP_FN void set_spike(T* row, int i, Value o) const {
    const auto stored = narrow_spike(o, T());
    memcpy(row + i * kLanes, &stored, sizeof(stored));
  }
  STBP_FN void store_total(State* to, const Value* values) const {
    State total = 0;
    for (int i = 0; i < vectors; ++i)
      for (int lane = 0; lane < kLanes; ++lane) total += values[i][lane];
    *to = total;
  }
};

// What is beyond the last position is 0, and adds nothing to a gradient.
template <class State>
struct Rest : Alone<State> {
  using Value = Vector<State>;
  static constexpr int kWidth = 1;

  Remainder<State> lanes;

  STBP_FN int width() const { return 1; }
  template <class T>
  STBP_FN Value get(const T* row, int i) const {
    return lanes.read(row).get(i);
  }
  template <class T>
  STBP_FN Value own(const T* row, int i) const {
    return get(row, i);
  }
  template <class T>
  STBP_FN void set(T* row, int i, Value value) const {
    lanes.write(row).set(i, value);
  }
  template <class T>
  STBP_FN void set_spike(T* row, int i, Value o) const {
    lanes.write(row).set_spike(i, o);
  }
  STBP_FN void store_total(State* to, const Value* values) const {
    State total = 0;
    for (int lane = 0; lane < lanes.count; ++lane) total += values[0][lane];
    *to = total;
  }
};

// scan(team, sample or group, strip, n) of every task in [first, last).
template <class State, class Scan>
STBP_FN void each_strip(const NeuNormPlan& plan, int64_t positions, int64_t first, int64_t last, const Scan& scan) {
  constexpr int kLanes = Strip<State>::kLanes;
  const int64_t in_vectors = positions / kLanes * kLanes;
  for (int64_t task = first; task < last; ++task) {
    const int64_t part = task / plan.strips, strip = task % plan.strips;
    if (strip < plan.whole) {
      const int64_t n = strip * plan.length, left = in_vectors - n;
      scan(Strip<State>{{}, int((plan.length < left ? plan.length : left) / kLanes)}, part, strip, n);
    } else {
      scan(Rest<State>{{}, {int(positions - in_vectors)}}, part, strip, in_vectors);
    }
  }
}

template <class Scalar>
void neunorm_forward(const NeuNormForward<Scalar>& io, const LifOptions& options, const NeuNormPlan& plan,
                     int64_t first, int64_t last) {
  visit_forward_neuron<Scalar>(options, [&](const auto& neuron) {
    each_strip<state_t<Scalar>>(plan, io.positions, first, last,
                                [&](const auto& team, int64_t sample, int64_t, int64_t n) {
                                  neunorm_forward_scan(team, neuron, io, sample, n);
                                });
  });
}

template <class Scalar>
void neunorm_backward(const NeuNormBackward<Scalar>& io, const LifOptions& options, const NeuNormPlan& plan,
                      int64_t first, int64_t last) {
  visit_backward_neuron<Scalar>(options, [&](const auto& neuron) {
    each_strip<state_t<Scalar>>(plan, io.positions, first, last,
                                [&](const auto& team, int64_t group, int64_t strip, int64_t n) {
                                  neunorm_backward_scan(team, neuron, io, group, strip, plan.strips, n);
                                });
  });
}

}  // namespace

template <class Scalar>
Kernels<Scalar> kernels() {
  return {forward<Scalar>, backward<Scalar>, neunorm_forward<Scalar>, neunorm_backward<Scalar>,
          kVectorBytes / int64_t(sizeof(state_t<Scalar>))};
}
template Kernels<float> kernels<float>();
template Kernels<double> kernels<double>();
template Kernels<Half> kernels<Half>();
template Kernels<BFloat16> kernels<BFloat16>();

}  // namespace stbp::cpu::STBP_ISA
