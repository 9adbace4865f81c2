// Run-time options to the neurons that the CUDA kernels are compiled for. Every combination is one more kernel for each
// architecture, and a kernel that waits for memory has time to choose: so the reset is chosen while it runs, and in
// double, which is for checking gradients, the surrogate too.
#pragma once

#include <type_traits>

#include "../dispatch.h"
#include "plan.h"

namespace stbp::cuda {

template <class Scalar, class F>
void visit_compiled_forward(const LifOptions& options, const F& f) {
  using State = state_t<Scalar>;
  const LifConstants<State> constants(options);
  if constexpr (kHasSmooth<Scalar>) {
    using Any = AnySurrogate<State, Surrogates>;
    if (options.smooth)
      return f(Lif<State, EitherReset, Smooth, Any>{constants, Any(options.surrogate, options.width)});
  }
  f(Lif<State, EitherReset, Heaviside, NoSurrogate>{constants, {}});
}

template <class Scalar, class F>
void visit_compiled_backward(const LifOptions& options, const F& f) {
  using State = state_t<Scalar>;
  const LifConstants<State> constants(options);
  if constexpr (kHasSmooth<Scalar>) {
    using Any = AnySurrogate<State, Surrogates>;
    const Any surrogate(options.surrogate, options.width);
    if (options.smooth) {
      f(Lif<State, EitherReset, Smooth, Any>{constants, surrogate});
    } else {
      f(Lif<State, EitherReset, Heaviside, Any>{constants, surrogate});
    }
  } else {
    visit_surrogate<State>(Surrogates{}, options, [&](const auto& surrogate) {
      f(Lif<State, EitherReset, Heaviside, std::decay_t<decltype(surrogate)>>{constants, surrogate});
    });
  }
}

// The widths that the LIF kernels of a number type are compiled for, as plan_lif chooses from them.
template <class Scalar, class F>
void visit_compiled_width(const LifPlan& plan, const F& f) {
  constexpr int kPack = 16 / sizeof(Scalar), kWord = 4 / sizeof(Scalar);
  if constexpr (sizeof(Scalar) < 8) {
    if (plan.width == kPack) return f(std::integral_constant<int, kPack>());
  }
  if constexpr (sizeof(Scalar) < 4) {
    if (plan.width == kWord) return f(std::integral_constant<int, kWord>());
  }
  f(std::integral_constant<int, 1>());
}

}  // namespace stbp::cuda
