// The leaky integrate-and-fire neuron: its options, one time step, and the adjoint of that. The only place where its
// arithmetic is written.
//
//   charge  u[t] = decay v[t-1] + i[t]
//   fire    o[t] = 1 if u[t] >= v_threshold else 0
//   reset   v[t] = u[t] (1 - o[t]) + v_reset o[t]    hard
//           v[t] = u[t] - subtract o[t]              soft
//
// A delayed reset comes in the next step, after the decay: v[t] = decay u[t] - subtract o[t] and u[t] = v[t-1] + i[t].
//
// Every function is a template of V, a number or a vector of them (number.h), and of what holds the parameters: the
// constants of a launch, or values of V. The order of the operations is that of stbp_cuda/neurons.py and of autograd on
// it; compiled without fused multiply-add, both give the same bits. A spike is 0 or 1, and where the reference
// multiplies by it, one of two values is chosen here: for finite numbers the same, but for the sign of a zero.
#pragma once

#include <cmath>
#include <type_traits>

#include "../core/number.h"
#include "surrogate.h"

namespace stbp {

struct LifOptions {
  static constexpr const char* kName = "lif";
  static constexpr int kParameters = 3;  // decay, v_threshold, subtract
  double decay = 0.25;
  double v_threshold = 0.75;
  double subtract = 0.75;
  double v_reset = 0;
  bool soft_reset = false;
  bool delayed = false;
  bool detach_reset = false;
  bool spatial_only = false;
  bool strict_threshold = false;
  bool smooth = false;  // fire with the surrogate's antiderivative; double only
  SurrogateOptions surrogate;

  template <class Reader>
  void read(Reader& reader) {
    reader.number("decay", decay);
    reader.number("v_threshold", v_threshold);
    reader.number("subtract", subtract);
    reader.number("v_reset", v_reset);
    reader.choice("reset", soft_reset, "hard", "soft");
    reader.flag("delayed", delayed);
    reader.flag("detach_reset", detach_reset);
    reader.flag("spatial_only", spatial_only);
    reader.flag("strict_threshold", strict_threshold);
    reader.flag("smooth", smooth);
    surrogate.read(reader);
  }

  bool is_smooth() const { return smooth; }
  // Whether the plain kernels and those with normalisation know the reset and the surrogate.
  bool is_plain() const { return !delayed && !(soft_reset && subtract != v_threshold) && surrogate.is_plain(); }
  bool needs_general() const { return smooth || !is_plain(); }
};

// The parameters of neurons that have their own.
template <class V>
struct LifValues {
  V decay, v_threshold, subtract, fires_at;
};

// The next number above.
template <class V>
STBP_FN V next_above(V x) {
  using Bits = typename Math<V>::Bits;
  const Bits bits = bit_cast<Bits>(x), one = broadcast<Bits>(1u);
  return bit_cast<V>(x > V{} ? bits + one : x < V{} ? bits - one : one);
}

template <class State>
struct LifConstants {
  State decay, v_threshold, v_reset, subtract;
  State fires_at;  // the smallest potential that fires
  bool strict, resets_to_zero, delayed;
  bool detached;      // no gradient flows through the reset
  bool spatial_only;  // none flows from a step to the one before
  // For EitherReset.
  using Bits = typename Math<State>::Bits;
  Bits soft;          // a mask of all bits with a soft reset
  State soft_target;  // what that subtracts; 0 with a hard one
  State kept, shift;  // a neuron that fires goes from u to kept u + shift
  Bits adds_v_reset, attached, temporal;

