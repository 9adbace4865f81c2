// Runs the CUDA kernels on the CPU against plain loops over time around neurons/, for shapes around the ends of packs,
// blocks, chunks and strips. Exits with 1 at the first difference. tests/test_mutants.py compiles it in seconds, once
// with the kernels as they are and once with all the ways to break them on purpose. With an argument it checks only the
// plain, the general, or the neunorm kernels.

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <random>
#include <vector>

#include "run.h"

namespace stbp::cuda {
namespace {

using Neuron = Lif<float, EitherReset, Heaviside, Rectangular<float>>;

// With threads of the system, for ThreadSanitizer: kernels without barriers have nothing to show to it, and a block of
// the others costs a hundred times more.
#if defined(STBP_THREADS)
constexpr bool kThreads = true;
#else
constexpr bool kThreads = false;
#endif

enum class Reset { kCommon, kHard, kSoft };

LifOptions options_of(Reset reset) {
  LifOptions options;
  options.decay = 0.5;
  options.v_reset = reset == Reset::kHard ? -0.125 : 0.0;
  options.soft_reset = reset == Reset::kSoft;
  return options;
}

Neuron neuron_of(const LifOptions& options) {
  return {LifConstants<float>(options), Rectangular<float>(options.surrogate)};
}

void demand(bool met, const char* what) {
  if (met) return;
  std::printf("differs: %s\n", what);
  std::exit(1);
}

template <class Scalar>
std::vector<Scalar> random_row(int64_t size, float low, float high) {
  static std::mt19937 generator(0);
  std::vector<Scalar> row(static_cast<size_t>(size));
  for (Scalar& value : row) value = Rounded<Scalar>::from(std::uniform_real_distribution<float>(low, high)(generator));
  return row;
}

template <class Scalar>
std::vector<Scalar> unwritten(int64_t size) {
  return std::vector<Scalar>(static_cast<size_t>(size), Rounded<Scalar>::from(std::numeric_limits<float>::quiet_NaN()));
}

template <class Scalar>
void forget(std::vector<Scalar>& row) {
  row.assign(row.size(), Rounded<Scalar>::from(std::numeric_limits<float>::quiet_NaN()));
}

// Whether all kernels have read what they are given once. Demanded at the end, for what they make of it tells more.
bool all_read_once = true;

// Runs a kernel; whether it has read as many bytes of each of these arrays as that has.
template <class Kernel, class... Arrays>
bool reads_once(const Kernel& kernel, const Arrays&... arrays) {
  (counted.emplace_back(arrays.data(), arrays.data() + arrays.size()), ...);
  kernel();
  bool once = true;
  for (const Counted& array : counted)
    once = once && array.bytes == size_t(static_cast<const char*>(array.end) - static_cast<const char*>(array.begin));
  counted.clear();
  return once;
}

template <class T>
bool same(T a, T b) {
  return to_state(a) == to_state(b);
}

// Of one neuron, as the reference has it: T spikes, and T gradients.
template <class Scalar>
struct Expected {
  std::vector<Scalar> spikes, grad_x;
  float final_potential, grad_initial;

