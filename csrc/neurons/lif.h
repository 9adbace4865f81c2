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

#include "../core/io.h"
#include "../core/number.h"

namespace stbp {

template <class State>
struct LifConstants {
  State decay, v_threshold, v_reset;
  State fires_at;  // the smallest potential that fires
  bool resets_to_zero;
  bool detached;      // no gradient flows through the reset
  bool spatial_only;  // none flows from a step to the one before
  // For EitherReset.
  using Bits = typename Math<State>::Bits;
  Bits soft;             // a mask of all bits with a soft reset
  State soft_threshold;  // 0 with a hard one
  State kept, shift;     // a neuron that fires goes from u to kept u + shift
  Bits adds_v_reset, attached, temporal;

  explicit LifConstants(const LifOptions& options)
      : decay(State(options.decay)),
        v_threshold(State(options.v_threshold)),
        v_reset(State(options.v_reset)),
        fires_at(options.strict_threshold ? std::nextafter(v_threshold, State(INFINITY)) : v_threshold),
        resets_to_zero(v_reset == State(0)),
        detached(options.detach_reset),
        spatial_only(options.spatial_only),
        soft(mask(options.soft_reset)),
        soft_threshold(options.soft_reset ? v_threshold : State(0)),
        kept(options.soft_reset ? State(1) : State(0)),
        shift(options.soft_reset ? -v_threshold : v_reset),
        adds_v_reset(mask(!options.soft_reset && !resets_to_zero && !detached)),
        attached(mask(!detached)),
        temporal(mask(!spatial_only)) {}

 private:
  static Bits mask(bool condition) { return condition ? ~Bits(0) : Bits(0); }
};

// How a neuron fires: the spikes users train with, or the surrogate's antiderivative, with which the whole network is
// differentiable and its gradient can be checked numerically. `fire` tells who fired: a condition, or how much.
struct Heaviside {
  static constexpr bool kBinary = true;
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
  static constexpr bool kBinary = false;
  template <class State, class Surrogate, class V>
  static STBP_FN V fire(const LifConstants<State>& c, const Surrogate& surrogate, V u) {
    return surrogate.antiderivative(u - c.v_threshold);
  }
  template <class V, class State>
  static STBP_FN V spike(V o) {
    return o;
  }
};

struct AnyReset {
  // dL/dv[t-1] from dL/du[t].
  template <class State, class V>
  static STBP_FN V leak(const LifConstants<State>& c, V grad_u) {
    return c.spatial_only ? V{} : grad_u * c.decay;
  }
};

struct HardReset : AnyReset {
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
    if (c.detached) return grad_spike;
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

struct SoftReset : AnyReset {
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
    return c.detached ? grad_spike : grad_spike - grad_v * c.v_threshold;
  }
  template <class Firing, class State, class V, class Fired>
  static STBP_FN V grad_potential(Firing, const LifConstants<State>&, Fired, V grad_v) {
    return grad_v;
  }
};

// One of the two, chosen while a kernel runs, for devices where that costs less than to compile each kernel twice.
// Masks choose, of all bits or none, for what looks like a condition becomes jumps, and loads do not cross these.
struct EitherReset {
  template <class State>
  static STBP_FN State only(State value, typename Math<State>::Bits mask) {
    return bit_cast<State>(bit_cast<typename Math<State>::Bits>(value) & mask);
  }

  template <class State>
  static STBP_FN State apply(Heaviside, const LifConstants<State>& c, State u, bool fired) {
    return fired ? u * c.kept + c.shift : u;
  }
  template <class State>
  static STBP_FN State apply(Smooth smooth, const LifConstants<State>& c, State u, State o) {
    return c.soft ? SoftReset::apply(smooth, c, u, o) : HardReset::apply(smooth, c, u, o);
  }
  template <class State>
  static STBP_FN State grad_spike(const LifConstants<State>& c, State u, State grad_spike, State grad_v) {
    const State target = only(u, ~c.soft) + c.soft_threshold;
    return (grad_spike + only(grad_v * c.v_reset, c.adds_v_reset)) - only(grad_v * target, c.attached);
  }
  template <class State>
  static STBP_FN State grad_potential(Heaviside, const LifConstants<State>& c, bool fired, State grad_v) {
    return fired ? only(grad_v, c.soft) : grad_v;
  }
  template <class State>
  static STBP_FN State grad_potential(Smooth, const LifConstants<State>& c, State o, State grad_v) {
    return c.soft ? grad_v : grad_v * (State(1) - o);
  }
  template <class State>
  static STBP_FN State leak(const LifConstants<State>& c, State grad_u) {
    return only(grad_u * c.decay, c.temporal);
  }
};

// The neuron that most people train, without the masks of EitherReset: a hard reset to 0, attached, and a gradient from
// step to step.
struct CommonReset : HardReset {
  template <class State, class Fired>
  static STBP_FN State apply(Heaviside, const LifConstants<State>&, State u, Fired fired) {
    return fired ? u * State(0) : u;
  }
  template <class State>
  static STBP_FN State grad_spike(const LifConstants<State>&, State u, State grad_spike, State grad_v) {
    return grad_spike - grad_v * u;
  }
  template <class State>
  static STBP_FN State leak(const LifConstants<State>& c, State grad_u) {
    return grad_u * c.decay;
  }
  static bool serves(const LifOptions& options) {
    return !options.soft_reset && options.v_reset == 0 && !options.detach_reset && !options.spatial_only;
  }
};

template <class State_, class Reset, class Firing, class Surrogate>
struct Lif {
  using State = State_;
  static constexpr bool kBinary = Firing::kBinary;  // spikes are 0 or 1
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

  // v[t] from u[t].
  template <class V>
  STBP_FN V after(V u) const {
    return Reset::apply(Firing(), c, u, Firing::fire(c, surrogate, u));
  }

  // The step back: returns dL/du[t], which is also dL/dx[t], from dL/do[t] and from dL/dv[t] in `grad_v`, where it
  // leaves dL/dv[t-1].
  template <class V>
  STBP_FN V step_back(V u, V grad_spike, V& grad_v) const {
    return step_back(u, surrogate.derivative(u - c.v_threshold), grad_spike, grad_v);
  }
  // The same from the surrogate's derivative at u[t] - v_threshold.
  template <class V>
  STBP_FN V step_back(V u, V derivative, V grad_spike, V& grad_v) const {
    const V total = Reset::grad_spike(c, u, grad_spike, grad_v);
    const auto fired = Firing::fire(c, surrogate, u);
    const V grad_u = total * derivative + Reset::grad_potential(Firing(), c, fired, grad_v);
    grad_v = Reset::leak(c, grad_u);
    return grad_u;
  }

  // The same for neighbouring neurons, whose surrogate is chosen once.
  template <class V, int kCount, class GradSpike>
  STBP_FN void steps_back(const V (&u)[kCount], const GradSpike& grad_spike, V (&grad_v)[kCount],
                          V (&grad_u)[kCount]) const {
    V s[kCount], h[kCount];
    for (int i = 0; i < kCount; ++i) s[i] = u[i] - c.v_threshold;
    derivatives(surrogate, s, h);
    for (int i = 0; i < kCount; ++i) grad_u[i] = step_back(u[i], h[i], grad_spike(i), grad_v[i]);
  }
};

}  // namespace stbp
