// The kernels of one number type, STBP_SCALAR, as csrc/cuda/launch.cu instantiates them: a small part of its compile
// time, for seeing what ptxas says of them.

#include "../../csrc/cuda/neunorm.cuh"
#include "../../csrc/dispatch.h"

namespace stbp::cuda {

using Scalar = STBP_SCALAR;
constexpr int kPack = 16 / sizeof(Scalar);

void instantiate(const LifForward<Scalar>& forward, const LifBackward<Scalar>& backward,
                 const NeuNormForward<Scalar>& norm_forward, const NeuNormBackward<Scalar>& norm_backward,
                 const LifOptions& options) {
  visit_forward_neuron<Scalar>(options, [&](const auto& neuron) {
    lif_forward<1><<<1, 1>>>(forward, neuron);
    lif_forward<kPack><<<1, 1>>>(forward, neuron);
    neunorm_forward<8><<<1, 1>>>(norm_forward, 1, neuron);
  });
  visit_backward_neuron<Scalar>(options, [&](const auto& neuron) {
    lif_backward<1><<<1, 1>>>(backward, neuron);
    lif_backward<kPack><<<1, 1>>>(backward, neuron);
    neunorm_backward<8><<<1, 1>>>(norm_backward, 1, neuron);
  });
}

}  // namespace stbp::cuda
