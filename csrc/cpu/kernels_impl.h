// The bodies of the CPU kernels, for the one instruction set that STBP_ISA names and the compiler's flags enable.

#include <type_traits>

#include "../core/neunorm.h"
#include "../neurons/registry.h"
#include "kernels.h"
#include "scan.h"
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

}  // namespace
}  // namespace stbp::cpu::STBP_ISA

#include "neunorm_impl.h"

namespace stbp::cpu::STBP_ISA {

template <class Scalar>
Kernels<Scalar> kernels() {
  return {forward<Scalar>, backward<Scalar>, neunorm_forward<Scalar>, neunorm_backward<Scalar>};
}
template Kernels<float> kernels<float>();
template Kernels<double> kernels<double>();
template Kernels<Half> kernels<Half>();
template Kernels<BFloat16> kernels<BFloat16>();

}  // namespace stbp::cpu::STBP_ISA
