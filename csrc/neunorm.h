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
// Team is one thread, or several that share the features, and a group of neighbouring positions, as Lanes is in scan.h.
// Beside what that gives, it has each_feature(C, f), which calls f(c) for its share of the features; sum(values,
// steps), which adds values[k][i] up over the team in a fixed order, for all of them; store_total(to, values), which
// adds up over team and positions; leads(), true for one of the team; and again(p), a row that it has written itself.
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

// Where rows begin.
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
};

// As load_state, of a row that this team has written itself.
template <class Team, class Value, class State>
STBP_FN void load_own_state(const Team& team, Value* v, const State* from) {
  const int width = team.width();
  if (from == nullptr) {
    STBP_LANE_LOOP
    for (int i = 0; i < width; ++i) v[i] = Value{};
  } else {
    const auto row = team.again(from);
    STBP_LANE_LOOP
    for (int i = 0; i < width; ++i) v[i] = row.get(i);
  }
}

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
      Value v[Team::kWidth];
      load_own_state(team, v, chunk ? io.states + at.neuron(chunk - 1, c) : nullptr);
      STBP_CHUNK_LOOP
      for (int k = 0; k < kChunk; ++k) {
        if (k >= steps) break;
        const auto in = team.read(io.x + at.neuron(start + k, c));
        Scalar* const to = io.normalised + at.neuron(start + k, c);
        auto out = team.write(to);
        STBP_LANE_LOOP
        for (int i = 0; i < width; ++i) {
          Value spike;
          neuron.step(v[i], in.get(i), spike);
          map[k][i] = map[k][i] + spike;
          out.set_spike(i, spike);
        }
        team.flush(to, out);
      }
      if (more) store_state(team, io.states + at.neuron(chunk, c), v);
    });
    team.sum(map, steps);
    STBP_CHUNK_LOOP
    for (int k = 0; k < kChunk; ++k) {
      if (k >= steps) break;
      if (team.leads()) store_state(team, io.sums + at.map(start + k), map[k]);
      STBP_LANE_LOOP
      for (int i = 0; i < width; ++i) map[k][i] = a[i] = norm.decay * a[i] + norm.gain * map[k][i];
      if (team.leads()) store_state(team, io.maps + at.map(start + k), map[k]);
    }
    team.each_feature(io.features, [&](int64_t c) {
      const auto weight = team.read(io.weight + at.weight(0, c));
      STBP_CHUNK_LOOP
      for (int k = 0; k < kChunk; ++k) {
        if (k >= steps) break;
        Scalar* const to = io.normalised + at.neuron(start + k, c);
        const auto spikes = team.again(to);
        auto out = team.write(to);
        STBP_LANE_LOOP
        for (int i = 0; i < width; ++i) out.set(i, spikes.get(i) - weight.get(i) * map[k][i]);
        team.flush(to, out);
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
  Value grad_decays[2][Team::kWidth];
  STBP_LANE_LOOP
  for (int i = 0; i < width; ++i) grad_decays[0][i] = grad_decays[1][i] = Value{};

  for (int64_t sample = from; sample < to; ++sample) {
    const NeuNormPlace at(io, sample, first);
    Value grad_a[Team::kWidth];  // norm_decay A[t+1]
    STBP_LANE_LOOP
    for (int i = 0; i < width; ++i) grad_a[i] = Value{};

    for (int64_t chunk = (io.steps - 1) / kChunk; chunk >= 0; --chunk) {
      const int64_t start = chunk * kChunk;
      const int steps = int(io.steps - start < kChunk ? io.steps - start : kChunk);
      Value grad_map[kChunk][Team::kWidth];  // the sum of U g, then A
      STBP_CHUNK_LOOP
      for (int k = 0; k < kChunk; ++k) {
        STBP_LANE_LOOP
        for (int i = 0; i < width; ++i) grad_map[k][i] = Value{};
      }
      team.each_feature(io.features, [&](int64_t c) {
        const auto weight = team.read(io.weight + at.weight(0, c));
        STBP_CHUNK_LOOP
        for (int k = 0; k < kChunk; ++k) {
          if (k >= steps) break;
          const auto grad = team.read(io.grad_normalised + at.neuron(start + k, c));
          STBP_LANE_LOOP
          for (int i = 0; i < width; ++i) grad_map[k][i] = grad_map[k][i] + weight.get(i) * grad.get(i);
        }
      });
      team.sum(grad_map, steps);

      Value map[kChunk][Team::kWidth];
      STBP_CHUNK_LOOP
      for (int k = kChunk - 1; k >= 0; --k) {
        if (k >= steps) continue;
        const int64_t t = start + k;
        load_state(team, map[k], io.maps + at.map(t));
        Value before[Team::kWidth];
        load_state(team, before, t > 0 ? io.maps + at.map(t - 1) : nullptr);
        const auto sums = team.read(io.sums + at.map(t));
        STBP_LANE_LOOP
        for (int i = 0; i < width; ++i) {
          const Value grad = grad_a[i] - grad_map[k][i];
          grad_map[k][i] = grad;
          grad_a[i] = norm.decay * grad;
          if (io.grad_decays && team.leads()) {
            const Value slope = before[i] - sums.get(i) / norm.share;
            grad_decays[1][i] = grad_decays[1][i] + grad * slope;
          }
        }
      }

      team.each_feature(io.features, [&](int64_t c) {
        Value v[Team::kWidth], grad_v[Team::kWidth], grad_weight[Team::kWidth];
        Value u[kChunk][Team::kWidth], v_before[kChunk][Team::kWidth];
        State* const sum = io.grad_weight + at.weight(group, c);
        const bool last = start + kChunk >= io.steps;
        load_state(team, v, chunk ? io.states + at.neuron(chunk - 1, c) : nullptr);
        load_own_state(team, grad_v, last ? nullptr : io.carried + at.weight(group, c));
        load_own_state(team, grad_weight, last && sample == from ? nullptr : sum);
        STBP_CHUNK_LOOP
        for (int k = 0; k < kChunk; ++k) {
          if (k >= steps) break;
          const auto in = team.read(io.x + at.neuron(start + k, c));
          STBP_LANE_LOOP
          for (int i = 0; i < width; ++i) {
            Value unused;
            v_before[k][i] = v[i];
            u[k][i] = neuron.step(v[i], in.get(i), unused);
          }
        }
        STBP_CHUNK_LOOP
        for (int k = kChunk - 1; k >= 0; --k) {
          if (k >= steps) continue;
          const auto grad = team.read(io.grad_normalised + at.neuron(start + k, c));
          Scalar* const grad_x = io.grad_x + at.neuron(start + k, c);
          auto out = team.write(grad_x);
          STBP_LANE_LOOP
          for (int i = 0; i < width; ++i) {
            const Value upstream = grad.get(i);
            grad_weight[i] = grad_weight[i] - upstream * map[k][i];
            const Value grad_u = neuron.step_back(u[k][i], upstream + norm.gain * grad_map[k][i], grad_v[i]);
            if (io.grad_decays) grad_decays[0][i] = grad_decays[0][i] + grad_u * v_before[k][i];
            out.set(i, grad_u);
          }
          team.flush(grad_x, out);
        }
        store_state(team, sum, grad_weight);
        if (chunk > 0) store_state(team, io.carried + at.weight(group, c), grad_v);
      });
    }
  }
  if (io.grad_decays) {
    State* const slot = io.grad_decays + (group * strips + strip) * 2;
    for (int which = 0; which < 2; ++which) team.store_total(slot + which, grad_decays[which]);
  }
}

}  // namespace stbp