  explicit LifConstants(const LifOptions& options)
      : decay(State(options.decay)),
        v_threshold(State(options.v_threshold)),
        v_reset(State(options.v_reset)),
        subtract(State(options.subtract)),
        fires_at(options.strict_threshold ? std::nextafter(v_threshold, State(INFINITY)) : v_threshold),
        strict(options.strict_threshold),
        resets_to_zero(v_reset == State(0)),
        delayed(options.delayed),
        detached(options.detach_reset),
        spatial_only(options.spatial_only),
        soft(mask(options.soft_reset)),
        soft_target(options.soft_reset ? subtract : State(0)),
        kept(options.soft_reset ? State(1) : State(0)),
        shift(options.soft_reset ? -subtract : v_reset),
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
  template <class State, class Parameters, class Surrogate, class V>
  static STBP_FN auto fire(const LifConstants<State>&, const Parameters& p, const Surrogate&, V u) {
    return Math<V>::at_least(u, broadcast<V>(p.fires_at));
  }
  template <class V, class State, class Fired>
  static STBP_FN V spike(Fired fired) {
    return Math<V>::choose(fired, broadcast<V>(State(1)), V{});
  }
};

struct Smooth {
  static constexpr bool kBinary = false;
  template <class State, class Parameters, class Surrogate, class V>
  static STBP_FN V fire(const LifConstants<State>&, const Parameters& p, const Surrogate& surrogate, V u) {
    return surrogate.antiderivative(u - p.v_threshold);
  }
  template <class V, class State>
  static STBP_FN V spike(V o) {
    return o;
  }
};

struct AnyReset {
  template <class State>
  static STBP_FN bool delayed(const LifConstants<State>&) {
    return false;
  }
  template <class State>
  static STBP_FN bool subtracts(const LifConstants<State>&) {
    return false;
  }
  template <class State, class Parameters, class V>
  static STBP_FN V charge(const LifConstants<State>&, const Parameters& p, V v, V current) {
    return p.decay * v + current;
  }
  // dL/dv[t-1] from dL/du[t].
  template <class State, class Parameters, class V>
  static STBP_FN V leak(const LifConstants<State>& c, const Parameters& p, V grad_u) {
    return c.spatial_only ? V{} : grad_u * p.decay;
  }
};

struct HardReset : AnyReset {
  template <class State, class Parameters, class V, class Fired>
  static STBP_FN V apply(Heaviside, const LifConstants<State>& c, const Parameters&, V u, Fired fired) {
    // v_reset, but NaN after an infinite potential, as in the reference.
    return Math<V>::choose(fired, Math<V>::zero_times_plus(u, broadcast<V>(c.v_reset)), u);
  }
  // dL/do from the spike's own gradient and, through the reset, from grad_v = dL/dv.
  template <class State, class Parameters, class V>
  static STBP_FN V grad_spike(const LifConstants<State>& c, const Parameters&, V u, V grad_spike, V grad_v) {
    if (c.detached) return grad_spike;
    // To neither add nor multiply is worth a condition: kernels on a CPU are bound by their arithmetic here.
    const V shifted = c.resets_to_zero ? grad_spike : grad_spike + grad_v * c.v_reset;
    return shifted - grad_v * u;
  }
  // dL/du from dL/dv with the spike held fixed.
  template <class State, class Parameters, class V, class Fired>
  static STBP_FN V grad_potential(Heaviside, const LifConstants<State>&, const Parameters&, Fired fired, V grad_v) {
    return Math<V>::choose(fired, V{}, grad_v);
  }
};

struct SoftReset : AnyReset {
  template <class State>
  static STBP_FN bool subtracts(const LifConstants<State>&) {
    return true;
  }
  template <class State, class Parameters, class V, class Fired>
  static STBP_FN V apply(Heaviside, const LifConstants<State>&, const Parameters& p, V u, Fired fired) {
    return Math<V>::choose(fired, u - p.subtract, u);
  }
  template <class State, class Parameters, class V>
  static STBP_FN V grad_spike(const LifConstants<State>& c, const Parameters& p, V, V grad_spike, V grad_v) {
    return c.detached ? grad_spike : grad_spike - grad_v * p.subtract;
  }
  template <class State, class Parameters, class V, class Fired>
  static STBP_FN V grad_potential(Heaviside, const LifConstants<State>&, const Parameters&, Fired, V grad_v) {
    return grad_v;
  }
};

// One of the two, chosen while a kernel runs, for devices where that costs less than to compile each kernel twice, and
// for neurons with parameters of their own, which may also have a delayed reset. Masks choose, of all bits or none, for
// what looks like a condition becomes jumps, and loads do not cross these.
struct EitherReset {
  template <class State>
  static STBP_FN bool delayed(const LifConstants<State>& c) {
    return c.delayed;
  }
  template <class State>
  static STBP_FN bool subtracts(const LifConstants<State>& c) {
    return c.soft != 0;
  }
  template <class V, class Bits>
  static STBP_FN V only(V value, Bits mask) {
    return bit_cast<V>(bit_cast<typename Math<V>::Bits>(value) & mask);
  }

