// Runs the CUDA kernels on the CPU.
#pragma once

#include "cuda_built_ins.h"

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
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

// For kernels whose threads wait for each other: a block's threads have a stack each, and run in turn from one
// __syncthreads() to the next. Where one is missing, a thread finds what another one has not yet written, or overwrites
// what it has not yet read, every time.
constexpr int kWarps = 2;

class Fibers {
 public:
  template <class Kernel>
  Fibers(unsigned threads, const Kernel& kernel)
      : contexts_(threads),
        stacks_(new char[threads * kStack]),
        call_([](const void* body) { (*static_cast<const Kernel*>(body))(); }),
        body_(&kernel) {}

  void run_block() {
    running_ = this;
    for (unsigned i = 0; i < contexts_.size(); ++i) {
      getcontext(&contexts_[i]);
      contexts_[i].uc_stack.ss_sp = &stacks_[i * kStack];
      contexts_[i].uc_stack.ss_size = kStack;
      contexts_[i].uc_link = &scheduler_;
      makecontext(&contexts_[i], [] { running_->call_(running_->body_); }, 0);
    }
    do {
      waiting_ = 0;
      for (unsigned i = 0; i < contexts_.size(); ++i) {
        threadIdx.x = i;
        swapcontext(&scheduler_, &contexts_[i]);
      }
      if (waiting_ != 0 && waiting_ != contexts_.size()) {
        std::fputs("threads of a block ended while others waited for them\n", stderr);
        std::abort();
      }
    } while (waiting_ != 0);
  }

  // Of the thread that runs, until all others have come as far.
  static void wait() {
    ++running_->waiting_;
    swapcontext(&running_->contexts_[threadIdx.x], &running_->scheduler_);
  }

 private:
  static constexpr size_t kStack = 1 << 17;
  static inline Fibers* running_ = nullptr;

  std::vector<ucontext_t> contexts_;
  std::unique_ptr<char[]> stacks_;  // [threads, kStack]
  void (*call_)(const void*);
  const void* body_;
  ucontext_t scheduler_;
  size_t waiting_ = 0;
};

template <class Kernel>
void launch_blocks(int64_t blocks, const Kernel& kernel) {
  blockDim.x = kWarps * kStrip;
  Fibers fibers(blockDim.x, kernel);
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) fibers.run_block();
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

inline void __syncthreads() { stbp::cuda::Fibers::wait(); }
