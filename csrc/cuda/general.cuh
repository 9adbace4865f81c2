// The CUDA kernels of every neuron with all that Extras has. As neuron.cuh, without torch or a header of CUDA's own.
//
// A thread owns a pack of neighbouring neurons, whose parameters it loads before the loop over time. Gradients of
// parameters: a thread adds up those of a sample over time in the state's type, and samples in double, in places of its
// own; the block adds up its threads as a tree, and a second kernel all blocks. No atomics: the same bits on every run.
#pragma once

#include <cstdint>
#include <utility>

#include "neuron.cuh"

namespace stbp::cuda {

// Entries of the parameters of a thread's neurons, which are neighbours from n on: the same for all, or neighbours,
// too.
template <int kWidth, class State>
struct Entries {
  int64_t first, apart;

  __device__ __forceinline__ Entries(const Extras<State>& extras, int64_t n)
      : first(extras.count > 1 ? n / extras.group % extras.count : 0),
        apart(extras.count > 1 && extras.group == 1 ? 1 : 0) {}

  // Those of parameter `which`, in a row of [P, R, count].
  __device__ __forceinline__ void load(const Extras<State>& extras, int which, int64_t row,
                                       State (&values)[kWidth]) const {
    const State* const from = extras.parameters + (which * extras.rows + row) * extras.count + first;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] = __ldg(from + i * apart);
  }
};

// What a thread's neurons compute with: their parameters, and scale and shift of their current.
template <int kWidth, class Neuron>
struct Parameters {
  using State = typename Neuron::State;
  using Values = decltype(std::declval<const Neuron&>().values(std::declval<const State (&)[Neuron::kParameters]>()));
  static constexpr int kOwn = Neuron::kParameters;

  const Extras<State>& extras;
  Entries<kWidth, State> entries;
  Values values[kWidth];
  State scale[kWidth], shift[kWidth];  // 1 and -0 leave every current as it is

  __device__ __forceinline__ Parameters(const Neuron& neuron, const Extras<State>& extras_, int64_t n)
      : extras(extras_), entries(extras_, n) {
    State all[kWidth][kOwn];
#pragma unroll
    for (int which = 0; which < kOwn; ++which) {
      State row[kWidth];
      if (extras.parameters) entries.load(extras, which, 0, row);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) all[i][which] = extras.parameters ? row[i] : neuron.parameter(which);
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      values[i] = neuron.values(all[i]);
      scale[i] = State(1);
      shift[i] = -State(0);
    }
    if (extras.affine && extras.rows == 1) load_affine(0);
  }
  // Scale and shift of step t, where they differ from step to step. Packs never have such.
  __device__ __forceinline__ void at_step(int64_t t) {
    if constexpr (kWidth == 1) {
      if (extras.affine && extras.rows > 1) load_affine(t);
    }
  }
  __device__ __forceinline__ State current(int i, State x) const { return scale[i] * x + shift[i]; }

 private:
  __device__ __forceinline__ void load_affine(int64_t row) {
    entries.load(extras, kOwn, row, scale);
    entries.load(extras, kOwn + 1, row, shift);
  }
};

__device__ __forceinline__ int general_rows_of(int64_t left) {
  return left < kGeneralAtOnce ? int(left) : kGeneralAtOnce;
}

// Minimum resident blocks: the most at which nothing spills.
template <class Scalar, int kWidth>
constexpr int kGeneralForwardBlocks = sizeof(Scalar) == 8 ? 4
                                      : kWidth == 1       ? 8
                                                          : 5;
template <class Scalar, int kWidth>
constexpr int kGeneralBackwardBlocks = sizeof(Scalar) < 8 && kWidth == 1 ? 4 : 3;

