// The CUDA kernels by themselves, without torch, against a copy of the same bytes in the same run. Within a minute:
//
//   nvcc -std=c++17 -O3 -fmad=false -arch=native -o kernels bench/kernels.cu && ./kernels [FILE.json]
//
// Every tensor is larger than twice the L2 cache, and random: a neuron fires in about a fifth of its steps. Prints a
// table, and writes a point a line if a file is named. What the package would launch is what is measured, unless macros
// say otherwise; -DSTBP_BLOCKS=N sets the minimum of resident blocks of all LIF kernels, and so their registers, and
//
//   -DROWS=4 -DWIDTH=2                 kernels for so many rows (0: for any T), with so many neurons a thread
//   -DRESET=EitherReset                the reset of the neuron that goes back
//   -DSURROGATE=Sigmoid                one surrogate, chosen while compiling
//   -DSTEPS=4,16 -DSCALARS=BFloat16    these alone
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "../csrc/cuda/dispatch.h"
#include "../csrc/cuda/neunorm.cuh"

#ifndef STEPS
#define STEPS 1, 2, 3, 4, 6, 8, 16, 32, 128
#endif
#ifndef SCALARS
#define SCALARS float, BFloat16, Half
#endif

namespace stbp::cuda {
namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}
#define CHECK(call) check(call, #call)

template <class Scalar>
constexpr const char* kName = "float32";
template <>
constexpr const char* kName<BFloat16> = "bfloat16";
template <>
constexpr const char* kName<Half> = "float16";

// A number of a normal distribution, that of a place.
__device__ float normal_at(uint64_t place, uint64_t seed) {
  uint64_t bits = (place ^ seed << 48) * 0x9e3779b97f4a7c15u;
  bits = (bits ^ bits >> 32) * 0xd6e8feb86659fd93u;
  bits ^= bits >> 32;
  const float radius = sqrtf(-2 * logf((float(bits & 0xffffffu) + 1) / 0x1p24f));
  return radius * cosf(6.2831853f * (float(bits >> 40) / 0x1p24f));
}

template <class Scalar>
__global__ void fill(Scalar* to, int64_t size, uint64_t seed) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < size; i += int64_t(gridDim.x) * blockDim.x)
    to[i] = Rounded<Scalar>::from(normal_at(uint64_t(i), seed));
}

__global__ void copy_packs(const uint4* from, uint4* to, int64_t packs) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i < packs) to[i] = from[i];
}

