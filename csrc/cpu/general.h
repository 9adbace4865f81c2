// The CPU kernels of any neuron with all that few need: parameters as arrays, an affine current, samples of different
// lengths, a constant current, potentials as an output.
//
// Where many neighbours have the same parameters, tiles lie within them, and parameters and their gradients stay in
// registers. Elsewhere tiles begin at the same entry of the parameters again and again, once for every sample or few
// neighbours: a task is one such place with some of its tiles. It lays the parameters beside each neuron of a tile
// once, and adds up their gradients there. GeneralPlan chooses.
#pragma once

#include <type_traits>
#include <utility>

#include "../core/io.h"
#include "../neurons/registry.h"
#include "lanes.h"
#include "scan.h"

namespace stbp::cpu::STBP_ISA {
namespace {

// Neighbouring neurons and the numbers beside them. In a uniform tile all neurons have the same, which then stay in
// registers. A lean one has what most calls have: scale and shift that do not change with time, an input of its own for
// each step, and no potentials as an output; what its functions then tell the compiler leaves no trace in the loops.
template <class Lanes, class Neuron, bool kUniform, bool kLean>
struct GeneralTile {
  using Value = typename Lanes::Value;
  using State = typename Neuron::State;
  using Values = decltype(std::declval<Neuron>().values(std::declval<const Value (&)[Neuron::kParameters]>()));
  static constexpr int kOwn = Neuron::kParameters, kAll = kOwn + 2, kWidth = Lanes::kWidth;
  // Vectors that are computed side by side. The steps of one wait for each other.
  static constexpr int kPair = kWidth > 1 ? 2 : 1;
  // Steps at once, where that is worth compiling more.
  static constexpr int kSteps = kLean ? 4 : 1;

  const Neuron& neuron;
  const Extras<State>& extras;
  Lanes lanes;
  const State* parameters;  // [P, R, stride]
  int64_t rows, stride;     // R
  bool past_caches;
  Values uniform;
  Value scale, shift;

  STBP_FN GeneralTile(const Neuron& of, const Extras<State>& beside, Lanes group, const State* numbers,
                      int64_t row_count, int64_t row_stride, bool streams)
      : neuron(of),
        extras(beside),
        lanes(group),
        parameters(numbers),
        rows(row_count),
        stride(row_stride),
        past_caches(streams) {
    if (kUniform) {
      Value own[kOwn];
      for (int p = 0; p < kOwn; ++p) own[p] = broadcast<Value>(parameters[p]);
      uniform = neuron.values(own);
      scale = broadcast<Value>(parameters[kOwn]);
      shift = broadcast<Value>(parameters[kOwn + 1]);
    }
  }

  STBP_FN int width() const { return lanes.width(); }
  // Of all vectors, and of one more where they are taken in pairs: the last again.
  STBP_FN void load_row(Value* v, const State* from) const {
    for (int i = 0; i < (width() + kPair - 1) / kPair * kPair; ++i) v[i] = from ? get(from, i) : Value{};
  }
  STBP_FN bool by_step() const { return !kLean && rows > 1; }
  STBP_FN bool constant() const { return !kLean && extras.constant; }
  STBP_FN bool has_potentials() const { return !kLean && extras.potentials; }
  STBP_FN int64_t steps(const Layout& layout, int64_t first) const { return extras.steps(layout, first); }

