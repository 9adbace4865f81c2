// The CPU kernels of any neuron with all that few need: parameters as arrays, an affine current, samples of different
// lengths, a constant current, potentials as an output.
//
// The neurons are cut into tiles that begin at the same entry of the parameters again and again, once for every sample
// or few neighbours. A task is one such place with some of its tiles: it lays the parameters beside each neuron of a
// tile once, and adds up their gradients over its tiles.
#pragma once

#include "../core/io.h"
#include "../neurons/registry.h"
#include "lanes.h"
#include "scan.h"

namespace stbp::cpu::STBP_ISA {
namespace {

// The tiles of a task, and the numbers beside their neurons.
template <class Lanes, class Neuron>
struct GeneralTile {
  using Value = typename Lanes::Value;
  using State = typename Neuron::State;
  static constexpr int kOwn = Neuron::kParameters;

  const Neuron& neuron;
  Lanes lanes;
  const State* parameters;  // [P, R, stride]
  int64_t rows, stride;     // R
  bool affine, past_caches;

  STBP_FN auto values(int i) const {
    Value own[kOwn];
    for (int p = 0; p < kOwn; ++p) own[p] = lanes.read(parameters + p * rows * stride).get(i);
    return neuron.values(own);
  }
  // Scale (0) or shift (1) of step t.
  STBP_FN Value of_current(int which, int64_t t, int i) const {
    return lanes.read(parameters + ((kOwn + which) * rows + (rows > 1 ? t : 0)) * stride).get(i);
  }
  STBP_FN Value current(Value x, int64_t t, int i) const {
    return affine ? of_current(0, t, i) * x + of_current(1, t, i) : x;
  }
  template <class T>
  STBP_FN void set(T* row, int i, Value value) const {
    auto to = lanes.write(row);
    if constexpr (Lanes::kStateInMemory) {
      if (past_caches) return stream(to.place(i), narrow(value, T()));
    }
    to.set(i, value);
  }
  template <class T>
  STBP_FN void set_output(T* row, int i, Value value) const {
    auto to = lanes.write(row);
    if constexpr (Lanes::kStateInMemory && Neuron::kBinary) {
      if (past_caches) return stream(to.place(i), narrow_spike(value, T()));
      return to.set_spike(i, value);
    }
    set(row, i, value);
  }
  template <class T>
  STBP_FN void clear(T* row) const {
    for (int i = 0; i < lanes.width(); ++i) lanes.write(row).set(i, Value{});
  }
};

template <int kSteps, class Tile, class Scalar, class Value>
STBP_FN void general_advance(const Tile& tile, const NeuronForward<Scalar>& io,
                             const Extras<typename Tile::State>& extras, int64_t first, int64_t t, Value* v) {
  const int64_t inner = io.layout.inner, at = io.layout.at(first, io.layout.steps) + t * inner;
  const Scalar* const x = io.x + (extras.constant ? first : at);
  const int64_t stride = extras.constant ? 0 : inner;
  for (int i = 0; i < tile.lanes.width(); ++i) {
    const auto values = tile.values(i);
    Value current[kSteps], output[kSteps];
    STBP_STEP_LOOP
    for (int k = 0; k < kSteps; ++k) current[k] = tile.lanes.read(x + k * stride).get(i);
    Value potential = v[i];
    STBP_STEP_LOOP
    for (int k = 0; k < kSteps; ++k) {
      const Value u = tile.neuron.step(values, potential, tile.current(current[k], t + k, i), output[k]);
      current[k] = extras.after_reset ? potential : u;
    }
    v[i] = potential;
    if (io.output) {
      STBP_STEP_LOOP
      for (int k = 0; k < kSteps; ++k) tile.set_output(io.output + at + k * inner, i, output[k]);
    }
    if (extras.potentials) {
      STBP_STEP_LOOP
      for (int k = 0; k < kSteps; ++k) tile.set(extras.potentials + at + k * inner, i, current[k]);
    }
  }
}

template <class Tile, class Scalar>
STBP_FN void general_forward_scan(const Tile& tile, const NeuronForward<Scalar>& io,
                                  const Extras<typename Tile::State>& extras, int64_t first) {
  constexpr int kChunk = cpu::kChunk, kSteps = 4;
  typename Tile::Value v[decltype(tile.lanes)::kWidth];
  load_state(tile.lanes, v, io.initial ? io.initial + first : nullptr);
  const int64_t steps = extras.steps(io.layout, first), inner = io.layout.inner;
  const int64_t saved = (io.layout.steps - 1) / kChunk, states = io.layout.at(first, saved);
  for (int64_t t = 0; t < steps;) {
    if (steps - t >= kSteps) {
      general_advance<kSteps>(tile, io, extras, first, t, v);
      t += kSteps;
    } else {
      general_advance<1>(tile, io, extras, first, t++, v);
    }
    if (io.states && t % kChunk == 0 && t / kChunk <= saved)
      store_state(tile.lanes, io.states + states + (t / kChunk - 1) * inner, v);
  }
  const int64_t at = io.layout.at(first, io.layout.steps);
  for (int64_t t = steps; t < io.layout.steps; ++t) {
    if (io.output) tile.clear(io.output + at + t * inner);
    if (extras.potentials) tile.clear(extras.potentials + at + t * inner);
  }
  for (int64_t row = steps / kChunk; io.states && row < saved; ++row)
    store_state(tile.lanes, io.states + states + row * inner, v);
  if (io.final_state) store_state(tile.lanes, io.final_state + first, v);
}

// The gradients of parameters beside each neuron of a tile.
template <class Value>
struct GradientRows {
  Value* few;  // [P, R, width] sums over a few dozen steps, or null
  int64_t rows, width;

