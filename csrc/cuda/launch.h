// Starts the CUDA kernels on a device's stream; knows no torch.
#pragma once

#include "../lif.h"

namespace stbp::cuda {

// K: a state is kept every 8 steps. A chunk's potentials live in registers: 8 x 4 floats a thread.
constexpr int kChunk = 8;
constexpr int kNeuNormChunk = 8;

// Positions that a block has of the neurons with normalisation: one for each thread of a warp.
constexpr int kStrip = 32;

// `stream` is a cudaStream_t of `device`. Both return at once, and throw std::runtime_error if the launch fails.
template <class Scalar>
void launch_forward(const LifForward<Scalar>& io, const LifOptions& options, int device, void* stream);
template <class Scalar>
void launch_backward(const LifBackward<Scalar>& io, const LifOptions& options, int device, void* stream);
template <class Scalar>
void launch_neunorm_forward(const NeuNormForward<Scalar>& io, const LifOptions& options, int device, void* stream);
template <class Scalar>
void launch_neunorm_backward(const NeuNormBackward<Scalar>& io, const LifOptions& options, int device, void* stream);

inline int64_t neunorm_strips(int64_t positions) { return (positions + kStrip - 1) / kStrip; }

// Enough blocks for any GPU, and the same number on all of them, as the sums over a group are rounded by themselves.
inline int64_t neunorm_groups(int64_t batch, int64_t positions) {
  constexpr int64_t kBlocks = 1024;
  const int64_t strips = neunorm_strips(positions);
  const int64_t groups = strips > 0 ? (kBlocks + strips - 1) / strips : 1;
  return groups < batch ? groups : batch > 0 ? batch : 1;
}

}  // namespace stbp::cuda