  STBP_FN Values values(int i) const {
    if (kUniform) return uniform;
    Value own[kOwn];
    for (int p = 0; p < kOwn; ++p) own[p] = get(parameters + p * rows * stride, i);
    return neuron.values(own);
  }
  // Scale (0) or shift (1) of step t.
  STBP_FN Value of_current(int which, int64_t t, int i) const {
    if (kUniform) return which == 0 ? scale : shift;
    return get(parameters + ((kOwn + which) * rows + (by_step() ? t : 0)) * stride, i);
  }
  STBP_FN Value current(Value x, int64_t t, int i) const { return of_current(0, t, i) * x + of_current(1, t, i); }
  template <class T>
  STBP_FN Value get(const T* row, int i) const {
    return lanes.get(row + lanes.offset(i));
  }
  // The i-th vector of kSteps rows that are `between` apart.
  template <int kSteps, class T>
  STBP_FN void get(const T* row, int64_t between, int i, Value (&values)[kSteps]) const {
    const T* const at = row + lanes.offset(i);
    STBP_STEP_LOOP
    for (int k = 0; k < kSteps; ++k) values[k] = lanes.get(at + k * between);
  }
  template <int kSteps, class T, class Narrow>
  STBP_FN void set(T* row, int64_t between, int i, const Value (&values)[kSteps], const Narrow& narrowed) const {
    T* const at = row + lanes.offset(i);
    if constexpr (Lanes::kStateInMemory) {
      if (past_caches) {
        STBP_STEP_LOOP
        for (int k = 0; k < kSteps; ++k) stream(at + k * between, narrowed(values[k]));
        return;
      }
    }
    STBP_STEP_LOOP
    for (int k = 0; k < kSteps; ++k) lanes.put(at + k * between, narrowed(values[k]));
  }
  template <int kSteps, class T>
  STBP_FN void set(T* row, int64_t between, int i, const Value (&values)[kSteps]) const {
    set(row, between, i, values, [](Value value) { return narrow(value, T()); });
  }
  template <int kSteps, class T>
  STBP_FN void set_output(T* row, int64_t between, int i, const Value (&values)[kSteps]) const {
    if constexpr (Neuron::kBinary) {
      set(row, between, i, values, [](Value value) { return narrow_spike(value, T()); });
    } else {
      set(row, between, i, values);
    }
  }
  template <class Row, int kSteps>
  STBP_FN void derivatives_of(const Row* rows, Value (&h)[kSteps][kWidth]) const {
    const auto at = [&](int i) { return values(i); };
    neuron.template derivatives_of<kUniform>(at, rows->u, sizeof(Row) / sizeof(Value), h[0], kWidth, kSteps,
                                             (width() + kPair - 1) / kPair * kPair);
  }
  // All vectors of a row.
  template <class T>
  STBP_FN void store_row(T* row, const Value* v) const {
    for (int i = 0; i < width(); ++i) lanes.put(row + lanes.offset(i), narrow(v[i], T()));
  }
  template <class T>
  STBP_FN void clear(T* row) const {
    for (int i = 0; i < width(); ++i) lanes.put(row + lanes.offset(i), narrow(Value{}, T()));
  }
};

template <int kSteps, class Tile, class Scalar, class Value>
STBP_FN void general_advance(const Tile& tile, const NeuronForward<Scalar>& io, int64_t first, int64_t t, Value* v) {
  const int64_t inner = io.layout.inner, at = io.layout.at(first, io.layout.steps) + t * inner;
  const Scalar* const x = io.x + (tile.constant() ? first : at);
  const int64_t stride = tile.constant() ? 0 : inner;
  Scalar* const to = io.output ? io.output + at : nullptr;
  for (int i = 0; i < tile.width(); ++i) {
    const auto values = tile.values(i);
    Value current[kSteps], output[kSteps];
    tile.get(x, stride, i, current);
    Value potential = v[i];
    STBP_STEP_LOOP
    for (int k = 0; k < kSteps; ++k) {
      const Value u = tile.neuron.step(values, potential, tile.current(current[k], t + k, i), output[k]);
      current[k] = tile.extras.after_reset ? potential : u;
    }
    v[i] = potential;
    if (to) tile.set_output(to, inner, i, output);
    if (tile.has_potentials()) tile.set(tile.extras.potentials + at, inner, i, current);
  }
}

template <class Tile, class Scalar>
STBP_FN void general_forward_scan(const Tile& tile, const NeuronForward<Scalar>& io, int64_t first) {
  constexpr int kChunk = cpu::kChunk, kSteps = Tile::kSteps;
  typename Tile::Value v[Tile::kWidth];
  tile.load_row(v, io.initial ? io.initial + first : nullptr);
  const int64_t steps = tile.steps(io.layout, first), inner = io.layout.inner;
  const int64_t saved = (io.layout.steps - 1) / kChunk, states = io.layout.at(first, saved);
  for (int64_t t = 0; t < steps;) {
    if (steps - t >= kSteps) {
      general_advance<kSteps>(tile, io, first, t, v);
      t += kSteps;
    } else {
      general_advance<1>(tile, io, first, t++, v);
    }
    if (io.states && t % kChunk == 0 && t / kChunk <= saved)
      tile.store_row(io.states + states + (t / kChunk - 1) * inner, v);
  }
  const int64_t at = io.layout.at(first, io.layout.steps);
  for (int64_t t = steps; t < io.layout.steps; ++t) {
    if (io.output) tile.clear(io.output + at + t * inner);
    if (tile.has_potentials()) tile.clear(tile.extras.potentials + at + t * inner);
  }
  for (int64_t row = steps / kChunk; io.states && row < saved; ++row)
    tile.store_row(io.states + states + row * inner, v);
  if (io.final_state) tile.store_row(io.final_state + first, v);
}

// The gradients of a tile's parameters: all of them while vectors go back some steps, from begin() to end(), and with
// add() those that change with time. In a uniform tile they stay in registers.
template <class Tile>
struct UniformSums {
  using Value = typename Tile::Value;
  using Bits = typename Math<Value>::Bits;
  static constexpr int kAll = Tile::kAll, kPair = Tile::kPair;
  Value total[kPair][kAll];

