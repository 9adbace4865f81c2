// Runs the CUDA kernels on the CPU.
#pragma once

#include "cuda_built_ins.h"

#include <pthread.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

namespace stbp::cuda {
// Of the block that runs.
inline unsigned char* shared_memory = nullptr;
inline unsigned char* shared_bytes() { return shared_memory; }
}  // namespace stbp::cuda

#include "../../csrc/cuda/dispatch.h"
#include "../../csrc/cuda/neunorm.cuh"

namespace stbp::cuda {

// Every thread in turn, for the kernels let none wait for another; whole blocks, and so threads beyond the last neuron.
// The blocks from `first` on: of more neurons than there is memory for, the tests run the last.
template <class Plan, class Kernel>
void launch(const Plan& plan, int64_t first, const Kernel& kernel) {
  for (int64_t block = first; block < plan.blocks; ++block)
    for (int thread = 0; thread < plan.threads; ++thread) {
      blockIdx.x = unsigned(block);
      threadIdx.x = unsigned(thread);
      kernel();
    }
}

template <class Scalar>
void run_forward(const NeuronForward<Scalar>& io, const LifOptions& options, const LifPlan& plan, int64_t first = 0) {
  visit_lif_forward<Scalar>(
      options, plan, [&](auto kernel, const auto& neuron) { launch(plan, first, [&] { kernel(io, plan, neuron); }); });
}

template <class Scalar>
void run_backward(const NeuronBackward<Scalar>& io, const LifOptions& options, const LifPlan& plan, int64_t first = 0) {
  visit_lif_backward<Scalar>(
      options, plan, [&](auto kernel, const auto& neuron) { launch(plan, first, [&] { kernel(io, plan, neuron); }); });
}

// The plans {rows, width} that kernels are compiled for and that can run T steps, whatever plan_lif would choose.
template <class Scalar>
std::vector<LifPlan> compiled_plans(int64_t steps, bool backward) {
  std::vector<LifPlan> plans;
  for (const int rows : {lif_rows(steps, sizeof(Scalar)), 0}) {
    if (const int pack = lif_pack(rows, sizeof(Scalar), backward); pack > 1) plans.push_back({rows, pack, 0, 0});
    plans.push_back({rows > 0 ? kMostRows : 0, 1, 0, 0});
    if (rows == 0) break;
  }
  return plans;
}

// For kernels whose threads wait for each other: a block's threads have a stack each, and run in turn from one meeting
// to the next. Where one is missing, a thread finds what another one has not yet written, or overwrites what it has not
// yet read, every time.
enum class Meeting { kBarrier, kShuffle };
#ifndef STBP_THREADS

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
      if (waiting_ != 0 && waiting_ != contexts_.size()) fail("threads of a block ended while others waited for them");
    } while (waiting_ != 0);
  }

  // Of the thread that runs, until all others have come as far.
  static void wait(Meeting meeting) {
    if (running_->waiting_++ == 0) running_->meeting_ = meeting;
    if (running_->meeting_ != meeting) fail("threads of a block wait for each other at different places");
    swapcontext(&running_->contexts_[threadIdx.x], &running_->scheduler_);
  }
  static unsigned threads() { return unsigned(running_->contexts_.size()); }

 private:
  static void fail(const char* why) {
    std::fprintf(stderr, "%s\n", why);
    std::abort();
  }
  static constexpr size_t kStack = 1 << 17;
  static inline Fibers* running_ = nullptr;

  std::vector<ucontext_t> contexts_;
  std::unique_ptr<char[]> stacks_;  // [threads, kStack]
  void (*call_)(const void*);
  const void* body_;
  ucontext_t scheduler_{};  // AddressSanitizer reads its stack, which swapcontext() does not fill in
  size_t waiting_ = 0;
  Meeting meeting_ = Meeting::kBarrier;
};

template <class Kernel>
void launch_blocks(int64_t blocks, int threads, const Kernel& kernel) {
  Fibers fibers(unsigned(threads), kernel);
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) fibers.run_block();
}

