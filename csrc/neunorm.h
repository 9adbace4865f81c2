// Leaky integrate-and-fire neurons with neuron normalisation (NeuNorm), over all time steps, for a few neighbouring
// positions of one sample. All feature maps share an auxiliary map a with a leak of its own:
//
//   S[t] = sum over the features c of o_c[t]
//   a[t] = norm_decay a[t-1] + gain S[t]           gain = (1 - norm_decay) / C or / C^2
//   y_c[t] = o_c[t] - U_c a[t]
//
// and its adjoint, with g_c[t] = dL/dy_c[t] and A[t] = dL/da[t]:
//
//   A[t] = norm_decay A[t+1] - sum over c of U_c g_c[t]
//   dL/do_c[t] = g_c[t] + gain A[t]
//   dL/dU_c = - sum over t of g_c[t] a[t]
//   dL/dnorm_decay = sum over t of A[t] (a[t-1] - S[t] / C or / C^2)
//
// The features meet in S[t] and in the sum of U_c g_c[t] alone. So a chunk of kChunk steps is gone through twice: once
// to sum over the features, once to use the sum.
//
// Team is one thread, or several that share the features, with a group of neighbouring positions. It gives Value, what
// is computed with at once: a number or a vector of them; kWidth, the most Values it holds, and width(), how many there
// are; kChunk, the K of "one state every K steps". get(p, i) is Value i of the row of positions at p, own(p, i) the
// same of a row that the team has written itself, and set(p, i, Value) and set_spike(p, i, Value) write it.
// each_feature(C, f) calls f(c) for its share of the features; sum(values, steps) adds values[k][i] up over the team in
// a fixed order, for all of them; store_total(p, values) adds up over team and positions; leads() is true for one of
// the team.
#pragma once

#include "neuron.h"
#include "scan.h"

namespace stbp {

template <class State>
struct NeuNormConstants {
  State decay, share, gain;

  template <class Io>
  STBP_FN explicit NeuNormConstants(const Io& io)
      : decay(io.decays ? io.decays[1] : io.norm_decay),
        share(io.squared ? State(io.features) * State(io.features) : State(io.features)),
        gain((State(1) - decay) / share) {}
};

// Where rows of positions begin.
struct NeuNormPlace {
  int64_t batch, features, positions, sample, first;

  template <class Io>
  STBP_FN NeuNormPlace(const Io& io, int64_t sample_, int64_t first_)
      : batch(io.batch), features(io.features), positions(io.positions), sample(sample_), first(first_) {}

