// The kernels of one number type, STBP_SCALAR, as csrc/cuda/launch.cu instantiates them: a small part of its compile
// time, for seeing what ptxas says of them.

#include "../../csrc/cuda/kernels.cuh"
#include "../../csrc/dispatch.h"

namespace stbp::cuda {

using Scalar = STBP_SCALAR;
constexpr int kPack = 16 / sizeof(Scalar);

void instantiate(const LifForward<Scalar>& forward, const LifBackward<Scalar>& backward, const LifOptions& options) {
  visit_forward_neuron<Scalar>(options, [&](const auto& neuron) {
    lif_forward<1><<<1, 1>>>(forward, neuron);
    lif_forward<kPack><<<1, 1>>>(forward, neuron);
  });
  visit_backward_neuron<Scalar>(options, [&](const auto& neuron) {
    lif_backward<1><<<1, 1>>>(backward, neuron);
    lif_backward<kPack><<<1, 1>>>(backward, neuron);
  });
}

}  // namespace stbp::cuda
