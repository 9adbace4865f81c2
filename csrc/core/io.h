// What a kernel is given: plain data, the same for every device, without torch.
#pragma once

#include <cstdint>

#include "number.h"

namespace stbp {

// Where the neurons of a tensor lie: time between `outer` and `inner` dimensions. Of an array with R rows in place of
// the T steps, neuron n has row r at [at(n, R) + r * inner]. [T, B, ...] is (1, T, B * rest); [B, T, ...] is
// (B, T, rest). Arrays without time, such as potentials, have neuron n at [n].
struct Layout {
  int64_t outer, steps, inner;

  STBP_FN int64_t neurons() const { return outer * inner; }
  STBP_FN int64_t at(int64_t n, int64_t rows) const { return outer == 1 ? n : n / inner * inner * rows + n % inner; }
};

template <class Scalar>
struct NeuronForward {
  using State = state_t<Scalar>;
  Layout layout;
  const Scalar* x;       // [outer, T, inner] input current
  const State* initial;  // [N] potential before the first step, or null for 0
  Scalar* output;        // [outer, T, inner], or null
  State* final_state;    // [N] potential after the last step, or null
  State* states;         // [outer, (T - 1) / K, inner] potential after every K-th step but the last, or null
};

template <class Scalar>
struct NeuronBackward {
  using State = state_t<Scalar>;
  Layout layout;
  const Scalar* x;            // [outer, T, inner]
  const State* initial;       // [N] or null
  const State* states;        // [outer, (T - 1) / K, inner], null when that is empty
  const Scalar* grad_output;  // [outer, T, inner] dL/doutput, or null for 0
  const State* grad_final;    // [N] dL/d(final potential), or null for 0
  Scalar* grad_x;             // [outer, T, inner] dL/dx
  State* grad_initial;        // [N] dL/d(initial potential), or null
};

// What the general kernels are given beside: all that few neurons need.
//
// Parameters as arrays hold in place of the constants of the launch. Those of the neuron come first; then, if it is
// affine, scale and shift of its current; P in all. Each has R rows, one or one for each step; of the neuron's own only
// the first row is used, and the gradients of the others are 0. Neuron n has entry n / group % count. count * group
// divides the neurons of a sample, unless count is 1.
template <class State>
struct Extras {
  const State* parameters;  // [P, R, count], or null
  int64_t rows, group, count;
  bool affine;             // the current is scale x + shift, not x
  const int64_t* lengths;  // [N / sample] steps of each sample, or null
  int64_t sample;          // neurons of a sample
  bool constant;           // x, and dL/dx, are [N]: the same current at every step
  bool after_reset;        // which potentials
  State* potentials;       // [outer, T, inner] of all steps, or null; going back, dL/dpotentials
  State* grad_parameters;  // [P, R, count], or null
  double* partial;         // what a device needs for the sums that lead to it

  // The steps of the sample of neuron n.
  STBP_FN int64_t steps(const Layout& layout, int64_t n) const {
    if (lengths == nullptr) return layout.steps;
    const int64_t length = lengths[n / sample];
    return length < 0 ? 0 : length < layout.steps ? length : layout.steps;
  }
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