  template <class X, class Gradient>
  Expected(const Neuron& neuron, int64_t steps, const X& x, const Gradient& gradient, float v, float grad_v) {
    std::vector<float> u;
    for (int64_t t = 0; t < steps; ++t) {
      float o;
      u.push_back(neuron.step(v, x(t), o));
      spikes.push_back(Rounded<Scalar>::from(o));
    }
    final_potential = v;
    grad_x.resize(u.size());
    for (int64_t t = steps - 1; t >= 0; --t)
      grad_x[size_t(t)] = Rounded<Scalar>::from(neuron.step_back(u[size_t(t)], gradient(t), grad_v));
    grad_initial = grad_v;
  }
};

// Where the neurons of the checks lie: T between two dimensions of N neurons in all.
Layout layout_of(int64_t steps, int64_t neurons, int64_t outer) { return {outer, steps, neurons / outer}; }

template <class Scalar>
NeuronForward<Scalar> forward_of(const Layout& layout, const Scalar* x, Scalar* output) {
  NeuronForward<Scalar> io{};
  io.layout = layout;
  io.x = x;
  io.output = output;
  return io;
}

template <class Scalar>
NeuronBackward<Scalar> backward_of(const Layout& layout, const Scalar* x, const Scalar* grad_output, Scalar* grad_x) {
  NeuronBackward<Scalar> io{};
  io.layout = layout;
  io.x = x;
  io.grad_output = grad_output;
  io.grad_x = grad_x;
  return io;
}

template <class Scalar>
void check_lif(const Layout& layout, int threads, Reset reset) {
  const int64_t steps = layout.steps, neurons = layout.neurons();
  const LifOptions options = options_of(reset);
  const auto x = random_row<Scalar>(steps * neurons, -0.5f, 1.5f),
             gradient = random_row<Scalar>(steps * neurons, -1, 1);
  const auto initial = random_row<float>(neurons, -1, 1), grad_final = random_row<float>(neurons, -1, 1);
  const auto kept = (steps - 1) / kChunk * neurons;
  auto spikes = unwritten<Scalar>(steps * neurons);
  auto final_state = unwritten<float>(neurons), states = unwritten<float>(kept);
  NeuronForward<Scalar> forward = forward_of(layout, x.data(), spikes.data());
  forward.initial = initial.data();
  forward.final_state = final_state.data();
  forward.states = states.data();
  auto grad_x = unwritten<Scalar>(steps * neurons);
  auto grad_initial = unwritten<float>(neurons);
  NeuronBackward<Scalar> backward = backward_of(layout, x.data(), gradient.data(), grad_x.data());
  backward.initial = initial.data();
  backward.states = states.data();
  backward.grad_final = grad_final.data();
  backward.grad_initial = grad_initial.data();
  const Neuron neuron = neuron_of(options);
  const auto place = [&](int64_t n, int64_t t) { return size_t(layout.at(n, steps) + t * layout.inner); };
  std::vector<Expected<Scalar>> expected;
  for (int64_t n = 0; n < neurons; ++n) {
    const auto at = [&](const std::vector<Scalar>& rows) {
      return [&, n](int64_t t) { return to_state(rows[place(n, t)]); };
    };
    expected.emplace_back(neuron, steps, at(x), at(gradient), initial[size_t(n)], grad_final[size_t(n)]);
  }
  const auto of_blocks = [&](LifPlan plan) {
    plan.threads = threads;
    plan.blocks = (neurons + plan.width * threads - 1) / (plan.width * threads);
    return plan;
  };
  for (const LifPlan& plan : compiled_plans<Scalar>(steps, false)) {
    if (plan.width > widest_pack(forward)) continue;
    forget(spikes), forget(final_state), forget(states);
    all_read_once &= reads_once([&] { run_forward(forward, options, of_blocks(plan)); }, x, initial);
    for (int64_t n = 0; n < neurons; ++n) {
      for (int64_t t = 0; t < steps; ++t)
        demand(same(spikes[place(n, t)], expected[size_t(n)].spikes[size_t(t)]), "spikes");
      demand(same(final_state[size_t(n)], expected[size_t(n)].final_potential), "the final potential");
    }
  }
  for (const LifPlan& plan : compiled_plans<Scalar>(steps, true)) {
    if (plan.width > widest_pack(backward)) continue;
    forget(grad_x), forget(grad_initial);
    all_read_once &=
        reads_once([&] { run_backward(backward, options, of_blocks(plan)); }, x, initial, states, gradient, grad_final);
    for (int64_t n = 0; n < neurons; ++n) {
      for (int64_t t = 0; t < steps; ++t)
        demand(same(grad_x[place(n, t)], expected[size_t(n)].grad_x[size_t(t)]), "dL/dx");
      demand(same(grad_initial[size_t(n)], expected[size_t(n)].grad_initial), "dL/dv[0]");
    }
  }
}

// Pointers that allow no pack must not be given one.
void check_alignment() {
  std::vector<float> rows(9);
  const auto widest = [](float* x) { return widest_pack(forward_of({1, 1, 8}, x, x)); };
  auto* const aligned = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(rows.data()) + 15) / 16 * 16);
  demand(widest(aligned) == 4 && widest(aligned + 1) == 1 && widest(aligned + 2) == 2, "the width that fits");
}