  STBP_FN UniformSums() { clear(); }
  STBP_FN void clear() {
    for (int j = 0; j < kPair; ++j)
      for (int p = 0; p < kAll; ++p) total[j][p] = Value{};
  }
  STBP_FN void begin(Value (&of)[kPair][kAll]) const {
    for (int j = 0; j < kPair; ++j)
      for (int p = 0; p < kAll; ++p) of[j][p] = total[j][p];
  }
  // What a vector shares with the one before is not counted again.
  STBP_FN void end(const Tile& tile, int i, const Value (&of)[kPair][kAll]) {
    if (i > 0 && i + kPair < tile.width()) {
      for (int j = 0; j < kPair; ++j)
        for (int p = 0; p < kAll; ++p) total[j][p] = of[j][p];
      return;
    }
    for (int j = 0; j < kPair; ++j) {
      const Bits counted = lanes_from<Bits>(i + j > 0 ? tile.lanes.shared(i + j) : 0);
      for (int p = 0; p < kAll; ++p)
        total[j][p] = bit_cast<Value>((bit_cast<Bits>(of[j][p]) & counted) | (bit_cast<Bits>(total[j][p]) & ~counted));
    }
  }
  STBP_FN void add(int, int64_t, int, Value) {}
  STBP_FN Value sum(int parameter) const {
    return kPair > 1 ? total[0][parameter] + total[kPair - 1][parameter] : total[0][parameter];
  }
};

// Elsewhere each neuron of a tile has its own, [P, R, width] vectors.
template <class Tile>
struct SumsBesideNeurons {
  using Value = typename Tile::Value;
  static constexpr int kAll = Tile::kAll, kPair = Tile::kPair;
  Value* few;
  int64_t rows, width;