  STBP_FN int64_t neuron(int64_t t, int64_t c) const {
    return ((t * batch + sample) * features + c) * positions + first;
  }
  STBP_FN int64_t map(int64_t t) const { return (t * batch + sample) * positions + first; }
  STBP_FN int64_t weight(int64_t group, int64_t c) const { return (group * features + c) * positions + first; }
  STBP_FN int64_t step() const { return batch * features * positions; }  // from a neuron to itself, one step later
};

template <class Team, class Neuron, class Scalar>
STBP_FN void neunorm_forward_scan(const Team& team, Neuron neuron, const NeuNormForward<Scalar>& io, int64_t sample,
                                  int64_t first) {
  using Value = typename Team::Value;
  using State = typename Neuron::State;
  constexpr int kChunk = Team::kChunk;
  if (io.decays) neuron.c.decay = io.decays[0];
  const NeuNormConstants<State> norm(io);
  const NeuNormPlace at(io, sample, first);
  const int width = team.width();
  Value a[Team::kWidth];
  STBP_LANE_LOOP
  for (int i = 0; i < width; ++i) a[i] = Value{};

  for (int64_t start = 0, chunk = 0; start < io.steps; start += kChunk, ++chunk) {
    const int steps = int(io.steps - start < kChunk ? io.steps - start : kChunk);
    const bool more = start + kChunk < io.steps;
    Value map[kChunk][Team::kWidth];  // S, then a
    STBP_CHUNK_LOOP
    for (int k = 0; k < kChunk; ++k) {
      STBP_LANE_LOOP
      for (int i = 0; i < width; ++i) map[k][i] = Value{};
    }
    team.each_feature(io.features, [&](int64_t c) {
      const int64_t row = at.neuron(start, c);
      STBP_LANE_LOOP
      for (int i = 0; i < width; ++i) {
        Value v = chunk ? team.own(io.states + at.neuron(chunk - 1, c), i) : Value{};
        STBP_CHUNK_LOOP
        for (int k = 0; k < kChunk; ++k) {
          if (k >= steps) break;
          Value spike;
          neuron.step(v, team.get(io.x + row + k * at.step(), i), spike);
          map[k][i] = map[k][i] + spike;
          team.set_spike(io.normalised + row + k * at.step(), i, spike);
        }
        if (more) team.set(io.states + at.neuron(chunk, c), i, v);
      }
    });
    team.sum(map, steps);
    STBP_CHUNK_LOOP
    for (int k = 0; k < kChunk; ++k) {
      if (k >= steps) break;
      STBP_LANE_LOOP
      for (int i = 0; i < width; ++i) {
        if (team.leads()) team.set(io.sums + at.map(start + k), i, map[k][i]);
        map[k][i] = a[i] = norm.decay * a[i] + norm.gain * map[k][i];
        if (team.leads()) team.set(io.maps + at.map(start + k), i, map[k][i]);
      }
    }
    team.each_feature(io.features, [&](int64_t c) {
      Scalar* const row = io.normalised + at.neuron(start, c);
      STBP_LANE_LOOP
      for (int i = 0; i < width; ++i) {
        const Value weight = team.get(io.weight + at.weight(0, c), i);
        STBP_CHUNK_LOOP
        for (int k = 0; k < kChunk; ++k) {
          if (k >= steps) break;
          team.set(row + k * at.step(), i, team.own(row + k * at.step(), i) - weight * map[k][i]);
        }
      }
    });
  }
}

// All samples of a group; leaves the sums over them in grad_weight and in slot `strip` of grad_decays.
template <class Team, class Neuron, class Scalar>
STBP_FN void neunorm_backward_scan(const Team& team, Neuron neuron, const NeuNormBackward<Scalar>& io, int64_t group,
                                   int64_t strip, int64_t strips, int64_t first) {
  using Value = typename Team::Value;
  using State = typename Neuron::State;
  constexpr int kChunk = Team::kChunk;
  if (io.decays) neuron.c.decay = io.decays[0];
  const NeuNormConstants<State> norm(io);
  const int width = team.width();
  const int64_t from = io.batch * group / io.groups, to = io.batch * (group + 1) / io.groups;
  Value grad_decay[Team::kWidth], grad_norm_decay[Team::kWidth];
  STBP_LANE_LOOP
  for (int i = 0; i < width; ++i) grad_decay[i] = grad_norm_decay[i] = Value{};

  for (int64_t sample = from; sample < to; ++sample) {
    const NeuNormPlace at(io, sample, first);
    Value carried[Team::kWidth];  // norm_decay A[t+1]
    STBP_LANE_LOOP
    for (int i = 0; i < width; ++i) carried[i] = Value{};

    for (int64_t chunk = (io.steps - 1) / kChunk; chunk >= 0; --chunk) {
      const int64_t start = chunk * kChunk;
      const int steps = int(io.steps - start < kChunk ? io.steps - start : kChunk);
      const bool last = start + kChunk >= io.steps;
      Value grad_map[kChunk][Team::kWidth];  // the sum of U g, then gain A
      STBP_CHUNK_LOOP
      for (int k = 0; k < kChunk; ++k) {
        STBP_LANE_LOOP
        for (int i = 0; i < width; ++i) grad_map[k][i] = Value{};
      }
      team.each_feature(io.features, [&](int64_t c) {
        const Scalar* const row = io.grad_normalised + at.neuron(start, c);
        STBP_LANE_LOOP
        for (int i = 0; i < width; ++i) {
          const Value weight = team.get(io.weight + at.weight(0, c), i);
          STBP_CHUNK_LOOP
          for (int k = 0; k < kChunk; ++k) {
            if (k >= steps) break;
            grad_map[k][i] = grad_map[k][i] + weight * team.get(row + k * at.step(), i);
          }
        }
      });
      team.sum(grad_map, steps);

      Value map[kChunk][Team::kWidth];
      STBP_CHUNK_LOOP
      for (int k = kChunk - 1; k >= 0; --k) {
        if (k >= steps) continue;
        const int64_t t = start + k;
        STBP_LANE_LOOP
        for (int i = 0; i < width; ++i) {
          map[k][i] = team.get(io.maps + at.map(t), i);
          const Value grad = carried[i] - grad_map[k][i];
          grad_map[k][i] = norm.gain * grad;
          carried[i] = norm.decay * grad;
          if (io.grad_decays && team.leads()) {
            const Value before = t > 0 ? team.get(io.maps + at.map(t - 1), i) : Value{};
            const Value slope = before - team.get(io.sums + at.map(t), i) / norm.share;
            grad_norm_decay[i] = grad_norm_decay[i] + grad * slope;
          }
        }
      }

      team.each_feature(io.features, [&](int64_t c) {
        const int64_t row = at.neuron(start, c);
        State* const sum = io.grad_weight + at.weight(group, c);
        STBP_LANE_LOOP
        for (int i = 0; i < width; ++i) {
          Value u[kChunk], before[kChunk], unused;
          Value v = chunk ? team.get(io.states + at.neuron(chunk - 1, c), i) : Value{};
          Value grad_v = last ? Value{} : team.own(io.carried + at.weight(group, c), i);
          Value grad_weight = last && sample == from ? Value{} : team.own(sum, i);
          STBP_CHUNK_LOOP
          for (int k = 0; k < kChunk; ++k) {
            if (k >= steps) break;
            before[k] = v;
            u[k] = neuron.step(v, team.get(io.x + row + k * at.step(), i), unused);
          }
          STBP_CHUNK_LOOP
          for (int k = kChunk - 1; k >= 0; --k) {
            if (k >= steps) continue;
            const Value upstream = team.get(io.grad_normalised + row + k * at.step(), i);
            grad_weight = grad_weight - upstream * map[k][i];
            const Value grad_u = neuron.step_back(u[k], upstream + grad_map[k][i], grad_v);
            if (io.grad_decays) grad_decay[i] = grad_decay[i] + grad_u * before[k];
            team.set(io.grad_x + row + k * at.step(), i, grad_u);
          }
          team.set(sum, i, grad_weight);
          if (chunk > 0) team.set(io.carried + at.weight(group, c), i, grad_v);
        }
      });
    }
  }
  if (io.grad_decays) {
    State* const slot = io.grad_decays + (group * strips + strip) * 2;
    team.store_total(slot, grad_decay);
    team.store_total(slot + 1, grad_norm_decay);
  }
}

}  // namespace stbp