// Address space without memory, but for the pages that are touched.
template <class T>
T* reserve(int64_t size) {
  void* const memory = mmap(nullptr, size_t(size) * sizeof(T), PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("mmap");
    std::exit(2);
  }
  return static_cast<T*>(memory);
}

// More than 2^31 neurons: the last block alone, at the addresses that all of them would have.
void check_large() {
  constexpr int64_t kSteps = kChunk + 1, kNeurons = (int64_t(1) << 31) + 8 * 40;
  const LifOptions options = options_of(Reset::kCommon);
  const auto plan_of = [](bool backward) { return plan_lif(kSteps, kNeurons, sizeof(Half), backward, 8, {132, 0}); };
  const LifPlan plan = plan_of(false), back = plan_of(true);
  demand(plan.width == 8 && back.width == 4, "plans for many neurons");
  auto* const x = reserve<Half>(kSteps * kNeurons);
  auto* const spikes = reserve<Half>(kSteps * kNeurons);
  auto* const states = reserve<float>(kNeurons);
  auto* const gradient = reserve<Half>(kSteps * kNeurons);
  auto* const grad_x = reserve<Half>(kSteps * kNeurons);
  const int64_t first = (plan.blocks - 1) * plan.threads * plan.width;
  const int64_t first_back = first / (back.threads * back.width);
  for (int64_t t = 0; t < kSteps; ++t)
    for (int64_t n = first; n < kNeurons; ++n) {
      x[t * kNeurons + n] = Rounded<Half>::from(float((n * 7 + t * 3) % 11) / 8);
      gradient[t * kNeurons + n] = Rounded<Half>::from(float((n * 5 + t) % 7) / 8);
    }
  const Neuron neuron = neuron_of(options);
  NeuronForward<Half> forward = forward_of({1, kSteps, kNeurons}, x, spikes);
  forward.states = states;
  NeuronBackward<Half> backward = backward_of({1, kSteps, kNeurons}, x, gradient, grad_x);
  backward.states = states;
  run_forward(forward, options, plan, plan.blocks - 1);
  run_backward(backward, options, back, first_back);
  for (int64_t n = first; n < kNeurons; ++n) {
    const auto at = [&](const Half* rows) { return [rows, n](int64_t t) { return to_state(rows[t * kNeurons + n]); }; };
    const Expected<Half> expected(neuron, kSteps, at(x), at(gradient), 0, 0);
    for (int64_t t = 0; t < kSteps; ++t) {
      demand(same(spikes[t * kNeurons + n], expected.spikes[size_t(t)]), "spikes of many neurons");
      demand(same(grad_x[t * kNeurons + n], expected.grad_x[size_t(t)]), "dL/dx of many neurons");
    }
  }
}

bool near(float a, float b, float unit) { return std::abs(a - b) <= unit * (1 + std::abs(b)); }

// The general kernels: what of Extras a call has.
struct GeneralCase {
  Layout layout;
  int64_t group, count;  // 0 of them: no parameters
  int64_t rows;
  bool affine, learned;
  int64_t sample;  // with lengths, or 0
  bool constant, after_reset, potentials, output, misaligned;
};

