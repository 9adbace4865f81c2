// Starts the CUDA kernels on a device's stream; knows no torch.
#pragma once

#include "../core/io.h"
#include "../neurons/registry.h"

namespace stbp::cuda {

// Steps whose rows a thread loads, and whose potentials it keeps, at once: 8 x 4 floats are 32 registers.
constexpr int kAtOnce = 8;
// K: a state is kept every 16 steps, none where T is no more. To go back over twice as many steps as it has potentials
// for costs a thread the currents of the others, 16 bytes for each, and to compute their potentials twice.
constexpr int kChunk = 2 * kAtOnce;
constexpr int kNeuNormChunk = 8;

// `stream` is a cudaStream_t of `device`. All return at once, and throw std::runtime_error if the launch fails.
template <class Scalar>
void launch_forward(const NeuronForward<Scalar>& io, const LifOptions& options, int device, void* stream);
template <class Scalar>
void launch_backward(const NeuronBackward<Scalar>& io, const LifOptions& options, int device, void* stream);
// general_partial of plan.h tells the size of extras.partial.
template <class Scalar>
void launch_general_forward(const NeuronForward<Scalar>& io, const Extras<state_t<Scalar>>& extras,
                            const NeuronOptions& options, int device, void* stream);
template <class Scalar>
void launch_general_backward(const NeuronBackward<Scalar>& io, const Extras<state_t<Scalar>>& extras,
                             const NeuronOptions& options, int device, void* stream);
template <class Scalar>
void launch_neunorm_forward(const NeuNormForward<Scalar>& io, const LifOptions& options, int device, void* stream);
template <class Scalar>
void launch_neunorm_backward(const NeuNormBackward<Scalar>& io, const LifOptions& options, int device, void* stream);

}  // namespace stbp::cuda
