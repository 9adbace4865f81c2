// The neurons that the operators know, and what is compiled for each.
#pragma once

#include <type_traits>
#include <utility>
#include <variant>

#include "li.h"
#include "lif.h"
#include "surrogate.h"

namespace stbp {

using NeuronOptions = std::variant<LifOptions, LiOptions>;

template <class State>
using AnySurrogateOf = AnySurrogate<State, Surrogates>;
template <class State>
using AnyPlainSurrogateOf = AnySurrogate<State, PlainSurrogates>;

// The Heaviside forward pass needs no surrogate, and one kernel serves them all.
struct NoSurrogate {
  template <class V>
  STBP_FN V derivative(V) const {
    return V{};
  }
};

// f(surrogate) for the one of the list that the options name.
template <class State, template <class> class... Surrogate, class F>
STBP_HOST_FN void visit_surrogate(SurrogateList<Surrogate...>, const SurrogateOptions& options, const F& f) {
  int place = 0;
  ((place++ == options.place ? f(Surrogate<State>(options)) : void()), ...);
}

template <class Scalar>
constexpr bool kHasSmooth = false;  // gradients are checked in double; other types save the compile time
template <>
constexpr bool kHasSmooth<double> = true;

// f(neuron) for a LIF neuron whose reset, and surrogate, are chosen while a kernel runs.
template <class Scalar, class List, class F>
STBP_HOST_FN void visit_either_lif(List, const LifOptions& options, const F& f) {
  using State = state_t<Scalar>;
  using Any = AnySurrogate<State, List>;
  const LifConstants<State> constants(options);
  if constexpr (kHasSmooth<Scalar>) {
    if (options.smooth) return f(Lif<State, EitherReset, Smooth, Any>{constants, Any(options.surrogate)});
  }
  f(Lif<State, EitherReset, Heaviside, Any>{constants, Any(options.surrogate)});
}

// f(neuron) for the general kernels: any neuron, with all that it can do.
template <class Scalar, class F>
STBP_HOST_FN void visit_general(const NeuronOptions& options, const F& f) {
  if (const auto* lif = std::get_if<LifOptions>(&options)) return visit_either_lif<Scalar>(Surrogates(), *lif, f);
  f(Li<state_t<Scalar>>(std::get<LiOptions>(options)));
}

}  // namespace stbp
