// The kernels of one number type, STBP_SCALAR, as csrc/cuda/launch.cu instantiates them: a small part of its compile
// time, for seeing what ptxas says of them.

#include "../../csrc/cuda/dispatch.h"
#include "../../csrc/cuda/neunorm.cuh"

namespace stbp::cuda {

using Scalar = STBP_SCALAR;

void instantiate(const LifForward<Scalar>& forward, const LifBackward<Scalar>& backward,
                 const NeuNormForward<Scalar>& norm_forward, const NeuNormBackward<Scalar>& norm_backward,
                 const LifOptions& options, const LifPlan& plan, const NeuNormPlan& norm_plan) {
  visit_compiled_forward<Scalar>(options, [&](const auto& neuron) {
    visit_compiled_width<Scalar>(
        plan, [&](auto width) { lif_forward<decltype(width)::value><<<1, 1>>>(forward, plan, neuron); });
    neunorm_forward<kNeuNormThreads><<<1, 1>>>(norm_forward, norm_plan, neuron);
  });
  visit_compiled_backward<Scalar>(options, [&](const auto& neuron) {
    visit_compiled_width<Scalar>(
        plan, [&](auto width) { lif_backward<decltype(width)::value><<<1, 1>>>(backward, plan, neuron); });
    neunorm_backward<kNeuNormThreads><<<1, 1>>>(norm_backward, norm_plan, neuron);
  });
}

}  // namespace stbp::cuda