template <class Scalar, class MakeNeuron>
void check_general(const GeneralCase& of, const NeuronOptions& options, const MakeNeuron& make_neuron) {
  const auto neuron = make_neuron();
  using Neuron = std::decay_t<decltype(neuron)>;
  constexpr int kOwn = Neuron::kParameters;
  const Layout& layout = of.layout;
  const int64_t steps = layout.steps, neurons = layout.neurons(), all = steps * neurons;
  const int64_t given = of.count ? kOwn + (of.affine ? 2 : 0) : 0;
  const int64_t skipped = of.misaligned ? 1 : 0;
  const int64_t x_size = of.constant ? neurons : all;
  const auto x = random_row<Scalar>(x_size + skipped, -0.5f, 1.5f), gradient = random_row<Scalar>(all, -1, 1);
  const auto initial = random_row<float>(neurons, -1, 1), grad_final = random_row<float>(neurons, -1, 1);
  const auto parameters = random_row<float>(given * of.rows * of.count, 0.25f, 1.25f);
  auto grad_potentials = random_row<float>(all, -1, 1);
  std::vector<int64_t> lengths;
  for (int64_t b = 0; of.sample && b < neurons / of.sample; ++b) lengths.push_back(b * 7 % (steps + 3) - 1);
  auto output = unwritten<Scalar>(all), grad_x = unwritten<Scalar>(x_size);
  auto final_state = unwritten<float>(neurons), states = unwritten<float>((steps - 1) / kChunk * neurons);
  auto potentials = unwritten<float>(all), grad_initial = unwritten<float>(neurons);
  auto grad_parameters = unwritten<float>(of.learned ? given * of.rows * of.count : 0);

  Extras<float> extras{};
  extras.parameters = of.count ? parameters.data() : nullptr;
  extras.rows = of.rows;
  extras.group = of.group;
  extras.count = of.count;
  extras.affine = of.affine;
  extras.lengths = of.sample ? lengths.data() : nullptr;
  extras.sample = of.sample;
  extras.constant = of.constant;
  extras.after_reset = of.after_reset;
  extras.potentials = of.potentials ? potentials.data() : nullptr;
  NeuronForward<Scalar> forward = forward_of(layout, x.data() + skipped, of.output ? output.data() : nullptr);
  forward.initial = initial.data();
  forward.final_state = final_state.data();
  forward.states = states.data();
  const DeviceProperties device{1, 0};
  run_general(forward, extras, options,
              plan_general<Scalar>(layout, extras, options, widest_pack(forward, extras), device));
  extras.potentials = of.potentials ? grad_potentials.data() : nullptr;
  extras.grad_parameters = of.learned ? grad_parameters.data() : nullptr;
  std::vector<double> partial(size_t(general_partial<Scalar>(layout, extras, options)),
                              std::numeric_limits<double>::quiet_NaN());
  demand(partial.empty() == !of.learned, "room for sums");
  extras.partial = partial.data();
  NeuronBackward<Scalar> backward =
      backward_of(layout, x.data() + skipped, of.output ? gradient.data() : nullptr, grad_x.data());
  backward.initial = initial.data();
  backward.states = states.data();
  backward.grad_final = grad_final.data();
  backward.grad_initial = grad_initial.data();
  run_general(backward, extras, options,
              plan_general<Scalar>(layout, extras, options, widest_pack(backward, extras), device));

  std::vector<double> totals(size_t(given * of.rows * of.count)), sizes = totals;
  for (int64_t n = 0; n < neurons; ++n) {
    const int64_t entry = of.count ? n / of.group % of.count : 0;
    const auto place = [&](int64_t which, int64_t row) { return size_t((which * of.rows + row) * of.count + entry); };
    const auto at = [&](int64_t t) { return size_t(layout.at(n, steps) + t * layout.inner); };
    const auto x_at = [&](int64_t t) { return to_state(x[(of.constant ? size_t(n) : at(t)) + size_t(skipped)]); };
    float own[kOwn];
    for (int k = 0; k < kOwn; ++k) own[k] = of.count ? parameters[place(k, 0)] : neuron.parameter(k);
    const auto values = neuron.values(own);
    const auto affine = [&](int k, int64_t t) {
      return of.affine ? parameters[place(kOwn + k, of.rows > 1 ? t : 0)] : 1 - float(k);
    };
    const int64_t length = of.sample ? std::min(std::max(lengths[size_t(n / of.sample)], int64_t(0)), steps) : steps;
    std::vector<float> before, u;
    float v = initial[size_t(n)];
    for (int64_t t = 0; t < steps; ++t) {
      float o = 0, shown = 0;
      if (t < length) {
        before.push_back(v);
        u.push_back(neuron.step(values, v, of.affine ? affine(0, t) * x_at(t) + affine(1, t) : x_at(t), o));
        shown = of.after_reset ? v : u.back();
      }
      if (of.output) demand(same(output[at(t)], Rounded<Scalar>::from(o)), "output");
      if (of.potentials) demand(same(potentials[at(t)], shown), "potentials");
      const int64_t saved = (steps - 1) / kChunk, row = t / kChunk;
      if (t % kChunk == kChunk - 1 && row < saved)
        demand(same(states[size_t(layout.at(n, saved) + row * layout.inner)], v), "the states");
    }
    demand(same(final_state[size_t(n)], v), "the final state");
    float grad_v = grad_final[size_t(n)], grad_constant = 0, of_own[kOwn] = {};
    const auto count_in = [&](size_t to, double value) { totals[to] += value, sizes[to] += std::abs(value); };
    for (int64_t t = steps - 1; t >= 0; --t) {
      float of_x = 0;
      if (t < length) {
        const float shown = of.potentials ? grad_potentials[at(t)] : 0;
        if (of.after_reset) grad_v += shown;
        const float grad_i =
            neuron.step_back(values, before[size_t(t)], u[size_t(t)], of.output ? to_state(gradient[at(t)]) : 0,
                             of.after_reset ? 0 : shown, grad_v, of_own);
        of_x = grad_i * affine(0, t);
        if (given > kOwn) {
          count_in(place(kOwn, of.rows > 1 ? t : 0), double(grad_i * x_at(t)));
          count_in(place(kOwn + 1, of.rows > 1 ? t : 0), double(grad_i));
        }
      }
      grad_constant += of_x;
      if (!of.constant) demand(same(grad_x[at(t)], Rounded<Scalar>::from(of_x)), "general dL/dx");
    }
    if (of.constant) demand(same(grad_x[size_t(n)], Rounded<Scalar>::from(grad_constant)), "dL/dx of all steps");
    demand(same(grad_initial[size_t(n)], grad_v), "general dL/dv[0]");
    for (int k = 0; k < kOwn && given; ++k) count_in(place(k, 0), double(of_own[k]));
  }
  for (size_t i = 0; i < grad_parameters.size(); ++i)
    demand(std::abs(double(grad_parameters[i]) - totals[i]) <= 1e-5 * (1e-3 + sizes[i]), "dL/dparameters");
}

