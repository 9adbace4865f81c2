// Starts the CUDA kernels on a device's stream; knows no torch.
#pragma once

#include "../lif.h"

namespace stbp::cuda {

// Steps whose rows a thread loads, and whose potentials it keeps, at once: 8 x 4 floats are 32 registers.
constexpr int kAtOnce = 8;
// K: a state is kept every 16 steps, none where T is no more. To go back over twice as many steps as it has potentials
// for costs a thread the currents of the others, 16 bytes for each, and to compute their potentials twice.
constexpr int kChunk = 2 * kAtOnce;
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