template <int kWidth, class Scalar, class Neuron>
__global__ void __launch_bounds__(kMostThreads, min_blocks(kGeneralForwardBlocks<Scalar, kWidth>))
    general_forward(const NeuronForward<Scalar> io, const Extras<state_t<Scalar>> extras, const GeneralPlan plan,
                    const Neuron neuron) {
  using State = state_t<Scalar>;
  using Row = Pack<Scalar, kWidth>;
  using States = Pack<State, kWidth>;
  const int64_t first = (int64_t(blockIdx.x) * plan.threads + threadIdx.x) * kWidth;
  if (first >= io.layout.neurons()) return;
  const int64_t all = io.layout.steps, steps = extras.steps(io.layout, first), saved = (all - 1) / kChunk;
  const int64_t at = io.layout.at(first, all), stride = io.layout.inner;
  Parameters<kWidth, Neuron> parameters(neuron, extras, first);
  const Scalar* const x = io.x + (extras.constant ? first : at);
  const int64_t x_stride = extras.constant ? 0 : stride;
  Scalar* const output = io.output ? io.output + at : nullptr;
  State* const potentials = extras.potentials ? extras.potentials + at : nullptr;
  State* const states = io.states ? io.states + io.layout.at(first, saved) : nullptr;
  State v[kWidth];
  load_states(v, io.initial, first);
  int64_t t = 0;
  while (t < steps) {
    Row rows[kGeneralAtOnce];
    const int left = general_rows_of(steps - t);
    load_rows<1>(rows, [](const Scalar* from) { return Row::load(from); }, x + t * x_stride, x_stride, left);
#pragma unroll
    for (int k = 0; k < kGeneralAtOnce; ++k) {
      if (k >= left) break;
      parameters.at_step(t);
      State o[kWidth], shown[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const State u = neuron.step(parameters.values[i], v[i], parameters.current(i, rows[k].get(i)), o[i]);
        shown[i] = extras.after_reset ? v[i] : u;
      }
      if (output) Row::of(o).store(output + t * stride);
      if (potentials) States::of(shown).store(potentials + t * stride);
      ++t;
    }
    if (states && t % kChunk == 0 && t < all) States::of(v).store_away(states + (t / kChunk - 1) * stride);
  }
  // Past the end of a sample its state stays.
  if (states)
    for (int64_t row = t / kChunk; row < saved; ++row) States::of(v).store_away(states + row * stride);
  for (; t < all; ++t) {
    if (output) Row{}.store(output + t * stride);
    if (potentials) States{}.store(potentials + t * stride);
  }
  if (io.final_state) States::of(v).store(io.final_state + first);
}

// A thread's sums, for each parameter and row, in doubles: where a block's threads have as many each, those of one
// thread are plan.threads apart. One for all neurons of the thread, or with plan.own one for each.
template <int kWidth>
struct ThreadSums {
  const GeneralPlan& plan;
  double* sums;

  __device__ __forceinline__ ThreadSums(const GeneralPlan& plan_, double* block_sums)
      : plan(plan_), sums(block_sums + threadIdx.x) {
    for (int64_t i = 0; i < size(); ++i) sums[i * plan.threads] = 0;
  }
  __device__ __forceinline__ int64_t size() const { return plan.cells * (plan.own ? kWidth : 1); }

  template <class State>
  __device__ __forceinline__ void add(int64_t cell, const State (&values)[kWidth]) const {
    if (kWidth == 1 || !plan.own) {
      State sum = values[0];
#pragma unroll
      for (int i = 1; i < kWidth; ++i) sum += values[i];
      sums[cell * plan.threads] += double(sum);
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sums[(cell * kWidth + i) * plan.threads] += double(values[i]);
    }
  }
  // Adds up, as a tree, those of `count` threads, `apart` from each other, of which this one is number `place`; all
  // threads of the block come here, and have at most `most` others to add up with.
  __device__ __forceinline__ void add_up(int place, int count, int apart, int most) const {
    for (int width = 1; width < most; width *= 2) {
      __syncthreads();
      if (place % (2 * width) == 0 && place + width < count)
        for (int64_t i = 0; i < size(); ++i) sums[i * plan.threads] += sums[i * plan.threads + width * apart];
    }
  }
};