void check_general() {
  const auto lif = [](bool soft, bool delayed) {
    LifOptions options = options_of(soft ? Reset::kSoft : Reset::kHard);
    options.delayed = delayed;
    options.strict_threshold = soft;
    options.subtract = 0.625;
    return options;
  };
  const auto check = [&](const GeneralCase& of) {
    static int number = 0;
    const LifOptions options = lif(number % 2 > 0, number % 4 == 3);
    const auto neuron = [&] {
      return Lif<float, EitherReset, Heaviside, Rectangular<float>>{LifConstants<float>(options),
                                                                    Rectangular<float>(options.surrogate)};
    };
    check_general<float>(of, options, neuron);
    if (number % 3 == 0) check_general<Half>(of, options, neuron);
    if (number % 3 == 1) check_general<float>(of, LiOptions(), [] { return Li<float>(LiOptions()); });
    ++number;
  };
  // Constants of the launch; potentials, lengths, and nothing but potentials.
  for (const int64_t steps : {1, 6, 17, 37}) {
    if (kThreads) break;
    for (const bool after : {false, true})
      for (const bool output : {true, false}) {
        check({layout_of(steps, 600, 1), 1, 0, 1, false, false, 0, false, after, !output || after, output, false});
        check({layout_of(steps, 96, 3), 1, 0, 1, false, false, 8, after, !after, true, output, false});
        check({layout_of(steps, 60, 1), 1, 0, 1, false, false, 15, !output, after, true, output, false});
      }
  }
  // Parameters: {neurons, outer, group, count}; the last with more of one entry than a block has positions.
  struct Shape {
    int64_t neurons, outer, group, count;
  };
  for (const Shape& s :
       {Shape{1100, 1, 1, 1}, Shape{5 * 24, 5, 8, 3}, Shape{7 * 20, 1, 1, 20}, Shape{3 * 30, 1, 3, 5},
        Shape{6 * 150, 6, 1, 150}, Shape{2 * 600, 1, 300, 2}, Shape{11 * 10, 11, 1, 10}, Shape{2 * 720, 2, 72, 10}})
    for (const int64_t steps : {5, 21}) {
      if (kThreads && steps != 5) continue;
      for (const bool affine : {false, true})
        for (const bool row_each : {false, true}) {
          if (row_each != affine && (row_each || kThreads)) continue;
          const int64_t rows = row_each ? steps : 1, sample = s.count > 1 ? s.group * s.count : 0;
          check({layout_of(steps, s.neurons, s.outer), s.group, s.count, rows, affine, true, 0, false, false, false,
                 true, false});
          if (kThreads) continue;
          check({layout_of(steps, s.neurons, s.outer), s.group, s.count, rows, affine, true, sample, affine, true, true,
                 true, true});
          check({layout_of(steps, s.neurons, s.outer), s.group, s.count, rows, affine, false, sample, false, false,
                 false, true, false});
        }
    }
}

