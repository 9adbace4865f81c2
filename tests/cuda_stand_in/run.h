// Runs the CUDA kernels on the CPU.
#pragma once

#include "cuda_built_ins.h"

#include <cstdint>

#include "../../csrc/cuda/kernels.cuh"
#include "../../csrc/dispatch.h"

namespace stbp::cuda {

// Every thread in turn, for the kernels let none wait for another; whole blocks, and so threads beyond the last neuron.
template <class Kernel>
void launch(int64_t threads, const Kernel& kernel) {
  blockDim.x = kThreads;
  for (blockIdx.x = 0; int64_t(blockIdx.x) * kThreads < threads; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < kThreads; ++threadIdx.x) kernel();
}

template <class Scalar>
constexpr int kPack = 16 / sizeof(Scalar);

template <class Scalar>
void run_forward(const LifForward<Scalar>& io, const LifOptions& options, bool packed) {
  visit_forward_neuron<Scalar>(options, [&](const auto& neuron) {
    if (packed) {
      launch(io.neurons / kPack<Scalar>, [&] { lif_forward<kPack<Scalar>>(io, neuron); });
    } else {
      launch(io.neurons, [&] { lif_forward<1>(io, neuron); });
    }
  });
}

template <class Scalar>
void run_backward(const LifBackward<Scalar>& io, const LifOptions& options, bool packed) {
  visit_backward_neuron<Scalar>(options, [&](const auto& neuron) {
    if (packed) {
      launch(io.neurons / kPack<Scalar>, [&] { lif_backward<kPack<Scalar>>(io, neuron); });
    } else {
      launch(io.neurons, [&] { lif_backward<1>(io, neuron); });
    }
  });
}

}  // namespace stbp::cuda
