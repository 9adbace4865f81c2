// The CPU's IMPL block: threads, memory for results, and the choice of instruction set.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <utility>

#include "../build_info.h"
#include "../operators.h"
#include "kernels.h"
#include "memory.h"

// Since torch 2.11; null beside an older one, whose headers lack it, too.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* result, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* context);

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
    run(io, [&, past_caches = cpu::past_caches(io)](int64_t first, int64_t last) {
      kernels<Scalar>().forward(io, options, first, last, past_caches);
    });
  }

  template <class Scalar>
  static void backward(const LifBackward<Scalar>& io, const LifOptions& options, int) {
    run(io, [&, past_caches = cpu::past_caches(io)](int64_t first, int64_t last) {
      kernels<Scalar>().backward(io, options, first, last, past_caches);
    });
  }

  static constexpr int kNeuNormChunk = cpu::kNeuNormChunk;
  static constexpr bool kCarriesInMemory = false;

  static std::pair<int64_t, int64_t> neunorm_parts(const NeuNormShape& shape, ScalarType type, bool decays) {
    std::pair<int64_t, int64_t> parts;
    visit_scalar(type, [&](auto number) {
      const cpu::NeuNormPlan plan = backward_plan<decltype(number)>(shape, decays);
      parts = {plan.groups, plan.strips};
    });
    return parts;
  }

  template <class Scalar>
  static void neunorm_forward(const NeuNormForward<Scalar>& io, const LifOptions& options, int) {
    const cpu::NeuNormPlan plan = neunorm_plan<Scalar>(io, cpu::kNeuNormForwardRows);
    run_tasks(io.batch * plan.strips, io.steps * io.features * plan.length,
              [&, past_caches = cpu::past_caches(io)](int64_t first, int64_t last) {
                kernels<Scalar>().neunorm_forward(io, options, plan, first, last, past_caches);
              });
  }

  template <class Scalar>
  static void neunorm_backward(const NeuNormBackward<Scalar>& io, const LifOptions& options, int) {
    const cpu::NeuNormPlan plan = backward_plan<Scalar>(io, io.grad_decays != nullptr);
    run_tasks(io.groups * plan.strips, io.batch / io.groups * io.steps * io.features * plan.length,
              [&, past_caches = cpu::past_caches(io)](int64_t first, int64_t last) {
                kernels<Scalar>().neunorm_backward(io, options, plan, first, last, past_caches);
              });
  }

  // In turn. How torch's own sum rounds depends on where in memory a number lies.
  static void sum_groups(const Tensor& total, const Tensor& parts) {
    visit_scalar(total.scalar_type(), [&](auto number) {
      using State = state_t<decltype(number)>;
      const int64_t count = total.numel(), groups = parts.size(0);
      State* const sum = output_pointer<State>(total);
      const State* const part = input_pointer<State>(parts);
      run_tasks((count + cpu::kBlock - 1) / cpu::kBlock, groups * cpu::kBlock, [&](int64_t first, int64_t last) {
        const int64_t begin = first * cpu::kBlock, end = std::min(last * cpu::kBlock, count);
        std::copy(part + begin, part + end, sum + begin);
        for (int64_t g = 1; g < groups; ++g)
          for (int64_t i = begin; i < end; ++i) sum[i] += part[g * count + i];
      });
    });
  }

  static Tensor new_tensor(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType type,
                           const Tensor& like) {
    int64_t count = 1;
    for (const int64_t size : sizes) count *= size;
    const size_t bytes = size_t(count) * element_size(type);
    if (bytes < cpu::kSmallestKept || torch_from_blob == nullptr) return empty_with(sizes, strides, type, like);
    void* const block = cpu::take_block(bytes);
    if (block == nullptr) return empty_with(sizes, strides, type, like);
    AtenTensorHandle handle;
    const auto code = torch_from_blob(
        block, int64_t(sizes.size()), sizes.data(), strides.data(), 0, dtype_code(type), aoti_torch_device_type_cpu(),
        like.get_device_index(), &handle, aoti_torch_layout_strided(), nullptr, 0,
        [](void* data, void* size) { cpu::give_block(data, reinterpret_cast<size_t>(size)); },
        reinterpret_cast<void*>(bytes));
    if (code != AOTI_TORCH_SUCCESS) cpu::give_block(block, bytes);
    TORCH_ERROR_CODE_CHECK(code);
    return Tensor(handle);
  }

 private:
  template <class Io, class Range>
  static void run(const Io& io, const Range& range) {
    using cpu::kBlock;
    run_tasks((io.neurons + kBlock - 1) / kBlock, io.steps * kBlock,
              [&](int64_t first, int64_t last) { range(first * kBlock, std::min(last * kBlock, io.neurons)); });
  }

  template <class Range>
  static void run_tasks(int64_t tasks, int64_t updates_each, const Range& range) {
    // A thread is worth waking for about this many updates.
    constexpr int64_t kUpdatesPerThread = 16384;
    torch::stable::parallel_for(0, tasks, std::max<int64_t>(1, kUpdatesPerThread / updates_each), range);
  }

  template <class Scalar, class Shape>
  static cpu::NeuNormPlan backward_plan(const Shape& of, bool decays) {
    return neunorm_plan<Scalar>(of, cpu::neunorm_backward_rows(of.steps, decays));
  }

  template <class Scalar, class Shape>
  static cpu::NeuNormPlan neunorm_plan(const Shape& of, int64_t rows) {
    return {rows, of.batch, of.features, of.positions, int64_t(sizeof(state_t<Scalar>))};
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

int cpu_neunorm_chunk() { return Cpu::kNeuNormChunk; }

int64_t cpu_cache_limit() { return torch_from_blob ? cpu::cache_limit() : 0; }

}  // namespace stbp

STABLE_TORCH_LIBRARY_IMPL(stbp_cuda, CPU, m) { stbp::implement<stbp::Cpu>(m); }
