// The CPU's IMPL block: threads, the choice of instruction set, and huge pages.

#include <sys/mman.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <string>

#include "../build_info.h"
#include "../operators.h"
#include "kernels.h"

namespace stbp {
namespace {

enum class InstructionSet { kPortable, kAvx2, kAvx512 };

// The widest that the machine has and, as in torch itself, that the environment variable ATEN_CPU_CAPABILITY allows.
InstructionSet instruction_set() {
  static const InstructionSet chosen = [] {
#if defined(__x86_64__)
    const char* const variable = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string allowed = variable ? variable : "";
    if (allowed == "default") return InstructionSet::kPortable;
    if (allowed != "avx2" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      return InstructionSet::kAvx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) return InstructionSet::kAvx2;
#endif
    return InstructionSet::kPortable;
  }();
  return chosen;
}

template <class Scalar>
cpu::Kernels<Scalar> kernels() {
  switch (instruction_set()) {
#if defined(__x86_64__)
    case InstructionSet::kAvx512:
      return cpu::avx512::kernels<Scalar>();
    case InstructionSet::kAvx2:
      return cpu::avx2::kernels<Scalar>();
#endif
    default:
      return cpu::portable::kernels<Scalar>();
  }
}

struct Cpu {
  static constexpr int kChunk = cpu::kChunk;

  template <class Scalar>
  static void forward(const LifForward<Scalar>& io, const LifOptions& options, int) {
    const int64_t moved = io.steps * io.neurons * int64_t(2 * sizeof(Scalar));
    run(io.steps, io.neurons,
        [&, past_caches = past_caches(moved, io.neurons, io.spikes, io.final_potential, io.states)](auto... range) {
          kernels<Scalar>().forward(io, options, range..., past_caches);
        });
  }

  template <class Scalar>
  static void backward(const LifBackward<Scalar>& io, const LifOptions& options, int) {
    const int64_t moved = io.steps * io.neurons * int64_t(3 * sizeof(Scalar));
    run(io.steps, io.neurons,
        [&, past_caches = past_caches(moved, io.neurons, io.grad_x, io.grad_initial)](auto... range) {
          kernels<Scalar>().backward(io, options, range..., past_caches);
        });
  }

  // Most of the time of a large call goes to the page faults of its outputs: 2 MB pages make 512 times fewer of them.
  // Has an effect where /sys/kernel/mm/transparent_hugepage/enabled says madvise; a refusal costs only speed. Smaller
  // outputs mostly come from memory that the allocator has kept, which has its pages already.
  static void fresh(void* pointer, size_t bytes) {
    constexpr size_t kSmallest = size_t(16) << 20;
    constexpr uintptr_t kPage = 4096;
    if (bytes < kSmallest) return;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(pointer) + kPage - 1) / kPage * kPage;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(pointer) + bytes) / kPage * kPage;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }

 private:
  // Whether a call moves more than the last cache holds, to results that allow it.
  template <class... T>
  static bool past_caches(int64_t moved, int64_t neurons, const T*... results) {
    static const int64_t last_cache = [] {
      const int64_t told = sysconf(_SC_LEVEL3_CACHE_SIZE);
      return told > 0 ? told : int64_t(32) << 20;
    }();
    return moved > last_cache && (cpu::aligned_for_streams(results, neurons) && ...);
  }

  template <class Run>
  static void run(int64_t steps, int64_t neurons, const Run& range) {
    using cpu::kBlock;
    // A thread is worth waking for about this many updates.
    constexpr int64_t kUpdatesPerThread = 16384;
    const int64_t grain = std::max<int64_t>(1, kUpdatesPerThread / (steps * kBlock));
    torch::stable::parallel_for(0, (neurons + kBlock - 1) / kBlock, grain, [&](int64_t first, int64_t last) {
      range(first * kBlock, std::min(last * kBlock, neurons));
    });
  }
};

}  // namespace

const char* cpu_instruction_set() {
  switch (instruction_set()) {
    case InstructionSet::kAvx512:
      return "AVX-512";
    case InstructionSet::kAvx2:
      return "AVX2";
    default:
      return "portable";
  }
}

int cpu_chunk() { return Cpu::kChunk; }

}  // namespace stbp

STABLE_TORCH_LIBRARY_IMPL(stbp_cuda, CPU, m) {
  m.impl("lif_forward", TORCH_BOX(&stbp::lif_forward<stbp::Cpu>));
  m.impl("lif_backward", TORCH_BOX(&stbp::lif_backward<stbp::Cpu>));
}
