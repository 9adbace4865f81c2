// Run-time options to template arguments.
#pragma once

#include "../core/io.h"
#include "lif.h"
#include "surrogate.h"

namespace stbp {

// The Heaviside forward pass needs no surrogate, and one kernel serves them all.
struct NoSurrogate {};

template <class State, template <class> class... Surrogate, class F>
STBP_HOST_FN void visit_surrogate(SurrogateList<Surrogate...>, const LifOptions& options, const F& f) {
  int place = 0;
  ((place++ == options.surrogate ? f(Surrogate<State>(options.width)) : void()), ...);
}

template <class State, class Firing, class Surrogate, class F>
STBP_HOST_FN void visit_reset(const LifOptions& options, const Surrogate& surrogate, const F& f) {
  const LifConstants<State> constants(options);
  if (options.soft_reset) {
    f(Lif<State, SoftReset, Firing, Surrogate>{constants, surrogate});
  } else {
    f(Lif<State, HardReset, Firing, Surrogate>{constants, surrogate});
  }
}

template <class Scalar>
constexpr bool kHasSmooth = false;  // gradients are checked in double; other types save the compile time
template <>
constexpr bool kHasSmooth<double> = true;

template <class Scalar, class F>
STBP_HOST_FN void visit_forward_neuron(const LifOptions& options, const F& f) {
  using State = state_t<Scalar>;
  if constexpr (kHasSmooth<Scalar>) {
    if (options.smooth) {
      visit_surrogate<State>(Surrogates{}, options,
                             [&](const auto& surrogate) { visit_reset<State, Smooth>(options, surrogate, f); });
      return;
    }
  }
  visit_reset<State, Heaviside>(options, NoSurrogate{}, f);
}

template <class Scalar, class F>
STBP_HOST_FN void visit_backward_neuron(const LifOptions& options, const F& f) {
  using State = state_t<Scalar>;
  visit_surrogate<State>(Surrogates{}, options, [&](const auto& surrogate) {
    if constexpr (kHasSmooth<Scalar>) {
      if (options.smooth) {
        visit_reset<State, Smooth>(options, surrogate, f);
        return;
      }
    }
    visit_reset<State, Heaviside>(options, surrogate, f);
  });
}

}  // namespace stbp
