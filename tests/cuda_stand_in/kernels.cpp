// The kernels of one number type, STBP_SCALAR. Apart from the bindings, which take longer to compile than all of these
// and which no sanitizer need watch.

#include "run.h"

namespace stbp::cuda {

template void run_forward<STBP_SCALAR>(const NeuronForward<STBP_SCALAR>&, const LifOptions&, const LifPlan&, int64_t);
template void run_backward<STBP_SCALAR>(const NeuronBackward<STBP_SCALAR>&, const LifOptions&, const LifPlan&, int64_t);
template void run_general(const NeuronForward<STBP_SCALAR>&, const Extras<state_t<STBP_SCALAR>>&, const NeuronOptions&,
                          const GeneralPlan&);
template void run_general(const NeuronBackward<STBP_SCALAR>&, const Extras<state_t<STBP_SCALAR>>&, const NeuronOptions&,
                          const GeneralPlan&);
template void run_neunorm(const NeuNormForward<STBP_SCALAR>&, const LifOptions&, const NeuNormPlan&);
template void run_neunorm(const NeuNormBackward<STBP_SCALAR>&, const LifOptions&, const NeuNormPlan&);

}  // namespace stbp::cuda