  STBP_FN void begin(Value (&of)[kPair][kAll]) const {
    for (int j = 0; j < kPair; ++j)
      for (int p = 0; p < kAll; ++p) of[j][p] = Value{};
  }
  STBP_FN void end(const Tile&, int i, const Value (&of)[kPair][kAll]) {
    for (int j = 0; j < kPair; ++j)
      for (int p = 0; p < kAll; ++p) add(p, 0, i + j, of[j][p]);
  }
  STBP_FN void add(int parameter, int64_t t, int i, Value gradient) {
    Value& sum = few[(parameter * rows + t) * width + i];
    sum = sum + gradient;
  }
};

// What the way back needs of each step of a chunk and each vector of a tile: u[t] and v[t-1].
template <class Value, int kWidth>
struct ChunkOfStates {
  struct Row {
    Value u[kWidth], before[kWidth];
  };
  Row row[cpu::kChunk];
};

template <int kSteps, class Tile, class Scalar, class Value, int kWidth>
STBP_FN void general_recompute(const Tile& tile, const NeuronBackward<Scalar>& io, int64_t first, int64_t t, Value* v,
                               ChunkOfStates<Value, kWidth>& of, int at_step) {
  const int64_t inner = io.layout.inner, at = io.layout.at(first, io.layout.steps) + t * inner;
  const Scalar* const x = io.x + (tile.constant() ? first : at);
  const int64_t stride = tile.constant() ? 0 : inner;
  constexpr int kPair = Tile::kPair;
  for (int i = 0; i < tile.width(); i += kPair) {
    typename Tile::Values values[kPair];
    Value current[kPair][kSteps], before[kPair][kSteps], potential[kPair], unused;
    for (int j = 0; j < kPair; ++j) {
      values[j] = tile.values(i + j);
      tile.get(x, stride, i + j, current[j]);
      potential[j] = v[i + j];
    }
    STBP_STEP_LOOP
    for (int k = 0; k < kSteps; ++k)
      for (int j = 0; j < kPair; ++j) {
        before[j][k] = potential[j];
        current[j][k] = tile.neuron.step(values[j], potential[j], tile.current(current[j][k], t + k, i + j), unused);
      }
    for (int j = 0; j < kPair; ++j) {
      v[i + j] = potential[j];
      STBP_STEP_LOOP
      for (int k = 0; k < kSteps; ++k) {
        of.row[at_step + k].u[i + j] = current[j][k];
        of.row[at_step + k].before[i + j] = before[j][k];
      }
    }
  }
}

// kSteps steps back of all neurons.
template <int kSteps, class Tile, class Scalar, class Value, int kWidth, class Sums>
STBP_FN void general_go_back(const Tile& tile, const NeuronBackward<Scalar>& io, Sums& to, int64_t first, int64_t t,
                             const ChunkOfStates<Value, kWidth>& of, int at_step, Value* grad_v, Value* grad_sum) {
  constexpr int kOwn = Tile::kOwn;
  const int64_t inner = io.layout.inner, at = io.layout.at(first, io.layout.steps) + t * inner;
  const Scalar* const currents = io.x + (tile.constant() ? first : at);
  const int64_t stride = tile.constant() ? 0 : inner;
  const Scalar* const grad_output = io.grad_output ? io.grad_output + at : nullptr;
  Value h[kSteps][kWidth];
  tile.derivatives_of(of.row + at_step, h);
  const auto* const row = of.row + at_step;
  constexpr int kPair = Tile::kPair;
  Sums sums = to;
  for (int i = 0; i < tile.width(); i += kPair) {
    typename Tile::Values values[kPair];
    Value gradient[kPair][kSteps] = {}, carried[kPair], total[kPair][Tile::kAll];
    sums.begin(total);
    for (int j = 0; j < kPair; ++j) {
      values[j] = tile.values(i + j);
      carried[j] = grad_v[i + j];
      if (grad_output) tile.get(grad_output, inner, i + j, gradient[j]);
    }
    STBP_STEP_LOOP
    for (int k = kSteps - 1; k >= 0; --k)
      for (int j = 0; j < kPair; ++j) {
        Value beside = -Value{};
        if (tile.has_potentials()) {
          const Value direct = tile.get(tile.extras.potentials + at + k * inner, i + j);
          if (tile.extras.after_reset) {
            carried[j] = carried[j] + direct;
          } else {
            beside = direct;
          }
        }
        const Value grad_i = tile.neuron.step_back(values[j], row[k].before[i + j], row[k].u[i + j], h[k][i + j],
                                                   gradient[j][k], beside, carried[j], total[j]);
        gradient[j][k] = grad_i * tile.of_current(0, t + k, i + j);
        const Value x = tile.get(currents + k * stride, i + j);
        if (tile.by_step()) {
          sums.add(kOwn, t + k, i + j, grad_i * x);
          sums.add(kOwn + 1, t + k, i + j, grad_i);
        } else {
          total[j][kOwn] = Math<Value>::plus_product(total[j][kOwn], grad_i, x);
          total[j][kOwn + 1] = total[j][kOwn + 1] + grad_i;
        }
      }
    sums.end(tile, i, total);
    for (int j = 0; j < kPair; ++j) {
      grad_v[i + j] = carried[j];
      if (tile.constant()) {
        STBP_STEP_LOOP
        for (int k = kSteps - 1; k >= 0; --k) grad_sum[i + j] = grad_sum[i + j] + gradient[j][k];
      } else {
        tile.set(io.grad_x + at, inner, i + j, gradient[j]);
      }
    }
  }
  to = sums;
}

template <class Tile, class Scalar, class Sums, class AfterSteps>
STBP_FN void general_backward_scan(const Tile& tile, const NeuronBackward<Scalar>& io, Sums& sums, int64_t first,
                                   const AfterSteps& after_steps) {
  using Value = typename Tile::Value;
  constexpr int kChunk = cpu::kChunk, kSteps = Tile::kSteps, kWidth = Tile::kWidth;
  Value v[kWidth], grad_v[kWidth], grad_sum[kWidth];
  ChunkOfStates<Value, kWidth> of;
  const int64_t inner = io.layout.inner, at = io.layout.at(first, io.layout.steps);
  const int64_t states = io.layout.at(first, (io.layout.steps - 1) / kChunk);
  const int64_t all = tile.steps(io.layout, first);
  tile.load_row(grad_v, io.grad_final ? io.grad_final + first : nullptr);
  if (tile.constant()) tile.load_row(grad_sum, nullptr);
  for (int64_t t = all; t < io.layout.steps && !tile.constant(); ++t) tile.clear(io.grad_x + at + t * inner);
  for (int64_t chunk = (all - 1 + kChunk) / kChunk - 1; chunk >= 0; --chunk) {
    const int64_t start = chunk * kChunk;
    const int steps = int(least(all - start, kChunk));
    tile.load_row(v, chunk > 0 ? io.states + states + (chunk - 1) * inner : io.initial ? io.initial + first : nullptr);
    int k = 0;
    while (k < steps) {
      if (steps - k >= kSteps) {
        general_recompute<kSteps>(tile, io, first, start + k, v, of, k);
        k += kSteps;
      } else {
        general_recompute<1>(tile, io, first, start + k, v, of, k);
        ++k;
      }
    }
    while (k > 0) {
      if (k % kSteps == 0) {
        k -= kSteps;
        general_go_back<kSteps>(tile, io, sums, first, start + k, of, k, grad_v, grad_sum);
        after_steps(kSteps);
      } else {
        --k;
        general_go_back<1>(tile, io, sums, first, start + k, of, k, grad_v, grad_sum);
        after_steps(1);
      }
    }
  }
  if (tile.constant()) tile.store_row(io.grad_x + first, grad_sum);
  if (io.grad_initial) tile.store_row(io.grad_initial + first, grad_v);
}

// The last tile of a row takes what would be less than a vector of any instruction set.
template <class State>
using FullTile = Tile<State, kGeneralTile + 128, 1, false>;

// f(n, length, entry) of the runs of neurons [n, n + length) that share an entry, in a tile of `count` neurons that
// begins at position `from` of a period.
template <class State, class F>
STBP_FN void each_run(const Extras<State>& extras, int64_t from, int64_t count, const F& f) {
  if (extras.count == 1) return f(int64_t(0), count, int64_t(0));
  int64_t entry = from / extras.group % extras.count, left = extras.group - from % extras.group;
  for (int64_t n = 0; n < count; left = extras.group) {
    const int64_t length = least(left, count - n);
    f(n, length, entry);
    n += length;
    if (++entry == extras.count) entry = 0;
  }
}

// Whether a parameter is a constant of the launch, and which.
template <class State, class Neuron>
STBP_FN bool is_constant(const Extras<State>& extras, const Neuron&, int which) {
  return extras.parameters == nullptr || (which >= Neuron::kParameters && !extras.affine);
}
template <class Neuron>
STBP_FN auto constant_parameter(const Neuron& neuron, int which) {
  using State = typename Neuron::State;
  return which < Neuron::kParameters ? neuron.parameter(which) : State(which == Neuron::kParameters ? 1 : 0);
}

// What a task has beside its tiles: a row for every parameter, or several where they change with time.
template <class Neuron>
struct TaskRows {
  using State = typename Neuron::State;
  static constexpr int64_t kStride = (kGeneralTile + 128) / int64_t(sizeof(State));

