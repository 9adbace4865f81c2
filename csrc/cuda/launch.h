// Starts the CUDA kernels on a device's stream; knows no torch.
#pragma once

#include "../lif.h"

namespace stbp::cuda {

// K: a state is kept every 8 steps. A chunk's potentials live in registers: 8 x 4 floats a thread.
constexpr int kChunk = 8;

// `stream` is a cudaStream_t of `device`. Both return at once, and throw std::runtime_error if the launch fails.
template <class Scalar>
void launch_forward(const LifForward<Scalar>& io, const LifOptions& options, int device, void* stream);
template <class Scalar>
void launch_backward(const LifBackward<Scalar>& io, const LifOptions& options, int device, void* stream);

}  // namespace stbp::cuda
