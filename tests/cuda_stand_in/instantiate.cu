// The kernels of one number type, STBP_SCALAR, as csrc/cuda/launch.cu instantiates them: a small part of its compile
// time, for seeing what ptxas says of them.

#include "../../csrc/cuda/dispatch.h"
#include "../../csrc/cuda/neunorm.cuh"

namespace stbp::cuda {

using Scalar = STBP_SCALAR;

void instantiate(const LifForward<Scalar>& forward, const LifBackward<Scalar>& backward,
                 const NeuNormForward<Scalar>& norm_forward, const NeuNormBackward<Scalar>& norm_backward,
                 const LifOptions& options, const LifPlan& plan, const NeuNormPlan& norm_plan) {
  visit_lif_forward<Scalar>(options, plan,
                            [&](auto kernel, const auto& neuron) { kernel<<<1, 1>>>(forward, plan, neuron); });
  visit_lif_backward<Scalar>(options, plan,
                             [&](auto kernel, const auto& neuron) { kernel<<<1, 1>>>(backward, plan, neuron); });
  visit_compiled_backward<Scalar>(options, [&](const auto& neuron) {
    visit_neunorm_tile<Scalar>(norm_plan, [&](auto tile) {
      neunorm_forward<decltype(tile)><<<1, 1>>>(norm_forward, norm_plan, neuron);
      neunorm_backward<decltype(tile)><<<1, 1>>>(norm_backward, norm_plan, neuron);
    });
  });
}

}  // namespace stbp::cuda
