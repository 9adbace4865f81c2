// What the kernels of one instruction set have in common: groups of neighbouring neurons, as scan.h describes them, and
// memory for a thread's work.
#pragma once

#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

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

  int count;     // of neurons; at least kLanes
  int skew = 0;  // how far the first is from where a vector would be aligned; the second vector is

  STBP_FN int width() const { return (count + skew + kLanes - 1) / kLanes; }

  // Where the i-th vector begins, how many lanes it shares with the one before, and what is there.
  STBP_FN int64_t offset(int i) const {
    const int aligned = i * kLanes - skew < 0 ? 0 : i * kLanes - skew;
    return aligned < count - kLanes ? aligned : count - kLanes;
  }
  STBP_FN int shared(int i) const { return int(offset(i - 1) - offset(i)) + kLanes; }
  template <class T>
  STBP_FN Value get(const T* at) const {
    return widen(load<decltype(narrow(Value(), T()))>(at), T());
  }
  template <class T, class Stored>
  STBP_FN void put(T* at, Stored stored) const {
    memcpy(at, &stored, sizeof(stored));
  }

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

  STBP_FN int64_t offset(int) const { return 0; }
  template <class T>
  STBP_FN Value get(const T* at) const {
    T lanes[kLanes] = {};
    for (int i = 0; i < count; ++i) lanes[i] = at[i];
    return widen(load<decltype(narrow(Value(), T()))>(lanes), T());
  }
  template <class T, class Stored>
  STBP_FN void put(T* at, Stored stored) const {
    T lanes[kLanes];
    memcpy(lanes, &stored, sizeof(stored));
    for (int i = 0; i < count; ++i) at[i] = lanes[i];
  }

  template <class T>
  struct Row {
    T* at;
    Remainder of;

    STBP_FN Value get(int) const { return of.get(at); }
    STBP_FN void set(int, Value value) { of.put(at, narrow(value, T())); }
    STBP_FN void set_spike(int, Value o) { set(0, o); }
  };

  template <class T>
  STBP_FN Row<const T> read(const T* from) const {
    return {from, *this};
  }
  template <class T>
  STBP_FN Row<T> write(T* to) const {
    return {to, *this};
  }
  template <class T>
  STBP_FN void prefetch(const T*, int) const {}
};

// Memory of this thread, kept from call to call: its page faults would cost more than the kernel.
inline void* scratch_memory(size_t bytes) {
  struct Memory {
    void* at = nullptr;
    size_t bytes = 0;
    ~Memory() { std::free(at); }
  };
  static thread_local Memory memory;
  if (memory.bytes < bytes) {
    std::free(memory.at);
    memory.bytes = 0;
    memory.at = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (memory.at == nullptr) throw std::bad_alloc();
    memory.bytes = bytes;
  }
  return memory.at;
}

// Not those of the standard library, which are not always inlined.
STBP_FN int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
STBP_FN int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
template <class T>
STBP_FN void fill(T* to, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}
template <class T>
STBP_FN void copy(T* to, const T* from, int64_t count) {
  memcpy(to, from, size_t(count) * sizeof(T));
}

}  // namespace
}  // namespace stbp::cpu::STBP_ISA