  template <class State, class V>
  static STBP_FN V charge(const LifConstants<State>&, const LifConstants<State>& p, V v, V current) {
    return p.decay * v + current;
  }
  template <class State, class V>
  static STBP_FN V charge(const LifConstants<State>& c, const LifValues<V>& p, V v, V current) {
    return (c.delayed ? v : p.decay * v) + current;
  }
  template <class State, class V>
  static STBP_FN V apply(Heaviside, const LifConstants<State>& c, const LifConstants<State>&, V u, bool fired) {
    return fired ? u * c.kept + c.shift : u;
  }
  template <class State, class V, class Fired>
  static STBP_FN V apply(Heaviside, const LifConstants<State>& c, const LifValues<V>& p, V u, Fired fired) {
    const V kept = c.delayed ? p.decay * u : u;
    const V less = c.soft ? kept - p.subtract : Math<V>::zero_times_plus(u, broadcast<V>(c.v_reset));
    return Math<V>::choose(fired, less, kept);
  }
  template <class State, class Parameters, class V>
  static STBP_FN V apply(Smooth, const LifConstants<State>& c, const Parameters& p, V u, V o) {
    if (c.soft) return (c.delayed ? p.decay * u : u) - p.subtract * o;
    return u * (State(1) - o) + c.v_reset * o;
  }
  template <class State, class V>
  static STBP_FN V grad_spike(const LifConstants<State>& c, const LifConstants<State>&, V u, V grad_spike, V grad_v) {
    const V target = only(u, ~c.soft) + c.soft_target;
    return (grad_spike + only(grad_v * c.v_reset, c.adds_v_reset)) - only(grad_v * target, c.attached);
  }
  template <class State, class V>
  static STBP_FN V grad_spike(const LifConstants<State>& c, const LifValues<V>& p, V u, V grad_spike, V grad_v) {
    if (c.soft) return grad_spike - only(grad_v * p.subtract, c.attached);
    return (grad_spike + only(grad_v * c.v_reset, c.adds_v_reset)) - only(grad_v * u, c.attached);
  }
  template <class State, class V>
  static STBP_FN V grad_potential(Heaviside, const LifConstants<State>& c, const LifConstants<State>&, bool fired,
                                  V grad_v) {
    return fired ? only(grad_v, c.soft) : grad_v;
  }
  template <class State, class V, class Fired>
  static STBP_FN V grad_potential(Heaviside, const LifConstants<State>& c, const LifValues<V>& p, Fired fired,
                                  V grad_v) {
    if (c.soft) return c.delayed ? grad_v * p.decay : grad_v;
    return Math<V>::choose(fired, V{}, grad_v);
  }
  template <class State, class Parameters, class V>
  static STBP_FN V grad_potential(Smooth, const LifConstants<State>& c, const Parameters& p, V o, V grad_v) {
    if (c.soft) return c.delayed ? grad_v * p.decay : grad_v;
    return grad_v * (State(1) - o);
  }
  template <class State, class V>
  static STBP_FN V leak(const LifConstants<State>& c, const LifConstants<State>& p, V grad_u) {
    return only(grad_u * p.decay, c.temporal);
  }
  template <class State, class V>
  static STBP_FN V leak(const LifConstants<State>& c, const LifValues<V>& p, V grad_u) {
    return c.delayed ? grad_u : only(grad_u * p.decay, c.temporal);
  }
};

// What most people train, without the masks of EitherReset: attached, with a gradient from step to step, and a hard
// reset to 0 or a soft one.
template <class Reset>
struct Common : Reset {
  template <class State, class Parameters, class V, class Fired>
  static STBP_FN V apply(Heaviside firing, const LifConstants<State>& c, const Parameters& p, V u, Fired fired) {
    if constexpr (std::is_same_v<Reset, HardReset>) return Math<V>::choose(fired, u * State(0), u);
    return Reset::apply(firing, c, p, u, fired);
  }
  template <class State, class Parameters, class V>
  static STBP_FN V grad_spike(const LifConstants<State>&, const Parameters& p, V u, V grad_spike, V grad_v) {
    if constexpr (std::is_same_v<Reset, HardReset>) return grad_spike - grad_v * u;
    return grad_spike - grad_v * p.subtract;
  }
  template <class State, class Parameters, class V>
  static STBP_FN V leak(const LifConstants<State>&, const Parameters& p, V grad_u) {
    return grad_u * p.decay;
  }
};

inline bool is_common(const LifOptions& options) {
  return !options.delayed && !options.detach_reset && !options.spatial_only &&
         (options.soft_reset || options.v_reset == 0);
}

template <class State_, class Reset, class Firing, class Surrogate>
struct Lif {
  using State = State_;
  static constexpr int kParameters = LifOptions::kParameters;
  static constexpr bool kBinary = Firing::kBinary;  // spikes are 0 or 1
  LifConstants<State> c;
  Surrogate surrogate;

