// The CPU kernels of neurons with normalisation.
//
// A thread computes a tile at a time: neighbouring positions of a sample with all their features, as rows of neurons
// that lie side by side. In a contiguous tensor a tile has a row of positions for each feature; with channels_last it
// is one row, all features of the first position, then those of the next. The loops over neurons are the same for both;
// only sums over the features and the map beside each neuron are made differently.
//
// The rows of scratch memory stay in the L2 cache. Where a row is updated in place, it holds the tile's vectors, of
// which the last two may overlap; where it is written at once, it holds the numbers themselves.
#pragma once

#include "../core/neunorm.h"
#include "../neurons/registry.h"
#include "lanes.h"

namespace stbp::cpu::STBP_ISA {
namespace {

template <class Lanes>
struct PositionTile {
  using Value = typename Lanes::Value;
  using State = std::remove_reference_t<decltype(Value()[0])>;
  static constexpr int kLanes = Lanes::kLanes;
  static constexpr int kLine = 64 / sizeof(State);

  Lanes lanes;  // of a row
  bool channels_last;
  bool past_caches;  // write results there
  int64_t features, positions;

  STBP_FN int64_t rows() const { return channels_last ? 1 : features; }
  STBP_FN Value* scratch(int64_t rows) const {
    return static_cast<Value*>(scratch_memory(size_t(rows * stride() + kLine / kLanes) * sizeof(Value)));
  }
  // From row to row of scratch memory, in vectors: whole cache lines, with one to spare for what spread() writes.
  STBP_FN int64_t stride() const { return ((lanes.count + kLine - 1) / kLine + channels_last) * (kLine / kLanes); }

  STBP_FN void clear(Value* row) const { fill(row, lanes.width(), Value{}); }
  template <class T>
  STBP_FN void load(Value* row, const T* from) const {
    for (int i = 0; i < lanes.width(); ++i) row[i] = lanes.read(from).get(i);
  }
  template <class T>
  STBP_FN void store(T* to, const Value* row) const {
    for (int i = 0; i < lanes.width(); ++i) lanes.write(to).set(i, row[i]);
  }
  // Writes beside each neuron of a row the number of its position.
  STBP_FN void spread(Value* row, const State* of_positions) const {
    State* const to = numbers(row);
    if (!channels_last) return copy(to, of_positions, positions);
    for (int64_t p = 0; p < positions; ++p) {
      const Value value = broadcast<Value>(of_positions[p]);
      for (int64_t c = 0; c < features; c += kLanes) memcpy(to + p * features + c, &value, sizeof(value));
    }
  }
  static STBP_FN State* numbers(Value* row) { return reinterpret_cast<State*>(row); }

  template <class T>
  STBP_FN void set_result(T* row, int i, Value value) const {
    auto to = lanes.write(row);
    if constexpr (Lanes::kStateInMemory) {
      if (past_caches) return stream(to.place(i), narrow(value, T()));
    }
    to.set(i, value);
  }
  // Rows are too short for the hardware to foresee what is read after them.
  template <class T>
  static STBP_FN void prefetch(const T* row, int i) {
    __builtin_prefetch(row + i * kLanes);
  }
  STBP_FN int64_t rows_ahead() const { return most(4, kNeuNormStrip / int64_t(sizeof(State)) / lanes.count); }
};

template <class V>
STBP_FN auto sum_by_halves(V v) {
  using State = std::remove_reference_t<decltype(v[0])>;
  constexpr int kHalf = sizeof(V) / sizeof(State) / 2;
  if constexpr (kHalf == 1) {
    return v[0] + v[1];
  } else {
    struct Halves {
      typename VectorOf<State, kHalf>::type first, second;
    };
    const auto halves = bit_cast<Halves>(v);
    return sum_by_halves(halves.first + halves.second);
  }
}

// Sums over the features, for each position of a tile. Of kParts parts, part p has the features c with c % kParts == p,
// in this order, and the parts are added by halves, p and p + kParts / 2 first: so a sum has the same bits for both
// memory orders and any vectors. Sums of spikes are exact in any order, and have fewer parts.
template <class Lanes, int kParts = PositionTile<Lanes>::kLine>
struct FeatureSum {
  using Tile = PositionTile<Lanes>;
  using Value = typename Tile::Value;
  using State = typename Tile::State;

