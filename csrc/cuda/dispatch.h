// Run-time options to the kernels that are compiled. Every combination is one more kernel for each architecture, and a
// kernel that waits for memory has time to choose: so the surrogate is chosen while it runs, once for all neurons of a
// thread, and so is the reset, but for the neuron that most people train.
#pragma once

#include <type_traits>

#include "../neurons/registry.h"
#include "general.cuh"
#include "neuron.cuh"

namespace stbp::cuda {

// f(rows, width), both as constants.
template <class Scalar, bool kBackward, class F>
void visit_compiled_size(const LifPlan& plan, const F& f) {
  constexpr std::integral_constant<int, 1> one;
  const auto with_rows = [&](auto rows) {
    if constexpr (lif_pack(rows, sizeof(Scalar), kBackward) > 1) {
      if (plan.width > 1) return f(rows, std::integral_constant<int, lif_pack(rows, sizeof(Scalar), kBackward)>());
    }
    if constexpr (rows == 0 || rows == kMostRows) f(rows, one);
  };
  if constexpr (lif_rows(1, sizeof(Scalar)) > 0) {
    if (plan.rows == 1) return with_rows(std::integral_constant<int, 1>());
    if (plan.rows == 2) return with_rows(std::integral_constant<int, 2>());
    if (plan.rows == 4) return with_rows(std::integral_constant<int, 4>());
    if (plan.rows == kMostRows) return with_rows(std::integral_constant<int, kMostRows>());
  }
  with_rows(std::integral_constant<int, 0>());
}

// f(kernel, neuron): the plain kernels of a number type.
template <class Scalar, class F>
void visit_lif_forward(const LifOptions& options, const LifPlan& plan, const F& f) {
  using State = state_t<Scalar>;
  using Neuron = Lif<State, EitherReset, Heaviside, NoSurrogate>;
  const Neuron neuron{LifConstants<State>(options), {}};
  visit_compiled_size<Scalar, false>(plan, [&](auto rows, auto width) {
    if constexpr (rows > 0) {
      f(lif_forward_rows<rows, width, Scalar, Neuron>, neuron);
    } else {
      f(lif_forward<width, Scalar, Neuron>, neuron);
    }
  });
}

template <class Scalar, class F>
void visit_lif_backward(const LifOptions& options, const LifPlan& plan, const F& f) {
  using State = state_t<Scalar>;
  using Any = AnyPlainSurrogateOf<State>;
  const LifConstants<State> constants(options);
  const Any surrogate(options.surrogate);
  visit_compiled_size<Scalar, true>(plan, [&](auto rows, auto width) {
    const auto with = [&](const auto& neuron) {
      using Neuron = std::decay_t<decltype(neuron)>;
      if constexpr (rows > 0) {
        f(lif_backward_rows<rows, width, Scalar, Neuron>, neuron);
      } else {
        f(lif_backward<width, Scalar, Neuron>, neuron);
      }
    };
    if constexpr (width > 1) {
      if (is_common(options) && !options.soft_reset)
        return with(Lif<State, Common<HardReset>, Heaviside, Any>{constants, surrogate});
    }
    with(Lif<State, EitherReset, Heaviside, Any>{constants, surrogate});
  });
}

// f(width, neuron): the general kernels of a number type, the width as a constant.
template <class Scalar, class F>
void visit_general_kernel(const NeuronOptions& options, const GeneralPlan& plan, const F& f) {
  visit_general<Scalar>(options, [&](const auto& neuron) {
    if constexpr (kGeneralPack<sizeof(Scalar)> > 1) {
      if (plan.width > 1) return f(std::integral_constant<int, kGeneralPack<sizeof(Scalar)>>(), neuron);
    }
    f(std::integral_constant<int, 1>(), neuron);
  });
}

// The tiles that the kernels with normalisation are compiled for, as plan_neunorm chooses from them.
template <class Scalar, class F>
void visit_neunorm_tile(const NeuNormPlan& plan, const F& f) {
  if constexpr (sizeof(Scalar) < 8) {
    if (plan.tile_features == 4) return f(Tile<1, 4>());
  }
  if constexpr (sizeof(Scalar) < 4) {
    if (plan.tile_positions == 2) return f(Tile<2, 1>());
  }
  f(Tile<1, 1>());
}

}  // namespace stbp::cuda