// Memory of the GPU.
template <class T>
class Array {
 public:
  explicit Array(int64_t size) { CHECK(cudaMalloc(&data_, size_t(std::max<int64_t>(size, 1)) * sizeof(T))); }
  Array(int64_t size, uint64_t seed) : Array(size) { fill<<<2048, 256>>>(data_, size, seed); }
  ~Array() { cudaFree(data_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_ = nullptr;
};

// Seconds of a launch: the median of nine, after two that are not counted.
template <class Launch>
double seconds_of(const Launch& launch) {
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<float> milliseconds;
  for (int i = 0; i < 11; ++i) {
    CHECK(cudaEventRecord(begin));
    launch();
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    CHECK(cudaGetLastError());
    float elapsed = 0;
    CHECK(cudaEventElapsedTime(&elapsed, begin, end));
    if (i >= 2) milliseconds.push_back(elapsed);
  }
  CHECK(cudaEventDestroy(begin));
  CHECK(cudaEventDestroy(end));
  std::sort(milliseconds.begin(), milliseconds.end());
  return double(milliseconds[milliseconds.size() / 2]) * 1e-3;
}

struct Bench {
  cudaDeviceProp gpu;
  DeviceProperties properties;
  int64_t bytes;  // of a tensor
  double copied;  // bytes read and written a second by a copy, the faster of memcpy's and a kernel's
  std::FILE* file;
  bool first = true;

  explicit Bench(const char* path) {
    CHECK(cudaGetDeviceProperties(&gpu, 0));
    properties = {gpu.multiProcessorCount, int(gpu.sharedMemPerBlockOptin)};
    bytes = int64_t(1) << 28;
    while (bytes < 2 * int64_t(gpu.l2CacheSize)) bytes *= 2;
    const Array<uint4> from(bytes / 16), to(bytes / 16);
    const int64_t packs = bytes / 16;
    const double by_kernel = seconds_of([&] { copy_packs<<<unsigned((packs + 255) / 256), 256>>>(from, to, packs); });
    const double by_driver =
        seconds_of([&] { CHECK(cudaMemcpyAsync(to, from, size_t(bytes), cudaMemcpyDeviceToDevice)); });
    copied = 2 * double(bytes) / std::min(by_kernel, by_driver);
    std::printf("%s, %d multiprocessors, %d MB L2; a copy moves %.0f GB/s (kernel %.0f, memcpy %.0f)\n", gpu.name,
                gpu.multiProcessorCount, gpu.l2CacheSize >> 20, copied * 1e-9, 2 * double(bytes) / by_kernel * 1e-9,
                2 * double(bytes) / by_driver * 1e-9);
    file = path ? std::fopen(path, "w") : nullptr;
    if (path && !file) check(cudaErrorInvalidValue, path);
    int driver = 0, runtime = 0;
    CHECK(cudaDriverGetVersion(&driver));
    CHECK(cudaRuntimeGetVersion(&runtime));
    if (file)
      std::fprintf(
          file,
          "{\"machine\": {\"gpu\": \"%s\", \"cuda_driver\": %d, \"cuda_runtime\": %d, \"copy_gb_per_s\": %.1f},"
          "\n \"points\": [",
          gpu.name, driver, runtime, copied * 1e-9);
  }
  ~Bench() {
    if (!file) return;
    std::fprintf(file, "\n ]}\n");
    std::fclose(file);
  }

  // Time of a launch, as a share of what a copy would take for the bytes that must move.
  template <class Launch>
  double point(const std::string& what, double moved, const Launch& launch) {
    const double seconds = seconds_of(launch), share = moved / seconds / copied;
    if (file)
      std::fprintf(file, "%s\n  {%s, \"ms\": %.5f, \"gb_per_s\": %.1f, \"of_a_copy\": %.4f}", first ? "" : ",",
                   what.c_str(), 1e3 * seconds, moved / seconds * 1e-9, share);
    first = false;
    return 100 * share;
  }
};

std::string text(const char* key, const std::string& value) {
  return std::string("\"") + key + "\": \"" + value + "\"";
}
std::string text(const char* key, int64_t value) { return std::string("\"") + key + "\": " + std::to_string(value); }

template <template <class> class... Surrogate>
std::vector<const char*> names(SurrogateList<Surrogate...>) {
  return {Surrogate<float>::kName...};
}

// What the macros ask for, else the package's own choice.
LifPlan plan_of(int64_t steps, int64_t neurons, int scalar_bytes, bool backward, const DeviceProperties& properties) {
  LifPlan plan = plan_lif(steps, neurons, scalar_bytes, backward, 16 / scalar_bytes, properties);
#ifdef WIDTH
  plan.width = WIDTH;
  plan.threads = kMostThreads;
  plan.blocks = (neurons + WIDTH * kMostThreads - 1) / (WIDTH * kMostThreads);
#endif
#ifdef ROWS
  plan.rows = ROWS;
#endif
  return plan;
}

template <class Scalar, bool kBackward, class F>
void visit_lif(const LifOptions& options, const LifPlan& plan, const F& f) {
#if defined(ROWS) || defined(WIDTH) || defined(RESET) || defined(SURROGATE)
#if !defined(ROWS) || !defined(WIDTH)
#error "ROWS and WIDTH are wanted, too"
#endif
#ifndef RESET
#define RESET CommonReset
#endif
#ifdef SURROGATE
  using Chosen = SURROGATE<float>;
  const Chosen surrogate(options.surrogate);
#else
  using Chosen = AnyPlainSurrogateOf<float>;
  const Chosen surrogate(options.surrogate);
#endif
  using Forward = Lif<float, EitherReset, Heaviside, NoSurrogate>;
  using Backward = Lif<float, RESET, Heaviside, Chosen>;
  const LifConstants<float> constants(options);
  if constexpr (kBackward) {
    const Backward neuron{constants, surrogate};
    if constexpr (ROWS > 0) {
      f(lif_backward_rows<ROWS, WIDTH, Scalar, Backward>, neuron);
    } else {
      f(lif_backward<WIDTH, Scalar, Backward>, neuron);
    }
  } else {
    const Forward neuron{constants, {}};
    if constexpr (ROWS > 0) {
      f(lif_forward_rows<ROWS, WIDTH, Scalar, Forward>, neuron);
    } else {
      f(lif_forward<WIDTH, Scalar, Forward>, neuron);
    }
  }
#else
  if constexpr (kBackward) {
    visit_lif_backward<Scalar>(options, plan, f);
  } else {
    visit_lif_forward<Scalar>(options, plan, f);
  }
#endif
}

template <class Scalar>
NeuronForward<Scalar> forward_of(const Layout& layout, const Scalar* x, Scalar* output, float* states) {
  NeuronForward<Scalar> io{};
  io.layout = layout;
  io.x = x, io.output = output, io.states = states;
  return io;
}

template <class Scalar>
NeuronBackward<Scalar> backward_of(const Layout& layout, const Scalar* x, const float* states,
                                   const Scalar* grad_output, Scalar* grad_x) {
  NeuronBackward<Scalar> io{};
  io.layout = layout;
  io.x = x, io.states = states, io.grad_output = grad_output, io.grad_x = grad_x;
  return io;
}

// The general kernels, at T = 4 and a batch of 64, with a decay and an affine current of each channel, which are
// learned going back.
template <class Scalar>
void bench_general(Bench& bench) {
  constexpr int64_t kSteps = 4, kBatch = 64, kParameters = 5;
  const int64_t shapes[][2] = {{64, 64 * 64}, {256, 32 * 32}, {512, 16 * 16}};  // C, P
  const NeuronOptions options = LifOptions();
  std::printf("\n%s with parameters, T 4, batch 64, %% of a copy\n", kName<Scalar>);
  for (const auto& shape : shapes) {
    const int64_t features = shape[0], positions = shape[1], neurons = kBatch * features * positions;
    const Layout layout{1, kSteps, neurons};
    const double row_bytes = double(kSteps * neurons) * sizeof(Scalar);
    const Array<Scalar> x(kSteps * neurons, 1), gradient(kSteps * neurons, 2), output(kSteps * neurons),
        grad_x(kSteps * neurons);
    const Array<float> parameters(kParameters * features, 3), grad_parameters(kParameters * features);
    const NeuronForward<Scalar> forward = forward_of<Scalar>(layout, x, output, nullptr);
    const NeuronBackward<Scalar> backward = backward_of<Scalar>(layout, x, nullptr, gradient, grad_x);
    for (const bool channels_last : {false, true}) {
      Extras<float> extras{};
      extras.parameters = parameters;
      extras.rows = 1;
      extras.group = channels_last ? 1 : positions;
      extras.count = features;
      extras.affine = true;
      const auto run = [&](const char* name, double bytes, const auto& launch) {
        const std::string what = text("kernel", name) + ", " + text("dtype", kName<Scalar>) + ", " +
                                 text("features", features) + ", " + text("positions", positions) + ", " +
                                 text("order", channels_last ? "channels_last" : "contiguous");
        std::printf("  %s %5.1f", name, bench.point(what, bytes, launch));
      };
      std::printf("%5d x %5d %-14s", int(features), int(positions), channels_last ? "channels_last" : "contiguous");
      const auto plan_of_call = [&](const auto& io) {
        return plan_general<Scalar>(layout, extras, options, widest_pack(io, extras), bench.properties);
      };
      const GeneralPlan there = plan_of_call(forward);
      visit_general_kernel<Scalar>(options, there, [&](auto width, const auto& neuron) {
        run("general_forward", 2 * row_bytes,
            [&] { general_forward<width><<<unsigned(there.blocks), there.threads>>>(forward, extras, there, neuron); });
      });
      for (const bool learned : {false, true}) {
        extras.grad_parameters = learned ? static_cast<float*>(grad_parameters) : nullptr;
        const Array<double> partial(general_partial<Scalar>(layout, extras, options));
        extras.partial = partial;
        const GeneralPlan back = plan_of_call(backward);
        visit_general_kernel<Scalar>(options, back, [&](auto width, const auto& neuron) {
          run(learned ? "general_learned" : "general_backward", 3 * row_bytes, [&] {
            general_backward<width>
                <<<unsigned(back.blocks), back.threads, size_t(back.shared_bytes)>>>(backward, extras, back, neuron);
            if (learned) general_gradients<<<unsigned(back.entry_blocks), kMostThreads>>>(extras, back);
          });
        });
      }
      std::printf("\n");
    }
  }
}

template <class Scalar>
void bench_lif(Bench& bench) {
  const int64_t all = bench.bytes / int64_t(sizeof(Scalar));
  const Array<Scalar> x(all, 1), gradient(all, 2), spikes(all), grad_x(all);
  const Array<float> kept(all / kChunk);
  const auto surrogates = names(PlainSurrogates{});
  std::printf("\n%s, %% of a copy   forward   backward:", kName<Scalar>);
  for (const char* name : surrogates) std::printf(" %12s", name);
  std::printf("   soft reset\n");
  for (const int64_t steps : {STEPS}) {
#ifdef ROWS
    if (ROWS > 0 && steps > ROWS) continue;
#endif
    const int64_t neurons = all / steps / 64 * 64, saved = (steps - 1) / kChunk;
    const double state_bytes = double(saved * neurons) * sizeof(float),
                 row_bytes = double(steps * neurons) * sizeof(Scalar);
    const Layout layout{1, steps, neurons};
    float* const states = saved ? static_cast<float*>(kept) : nullptr;
    const NeuronForward<Scalar> forward = forward_of<Scalar>(layout, x, spikes, states);
    const NeuronBackward<Scalar> backward = backward_of<Scalar>(layout, x, states, gradient, grad_x);
    const auto what = [&](const char* kernel, const LifPlan& plan, const char* surrogate, const char* reset) {
      return text("kernel", kernel) + ", " + text("dtype", kName<Scalar>) + ", " + text("steps", steps) + ", " +
             text("surrogate", surrogate) + ", " + text("reset", reset) + ", " + text("rows", plan.rows) + ", " +
             text("width", plan.width);
    };
    const auto options = [](int surrogate, bool soft) {
      LifOptions options;
      options.decay = 0.5;
      options.soft_reset = soft;
      options.surrogate.place = surrogate;
      return options;
    };
    const LifPlan there = plan_of(steps, neurons, sizeof(Scalar), false, bench.properties);
    const LifPlan back = plan_of(steps, neurons, sizeof(Scalar), true, bench.properties);
    double share = 0;
    visit_lif<Scalar, false>(options(0, false), there, [&](auto kernel, const auto& neuron) {
      share = bench.point(what("lif_forward", there, "", "common"), 2 * row_bytes + state_bytes,
                          [&] { kernel<<<unsigned(there.blocks), there.threads>>>(forward, there, neuron); });
    });
    std::printf("T %-4d %8.1f %25s", int(steps), share, "");
    const auto run_backward = [&](int surrogate, bool soft) {
      visit_lif<Scalar, true>(options(surrogate, soft), back, [&](auto kernel, const auto& neuron) {
        share = bench.point(what("lif_backward", back, surrogates[size_t(surrogate)], soft ? "soft" : "common"),
                            3 * row_bytes + state_bytes,
                            [&] { kernel<<<unsigned(back.blocks), back.threads>>>(backward, back, neuron); });
      });
      std::printf(" %12.1f", share);
      std::fflush(stdout);
    };
    for (size_t i = 0; i < surrogates.size(); ++i) run_backward(int(i), false);
    run_backward(0, true);
    std::printf("\n");
  }
}

template <class Scalar>
void bench_neunorm(Bench& bench) {
  constexpr int64_t kSteps = 8, kBatch = 64;
  const int64_t shapes[][2] = {{128, 32 * 32}, {256, 32 * 32}, {512, 16 * 16}, {1024, 8 * 8}};  // C, P
  const LifOptions options;
  std::printf("\n%s with normalisation, T 8, batch 64, %% of a copy\n", kName<Scalar>);
  for (const auto& shape : shapes) {
    const int64_t features = shape[0], positions = shape[1];
    for (const bool channels_last : {false, true}) {
      const int64_t weights = features * positions, all = kSteps * kBatch * weights, maps = kSteps * kBatch * positions;
      const Array<Scalar> x(all, 1), gradient(all, 2), normalised(all), grad_x(all);
      const Array<float> weight(weights, 3), sum(maps), map(maps);
      const int64_t groups = neunorm_groups(kBatch, features, positions, sizeof(Scalar));
      const Array<float> grad_weight(groups * weights);
      NeuNormForward<Scalar> forward{};
      NeuNormBackward<Scalar> backward{};
      const auto set = [&](auto& io) {
        io.steps = kSteps, io.batch = kBatch, io.features = features, io.positions = positions;
        io.norm_decay = 0.8f, io.channels_last = channels_last;
        io.x = x, io.weight = weight, io.sums = sum, io.maps = map;
      };
      set(forward), set(backward);
      forward.normalised = normalised;
      backward.groups = groups;
      backward.grad_normalised = gradient, backward.grad_x = grad_x, backward.grad_weight = grad_weight;
      std::printf("%5d x %5d %-14s", int(features), int(positions), channels_last ? "channels_last" : "contiguous");
      const auto run = [&](const char* name, const auto& io, double bytes, auto compiled) {
        const NeuNormSplit split = split_neunorm(features, positions, sizeof(Scalar));
        const NeuNormPlan plan = plan_neunorm(split, io, widest_pack(io), bench.properties);
        visit_either_lif<Scalar>(PlainSurrogates(), options, [&](const auto& neuron) {
          visit_neunorm_tile<Scalar>(plan, [&](auto tile) {
            const auto kernel = compiled(tile, neuron);
            CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes));
            const std::string what = text("kernel", name) + ", " + text("dtype", kName<Scalar>) + ", " +
                                     text("features", features) + ", " + text("positions", positions) + ", " +
                                     text("order", channels_last ? "channels_last" : "contiguous");
            const double share = bench.point(what, bytes, [&] {
              kernel<<<unsigned(plan.blocks), unsigned(plan.threads()), size_t(plan.shared_bytes)>>>(io, plan, neuron);
            });
            std::printf("  %s %5.1f", name, share);
          });
        });
      };
      run("neunorm_forward", forward, 2.0 * double(all) * sizeof(Scalar), [](auto tile, const auto& neuron) {
        return neunorm_forward<decltype(tile), Scalar, std::decay_t<decltype(neuron)>>;
      });
      run("neunorm_backward", backward, 3.0 * double(all) * sizeof(Scalar), [](auto tile, const auto& neuron) {
        return neunorm_backward<decltype(tile), Scalar, std::decay_t<decltype(neuron)>>;
      });
      std::printf("\n");
    }
  }
}

template <class... Scalar>
struct ScalarList {};

template <class... Scalar>
void bench_all(Bench& bench, ScalarList<Scalar...>) {
  (bench_lif<Scalar>(bench), ...);
  (bench_general<Scalar>(bench), ...);
  (bench_neunorm<Scalar>(bench), ...);
}

}  // namespace
}  // namespace stbp::cuda

int main(int argc, char** argv) {
  using namespace stbp;
  cuda::Bench bench(argc > 1 ? argv[1] : nullptr);
  cuda::bench_all(bench, cuda::ScalarList<SCALARS>());
}
