// The CPU's IMPL block: threads, and the choice of instruction set.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <utility>

#include "../torch/build_info.h"
#include "../torch/implement.h"
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
  static void forward(const NeuronForward<Scalar>& io, const LifOptions& options, int) {
    run(io, [&, past_caches = cpu::past_caches(io)](int64_t first, int64_t last) {
      kernels<Scalar>().forward(io, options, first, last, past_caches);
    });
  }

  template <class Scalar>
  static void backward(const NeuronBackward<Scalar>& io, const LifOptions& options, int) {
    run(io, [&, past_caches = cpu::past_caches(io)](int64_t first, int64_t last) {
      kernels<Scalar>().backward(io, options, first, last, past_caches);
    });
  }

  template <class Scalar>
  static void general_forward(const NeuronForward<Scalar>& io, const Extras<state_t<Scalar>>& extras,
                              const NeuronOptions& options, int) {
    cpu::GeneralPlan plan(io.layout, extras, cpu::kGeneralTile);
    plan.past_caches =
        cpu::past_caches(io) && plan.aligned() && cpu::aligned_for_streams(extras.potentials, io.layout.inner);
    run_tasks(plan.tasks(), plan.strands / plan.groups * plan.width * io.layout.steps,
              [&](int64_t first, int64_t last) {
                kernels<Scalar>().general_forward(io, extras, options, plan, first, last);
              });
  }

  template <class Scalar>
  static void general_backward(const NeuronBackward<Scalar>& io, const Extras<state_t<Scalar>>& extras,
                               const NeuronOptions& options, int) {
    cpu::GeneralPlan plan(io.layout, extras, cpu::kGeneralTileBack);
    plan.past_caches = cpu::past_caches(io) && plan.aligned();
    run_tasks(plan.tasks(), plan.strands / plan.groups * plan.width * io.layout.steps,
              [&](int64_t first, int64_t last) {
                kernels<Scalar>().general_backward(io, extras, options, plan, first, last);
              });
    if (extras.grad_parameters) sum_partial(extras, plan, rows_of(extras, options));
  }

  template <class Scalar>
  static int64_t general_partial(const Layout& layout, const Extras<state_t<Scalar>>& extras,
                                 const NeuronOptions& options) {
    if (extras.grad_parameters == nullptr) return 0;
    const cpu::GeneralPlan plan(layout, extras, cpu::kGeneralTileBack);
    return plan.tasks() * plan.entries * rows_of(extras, options);
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

 private:
  template <class Io, class Range>
  static void run(const Io& io, const Range& range) {
    using cpu::kBlock;
    const int64_t neurons = io.layout.neurons();
    run_tasks((neurons + kBlock - 1) / kBlock, io.layout.steps * kBlock,
              [&](int64_t first, int64_t last) { range(first * kBlock, std::min(last * kBlock, neurons)); });
  }

  // Of the parameters of a neuron, with or without an affine current.
  template <class State>
  static int64_t rows_of(const Extras<State>& extras, const NeuronOptions& options) {
    return (std::visit([](const auto& of) { return of.kParameters; }, options) + 2) * extras.rows;
  }

  // The sums for each entry of all tasks that have some of its neurons, one after the other.
  template <class State>
  static void sum_partial(const Extras<State>& extras, const cpu::GeneralPlan& plan, int64_t rows) {
    const int64_t wanted = extras.affine ? rows : rows - 2 * extras.rows;
    run_tasks(extras.count, rows * plan.groups * 4, [&](int64_t first_entry, int64_t last_entry) {
      for (int64_t entry = first_entry; entry < last_entry; ++entry)
        for (int64_t row = 0; row < wanted; ++row) {
          double sum = 0;
          plan.each_place(extras.group, extras.count, entry, [&](int64_t task, int64_t place) {
            sum += extras.partial[(task * plan.entries + place) * rows + row];
          });
          extras.grad_parameters[row * extras.count + entry] = State(sum);
        }
    });
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

}  // namespace stbp

STABLE_TORCH_LIBRARY_IMPL(stbp_cuda, CPU, m) { stbp::implement<stbp::Cpu>(m); }
