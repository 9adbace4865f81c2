// Runs the CUDA kernels on the CPU.
#pragma once

#include "cuda_built_ins.h"

#include <cstdint>
#include <thread>
#include <vector>

#include "../../csrc/cuda/neunorm.cuh"
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

// For kernels whose threads wait for each other: the threads of a block at the same time, the blocks in turn.
constexpr int kWarps = 2;

template <class Kernel>
void launch_blocks(int64_t blocks, const Kernel& kernel) {
  blockDim.x = kWarps * kStrip;
  pthread_barrier_init(&block_barrier, nullptr, blockDim.x);
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < blockDim.x; ++i)
      threads.emplace_back([&kernel, i] {
        threadIdx.x = i;
        kernel();
      });
    for (std::thread& thread : threads) thread.join();
  }
  pthread_barrier_destroy(&block_barrier);
}

template <class Scalar>
void run_neunorm_forward(const NeuNormForward<Scalar>& io, const LifOptions& options) {
  const int64_t strips = neunorm_strips(io.positions);
  visit_forward_neuron<Scalar>(options, [&](const auto& neuron) {
    launch_blocks(strips * io.batch, [&] { neunorm_forward<kWarps>(io, strips, neuron); });
  });
}

template <class Scalar>
void run_neunorm_backward(const NeuNormBackward<Scalar>& io, const LifOptions& options) {
  const int64_t strips = neunorm_strips(io.positions);
  visit_backward_neuron<Scalar>(options, [&](const auto& neuron) {
    launch_blocks(strips * io.groups, [&] { neunorm_backward<kWarps>(io, strips, neuron); });
  });
}

}  // namespace stbp::cuda