  const Tile& tile;
  Value* rows;  // the parts, and zeros; with channels_last one row of the numbers that are to be added

  static STBP_FN int64_t row_count(const Tile& tile) { return tile.channels_last ? 1 : kParts + 1; }
  STBP_FN FeatureSum(const Tile& tile_, Value* rows_) : tile(tile_), rows(rows_) {
    for (int64_t p = least(tile.features, kParts); !tile.channels_last && p <= kParts; ++p)
      tile.clear(rows + p * tile.stride());
  }

  // value(i) are the vectors of row c.
  template <class F>
  STBP_FN void add(int64_t c, const F& value) const {
    const int width = tile.lanes.width();
    if (tile.channels_last) {
      auto row = tile.lanes.write(tile.numbers(rows));
      for (int i = 0; i < width; ++i) row.set(i, value(i));
    } else {
      Value* const part = rows + c % kParts * tile.stride();
      const Value* const before = c < kParts ? rows + kParts * tile.stride() : part;
      for (int i = 0; i < width; ++i) part[i] = before[i] + value(i);
    }
  }

  // Of all rows, to [positions].
  STBP_FN void total(State* to) const {
    if (!tile.channels_last) {
      auto sums = tile.lanes.write(to);
      for (int i = 0; i < tile.lanes.width(); ++i) sums.set(i, sum_of_parts<1>(rows + i));
      return;
    }
    constexpr int kLine = Tile::kLine, kVectors = kLine / Tile::kLanes;
    Value lane{};
    for (int l = 0; l < Tile::kLanes; ++l) lane[l] = State(l);
    const State* from = tile.numbers(rows);
    for (int64_t p = 0; p < tile.positions; ++p) {
      Value sum[kVectors] = {};
      for (int64_t left = tile.features; left > 0; left -= kLine) {
        for (int j = 0; j < kVectors; ++j) {
          const Value value = load<Value>(from + j * Tile::kLanes);
          const State end = State(left - j * Tile::kLanes);
          sum[j] = sum[j] + (left >= kLine
                                 ? value
                                 : Math<Value>::choose(Math<Value>::less(lane, broadcast<Value>(end)), value, Value{}));
        }
        from += least(left, kLine);
      }
      for (int half = kVectors / 2; half > 0; half /= 2)
        for (int j = 0; j < half; ++j) sum[j] = sum[j] + sum[j + half];
      to[p] = sum_by_halves(sum[0]);
    }
  }
  template <int kStep>
  STBP_FN Value sum_of_parts(const Value* part) const {
    if constexpr (kStep == kParts) {
      return *part;
    } else {
      return sum_of_parts<2 * kStep>(part) + sum_of_parts<2 * kStep>(part + kStep * tile.stride());
    }
  }
};

template <class Lanes, class Neuron, class Scalar>
STBP_FN void neunorm_forward_scan(const PositionTile<Lanes>& tile, Neuron neuron, const NeuNormForward<Scalar>& io,
                                  int64_t sample, int64_t first) {
  using Value = typename Lanes::Value;
  using State = typename Neuron::State;
  using Sum = FeatureSum<Lanes, Neuron::kBinary ? 4 : PositionTile<Lanes>::kLine>;
  if (io.decays) neuron.c.decay = io.decays[0];
  const NeuNormConstants<State> norm(io);
  const NeuNormPlace at(io, sample, first);
  const Lanes lanes = tile.lanes;
  const int width = lanes.width();
  const int64_t rows = tile.rows(), stride = tile.stride();
  Value* const weights = tile.scratch(kNeuNormForwardRows * rows + 3 + Sum::row_count(tile));
  Value *const potentials = weights + rows * stride, *const spikes = potentials + rows * stride;
  Value* const beside = spikes + rows * stride;
  State *const a = tile.numbers(beside + stride), *const sums = tile.numbers(beside + 2 * stride);
  const Sum sum(tile, beside + 3 * stride);
  for (int64_t c = 0; c < rows; ++c) {
    tile.load(weights + c * stride, io.weight + at.weight(0, c));
    tile.clear(potentials + c * stride);
  }
  fill(a, tile.positions, State(0));

  const bool past_caches = tile.past_caches;
  const int64_t ahead = tile.channels_last ? at.step() : tile.rows_ahead() * io.positions;
  for (int64_t t = 0; t < io.steps; ++t) {
    for (int64_t c = 0; c < rows; ++c) {
      const Scalar* const current = io.x + at.neuron(t, c);
      const auto x = lanes.read(current);
      auto fired = lanes.write(tile.numbers(spikes + c * stride));
      Value* const v = potentials + c * stride;
      sum.add(c, [&](int i) {
        Value spike;
        neuron.step(v[i], x.get(i), spike);
        fired.set(i, spike);
        tile.prefetch(current + ahead, i);
        return spike;
      });
      if ((t + 1) % kNeuNormChunk == 0 && t + 1 < io.steps) tile.store(io.states + at.neuron(t / kNeuNormChunk, c), v);
    }
    sum.total(sums);
    for (int64_t p = 0; p < tile.positions; ++p) a[p] = norm.decay * a[p] + norm.gain * sums[p];
    copy(io.sums + at.map(t), sums, tile.positions);
    copy(io.maps + at.map(t), a, tile.positions);
    tile.spread(beside, a);
    for (int64_t c = 0; c < rows; ++c) {
      const auto fired = lanes.read(tile.numbers(spikes + c * stride)), map = lanes.read(tile.numbers(beside));
      const Value* const weight = weights + c * stride;
      Scalar* const normalised = io.normalised + at.neuron(t, c);
      for (int i = 0; i < width; ++i) {
        tile.set_result(normalised, i, fired.get(i) - weight[i] * map.get(i));
        if (!past_caches) tile.prefetch(normalised + ahead, i);
      }
    }
  }
}

// The map's part of the backward pass, the same for all neurons and so compiled once.
template <class Lanes>
struct MapGradient {
  using Value = typename Lanes::Value;
  using State = typename PositionTile<Lanes>::State;
  PositionTile<Lanes> tile;
  FeatureSum<Lanes> sum;
  const Value* weights;       // a row, or one for each feature
  Value *through_map, *maps;  // beside a row, of each step of a chunk: what reaches dL/do through the map; the map
  State *sums, *carried, *of_decay;  // of positions: a sum over features; norm_decay A[t+1]; dL/dnorm_decay