// Goes back chunk by chunk, and within a chunk kGeneralAtOnce steps at a time: once forward to find the states before
// each of these parts, and then from the last part to the first.
template <int kWidth, class Scalar, class Neuron>
__device__ __forceinline__ void general_sample_back(const NeuronBackward<Scalar>& io,
                                                    const Extras<state_t<Scalar>>& extras, const Neuron& neuron,
                                                    Parameters<kWidth, Neuron>& parameters,
                                                    const ThreadSums<kWidth>& sums, int64_t first) {
  using State = state_t<Scalar>;
  using Row = Pack<Scalar, kWidth>;
  using States = Pack<State, kWidth>;
  constexpr int kParts = kChunk / kGeneralAtOnce, kOwn = Neuron::kParameters;
  const int64_t all = io.layout.steps, steps = extras.steps(io.layout, first);
  const int64_t at = io.layout.at(first, all), stride = io.layout.inner;
  const Scalar* const x = io.x + (extras.constant ? first : at);
  const int64_t x_stride = extras.constant ? 0 : stride;
  const auto load = [](const Scalar* from) { return Row::load(from); };
  State grad_v[kWidth], grad_constant[kWidth] = {}, gradients[kWidth][kOwn] = {};
  State grad_scale[kWidth] = {}, grad_shift[kWidth] = {};
  load_states(grad_v, io.grad_final, first);
  if (!extras.constant)
    for (int64_t t = steps; t < all; ++t) Row{}.store(io.grad_x + at + t * stride);
  for (int64_t chunk = (steps - 1) / kChunk; chunk >= 0; --chunk) {
    const int64_t begin = chunk * kChunk, left_of_chunk = steps - begin;
    int part = int((left_of_chunk < kChunk ? left_of_chunk - 1 : kChunk - 1) / kGeneralAtOnce);
    State v[kWidth], starts[kParts - 1][kWidth];  // the latest first
    load_states(v, chunk > 0 ? io.states : io.initial,
                chunk > 0 ? io.layout.at(first, (all - 1) / kChunk) + (chunk - 1) * stride : first);
#pragma unroll 1
    for (int earlier = 0; earlier < part; ++earlier) {
      Row rows[kGeneralAtOnce];
      const int64_t start = begin + earlier * kGeneralAtOnce;
      load_rows<kGeneralAtOnce>(rows, load, x + start * x_stride, x_stride, kGeneralAtOnce);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
#pragma unroll
        for (int j = kParts - 2; j > 0; --j) starts[j][i] = starts[j - 1][i];
        starts[0][i] = v[i];
      }
#pragma unroll
      for (int k = 0; k < kGeneralAtOnce; ++k) {
        parameters.at_step(start + k);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          State unused;
          neuron.step(parameters.values[i], v[i], parameters.current(i, rows[k].get(i)), unused);
        }
      }
    }
#pragma unroll 1
    for (; part >= 0; --part) {
      const int64_t start = begin + part * kGeneralAtOnce;
      const int left = general_rows_of(steps - start);
      Row rows[kGeneralAtOnce], gradient[kGeneralAtOnce] = {};
      load_rows<0>(rows, load, x + start * x_stride, x_stride, left);
      if (io.grad_output) load_rows<0>(gradient, load, io.grad_output + at + start * stride, stride, left);
      State before[kGeneralAtOnce][kWidth];
#pragma unroll
      for (int k = 0; k < kGeneralAtOnce; ++k) {
        if (k >= left) break;
        parameters.at_step(start + k);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          State unused;
          before[k][i] = v[i];
          neuron.step(parameters.values[i], v[i], parameters.current(i, rows[k].get(i)), unused);
        }
      }
#pragma unroll
      for (int k = kGeneralAtOnce - 1; k >= 0; --k) {
        if (k >= left) continue;
        const int64_t t = start + k;
        parameters.at_step(t);
        const auto shown = extras.potentials ? States::load(extras.potentials + at + t * stride) : States{};
        State u[kWidth], derivatives[kWidth] = {}, grad_x[kWidth];
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          State after = before[k][i], unused;
          u[i] = neuron.step(parameters.values[i], after, parameters.current(i, rows[k].get(i)), unused);
        }
        neuron.derivatives_at(parameters.values, u, derivatives);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          if (extras.after_reset) grad_v[i] += shown.get(i);
          const State grad_i =
              neuron.step_back(parameters.values[i], before[k][i], u[i], derivatives[i], gradient[k].get(i),
                               extras.after_reset ? State(0) : shown.get(i), grad_v[i], gradients[i]);
          grad_x[i] = grad_i * parameters.scale[i];
          grad_constant[i] += grad_x[i];
          grad_scale[i] += grad_i * rows[k].get(i);
          grad_shift[i] += grad_i;
        }
        if (!extras.constant) Row::of(grad_x).store(io.grad_x + at + t * stride);
        if (kWidth == 1 && sums.plan.learned && extras.affine && extras.rows > 1) {
          sums.add(kOwn + t, grad_scale);
          sums.add(kOwn + extras.rows + t, grad_shift);
          grad_scale[0] = grad_shift[0] = State(0);
        }
      }
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        v[i] = starts[0][i];
#pragma unroll
        for (int j = 0; j < kParts - 2; ++j) starts[j][i] = starts[j + 1][i];
      }
    }
  }
  if (extras.constant) Row::of(grad_constant).store(io.grad_x + first);
  if (io.grad_initial) States::of(grad_v).store(io.grad_initial + first);
  if (sums.plan.learned && extras.affine && extras.rows == 1) {
    sums.add(kOwn, grad_scale);
    sums.add(kOwn + 1, grad_shift);
  }
  if (sums.plan.learned)
#pragma unroll
    for (int which = 0; which < kOwn; ++which) {
      State row[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) row[i] = gradients[i][which];
      sums.add(which, row);
    }
}