  const Extras<State>& extras;
  int64_t count;      // of rows
  State* parameters;  // [count, stride]
  State* few;         // [count, stride] of vectors, and
  double* all;        // [count, stride]: the gradients beside each neuron

  STBP_FN TaskRows(const Extras<State>& of, bool learned) : extras(of), count((Neuron::kParameters + 2) * of.rows) {
    char* const memory = static_cast<char*>(
        scratch_memory(size_t(count * kStride) * (learned ? 2 * sizeof(State) + sizeof(double) : sizeof(State))));
    const size_t size = size_t(count * kStride) * sizeof(State);
    parameters = reinterpret_cast<State*>(memory);
    few = learned ? reinterpret_cast<State*>(memory + size) : nullptr;
    all = learned ? reinterpret_cast<double*>(memory + 2 * size) : nullptr;
  }

  STBP_FN void begin(const Neuron& neuron, int64_t from, int64_t neurons) const {
    for (int64_t row = 0; row < count; ++row) {
      State* const to = parameters + row * kStride;
      const int which = int(row / extras.rows);
      const State* const values = extras.parameters + row * extras.count;
      if (is_constant(extras, neuron, which)) {
        fill(to, neurons, constant_parameter(neuron, which));
      } else if (extras.group == 1 && extras.count > 1) {
        for (int64_t n = 0, entry = from % extras.count; n < neurons; entry = 0) {
          const int64_t length = least(neurons - n, extras.count - entry);
          copy(to + n, values + entry, length);
          n += length;
        }
      } else {
        each_run(extras, from, neurons,
                 [&](int64_t n, int64_t length, int64_t entry) { fill(to + n, length, values[entry]); });
      }
    }
    if (few) fill(few, count * kStride, State(0));
    if (all) fill(all, count * kStride, 0.0);
  }