  // `steps` steps from `start` on, from the last to the first.
  template <class Scalar>
  __attribute__((noinline)) void go_back(const NeuNormBackward<Scalar>& io, const NeuNormPlace& at, int64_t start,
                                         int steps) const {
    const NeuNormConstants<State> norm(io);
    const int64_t stride = tile.stride();
    const int64_t ahead = tile.channels_last ? -at.step() : tile.rows_ahead() * io.positions;
    for (int k = steps - 1; k >= 0; --k) {
      const int64_t t = start + k;
      for (int64_t c = 0; c < tile.rows(); ++c) {
        const Scalar* const upstream = io.grad_normalised + at.neuron(t, c);
        const Scalar* const next = tile.channels_last ? io.x + at.neuron(t, c) : upstream;
        const auto grad = tile.lanes.read(upstream);
        const Value* const weight = weights + c * stride;
        sum.add(c, [&](int i) {
          tile.prefetch(upstream + ahead, i);
          tile.prefetch(next, i);
          return weight[i] * grad.get(i);
        });
      }
      sum.total(sums);
      for (int64_t p = 0; p < tile.positions; ++p) {
        const State grad_a = carried[p] - sums[p];
        carried[p] = norm.decay * grad_a;
        sums[p] = norm.gain * grad_a;
        if (!io.grad_decays) continue;
        const State before = t > 0 ? io.maps[at.map(t - 1) + p] : State(0);
        of_decay[p] += grad_a * (before - io.sums[at.map(t) + p] * norm.share);
      }
      tile.spread(through_map + k * stride, sums);
      tile.spread(maps + k * stride, io.maps + at.map(t));
    }
  }
};

// All samples of a group; leaves the sums over them in grad_weight, and adds what reaches the decays to grad_decays
// [2].
template <class Lanes, class Neuron, class Scalar>
STBP_FN void neunorm_backward_scan(const PositionTile<Lanes>& tile, Neuron neuron, const NeuNormBackward<Scalar>& io,
                                   int64_t group, int64_t first, state_t<Scalar>* grad_decays) {
  using Value = typename Lanes::Value;
  using State = typename Neuron::State;
  if (io.decays) neuron.c.decay = io.decays[0];
  const Lanes lanes = tile.lanes;
  const int width = lanes.width();
  const int64_t rows = tile.rows(), stride = tile.stride();
  const bool learned = grad_decays != nullptr, past_caches = tile.past_caches;
  const int64_t at_once = least(io.steps, kNeuNormChunk), next_row = tile.channels_last ? lanes.count : io.positions;
  const bool several = io.steps > at_once;  // chunks, from one to the next of which dL/dv goes
  Value* next =
      tile.scratch((2 + several + learned) * rows + (3 + learned) * at_once + 5 + FeatureSum<Lanes>::row_count(tile));
  const auto take = [&](int64_t count) { return (next += count * stride) - count * stride; };
  Value *const weights = take(rows), *const grad_weights = take(rows), *const grad_vs = take(several ? rows : 1);
  Value *const of_decay = take(learned * rows), *const v = take(1);
  Value *const us = take(at_once), *const befores = take(learned * at_once);
  const MapGradient<Lanes> map{tile,
                               {tile, take(FeatureSum<Lanes>::row_count(tile))},
                               weights,
                               take(at_once),
                               take(at_once),
                               tile.numbers(take(1)),
                               tile.numbers(take(1)),
                               tile.numbers(take(1))};
  for (int64_t c = 0; c < rows; ++c) {
    tile.load(weights + c * stride, io.weight + NeuNormPlace(io, 0, first).weight(0, c));
    tile.clear(grad_weights + c * stride);
    if (learned) tile.clear(of_decay + c * stride);
  }
  fill(map.of_decay, tile.positions, State(0));

  const int64_t from = io.batch * group / io.groups, to = io.batch * (group + 1) / io.groups;
  for (int64_t sample = from; sample < to; ++sample) {
    const NeuNormPlace at(io, sample, first);
    fill(map.carried, tile.positions, State(0));
    for (int64_t chunk = (io.steps - 1) / kNeuNormChunk; chunk >= 0; --chunk) {
      const int64_t start = chunk * kNeuNormChunk;
      const int steps = int(least(io.steps - start, kNeuNormChunk));
      map.go_back(io, at, start, steps);
      for (int64_t c = 0; c < rows; ++c) {
        Value* const grad_v = grad_vs + (several ? c * stride : 0);
        if (start + steps == io.steps) tile.clear(grad_v);
        if (chunk > 0) {
          tile.load(v, io.states + at.neuron(chunk - 1, c));
        } else {
          tile.clear(v);
        }
        for (int k = 0; k < steps; ++k) {
          const Scalar* const current = io.x + at.neuron(start + k, c);
          const Scalar* const result = past_caches ? current : io.grad_x + at.neuron(start + k, c);
          const auto x = lanes.read(current);
          Value *const u = us + k * stride, *const before = befores + k * stride;
          for (int i = 0; i < width; ++i) {
            Value unused;
            if (learned) before[i] = v[i];
            u[i] = neuron.step(v[i], x.get(i), unused);
            tile.prefetch(current + next_row, i);
            tile.prefetch(result, i);
          }
        }
        Value *const grad_weight = grad_weights + c * stride, *const grad_decay = of_decay + c * stride;
        for (int k = steps - 1; k >= 0; --k) {
          const Scalar* const upstream = io.grad_normalised + at.neuron(start + k, c);
          const auto grad = lanes.read(upstream);
          const auto through_map = lanes.read(tile.numbers(map.through_map + k * stride));
          const auto a = lanes.read(tile.numbers(map.maps + k * stride));
          const Value *const u = us + k * stride, *const before = befores + k * stride;
          Scalar* const grad_x = io.grad_x + at.neuron(start + k, c);
          for (int i = 0; i < width; ++i) {
            grad_weight[i] = grad_weight[i] - grad.get(i) * a.get(i);
            const Value grad_u = neuron.step_back(u[i], grad.get(i) + through_map.get(i), grad_v[i]);
            if (learned) grad_decay[i] = grad_decay[i] + grad_u * before[i];
            tile.set_result(grad_x, i, grad_u);
            tile.prefetch(upstream + next_row, i);
          }
        }
      }
    }
  }
  for (int64_t c = 0; c < rows; ++c)
    tile.store(io.grad_weight + NeuNormPlace(io, 0, first).weight(group, c), grad_weights + c * stride);
  if (!learned) return;
  for (int64_t c = 0; c < rows; ++c) map.sum.add(c, [&](int i) { return of_decay[c * stride + i]; });
  map.sum.total(map.sums);
  for (int64_t p = 0; p < tile.positions; ++p) {
    grad_decays[0] += map.sums[p];
    grad_decays[1] += map.of_decay[p];
  }
}

// scan(tile, sample or group, strip, n) of every tile of the tasks [first, last).
template <class State, class Io, class Scan>
STBP_FN void each_position_tile(const NeuNormPlan& plan, const Io& io, int64_t first, int64_t last, bool past_caches,
                                const Scan& scan) {
  using Row = Tile<State, 64, 1, false>;
  const bool channels_last = io.channels_last || io.positions == 1;  // of one position, both orders are the same
  const int64_t at_once = most(1, kNeuNormRow / int64_t(sizeof(State)) / io.features);
  for (int64_t task = first; task < last; ++task) {
    const int64_t strip = task % plan.strips;
    const int64_t end = strip + 1 < plan.strips ? (strip + 1) * plan.length : io.positions;
    for (int64_t n = strip * plan.length, positions; n < end; n += positions) {
      positions = channels_last ? least(at_once, end - n) : end - n;
      const int count = int(channels_last ? positions * io.features : positions);
      const auto run = [&](auto lanes) {
        scan(PositionTile<decltype(lanes)>{lanes, channels_last, past_caches, io.features, positions},
             task / plan.strips, strip, n);
      };
      if (count >= Row::kLanes) {
        run(Row{count});
      } else {
        run(Remainder<State>{count});
      }
    }
  }
}

// f(neuron), with a surrogate that is chosen while the kernel runs.
template <class Scalar, class Surrogate, class F>
STBP_FN void visit_normalised(const LifOptions& options, const Surrogate& surrogate, const F& f) {
  using State = state_t<Scalar>;
  if constexpr (kHasSmooth<Scalar>) {
    using Any = AnyPlainSurrogateOf<State>;
    if (options.smooth)
      return f(Lif<State, EitherReset, Smooth, Any>{LifConstants<State>(options), Any(options.surrogate)});
  }
  visit_reset<State>(options, surrogate, f);
}

template <class Scalar>
void neunorm_forward(const NeuNormForward<Scalar>& io, const LifOptions& options, const NeuNormPlan& plan,
                     int64_t first, int64_t last, bool past_caches) {
  visit_normalised<Scalar>(options, NoSurrogate(), [&](const auto& neuron) {
    each_position_tile<state_t<Scalar>>(plan, io, first, last, past_caches,
                                        [&](const auto& tile, int64_t sample, int64_t, int64_t n) {
                                          neunorm_forward_scan(tile, neuron, io, sample, n);
                                        });
  });
  if (past_caches) end_of_streams();
}

template <class Scalar>
void neunorm_backward(const NeuNormBackward<Scalar>& io, const LifOptions& options, const NeuNormPlan& plan,
                      int64_t first, int64_t last, bool past_caches) {
  visit_normalised<Scalar>(options, AnyPlainSurrogateOf<state_t<Scalar>>(options.surrogate), [&](const auto& neuron) {
    each_position_tile<state_t<Scalar>>(
        plan, io, first, last, past_caches, [&](const auto& tile, int64_t group, int64_t strip, int64_t n) {
          state_t<Scalar>* const slot = io.grad_decays ? io.grad_decays + (group * plan.strips + strip) * 2 : nullptr;
          if (slot && n == strip * plan.length) slot[0] = slot[1] = 0;
          neunorm_backward_scan(tile, neuron, io, group, n, slot);
        });
  });
  if (past_caches) end_of_streams();
}

}  // namespace
}  // namespace stbp::cpu::STBP_ISA
