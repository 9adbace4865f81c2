// The CPU's IMPL block: threads, the choice of instruction set, and huge pages.

#include <sys/mman.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

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
    if (__builtin_cpu_supports("avx2")) return InstructionSet::kAvx2;
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
    run(io.steps, io.neurons,
        [&](int64_t first, int64_t last) { kernels<Scalar>().forward(io, options, first, last); });
  }

  template <class Scalar>
  static void backward(const LifBackward<Scalar>& io, const LifOptions& options, int) {
    run(io.steps, io.neurons,
        [&](int64_t first, int64_t last) { kernels<Scalar>().backward(io, options, first, last); });
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
  template <class Run>
  static void run(int64_t steps, int64_t neurons, const Run& range) {
    // A thread is worth waking for about this many updates; blocks keep threads off each other's cache lines.
    constexpr int64_t kUpdatesPerThread = 16384;
    constexpr int64_t kBlock = 64;
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