template <int kWidth, class Scalar, class Neuron>
__global__ void __launch_bounds__(kMostThreads, min_blocks(kGeneralBackwardBlocks<Scalar, kWidth>))
    general_backward(const NeuronBackward<Scalar> io, const Extras<state_t<Scalar>> extras, const GeneralPlan plan,
                     const Neuron neuron) {
  const int64_t column = blockIdx.x % unsigned(plan.columns), group = blockIdx.x / unsigned(plan.columns);
  const int lane = int(threadIdx.x) % plan.lanes, row = int(threadIdx.x) / plan.lanes;
  const int64_t positions = int64_t(plan.lanes) * kWidth, position = column * positions + lane * kWidth;
  const int64_t neurons = io.layout.neurons();
  double* const held = extras.partial + (plan.cells * plan.groups * plan.sums() +
                                         int64_t(blockIdx.x) * plan.cells * (plan.own ? kWidth : 1) * plan.threads);
  const ThreadSums<kWidth> sums(plan, plan.shared_bytes > 0 ? reinterpret_cast<double*>(shared_bytes()) : held);
  if (position < plan.period && position < neurons) {
    Parameters<kWidth, Neuron> parameters(neuron, extras, position);
    for (int64_t pass = 0; pass < plan.passes; ++pass) {
      const int64_t first = ((group * plan.passes + pass) * plan.thread_rows + row) * plan.period + position;
      if (first >= neurons) break;
      general_sample_back(io, extras, neuron, parameters, sums, first);
    }
  }
  if (!plan.learned) return;
  sums.add_up(row, plan.thread_rows, plan.lanes, plan.thread_rows);
  // The lanes of the same entry.
  const int64_t entry = position / plan.group, before = entry * plan.group - column * positions;
  const int64_t end = (before + plan.group) / kWidth;
  const int begin = before > 0 ? int(before / kWidth) : 0, lanes = end < plan.lanes ? int(end) : plan.lanes;
  sums.add_up(lane - begin, row == 0 ? lanes - begin : 0, 1, plan.lanes);
  if (row > 0 || lane > begin || position >= plan.period) return;
  const int own = plan.own ? kWidth : 1;
  for (int64_t cell = 0; cell < plan.cells; ++cell)
    for (int i = 0; i < own; ++i)
      extras.partial[(cell * plan.groups + group) * plan.sums() + column + entry + i] =
          sums.sums[(cell * own + i) * plan.threads];
}

// Adds up the blocks' sums of each entry, in an order that the plan alone decides.
template <class State>
__global__ void __launch_bounds__(kMostThreads) general_gradients(const Extras<State> extras, const GeneralPlan plan) {
  __shared__ double scratch[kMostThreads];
  const int parameters = plan.parameters;
  const int thread = int(threadIdx.x), member = thread % plan.team;
  const int64_t at = int64_t(blockIdx.x) * (kMostThreads / plan.team) + thread / plan.team;  // in [P, R, count]
  const int64_t entry = at % plan.count, row = at / plan.count % plan.rows, which = at / plan.count / plan.rows;
  const int64_t cell = which < parameters ? which : parameters + (which - parameters) * plan.rows + row;
  const bool there = which < parameters ? row == 0 : cell < plan.cells;
  const int64_t positions = int64_t(plan.lanes) * plan.width;
  const int64_t begin = entry * plan.group / positions;
  const int64_t columns = plan.columns > 0 ? ((entry + 1) * plan.group - 1) / positions + 1 - begin : 0;
  double sum = 0;
  if (there)
    for (int64_t i = member; i < columns * plan.groups; i += plan.team)
      sum += extras.partial[(cell * plan.groups + i / columns) * plan.sums() + entry + begin + i % columns];
  scratch[thread] = sum;
  for (int width = 1; width < plan.team; width *= 2) {
    __syncthreads();
    if (member % (2 * width) == 0) scratch[thread] += scratch[thread + width];
  }
  if (member == 0 && which < parameters + (plan.affine ? 2 : 0)) extras.grad_parameters[at] = State(scratch[thread]);
}

template <class Scalar>
int widest_pack(const NeuronForward<Scalar>& io, const Extras<state_t<Scalar>>& extras) {
  const int of_potentials = WidestPack<Scalar>(io.layout.inner).at(extras.potentials), of_io = widest_pack(io);
  return of_io < of_potentials ? of_io : of_potentials;
}
template <class Scalar>
int widest_pack(const NeuronBackward<Scalar>& io, const Extras<state_t<Scalar>>& extras) {
  const int of_potentials = WidestPack<Scalar>(io.layout.inner).at(extras.potentials), of_io = widest_pack(io);
  return of_io < of_potentials ? of_io : of_potentials;
}

}  // namespace stbp::cuda
