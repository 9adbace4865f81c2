// The kernels of one number type, STBP_SCALAR. Apart from the bindings, which take longer to compile than all of these
// and which no sanitizer need watch.

#include "run.h"

namespace stbp::cuda {

template void run_forward<STBP_SCALAR>(const LifForward<STBP_SCALAR>&, const LifOptions&, const LifPlan&, int64_t);
template void run_backward<STBP_SCALAR>(const LifBackward<STBP_SCALAR>&, const LifOptions&, const LifPlan&, int64_t);
template void run_neunorm(const NeuNormForward<STBP_SCALAR>&, const LifOptions&, const NeuNormPlan&);
template void run_neunorm(const NeuNormBackward<STBP_SCALAR>&, const LifOptions&, const NeuNormPlan&);

}  // namespace stbp::cuda
