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
  bool spatial_only;
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

// LIF neurons with neuron normalisation: T steps of B samples with C feature maps of P positions each. Every array with
// features lies in the order of x: neuron (c, p) of sample b at step t is at [((t * B + b) * C + c) * P + p], and with
// channels_last at [((t * B + b) * P + p) * C + c]. Its shape is given as [T, B, C, P] in both cases.
template <class Scalar>
struct NeuNormForward {
  using State = state_t<Scalar>;
  int64_t steps, batch, features, positions;  // T, B, C, P
  State norm_decay;                           // of the map
  bool squared;                               // the map takes 1 / C^2 of the spikes and not 1 / C
  bool channels_last;                         // features innermost, not positions
  const Scalar* x;                            // [T, B, C, P] input current
  const State* weight;                        // [C, P] U
  const State* decays;                        // [2] of the potential and of the map, or null for the constant ones
  Scalar* normalised;                         // [T, B, C, P]
  State* sums;                                // [T, B, P] spikes of all features
  State* maps;                                // [T, B, P] a
  State* states;                              // [(T - 1) / K, B, C, P] potential after every K-th step but the last
};

// The batch is split into G groups of consecutive samples, the positions into S strips, each the work of one thread or
// one block of threads; what is summed over the batch comes out as one partial sum for each.
template <class Scalar>
struct NeuNormBackward {
  using State = state_t<Scalar>;
  int64_t steps, batch, features, positions;  // T, B, C, P
  State norm_decay;
  bool squared;
  bool channels_last;
  int64_t groups;                 // G
  const Scalar* x;                // [T, B, C, P]
  const State* weight;            // [C, P]
  const State* decays;            // [2] or null
  const State* sums;              // [T, B, P]
  const State* maps;              // [T, B, P]
  const State* states;            // [(T - 1) / K, B, C, P]
  const Scalar* grad_normalised;  // [T, B, C, P]
  Scalar* grad_x;                 // [T, B, C, P]
  State* grad_weight;             // [G, C, P]
  State* grad_decays;             // [G, S, 2], or null
  State* carried;                 // [G, C, P] for dL/dv between two chunks where a device wants it, else null
};

}  // namespace stbp