// [N, C, P] to [N, P, C].
template <class T>
std::vector<T> transposed(const std::vector<T>& of, int64_t features, int64_t positions) {
  std::vector<T> to(of.size());
  const int64_t size = features * positions;
  for (int64_t i = 0; i < int64_t(of.size()); ++i)
    to[size_t(i / size * size + i % positions * features + i / positions % features)] = of[size_t(i)];
  return to;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// Neurons with normalisation: what they are given, in the order [T, B, C, P], and what the kernels make of it.
template <class Scalar>
struct NeuNormCheck {
  struct Found {
    std::vector<Scalar> normalised, grad_x;
    std::vector<float> sums, maps, states, carried, grad_weight, grad_decays;
    bool once;  // whether both kernels have read what they are given once

    bool operator==(const Found& o) const {
      return same_bits(normalised, o.normalised) && same_bits(grad_x, o.grad_x) && same_bits(sums, o.sums) &&
             same_bits(maps, o.maps) && same_bits(states, o.states) && same_bits(grad_weight, o.grad_weight) &&
             same_bits(grad_decays, o.grad_decays);
    }
  };

  int64_t steps, batch, features, positions, groups;
  LifOptions options = options_of(Reset::kHard);
  Neuron neuron = neuron_of(options);
  int64_t all = steps * batch * features * positions, weights = features * positions;
  std::vector<Scalar> x = random_row<Scalar>(all, -0.5f, 1.5f), gradient = random_row<Scalar>(all, -1, 1);
  std::vector<float> weight = random_row<float>(weights, 0, 1);
  std::vector<float> decays{0.5f, 0.75f};

  // For packs as wide as `widest` at most, with so much shared memory.
  Found run(bool channels_last, int widest, int shared_bytes) const {
    const NeuNormSplit split{features % 4 == 0 ? 4 : 1, 8, 8, 4};
    const int64_t kept = (steps - 1) / kNeuNormChunk, maps = steps * batch * positions;
    const int64_t strips = (positions + split.strip - 1) / split.strip;
    const auto ordered = [&](const auto& array) {
      return channels_last ? transposed(array, features, positions) : array;
    };
    const auto back = [&](auto& array) {
      if (channels_last) array = transposed(array, positions, features);
    };
    const auto own_x = ordered(x), own_gradient = ordered(gradient);
    const auto own_weight = ordered(weight);
    Found found{unwritten<Scalar>(all),
                unwritten<Scalar>(all),
                unwritten<float>(maps),
                unwritten<float>(maps),
                unwritten<float>(kept * batch * weights),
                unwritten<float>(kept > 0 ? groups * weights : 0),
                unwritten<float>(groups * weights),
                unwritten<float>(groups * strips * 2),
                false};
    NeuNormForward<Scalar> forward{};
    forward.steps = steps;
    forward.batch = batch;
    forward.features = features;
    forward.positions = positions;
    forward.norm_decay = decays[1];
    forward.channels_last = channels_last;
    forward.x = own_x.data();
    forward.weight = own_weight.data();
    forward.decays = decays.data();
    forward.normalised = found.normalised.data();
    forward.sums = found.sums.data();
    forward.maps = found.maps.data();
    forward.states = found.states.data();
    NeuNormBackward<Scalar> backward{};
    backward.steps = steps;
    backward.batch = batch;
    backward.features = features;
    backward.positions = positions;
    backward.norm_decay = decays[1];
    backward.channels_last = channels_last;
    backward.groups = groups;
    backward.x = own_x.data();
    backward.weight = own_weight.data();
    backward.decays = decays.data();
    backward.sums = found.sums.data();
    backward.maps = found.maps.data();
    backward.states = found.states.data();
    backward.grad_normalised = own_gradient.data();
    backward.grad_x = found.grad_x.data();
    backward.grad_weight = found.grad_weight.data();
    backward.grad_decays = found.grad_decays.data();
    backward.carried = kept > 0 ? found.carried.data() : nullptr;
    const DeviceProperties device{132, shared_bytes};
    const NeuNormPlan plan = plan_neunorm(split, forward, std::min(widest, widest_pack(forward)), device);
    const NeuNormPlan plan_back = plan_neunorm(split, backward, std::min(widest, widest_pack(backward)), device);
    demand((plan.shared_bytes > 0) == (shared_bytes > 0) && (plan_back.shared_bytes > 0) == (shared_bytes > 0),
           "the plans");
    found.once = reads_once([&] { run_neunorm(forward, options, plan); }, own_x);
    found.once =
        reads_once([&] { run_neunorm(backward, options, plan_back); }, own_x, found.states, own_gradient) && found.once;
    back(found.normalised);
    back(found.grad_x);
    back(found.states);
    back(found.grad_weight);
    return found;
  }

  void expect(const Found& found) const {
    const float share = float(1 / double(features)), gain = (1 - decays[1]) * share;
    const float unit = sizeof(Scalar) == 2 ? 2.5e-3f : 1e-5f;
    std::vector<double> weight_total(static_cast<size_t>(weights));
    double decay_total = 0, norm_decay_total = 0;
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t p = 0; p < positions; ++p) {
        const auto at = [&](int64_t t, int64_t c) { return size_t(((t * batch + b) * features + c) * positions + p); };
        const auto of = [&](const std::vector<Scalar>& rows, int64_t t, int64_t c) { return to_state(rows[at(t, c)]); };
        const auto zeros = [](int64_t size) { return std::vector<float>(static_cast<size_t>(size)); };
        auto v = zeros(features), u = zeros(steps * features), before = u, map = zeros(steps), s = map;
        for (int64_t t = 0; t < steps; ++t) {
          auto o = zeros(features);
          for (int64_t c = 0; c < features; ++c) {
            before[size_t(t * features + c)] = v[size_t(c)];
            u[size_t(t * features + c)] = neuron.step(v[size_t(c)], of(x, t, c), o[size_t(c)]);
            s[size_t(t)] += o[size_t(c)];
          }
          map[size_t(t)] = decays[1] * (t ? map[size_t(t - 1)] : 0) + gain * s[size_t(t)];
          for (int64_t c = 0; c < features; ++c)
            demand(same(found.normalised[at(t, c)],
                        Rounded<Scalar>::from(o[size_t(c)] - weight[size_t(c * positions + p)] * map[size_t(t)])),
                   "normalised spikes");
        }
        auto grad_v = zeros(features);
        float grad_map = 0;
        for (int64_t t = steps - 1; t >= 0; --t) {
          grad_map *= decays[1];
          for (int64_t c = 0; c < features; ++c) {
            grad_map -= weight[size_t(c * positions + p)] * of(gradient, t, c);
            weight_total[size_t(c * positions + p)] -= double(of(gradient, t, c) * map[size_t(t)]);
          }
          norm_decay_total += double(grad_map * ((t ? map[size_t(t - 1)] : 0) - share * s[size_t(t)]));
          for (int64_t c = 0; c < features; ++c) {
            const float grad_u =
                neuron.step_back(u[size_t(t * features + c)], of(gradient, t, c) + gain * grad_map, grad_v[size_t(c)]);
            decay_total += double(grad_u * before[size_t(t * features + c)]);
            demand(near(to_state(found.grad_x[at(t, c)]), grad_u, unit), "dL/dx with normalisation");
          }
        }
      }
    for (int64_t i = 0; i < weights; ++i) {
      double total = 0;
      for (int64_t group = 0; group < groups; ++group) total += double(found.grad_weight[size_t(group * weights + i)]);
      demand(near(float(total), float(weight_total[size_t(i)]), 1e-5f), "dL/dU");
    }
    for (const auto* array : {&found.sums, &found.maps, &found.states})
      for (const float value : *array) demand(!std::isnan(value), "everything is written");
    double totals[2] = {0, 0};
    for (size_t i = 0; i < found.grad_decays.size(); ++i) totals[i % 2] += double(found.grad_decays[i]);
    demand(std::abs(totals[0] - decay_total) <= 1e-3, "dL/ddecay");
    demand(std::abs(totals[1] - norm_decay_total) <= 1e-3, "dL/dnorm_decay");
  }

  void check() const {
    constexpr int kShared = 64 * 1024;
    const Found first = run(false, 8, kShared);
    expect(first);
    all_read_once = all_read_once && first.once;
    for (const bool channels_last : {false, true})
      for (const int widest : {8, 1})
        for (const int shared_bytes : {kShared, 0}) {
          if (!channels_last && widest == 8 && shared_bytes > 0) continue;
          const Found found = run(channels_last, widest, shared_bytes);
          expect(found);
          demand(found == first, "bits of another order, tile or memory");
          all_read_once = all_read_once && (found.once || shared_bytes == 0);  // else gradients are read again
        }
  }
};

