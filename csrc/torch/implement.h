// What every device registers: the same operators.
#pragma once

#include <torch/csrc/stable/library.h>

#include "neunorm_op.h"
#include "neuron_op.h"

namespace stbp {

template <class Device, class Library>
void implement(Library& m) {
  m.impl("neuron_forward", TORCH_BOX(&neuron_forward<Device>));
  m.impl("neuron_backward", TORCH_BOX(&neuron_backward<Device>));
  m.impl("neunorm_lif_forward", TORCH_BOX(&neunorm_lif_forward<Device>));
  m.impl("neunorm_lif_backward", TORCH_BOX(&neunorm_lif_backward<Device>));
  m.impl("_neuron_forward", TORCH_BOX(&eager_neuron_forward<Device>));
  m.impl("_neuron_backward", TORCH_BOX(&eager_neuron_backward<Device>));
}

}  // namespace stbp
