#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "../build_info.h"
#include "../dispatch.h"
#include "launch.h"
#include "neunorm.cuh"

namespace stbp {
namespace cuda {
namespace {

void throw_on(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("stbp_cuda: ") + what + " failed: " + cudaGetErrorString(error));
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    throw_on(cudaGetDevice(&previous_), "cudaGetDevice");
    if (device != previous_) throw_on(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != previous_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// A GPU hides the latency of memory with about this many threads on each multiprocessor; where packs would leave fewer,
// one neuron a thread spreads the work wider.
constexpr int64_t kThreadsToFill = 1024;

bool packs_fill(int64_t packs, int device) {
  int processors = 0;
  throw_on(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return packs >= processors * kThreadsToFill;
}

unsigned blocks_for(int64_t threads) { return unsigned((threads + kThreads - 1) / kThreads); }

}  // namespace

template <class Scalar>
void launch_forward(const LifForward<Scalar>& io, const LifOptions& options, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  constexpr int kPack = 16 / sizeof(Scalar);
  const bool packed = packs_fit(io) && packs_fill(io.neurons / kPack, device);
  visit_forward_neuron<Scalar>(options, [&](const auto& neuron) {
    if (packed) {
      lif_forward<kPack><<<blocks_for(io.neurons / kPack), kThreads, 0, on>>>(io, neuron);
    } else {
      lif_forward<1><<<blocks_for(io.neurons), kThreads, 0, on>>>(io, neuron);
    }
  });
  throw_on(cudaGetLastError(), "launching lif_forward");
}

template <class Scalar>
void launch_backward(const LifBackward<Scalar>& io, const LifOptions& options, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  constexpr int kPack = 16 / sizeof(Scalar);
  const bool packed = packs_fit(io) && packs_fill(io.neurons / kPack, device);
  visit_backward_neuron<Scalar>(options, [&](const auto& neuron) {
    if (packed) {
      lif_backward<kPack><<<blocks_for(io.neurons / kPack), kThreads, 0, on>>>(io, neuron);
    } else {
      lif_backward<1><<<blocks_for(io.neurons), kThreads, 0, on>>>(io, neuron);
    }
  });
  throw_on(cudaGetLastError(), "launching lif_backward");
}

// Two barriers for each chunk: with fewer warps a block does more of its work between them, with more it hides more of
// the latency of memory.
constexpr int kWarps = 8;

template <class Scalar>
void launch_neunorm_forward(const NeuNormForward<Scalar>& io, const LifOptions& options, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  const int64_t strips = neunorm_strips(io.positions);
  visit_forward_neuron<Scalar>(options, [&](const auto& neuron) {
    neunorm_forward<kWarps><<<unsigned(strips * io.batch), kWarps * kStrip, 0, on>>>(io, strips, neuron);
  });
  throw_on(cudaGetLastError(), "launching neunorm_forward");
}

template <class Scalar>
void launch_neunorm_backward(const NeuNormBackward<Scalar>& io, const LifOptions& options, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  const int64_t strips = neunorm_strips(io.positions);
  visit_backward_neuron<Scalar>(options, [&](const auto& neuron) {
    neunorm_backward<kWarps><<<unsigned(strips * io.groups), kWarps * kStrip, 0, on>>>(io, strips, neuron);
  });
  throw_on(cudaGetLastError(), "launching neunorm_backward");
}

#define STBP_INSTANTIATE(Scalar)                                                                              \
  template void launch_forward<Scalar>(const LifForward<Scalar>&, const LifOptions&, int, void*);             \
  template void launch_backward<Scalar>(const LifBackward<Scalar>&, const LifOptions&, int, void*);           \
  template void launch_neunorm_forward<Scalar>(const NeuNormForward<Scalar>&, const LifOptions&, int, void*); \
  template void launch_neunorm_backward<Scalar>(const NeuNormBackward<Scalar>&, const LifOptions&, int, void*);
STBP_INSTANTIATE(float)
STBP_INSTANTIATE(double)
STBP_INSTANTIATE(Half)
STBP_INSTANTIATE(BFloat16)

}  // namespace cuda

int cuda_chunk() { return cuda::kChunk; }

int cuda_neunorm_chunk() { return cuda::kNeuNormChunk; }

}  // namespace stbp
