// The leaky integrate-and-fire neuron: one time step, and its adjoint. The only place where its arithmetic is written.
//
//   charge  u[t] = decay v[t-1] + x[t]
//   fire    o[t] = 1 if u[t] >= v_threshold else 0
//   reset   v[t] = u[t] (1 - o[t]) + v_reset o[t]    hard
//           v[t] = u[t] - v_threshold o[t]           soft
//
// The order of the operations is that of stbp_cuda/reference.py and of autograd on it; compiled without fused
// multiply-add, both give the same bits.
#pragma once

#include <cmath>

#include "lif.h"
#include "number.h"

namespace stbp {

template <class State>
struct LifConstants {
  State decay, v_threshold, v_reset;
  State fires_at;  // the smallest potential that fires
  State detached;  // 1 where no gradient flows through the reset, else 0; a bool would keep GCC from vectorising

  explicit LifConstants(const LifOptions& options)
      : decay(State(options.decay)),
        v_threshold(State(options.v_threshold)),
        v_reset(State(options.v_reset)),
        fires_at(options.strict_threshold ? std::nextafter(v_threshold, State(INFINITY)) : v_threshold),
        detached(options.detach_reset ? State(1) : State(0)) {}
};

struct HardReset {
  template <class State>
  static STBP_FN State apply(const LifConstants<State>& c, State u, State o) {
    return u * (State(1) - o) + c.v_reset * o;
  }
  // dL/do from the spike's own gradient and, through the reset, from grad_v = dL/dv.
  template <class State>
  static STBP_FN State grad_spike(const LifConstants<State>& c, State u, State grad_spike, State grad_v) {
    return (grad_spike + grad_v * c.v_reset) - grad_v * u;
  }
  // dL/du from dL/dv with the spike held fixed.
  template <class State>
  static STBP_FN State grad_potential(State o, State grad_v) {
    return grad_v * (State(1) - o);
  }
};

struct SoftReset {
  template <class State>
  static STBP_FN State apply(const LifConstants<State>& c, State u, State o) {
    return u - c.v_threshold * o;
  }
  template <class State>
  static STBP_FN State grad_spike(const LifConstants<State>& c, State, State grad_spike, State grad_v) {
    return grad_spike - grad_v * c.v_threshold;
  }
  template <class State>
  static STBP_FN State grad_potential(State, State grad_v) {
    return grad_v;
  }
};

// How a neuron fires: the spike users train with, or the surrogate's antiderivative, with which the whole network is
// differentiable and its gradient can be checked numerically.
struct Heaviside {
  template <class Constants, class Surrogate, class State>
  static STBP_FN State apply(const Constants& c, const Surrogate&, State u) {
    return u >= c.fires_at ? State(1) : State(0);
  }
};

struct Smooth {
  template <class Constants, class Surrogate, class State>
  static STBP_FN State apply(const Constants& c, const Surrogate& surrogate, State u) {
    return surrogate.antiderivative(u - c.v_threshold);
  }
};

template <class State_, class Reset, class Firing, class Surrogate>
struct Lif {
  using State = State_;
  LifConstants<State> c;
  Surrogate surrogate;

  STBP_FN State charge(State v, State x) const { return c.decay * v + x; }
  STBP_FN State fire(State u) const { return Firing::apply(c, surrogate, u); }
  STBP_FN State reset(State u, State o) const { return Reset::apply(c, u, o); }

  // dL/du[t], which is also dL/dx[t], from dL/do[t] and dL/dv[t].
  STBP_FN State adjoint(State u, State grad_spike, State grad_v) const {
    const State with_reset = Reset::grad_spike(c, u, grad_spike, grad_v);
    const State total = c.detached > State(0) ? grad_spike : with_reset;
    return total * surrogate.derivative(u - c.v_threshold) + Reset::grad_potential(fire(u), grad_v);
  }
  // dL/dv[t-1] from dL/du[t].
  STBP_FN State grad_previous(State grad_u) const { return grad_u * c.decay; }
};

}  // namespace stbp
