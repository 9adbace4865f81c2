// The kernels of one number type, STBP_SCALAR, as csrc/cuda/launch.cu instantiates them: a small part of its compile
// time, for seeing what ptxas says of them.

#include "../../csrc/cuda/dispatch.h"
#include "../../csrc/cuda/neunorm.cuh"

namespace stbp::cuda {

using Scalar = STBP_SCALAR;

void instantiate(const NeuronForward<Scalar>& forward, const NeuronBackward<Scalar>& backward,
                 const NeuNormForward<Scalar>& norm_forward, const NeuNormBackward<Scalar>& norm_backward,
                 const Extras<state_t<Scalar>>& extras, const LifOptions& options, const NeuronOptions& any_options,
                 const LifPlan& plan, const GeneralPlan& general_plan, const NeuNormPlan& norm_plan) {
  visit_lif_forward<Scalar>(options, plan,
                            [&](auto kernel, const auto& neuron) { kernel<<<1, 1>>>(forward, plan, neuron); });
  visit_lif_backward<Scalar>(options, plan,
                             [&](auto kernel, const auto& neuron) { kernel<<<1, 1>>>(backward, plan, neuron); });
  visit_general_kernel<Scalar>(any_options, general_plan, [&](auto width, const auto& neuron) {
    general_forward<width><<<1, 1>>>(forward, extras, general_plan, neuron);
    general_backward<width><<<1, 1>>>(backward, extras, general_plan, neuron);
  });
  general_gradients<<<1, 1>>>(extras, general_plan);
  visit_either_lif<Scalar>(PlainSurrogates(), options, [&](const auto& neuron) {
    visit_neunorm_tile<Scalar>(norm_plan, [&](auto tile) {
      neunorm_forward<decltype(tile)><<<1, 1>>>(norm_forward, norm_plan, neuron);
      neunorm_backward<decltype(tile)><<<1, 1>>>(norm_backward, norm_plan, neuron);
    });
  });
}

}  // namespace stbp::cuda
