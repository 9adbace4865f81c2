// The leaky integrate-and-fire neuron: one time step, and its adjoint. The only place where its arithmetic is written.
//
//   charge  u[t] = decay v[t-1] + x[t]
//   fire    o[t] = 1 if u[t] >= v_threshold else 0
//   reset   v[t] = u[t] (1 - o[t]) + v_reset o[t]    hard
//           v[t] = u[t] - v_threshold o[t]           soft
//
// Every function is a template of V, a number or a vector of them (number.h). The order of the operations is that of
// stbp_cuda/reference.py and of autograd on it; compiled without fused multiply-add, both give the same bits. A spike
// is 0 or 1, and where the reference multiplies by it, one of two values is chosen here: for finite numbers the same,
// but for the sign of a zero.
#pragma once

#include <cmath>

#include "lif.h"
#include "number.h"

namespace stbp {

template <class State>
struct LifConstants {
  State decay, v_threshold, v_reset;
  State fires_at;  // the smallest potential that fires
  bool resets_to_zero;
  bool detached;      // no gradient flows through the reset
  bool spatial_only;  // none flows from a step to the one before

  explicit LifConstants(const LifOptions& options)
      : decay(State(options.decay)),
        v_threshold(State(options.v_threshold)),
        v_reset(State(options.v_reset)),
        fires_at(options.strict_threshold ? std::nextafter(v_threshold, State(INFINITY)) : v_threshold),
        resets_to_zero(v_reset == State(0)),
        detached(options.detach_reset),
        spatial_only(options.spatial_only) {}
};

// How a neuron fires: the spikes users train with, or the surrogate's antiderivative, with which the whole network is
// differentiable and its gradient can be checked numerically. `fire` tells who fired: a condition, or how much.
struct Heaviside {
  template <class State, class Surrogate, class V>
  static STBP_FN auto fire(const LifConstants<State>& c, const Surrogate&, V u) {
    return Math<V>::at_least(u, broadcast<V>(c.fires_at));
  }
  template <class V, class State, class Fired>
  static STBP_FN V spike(Fired fired) {
    return Math<V>::choose(fired, broadcast<V>(State(1)), V{});
  }
};

struct Smooth {
  template <class State, class Surrogate, class V>
  static STBP_FN V fire(const LifConstants<State>& c, const Surrogate& surrogate, V u) {
    return surrogate.antiderivative(u - c.v_threshold);
  }
  template <class V, class State>
  static STBP_FN V spike(V o) {
    return o;
  }
};

struct HardReset {
  template <class State, class V, class Fired>
  static STBP_FN V apply(Heaviside, const LifConstants<State>& c, V u, Fired fired) {
    // v_reset, but NaN after an infinite potential, as in the reference.
    return Math<V>::choose(fired, Math<V>::zero_times_plus(u, broadcast<V>(c.v_reset)), u);
  }
  template <class State, class V>
  static STBP_FN V apply(Smooth, const LifConstants<State>& c, V u, V o) {
    return u * (State(1) - o) + c.v_reset * o;
  }
  // dL/do from the spike's own gradient and, through the reset, from grad_v = dL/dv.
  template <class State, class V>
  static STBP_FN V grad_spike(const LifConstants<State>& c, V u, V grad_spike, V grad_v) {
    // To neither add nor multiply is worth a condition: kernels on a CPU are bound by their arithmetic here.
    const V shifted = c.resets_to_zero ? grad_spike : grad_spike + grad_v * c.v_reset;
    return shifted - grad_v * u;
  }
  // dL/du from dL/dv with the spike held fixed.
  template <class State, class V, class Fired>
  static STBP_FN V grad_potential(Heaviside, const LifConstants<State>&, Fired fired, V grad_v) {
    return Math<V>::choose(fired, V{}, grad_v);
  }
  template <class State, class V>
  static STBP_FN V grad_potential(Smooth, const LifConstants<State>&, V o, V grad_v) {
    return grad_v * (State(1) - o);
  }
};

struct SoftReset {
  template <class State, class V, class Fired>
  static STBP_FN V apply(Heaviside, const LifConstants<State>& c, V u, Fired fired) {
    return Math<V>::choose(fired, u - c.v_threshold, u);
  }
  template <class State, class V>
  static STBP_FN V apply(Smooth, const LifConstants<State>& c, V u, V o) {
    return u - c.v_threshold * o;
  }
  template <class State, class V>
  static STBP_FN V grad_spike(const LifConstants<State>& c, V, V grad_spike, V grad_v) {
    return grad_spike - grad_v * c.v_threshold;
  }
  template <class Firing, class State, class V, class Fired>
  static STBP_FN V grad_potential(Firing, const LifConstants<State>&, Fired, V grad_v) {
    return grad_v;
  }
};

template <class State_, class Reset, class Firing, class Surrogate>
struct Lif {
  using State = State_;
  LifConstants<State> c;
  Surrogate surrogate;

  // The step from v[t-1] in `v` to v[t]: returns u[t], and o[t] in `o`.
  template <class V>
  STBP_FN V step(V& v, V x, V& o) const {
    const V u = c.decay * v + x;
    const auto fired = Firing::fire(c, surrogate, u);
    o = Firing::template spike<V, State>(fired);
    v = Reset::apply(Firing(), c, u, fired);
    return u;
  }

  // The step back: returns dL/du[t], which is also dL/dx[t], from dL/do[t] and from dL/dv[t] in `grad_v`, where it
  // leaves dL/dv[t-1].
  template <class V>
  STBP_FN V step_back(V u, V grad_spike, V& grad_v) const {
    const V total = c.detached ? grad_spike : Reset::grad_spike(c, u, grad_spike, grad_v);
    const auto fired = Firing::fire(c, surrogate, u);
    const V grad_u =
        total * surrogate.derivative(u - c.v_threshold) + Reset::grad_potential(Firing(), c, fired, grad_v);
    grad_v = c.spatial_only ? V{} : grad_u * c.decay;
    return grad_u;
  }
};

}  // namespace stbp