  STBP_FN State parameter(int which) const { return which == 0 ? c.decay : which == 1 ? c.v_threshold : c.subtract; }
  template <class V>
  STBP_FN LifValues<V> values(const V (&of)[kParameters]) const {
    return {of[0], of[1], of[2], c.strict ? next_above(of[1]) : of[1]};
  }

  // Whether a parameter can have a gradient other than 0.
  STBP_FN bool learns(int which) const { return which < 2 || Reset::subtracts(c); }

  // The step from v[t-1] in `v` to v[t]: returns u[t], and o[t] in `o`.
  template <class Parameters, class V>
  STBP_FN V step(const Parameters& p, V& v, V current, V& o) const {
    const V u = Reset::charge(c, p, v, current);
    const auto fired = Firing::fire(c, p, surrogate, u);
    o = Firing::template spike<V, State>(fired);
    v = Reset::apply(Firing(), c, p, u, fired);
    return u;
  }
  template <class V>
  STBP_FN V step(V& v, V current, V& o) const {
    return step(c, v, current, o);
  }

  // v[t] from u[t].
  template <class V>
  STBP_FN V after(V u) const {
    return Reset::apply(Firing(), c, c, u, Firing::fire(c, c, surrogate, u));
  }

  // The step back: returns dL/du[t], which is also dL/di[t], from dL/do[t] and from dL/dv[t] in `grad_v`, where it
  // leaves dL/dv[t-1].
  template <class V>
  STBP_FN V step_back(V u, V grad_spike, V& grad_v) const {
    return step_back(u, surrogate.derivative(u - c.v_threshold), grad_spike, grad_v);
  }
  // The same from the surrogate's derivative at u[t] - v_threshold.
  template <class V>
  STBP_FN V step_back(V u, V derivative, V grad_spike, V& grad_v) const {
    const V total = Reset::grad_spike(c, c, u, grad_spike, grad_v);
    const auto fired = Firing::fire(c, c, surrogate, u);
    const V grad_u = total * derivative + Reset::grad_potential(Firing(), c, c, fired, grad_v);
    grad_v = Reset::leak(c, c, grad_u);
    return grad_u;
  }
  // The same with parameters of their own, to whose gradients it adds; `before` is v[t-1], and grad_u what reaches u[t]
  // beside.
  template <class V>
  STBP_FN V step_back(const LifValues<V>& p, V before, V u, V grad_spike, V grad_u, V& grad_v, V* gradients) const {
    return step_back(p, before, u, surrogate.derivative(u - p.v_threshold), grad_spike, grad_u, grad_v, gradients);
  }
  template <class V>
  STBP_FN V step_back(const LifValues<V>& p, V before, V u, V derivative, V grad_spike, V grad_u, V& grad_v,
                      V* gradients) const {
    const V through_spike = Reset::grad_spike(c, p, u, grad_spike, grad_v) * derivative;
    const auto fired = Firing::fire(c, p, surrogate, u);
    grad_u = (grad_u + Reset::grad_potential(Firing(), c, p, fired, grad_v)) + through_spike;
    gradients[0] = Reset::delayed(c) ? Math<V>::plus_product(gradients[0], grad_v, u)
                                     : Math<V>::plus_product(gradients[0], grad_u, before);
    gradients[1] = gradients[1] - through_spike;
    if (Reset::subtracts(c)) gradients[2] = gradients[2] - grad_v * Firing::template spike<V, State>(fired);
    grad_v = Reset::leak(c, p, grad_u);
    return grad_u;
  }
  // The derivatives at rows of potentials, of neurons with the same parameters or others.
  template <bool kSame, class ParametersAt, class V>
  STBP_FN void derivatives_of(const ParametersAt& parameters_at, const V* u, int64_t u_row, V* h, int64_t h_row,
                              int rows, int count) const {
    if (kSame) return derivatives(surrogate, parameters_at(0).v_threshold, u, u_row, h, h_row, rows, count);
    for (int row = 0; row < rows; ++row)
      for (int i = 0; i < count; ++i) h[row * h_row + i] = u[row * u_row + i] - parameters_at(i).v_threshold;
    derivatives(surrogate, V{}, h, h_row, h, h_row, rows, count);
  }
  // The derivatives at the potentials of neighbouring neurons, for which the surrogate is chosen once.
  template <class V, int kCount>
  STBP_FN void derivatives_at(const LifValues<V> (&p)[kCount], const V (&u)[kCount], V (&h)[kCount]) const {
    V s[kCount];
    for (int i = 0; i < kCount; ++i) s[i] = u[i] - p[i].v_threshold;
    derivatives(surrogate, s, h);
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

// f(neuron) for a LIF neuron that is compiled for its reset alone.
template <class State, class Surrogate, class F>
STBP_HOST_FN void visit_reset(const LifOptions& options, const Surrogate& surrogate, const F& f) {
  const LifConstants<State> constants(options);
  if (options.soft_reset) {
    f(Lif<State, SoftReset, Heaviside, Surrogate>{constants, surrogate});
  } else {
    f(Lif<State, HardReset, Heaviside, Surrogate>{constants, surrogate});
  }
}

// f(neuron) for a LIF neuron with a kernel for its reset alone if that is common.
template <class State, class Surrogate, class F>
STBP_HOST_FN void visit_common_reset(const LifOptions& options, const Surrogate& surrogate, const F& f) {
  const LifConstants<State> constants(options);
  if (!is_common(options)) {
    f(Lif<State, EitherReset, Heaviside, Surrogate>{constants, surrogate});
  } else if (options.soft_reset) {
    f(Lif<State, Common<SoftReset>, Heaviside, Surrogate>{constants, surrogate});
  } else {
    f(Lif<State, Common<HardReset>, Heaviside, Surrogate>{constants, surrogate});
  }
}

}  // namespace stbp
