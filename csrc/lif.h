// What a LIF kernel is given: plain data, the same for every device, without torch.
#pragma once

#include <cstdint>

#include "number.h"

namespace stbp {

struct LifOptions {
  double decay;
  double v_threshold;
  double v_reset;
  bool soft_reset;
  bool detach_reset;
  bool strict_threshold;
  bool smooth;    // fire with the surrogate's antiderivative; double only
  int surrogate;  // its place in Surrogates
  double width;
};

// T steps of N neurons, time outermost: neuron n at step t is at [t * N + n] of every [T, N] array.
template <class Scalar>
struct LifForward {
  using State = state_t<Scalar>;
  int64_t steps;           // T
  int64_t neurons;         // N
  const Scalar* x;         // [T, N] input current
  const State* initial;    // [N] potential before the first step, or null for 0
  Scalar* spikes;          // [T, N]
  State* final_potential;  // [N] potential after the last step, or null
  State* states;           // [(T - 1) / K, N] potential after every K-th step but the last, or null
};

template <class Scalar>
struct LifBackward {
  using State = state_t<Scalar>;
  int64_t steps;              // T
  int64_t neurons;            // N
  const Scalar* x;            // [T, N]
  const State* initial;       // [N] or null
  const State* states;        // [(T - 1) / K, N], null when that is empty
  const Scalar* grad_spikes;  // [T, N] dL/dspikes
  const State* grad_final;    // [N] dL/d(final potential), or null for 0
  Scalar* grad_x;             // [T, N] dL/dx
  State* grad_initial;        // [N] dL/d(initial potential), or null
};

}  // namespace stbp