  STBP_FN void add(int parameter, int64_t t, int i, Value gradient) const {
    Value& sum = few[(parameter * rows + (rows > 1 ? t : 0)) * width + i];
    sum = sum + gradient;
  }
};

// kSteps steps back of all neurons. Their potentials were computed before, or are here, from the state before them in
// `v`: then they never leave the registers.
template <int kSteps, bool kTurn, class Tile, class Scalar, class Value>
STBP_FN void general_go_back(const Tile& tile, const NeuronBackward<Scalar>& io,
                             const Extras<typename Tile::State>& extras, const GradientRows<Value>& gradients,
                             int64_t first, int64_t t, const Value* v, const Value (*us)[decltype(tile.lanes)::kWidth],
                             const Value (*befores)[decltype(tile.lanes)::kWidth], Value* grad_v, Value* grad_sum) {
  constexpr int kOwn = Tile::kOwn;
  const int64_t inner = io.layout.inner, at = io.layout.at(first, io.layout.steps) + t * inner;
  const Scalar* const currents = io.x + (extras.constant ? first : at);
  const int64_t stride = extras.constant ? 0 : inner;
  const bool needs_x = kTurn || (tile.affine && gradients.few);
  for (int i = 0; i < tile.lanes.width(); ++i) {
    const auto values = tile.values(i);
    Value x[kSteps] = {}, gradient[kSteps] = {}, u[kSteps], before[kSteps], h[kSteps] = {};
    Value own[kOwn] = {}, grad_scale{}, grad_shift{};
    if (needs_x) {
      STBP_STEP_LOOP
      for (int k = 0; k < kSteps; ++k) x[k] = tile.lanes.read(currents + k * stride).get(i);
    }
    if (io.grad_output) {
      STBP_STEP_LOOP
      for (int k = 0; k < kSteps; ++k) gradient[k] = tile.lanes.read(io.grad_output + at + k * inner).get(i);
    }
    Value potential = kTurn ? v[i] : Value{};
    STBP_STEP_LOOP
    for (int k = 0; k < kSteps; ++k) {
      before[k] = kTurn ? potential : befores[k][i];
      Value unused;
      u[k] = kTurn ? tile.neuron.step(values, potential, tile.current(x[k], t + k, i), unused) : us[k][i];
    }
    tile.neuron.derivatives_at(values, u, h);
    Value carried = grad_v[i];
    STBP_STEP_LOOP
    for (int k = kSteps - 1; k >= 0; --k) {
      Value beside{};
      if (extras.potentials) {
        const Value direct = tile.lanes.read(extras.potentials + at + k * inner).get(i);
        if (extras.after_reset) {
          carried = carried + direct;
        } else {
          beside = direct;
        }
      }
      const Value grad_i = tile.neuron.step_back(values, before[k], u[k], h[k], gradient[k], beside, carried, own);
      gradient[k] = tile.affine ? grad_i * tile.of_current(0, t + k, i) : grad_i;
      if (tile.rows > 1 && gradients.few) {
        gradients.add(kOwn, t + k, i, grad_i * x[k]);
        gradients.add(kOwn + 1, t + k, i, grad_i);
      } else {
        grad_scale = grad_scale + grad_i * x[k];
        grad_shift = grad_shift + grad_i;
      }
    }
    grad_v[i] = carried;
    if (gradients.few) {
      for (int p = 0; p < kOwn; ++p) {
        if (tile.neuron.learns(p)) gradients.add(p, 0, i, own[p]);
      }
      if (tile.affine && tile.rows == 1) {
        gradients.add(kOwn, 0, i, grad_scale);
        gradients.add(kOwn + 1, 0, i, grad_shift);
      }
    }
    if (extras.constant) {
      STBP_STEP_LOOP
      for (int k = kSteps - 1; k >= 0; --k) grad_sum[i] = grad_sum[i] + gradient[k];
    } else {
      STBP_STEP_LOOP
      for (int k = 0; k < kSteps; ++k) tile.set(io.grad_x + at + k * inner, i, gradient[k]);
    }
  }
}

template <class Tile, class Scalar, class Value = typename Tile::Value>
STBP_FN void general_backward_scan(const Tile& tile, const NeuronBackward<Scalar>& io,
                                   const Extras<typename Tile::State>& extras, const GradientRows<Value>& gradients,
                                   int64_t first) {
  constexpr int kChunk = cpu::kChunk, kSteps = 4, kWidth = decltype(tile.lanes)::kWidth;
  Value v[kWidth], grad_v[kWidth], grad_sum[kWidth] = {}, us[kChunk][kWidth], befores[kChunk][kWidth];
  const auto& lanes = tile.lanes;
  const int64_t inner = io.layout.inner, at = io.layout.at(first, io.layout.steps);
  const int64_t states = io.layout.at(first, (io.layout.steps - 1) / kChunk);
  const int64_t all = extras.steps(io.layout, first), stride = extras.constant ? 0 : inner;
  load_state(lanes, grad_v, io.grad_final ? io.grad_final + first : nullptr);
  for (int64_t t = all; t < io.layout.steps && !extras.constant; ++t) tile.clear(io.grad_x + at + t * inner);
  for (int64_t chunk = (all - 1 + kChunk) / kChunk - 1; chunk >= 0; --chunk) {
    const int64_t start = chunk * kChunk;
    const int steps = int(least(all - start, kChunk)), last = steps < kSteps ? 1 : kSteps;
    load_state(lanes, v,
               chunk > 0    ? io.states + states + (chunk - 1) * inner
               : io.initial ? io.initial + first
                            : nullptr);
    for (int k = 0; k < steps - last; ++k) {
      const auto x = lanes.read(io.x + (extras.constant ? first : at) + (start + k) * stride);
      for (int i = 0; i < lanes.width(); ++i) {
        Value unused;
        befores[k][i] = v[i];
        us[k][i] = tile.neuron.step(tile.values(i), v[i], tile.current(x.get(i), start + k, i), unused);
      }
    }
    int k = steps - last;
    const auto back = [&](auto count, auto turn) {
      general_go_back<decltype(count)::value, decltype(turn)::value>(tile, io, extras, gradients, first, start + k, v,
                                                                     us + k, befores + k, grad_v, grad_sum);
    };
    constexpr std::integral_constant<int, 1> one;
    constexpr std::integral_constant<int, kSteps> several;
    if (last == 1) {
      back(one, std::true_type());
    } else {
      back(several, std::true_type());
    }
    while (k > 0) {
      if (k >= kSteps) {
        k -= kSteps;
        back(several, std::false_type());
      } else {
        --k;
        back(one, std::false_type());
      }
    }
  }
  if (extras.constant) {
    for (int i = 0; i < lanes.width(); ++i) tile.set(io.grad_x + first, i, grad_sum[i]);
  }
  if (io.grad_initial) store_state(lanes, io.grad_initial + first, grad_v);
}

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

// What a task has beside its tiles: a row for every parameter, or several where they change with time.
template <class Neuron>
struct TaskRows {
  using State = typename Neuron::State;
  static constexpr int64_t kStride = kGeneralTile / int64_t(sizeof(State));

