// Leaky integrate-and-fire neurons with neuron normalisation (NeuNorm), over all time steps, for a few neighbouring
// positions of one sample. All feature maps share an auxiliary map a with a leak of its own:
//
//   S[t] = sum over the features c of o_c[t]
//   a[t] = norm_decay a[t-1] + gain S[t]           gain = (1 - norm_decay) share, share = 1 / C or 1 / C^2
//   y_c[t] = o_c[t] - U_c a[t]
//
// and its adjoint, with g_c[t] = dL/dy_c[t] and A[t] = dL/da[t]:
//
//   A[t] = norm_decay A[t+1] - sum over c of U_c g_c[t]
//   dL/do_c[t] = g_c[t] + gain A[t]
//   dL/dU_c = - sum over t of g_c[t] a[t]
//   dL/dnorm_decay = sum over t of A[t] (a[t-1] - share S[t])
//
// The features meet in S[t] and in the sum of U_c g_c[t] alone. What shares them out, and what is held where between a
// sum and its use, is each device's own: cpu/neunorm_impl.h and cuda/neunorm.cuh.
#pragma once

#include <cstdint>

#include "number.h"

namespace stbp {

template <class Io>
STBP_FN double neunorm_share(const Io& io) {
  return 1 / (io.squared ? double(io.features) * double(io.features) : double(io.features));
}

template <class State>
struct NeuNormConstants {
  State decay, share, gain;

  template <class Io>
  STBP_FN explicit NeuNormConstants(const Io& io) : NeuNormConstants(io, State(neunorm_share(io))) {}
  template <class Io>
  STBP_FN NeuNormConstants(const Io& io, State share_)
      : decay(io.decays ? io.decays[1] : io.norm_decay), share(share_), gain((State(1) - decay) * share) {}
};

// Where the neurons of position `first` of a sample lie.
struct NeuNormPlace {
  int64_t batch, features, positions, sample, first;
  int64_t feature_stride, position_stride;

  template <class Io>
  STBP_FN NeuNormPlace(const Io& io, int64_t sample_, int64_t first_)
      : batch(io.batch),
        features(io.features),
        positions(io.positions),
        sample(sample_),
        first(first_),
        feature_stride(io.channels_last ? 1 : io.positions),
        position_stride(io.channels_last ? io.features : 1) {}

  STBP_FN int64_t neuron(int64_t t, int64_t c) const { return weight(t * batch + sample, c); }
  STBP_FN int64_t map(int64_t t) const { return (t * batch + sample) * positions + first; }
  STBP_FN int64_t weight(int64_t group, int64_t c) const {
    return group * features * positions + c * feature_stride + first * position_stride;
  }
  STBP_FN int64_t step() const { return batch * features * positions; }  // from a neuron to itself, one step later
};

}  // namespace stbp