inline void wait_for_block(Meeting meeting) { Fibers::wait(meeting); }

#else

// The same with threads of the system, for ThreadSanitizer to watch.
// Two barriers for one: ThreadSanitizer takes what a thread does before it waits for known to all that leave, also to
// one so late that the others have come to the next barrier, unless that is another.
inline pthread_barrier_t barriers[2];
inline void wait_for_block(Meeting) {
  for (pthread_barrier_t& barrier : barriers) pthread_barrier_wait(&barrier);
}

template <class Kernel>
void launch_blocks(int64_t blocks, int count, const Kernel& kernel) {
  for (pthread_barrier_t& barrier : barriers) pthread_barrier_init(&barrier, nullptr, unsigned(count));
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < unsigned(count); ++i) {
    threads.emplace_back([&, i] {
      threadIdx.x = i;
      for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        kernel();
        wait_for_block(Meeting::kBarrier);  // the next block has the same shared memory
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (pthread_barrier_t& barrier : barriers) pthread_barrier_destroy(&barrier);
}

#endif

// Runs a kernel with normalisation in as much shared memory as its plan says.
template <class Io>
void run_neunorm(const Io& io, const LifOptions& options, const NeuNormPlan& plan) {
  using Scalar = std::remove_const_t<std::remove_pointer_t<decltype(io.x)>>;
  const std::unique_ptr<unsigned char[]> shared(new unsigned char[size_t(plan.shared_bytes)]);
  shared_memory = shared.get();
  visit_either_lif<Scalar>(PlainSurrogates(), options, [&](const auto& neuron) {
    visit_neunorm_tile<Scalar>(plan, [&](auto tile) {
      launch_blocks(plan.blocks, plan.threads(), [&] {
        if constexpr (std::is_same_v<Io, NeuNormForward<Scalar>>) {
          neunorm_forward<decltype(tile)>(io, plan, neuron);
        } else {
          neunorm_backward<decltype(tile)>(io, plan, neuron);
        }
      });
    });
  });
}

template <class Scalar>
void run_general(const NeuronForward<Scalar>& io, const Extras<state_t<Scalar>>& extras, const NeuronOptions& options,
                 const GeneralPlan& plan) {
  visit_general_kernel<Scalar>(options, plan, [&](auto width, const auto& neuron) {
    launch(plan, 0, [&] { general_forward<width>(io, extras, plan, neuron); });
  });
}

template <class Scalar>
void run_general(const NeuronBackward<Scalar>& io, const Extras<state_t<Scalar>>& extras, const NeuronOptions& options,
                 const GeneralPlan& plan) {
  const std::unique_ptr<unsigned char[]> shared(new unsigned char[size_t(plan.shared_bytes)]);
  shared_memory = shared.get();
  visit_general_kernel<Scalar>(options, plan, [&](auto width, const auto& neuron) {
    const auto kernel = [&] { general_backward<width>(io, extras, plan, neuron); };
    if (plan.learned) return launch_blocks(plan.blocks, plan.threads, kernel);
    launch(plan, 0, kernel);
  });
  if (plan.learned) launch_blocks(plan.entry_blocks, kMostThreads, [&] { general_gradients(extras, plan); });
}

}  // namespace stbp::cuda

inline void __syncthreads() { stbp::cuda::wait_for_block(stbp::cuda::Meeting::kBarrier); }

// All threads of a block have to come, which suits kernels whose warps all do the same.
template <class T>
T __shfl_xor_sync(unsigned threads, T value, int apart) {
  using namespace stbp::cuda;
  static T values[kNeuNormThreads];
  if (threads != ~0u) std::abort();
  values[threadIdx.x] = value;
  wait_for_block(Meeting::kShuffle);
  const T of_other = values[threadIdx.x ^ unsigned(apart)];
  wait_for_block(Meeting::kShuffle);
  return of_other;
}
