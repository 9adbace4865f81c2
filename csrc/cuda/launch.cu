#include <cuda_runtime.h>

#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../torch/build_info.h"
#include "dispatch.h"
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

// What is found out or set once for each device, whichever threads ask for it.
template <class T>
class OncePerDevice {
 public:
  template <class Find>
  const T& get(int device, const Find& find) {
    Entry& entry = entries_[size_t(device)];
    std::call_once(entry.once, [&] { entry.value = find(); });
    return entry.value;
  }

 private:
  struct Entry {
    std::once_flag once;
    T value{};
  };
  static size_t count() {
    int count = 0;
    throw_on(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
    return size_t(count);
  }
  std::unique_ptr<Entry[]> entries_{new Entry[count()]};
};

const DeviceProperties& properties_of(int device) {
  static OncePerDevice<DeviceProperties> known;
  return known.get(device, [device] {
    DeviceProperties properties{};
    const auto ask = [device](int& value, cudaDeviceAttr attribute) {
      throw_on(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
    };
    ask(properties.processors, cudaDevAttrMultiProcessorCount);
    ask(properties.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    return properties;
  });
}

// Launches a kernel with normalisation. Tile, Io and Neuron tell the kernels apart: each is allowed once on each device
// to have as much shared memory as a block may ask for.
template <class Tile, class Kernel, class Io, class Neuron>
void launch_blocks(Kernel kernel, const NeuNormPlan& plan, int device, void* stream, const Io& io,
                   const Neuron& neuron) {
  static OncePerDevice<bool> allowed;
  allowed.get(device, [&] {
    const int scratch = kNeuNormScratch<Tile::kInWarp> * int(sizeof(typename Io::State));
    throw_on(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  properties_of(device).shared_bytes - scratch),
             "cudaFuncSetAttribute");
    return true;
  });
  kernel<<<unsigned(plan.blocks), plan.threads(), size_t(plan.shared_bytes), static_cast<cudaStream_t>(stream)>>>(
      io, plan, neuron);
}

}  // namespace

template <class Scalar>
void launch_forward(const LifForward<Scalar>& io, const LifOptions& options, int device, void* stream) {
  const DeviceGuard guard(device);
  const LifPlan plan = plan_lif(io.steps, io.neurons, sizeof(Scalar), false, widest_pack(io), properties_of(device));
  visit_lif_forward<Scalar>(options, plan, [&](auto kernel, const auto& neuron) {
    kernel<<<unsigned(plan.blocks), plan.threads, 0, static_cast<cudaStream_t>(stream)>>>(io, plan, neuron);
  });
  throw_on(cudaGetLastError(), "launching lif_forward");
}

template <class Scalar>
void launch_backward(const LifBackward<Scalar>& io, const LifOptions& options, int device, void* stream) {
  const DeviceGuard guard(device);
  const LifPlan plan = plan_lif(io.steps, io.neurons, sizeof(Scalar), true, widest_pack(io), properties_of(device));
  visit_lif_backward<Scalar>(options, plan, [&](auto kernel, const auto& neuron) {
    kernel<<<unsigned(plan.blocks), plan.threads, 0, static_cast<cudaStream_t>(stream)>>>(io, plan, neuron);
  });
  throw_on(cudaGetLastError(), "launching lif_backward");
}

template <class Scalar>
void launch_neunorm_forward(const NeuNormForward<Scalar>& io, const LifOptions& options, int device, void* stream) {
  const DeviceGuard guard(device);
  const NeuNormSplit split = split_neunorm(io.features, io.positions, sizeof(Scalar));
  const NeuNormPlan plan = plan_neunorm(split, io, widest_pack(io), properties_of(device));
  visit_compiled_backward<Scalar>(options, [&](const auto& neuron) {
    visit_neunorm_tile<Scalar>(plan, [&](auto tile) {
      using Tile = decltype(tile);
      launch_blocks<Tile>(neunorm_forward<Tile, Scalar, std::decay_t<decltype(neuron)>>, plan, device, stream, io,
                          neuron);
    });
  });
  throw_on(cudaGetLastError(), "launching neunorm_forward");
}

template <class Scalar>
void launch_neunorm_backward(const NeuNormBackward<Scalar>& io, const LifOptions& options, int device, void* stream) {
  const DeviceGuard guard(device);
  const NeuNormSplit split = split_neunorm(io.features, io.positions, sizeof(Scalar));
  const NeuNormPlan plan = plan_neunorm(split, io, widest_pack(io), properties_of(device));
  visit_compiled_backward<Scalar>(options, [&](const auto& neuron) {
    visit_neunorm_tile<Scalar>(plan, [&](auto tile) {
      using Tile = decltype(tile);
      launch_blocks<Tile>(neunorm_backward<Tile, Scalar, std::decay_t<decltype(neuron)>>, plan, device, stream, io,
                          neuron);
    });
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