template <class Scalar>
void check_neunorm(int64_t steps, int64_t batch, int64_t features, int64_t positions, int64_t groups) {
  NeuNormCheck<Scalar>{steps, batch, features, positions, groups}.check();
}

}  // namespace
}  // namespace stbp::cuda

int main(int argc, char** argv) {
  using namespace stbp;
  using namespace stbp::cuda;
  const auto asked = [&](const char* part) { return argc == 1 || std::strcmp(argv[1], part) == 0; };
  if constexpr (!kThreads) {
    if (asked("plain")) {
      check_alignment();
      for (const Reset reset : {Reset::kCommon, Reset::kHard, Reset::kSoft})
        for (const int64_t steps : {1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 24, 25, 41})
          for (const Layout& layout :
               {layout_of(steps, 0, 1), layout_of(steps, 1, 1), layout_of(steps, 24, 3), layout_of(steps, 8 * 33, 1),
                layout_of(steps, 8 * 34 + 4, 1), layout_of(steps, 8 * 34 + 5, 1), layout_of(steps, 8 * 36, 9)}) {
            check_lif<float>(layout, 32, reset);
            check_lif<Half>(layout, 32, reset);
          }
      check_large();
    }
  }
  if (asked("general")) check_general();
  if (asked("neunorm")) {
    // Whole packs and teams; features that are no packs, and positions that are no pairs; some of all.
    check_neunorm<float>(2 * kNeuNormChunk + 3, 3, 44, 5, 2);
    check_neunorm<float>(kNeuNormChunk + 1, 2, 15, 9, 1);
    check_neunorm<float>(3, 1, 32, 1, 1);
    check_neunorm<BFloat16>(kNeuNormChunk, 2, 36, 18, 1);
    check_neunorm<BFloat16>(2 * kNeuNormChunk + 5, 1, 17, 2, 1);
    check_neunorm<BFloat16>(2, 2, 8, 7, 2);
  }
  demand(all_read_once, "more or less read than there is");
  std::puts("all the same");
}