  // Adds the few to all, of a tile's neurons.
  template <class Lanes>
  STBP_FN void flush(const Lanes& lanes) const {
    constexpr int64_t kLanes = Lanes::kLanes;
    // The last vector begins earlier where it overlaps the one before.
    const int64_t whole = lanes.count / kLanes * kLanes, begin = lanes.count < kLanes ? 0 : lanes.count - kLanes;
    for (int64_t row = 0; row < count; ++row) {
      State* const from = few + row * kStride;
      double* const to = all + row * kStride;
      for (int64_t n = 0; n < whole; ++n) to[n] += double(from[n]);
      for (int64_t n = whole; n < lanes.count; ++n) to[n] += double(from[whole + n - begin]);
      fill(from, kStride, State(0));
    }
  }

  // The sums over the neurons of each entry, to [entries, count].
  STBP_FN void sum(int64_t from, int64_t neurons, int64_t entries, double* to) const {
    const int64_t first = extras.count == 1 ? 0 : from / extras.group % extras.count;
    fill(to, entries * count, 0.0);
    for (int64_t row = 0; row < count; ++row) {
      const double* const values = all + row * kStride;
      each_run(extras, from, neurons, [&](int64_t n, int64_t length, int64_t entry) {
        double parts[8] = {};
        int64_t k = 0;
        for (; k + 8 <= length; k += 8)
          for (int part = 0; part < 8; ++part) parts[part] += values[n + k + part];
        for (; k < length; ++k) parts[0] += values[n + k];
        to[(entry - first) * count + row] +=
            ((parts[0] + parts[1]) + (parts[2] + parts[3])) + ((parts[4] + parts[5]) + (parts[6] + parts[7]));
      });
    }
  }
};

// What people train with, where they do: compiled more often, to run faster.
template <class Scalar>
constexpr bool kOften = (std::is_same_v<Scalar, float> || std::is_same_v<Scalar, BFloat16>) && kVectorBytes > 16;

// run(tile, first, last) of all tiles of a task; `last` of its length in a row.
template <bool kLeanToo, class Neuron, class Run>
STBP_FN void each_general_tile(const Neuron& neuron, const TaskRows<Neuron>& rows, const GeneralPlan& plan,
                               int64_t task, const Run& run) {
  using State = typename Neuron::State;
  using Full = FullTile<State>;
  const auto& extras = rows.extras;
  const int64_t block = task % plan.blocks, group = task / plan.blocks;
  const int64_t end = plan.strands * (group + 1) / plan.groups;
  for (int64_t strand = plan.strands * group / plan.groups; strand < end; ++strand) {
    const int64_t count = plan.count(block, strand);
    const bool last = strand + 1 == end || plan.count(block, strand + 1) != count;
    const auto with = [&](auto lanes, auto lean) {
      run(GeneralTile<decltype(lanes), Neuron, false, decltype(lean)::value>(
              neuron, extras, lanes, rows.parameters, extras.rows, rows.kStride, plan.past_caches),
          plan.first(block, strand), last);
    };
    if (count < Full::kLanes) {
      with(Remainder<State>{int(count)}, std::false_type());
    } else if (kLeanToo && plan.lean) {
      with(Full{int(count)}, std::bool_constant<kLeanToo>());
    } else {
      with(Full{int(count)}, std::false_type());
    }
  }
}

// f(neuron), for uniform tiles. What people train with gets kernels for each reset; the others choose that, too, while
// they run.
template <class Scalar, class F>
STBP_FN void visit_uniform(const NeuronOptions& options, const F& f) {
  using State = state_t<Scalar>;
  if constexpr (kOften<Scalar>) {
    if (const auto* lif = std::get_if<LifOptions>(&options))
      return visit_common_reset<State>(*lif, AnySurrogateOf<State>(lif->surrogate), f);
  }
  visit_general<Scalar>(options, f);
}

// run(tile, first) of the uniform tiles of a task, in the order of memory; end_of_run(place) after the last of those
// that share a channel of a sample, which is the place-th of the task.
template <class Neuron, class Run, class EndOfRun>
STBP_FN void each_uniform_tile(const Neuron& neuron, const Extras<typename Neuron::State>& extras,
                               const GeneralPlan& plan, int64_t task, const Run& run, const EndOfRun& end_of_run) {
  using State = typename Neuron::State;
  constexpr int kAll = Neuron::kParameters + 2;
  const int64_t begin = plan.first_tile(task), end = plan.first_tile(task + 1);
  int64_t piece = begin % plan.pieces, of = begin / plan.pieces, entry = of % extras.count, place = 0;
  for (int64_t tile = begin; tile < end; ++tile) {
    State parameters[kAll];
    for (int p = 0; p < kAll; ++p)
      parameters[p] =
          is_constant(extras, neuron, p) ? constant_parameter(neuron, p) : extras.parameters[p * extras.count + entry];
    const bool last = piece + 1 == plan.pieces;
    const int64_t n = of * plan.run + piece * plan.width;
    const int count = int(last ? plan.run - piece * plan.width : plan.width);
    run(GeneralTile<FullTile<State>, Neuron, true, true>(neuron, extras, {count, int(n % FullTile<State>::kLanes)},
                                                         parameters, 1, 1, plan.past_caches),
        n);
    if (last || tile + 1 == end) end_of_run(place);
    ++piece;
    if (last) {
      piece = 0;
      ++of;
      if (++entry == extras.count) entry = 0;
      if (++place == extras.count) place = 0;
    }
  }
}

template <class Scalar>
void general_forward(const NeuronForward<Scalar>& io, const Extras<state_t<Scalar>>& extras,
                     const NeuronOptions& options, const GeneralPlan& plan, int64_t first, int64_t last) {
  if (plan.uniform) {
    visit_uniform<Scalar>(options, [&](const auto& neuron) {
      for (int64_t task = first; task < last; ++task)
        each_uniform_tile(
            neuron, extras, plan, task,
            [&](const auto& tile, int64_t n) STBP_INLINE { general_forward_scan(tile, io, n); }, [](int64_t) {});
    });
  } else {
    visit_general<Scalar>(options, [&](const auto& neuron) {
      using Neuron = std::decay_t<decltype(neuron)>;
      const TaskRows<Neuron> rows(extras, false);
      for (int64_t task = first; task < last; ++task) {
        if (task == first || plan.blocks > 1) rows.begin(neuron, task % plan.blocks * plan.width, plan.widest(task));
        each_general_tile<kOften<Scalar>>(neuron, rows, plan, task, [&](const auto& tile, int64_t n, bool) STBP_INLINE {
          general_forward_scan(tile, io, n);
        });
      }
    });
  }
  if (plan.past_caches) end_of_streams();
}

template <class Scalar>
void uniform_backward(const NeuronBackward<Scalar>& io, const Extras<state_t<Scalar>>& extras,
                      const NeuronOptions& options, const GeneralPlan& plan, int64_t first, int64_t last) {
  using State = state_t<Scalar>;
  visit_uniform<Scalar>(options, [&](const auto& neuron) {
    using Neuron = std::decay_t<decltype(neuron)>;
    using Full = FullTile<State>;
    using Value = typename Full::Value;
    constexpr int kAll = Neuron::kParameters + 2;
    for (int64_t task = first; task < last; ++task) {
      double* const partial = extras.grad_parameters ? extras.partial + task * plan.entries * kAll : nullptr;
      if (partial) fill(partial, plan.entries * kAll, 0.0);
      DoublesOf<Value> sums[kAll] = {};
      each_uniform_tile(
          neuron, extras, plan, task,
          [&](const auto& tile, int64_t n) STBP_INLINE {
            UniformSums<std::decay_t<decltype(tile)>> of_tile;
            general_backward_scan(tile, io, of_tile, n, [&](int) {
              for (int p = 0; p < kAll; ++p) add_in_double(sums[p], of_tile.sum(p));
              of_tile.clear();
            });
          },
          [&](int64_t place) {
            for (int p = 0; p < kAll; ++p) {
              if (partial) partial[place * kAll + p] += sum_of(sums[p]);
              sums[p] = {};
            }
          });
    }
  });
}

template <class Scalar>
void general_backward(const NeuronBackward<Scalar>& io, const Extras<state_t<Scalar>>& extras,
                      const NeuronOptions& options, const GeneralPlan& plan, int64_t first, int64_t last) {
  if (plan.uniform) {
    uniform_backward(io, extras, options, plan, first, last);
  } else {
    visit_general<Scalar>(options, [&](const auto& neuron) {
      using Neuron = std::decay_t<decltype(neuron)>;
      const bool learned = extras.grad_parameters != nullptr;
      const TaskRows<Neuron> rows(extras, true);
      for (int64_t task = first; task < last; ++task) {
        const int64_t from = task % plan.blocks * plan.width;
        rows.begin(neuron, from, plan.widest(task));
        int64_t steps = 0;  // that are in the sums of few
        each_general_tile<kOften<Scalar>>(
            neuron, rows, plan, task, [&](const auto& tile, int64_t n, bool last_of_length) STBP_INLINE {
              using Value = typename std::decay_t<decltype(tile)>::Value;
              const auto& lanes = tile.lanes;
              SumsBesideNeurons<std::decay_t<decltype(tile)>> sums{reinterpret_cast<Value*>(rows.few), tile.rows,
                                                                   rows.kStride / lanes.kLanes};
              general_backward_scan(tile, io, sums, n, [&](int count) {
                if ((steps += count) < kStepsInFloat && !last_of_length) return;
                rows.flush(lanes);
                steps = 0;
              });
            });
        if (learned) rows.sum(from, plan.widest(task), plan.entries, extras.partial + task * plan.entries * rows.count);
      }
    });
  }
  if (plan.past_caches) end_of_streams();
}

}  // namespace
}  // namespace stbp::cpu::STBP_ISA