  const Extras<State>& extras;
  int64_t count;      // of rows
  State* parameters;  // [count, stride]
  State* few;         // [count, stride] of vectors, and
  double* all;        // [count, stride]: the gradients beside each neuron

  STBP_FN TaskRows(const Extras<State>& of, bool learned)
      : extras(of), count((Neuron::kParameters + (of.affine ? 2 : 0)) * (of.parameters ? of.rows : 1)) {
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
      const State* const values = extras.parameters ? extras.parameters + row * extras.count : nullptr;
      if (values == nullptr) {
        fill(to, neurons, neuron.parameter(int(row)));
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

// run(tile, first, last) of all tiles of a task; `last` of its length in a row.
template <class Neuron, class Run>
STBP_FN void each_general_tile(const Neuron& neuron, const TaskRows<Neuron>& rows, const GeneralPlan& plan,
                               int64_t task, bool past_caches, const Run& run) {
  using State = typename Neuron::State;
  using Full = Tile<State, kGeneralTile, 1, false>;
  const auto& extras = rows.extras;
  const int64_t block = task % plan.blocks, group = task / plan.blocks;
  const int64_t end = plan.strands * (group + 1) / plan.groups;
  for (int64_t strand = plan.strands * group / plan.groups; strand < end; ++strand) {
    const int64_t count = plan.count(block, strand);
    const bool last = strand + 1 == end || plan.count(block, strand + 1) != count;
    const auto with = [&](auto lanes) {
      run(GeneralTile<decltype(lanes), Neuron>{neuron, lanes, rows.parameters, extras.parameters ? extras.rows : 1,
                                               rows.kStride, extras.affine, past_caches},
          plan.first(block, strand), last);
    };
    if (count >= Full::kLanes) {
      with(Full{int(count)});
    } else {
      with(Remainder<State>{int(count)});
    }
  }
}

// f(neuron). What people train with gets kernels for each reset; the others choose that, too, while they run, which
// saves a quarter of the compile time.
template <class Scalar, class F>
STBP_FN void visit_any(const NeuronOptions& options, const F& f) {
  using State = state_t<Scalar>;
  constexpr bool kOften = (std::is_same_v<Scalar, float> || std::is_same_v<Scalar, BFloat16>) && kVectorBytes > 16;
  if constexpr (kOften) {
    if (const auto* lif = std::get_if<LifOptions>(&options))
      return visit_any_reset<State>(*lif, AnySurrogateOf<State>(lif->surrogate), f);
  }
  visit_general<Scalar>(options, f);
}

template <class Scalar>
void general_forward(const NeuronForward<Scalar>& io, const Extras<state_t<Scalar>>& extras,
                     const NeuronOptions& options, const GeneralPlan& plan, int64_t first, int64_t last) {
  visit_any<Scalar>(options, [&](const auto& neuron) {
    using Neuron = std::decay_t<decltype(neuron)>;
    const TaskRows<Neuron> rows(extras, false);
    for (int64_t task = first; task < last; ++task) {
      if (task == first || plan.blocks > 1) rows.begin(neuron, task % plan.blocks * plan.width, plan.widest(task));
      each_general_tile(neuron, rows, plan, task, plan.past_caches,
                        [&](const auto& tile, int64_t n, bool) { general_forward_scan(tile, io, extras, n); });
    }
  });
  if (plan.past_caches) end_of_streams();
}

template <class Scalar>
void general_backward(const NeuronBackward<Scalar>& io, const Extras<state_t<Scalar>>& extras,
                      const NeuronOptions& options, const GeneralPlan& plan, int64_t first, int64_t last) {
  visit_any<Scalar>(options, [&](const auto& neuron) {
    using Neuron = std::decay_t<decltype(neuron)>;
    const bool learned = extras.grad_parameters != nullptr;
    const TaskRows<Neuron> rows(extras, learned);
    for (int64_t task = first; task < last; ++task) {
      const int64_t from = task % plan.blocks * plan.width;
      rows.begin(neuron, from, plan.widest(task));
      int64_t steps = 0;  // that are in the sums of few
      each_general_tile(neuron, rows, plan, task, plan.past_caches,
                        [&](const auto& tile, int64_t n, bool last_of_length) {
                          using Value = typename std::decay_t<decltype(tile)>::Value;
                          const auto& lanes = tile.lanes;
                          const GradientRows<Value> gradients{reinterpret_cast<Value*>(rows.few), tile.rows,
                                                              rows.kStride / lanes.kLanes};
                          general_backward_scan(tile, io, extras, gradients, n);
                          steps += io.layout.steps;
                          if (learned && (steps >= kStepsInFloat || last_of_length)) {
                            rows.flush(lanes);
                            steps = 0;
                          }
                        });
      if (learned) rows.sum(from, plan.widest(task), plan.entries, extras.partial + task * plan.entries * rows.count);
    }
  });
  if (plan.past_caches) end_of_streams();
}

}  // namespace
}  // namespace stbp::cpu::STBP_ISA
