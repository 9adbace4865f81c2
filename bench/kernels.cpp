// Times the CPU kernels by themselves, on buffers that are there already, against a copy of the same input. No torch: a
// call of an operator takes longer than a small kernel. Started by kernels.py.
//
//   kernels INSTRUCTION_SET DTYPE SECONDS T N [T N ...]
//
// prints for each T x N: "T N", then for the copy, the forward and the backward pass the median and both quartiles of
// the seconds of a call.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include <omp.h>

#include "../csrc/cpu/kernels.h"

namespace {

using stbp::BFloat16;
using stbp::Half;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Touched, and filled with the same random numbers in another order for each offset.
template <class Scalar>
std::unique_ptr<Scalar[], Free> buffer(int64_t count, int64_t offset) {
  static const std::vector<float> normal = [] {
    std::mt19937 generator(0);
    std::normal_distribution<float> distribution;
    std::vector<float> numbers(65521);  // a prime: rows do not repeat each other
    for (float& number : numbers) number = distribution(generator);
    return numbers;
  }();
  const size_t bytes = (size_t(count) * sizeof(Scalar) + 4095) / 4096 * 4096;
  std::unique_ptr<Scalar[], Free> memory(static_cast<Scalar*>(std::aligned_alloc(4096, bytes)));
  if (!memory) std::abort();
  for (int64_t i = 0; i < count; ++i)
    memory[i] = stbp::Rounded<Scalar>::from(stbp::state_t<Scalar>(normal[size_t(i + offset) % normal.size()]));
  return memory;
}

// The neurons of one thread, in whole blocks.
template <class Range>
void share(int64_t neurons, const Range& range) {
#pragma omp parallel
  {
    const int64_t blocks = (neurons + stbp::cpu::kBlock - 1) / stbp::cpu::kBlock;
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const int64_t first = blocks * thread / threads * stbp::cpu::kBlock;
    const int64_t last = std::min(neurons, blocks * (thread + 1) / threads * stbp::cpu::kBlock);
    if (first < last) range(first, last);
  }
}

double seconds_of(const std::function<void()>& run, int calls) {
  const auto start = std::chrono::steady_clock::now();
  for (int call = 0; call < calls; ++call) run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / calls;
}

void measure(const std::vector<std::function<void()>>& runs, double seconds) {
  constexpr double kShortestSample = 2e-4;
  std::vector<int> calls;
  for (const auto& run : runs) {
    run();
    calls.push_back(int(std::ceil(kShortestSample / std::min(kShortestSample, seconds_of(run, 1)))));
  }
  std::vector<std::vector<double>> samples(runs.size());
  const auto start = std::chrono::steady_clock::now();
  while (samples[0].size() < 7 || std::chrono::steady_clock::now() - start < std::chrono::duration<double>(seconds)) {
    for (size_t i = 0; i < runs.size(); ++i) {
      runs[i]();  // the caches as this one leaves them
      samples[i].push_back(seconds_of(runs[i], calls[i]));
    }
  }
  for (auto& values : samples) {
    std::sort(values.begin(), values.end());
    const auto at = [&](double share) { return values[size_t(share * double(values.size() - 1))]; };
    std::printf(" %.9g %.9g %.9g", at(0.5), at(0.25), at(0.75));
  }
}

template <class Scalar>
void point(const stbp::cpu::Kernels<Scalar>& kernels, int64_t steps, int64_t neurons, double seconds) {
  using State = stbp::state_t<Scalar>;
  const int64_t count = steps * neurons, saved = (steps - 1) / stbp::cpu::kChunk;
  const auto x = buffer<Scalar>(count, 0), grad = buffer<Scalar>(count, 12345), result = buffer<Scalar>(count, 0);
  const auto states = buffer<State>(std::max<int64_t>(1, saved * neurons), 0);
  stbp::LifOptions options;  // a hard reset and a rectangular surrogate
  options.decay = 0.5;
  const stbp::Layout layout{1, steps, neurons};
  const State* const known = saved ? states.get() : nullptr;
  const stbp::NeuronForward<Scalar> io{layout, x.get(), nullptr, result.get(), nullptr, saved ? states.get() : nullptr};
  const stbp::NeuronBackward<Scalar> back{layout, x.get(), nullptr, known, grad.get(), nullptr, result.get(), nullptr};
  std::printf("%lld %lld", static_cast<long long>(steps), static_cast<long long>(neurons));
  measure({[&] {
             share(count, [&](int64_t first, int64_t last) {
               std::memcpy(result.get() + first, x.get() + first, size_t(last - first) * sizeof(Scalar));
             });
           },
           [&] {
             share(neurons, [&](int64_t first, int64_t last) {
               kernels.forward(io, options, first, last, stbp::cpu::past_caches(io));
             });
           },
           [&] {
             share(neurons, [&](int64_t first, int64_t last) {
               kernels.backward(back, options, first, last, stbp::cpu::past_caches(back));
             });
           }},
          seconds);
  std::printf("\n");
  std::fflush(stdout);
}

template <class Scalar>
stbp::cpu::Kernels<Scalar> kernels(const std::string& instruction_set) {
  if (instruction_set == "portable") return stbp::cpu::portable::kernels<Scalar>();
#if defined(__x86_64__)
  if (instruction_set == "AVX2") return stbp::cpu::avx2::kernels<Scalar>();
  if (instruction_set == "AVX-512") return stbp::cpu::avx512::kernels<Scalar>();
#endif
  std::fprintf(stderr, "no kernels for %s\n", instruction_set.c_str());
  std::exit(2);
}

template <class Scalar>
void all_points(int count, char** arguments) {
  for (int i = 4; i + 1 < count; i += 2)
    point(kernels<Scalar>(arguments[1]), std::atoll(arguments[i]), std::atoll(arguments[i + 1]),
          std::atof(arguments[3]));
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 6) return 2;
  const std::string dtype = arguments[2];
  if (dtype == "float32") all_points<float>(count, arguments);
  if (dtype == "float64") all_points<double>(count, arguments);
  if (dtype == "float16") all_points<Half>(count, arguments);
  if (dtype == "bfloat16") all_points<BFloat16>(count, arguments);
}
