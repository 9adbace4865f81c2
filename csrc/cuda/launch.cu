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

template <class Io, class State>
GeneralPlan plan_of(const Io& io, const Extras<State>& extras, const NeuronOptions& options, int device) {
  using Scalar = std::remove_const_t<std::remove_pointer_t<decltype(io.x)>>;
  return plan_general<Scalar>(io.layout, extras, options, widest_pack(io, extras), properties_of(device));
}

}  // namespace

template <class Scalar>
void launch_forward(const NeuronForward<Scalar>& io, const LifOptions& options, int device, void* stream) {
  const DeviceGuard guard(device);
  const LifPlan plan =
      plan_lif(io.layout.steps, io.layout.neurons(), sizeof(Scalar), false, widest_pack(io), properties_of(device));
  visit_lif_forward<Scalar>(options, plan, [&](auto kernel, const auto& neuron) {
    kernel<<<unsigned(plan.blocks), plan.threads, 0, static_cast<cudaStream_t>(stream)>>>(io, plan, neuron);
  });
  throw_on(cudaGetLastError(), "launching lif_forward");
}

template <class Scalar>
void launch_backward(const NeuronBackward<Scalar>& io, const LifOptions& options, int device, void* stream) {
  const DeviceGuard guard(device);
  const LifPlan plan =
      plan_lif(io.layout.steps, io.layout.neurons(), sizeof(Scalar), true, widest_pack(io), properties_of(device));
  visit_lif_backward<Scalar>(options, plan, [&](auto kernel, const auto& neuron) {
    kernel<<<unsigned(plan.blocks), plan.threads, 0, static_cast<cudaStream_t>(stream)>>>(io, plan, neuron);
  });
  throw_on(cudaGetLastError(), "launching lif_backward");
}

template <class Scalar>
void launch_general_forward(const NeuronForward<Scalar>& io, const Extras<state_t<Scalar>>& extras,
                            const NeuronOptions& options, int device, void* stream) {
  const DeviceGuard guard(device);
  const GeneralPlan plan = plan_of(io, extras, options, device);
  if (plan.blocks == 0) return;
  visit_general_kernel<Scalar>(options, plan, [&](auto width, const auto& neuron) {
    general_forward<width>
        <<<unsigned(plan.blocks), plan.threads, 0, static_cast<cudaStream_t>(stream)>>>(io, extras, plan, neuron);
  });
  throw_on(cudaGetLastError(), "launching general_forward");
}

template <class Scalar>
void launch_general_backward(const NeuronBackward<Scalar>& io, const Extras<state_t<Scalar>>& extras,
                             const NeuronOptions& options, int device, void* stream) {
  const DeviceGuard guard(device);
  const GeneralPlan plan = plan_of(io, extras, options, device);
  const auto on = static_cast<cudaStream_t>(stream);
  if (plan.blocks > 0) {
    visit_general_kernel<Scalar>(options, plan, [&](auto width, const auto& neuron) {
      general_backward<width>
          <<<unsigned(plan.blocks), plan.threads, size_t(plan.shared_bytes), on>>>(io, extras, plan, neuron);
    });
  }
  throw_on(cudaGetLastError(), "launching general_backward");
  if (!plan.learned) return;
  general_gradients<<<unsigned(plan.entry_blocks), kMostThreads, 0, on>>>(extras, plan);
  throw_on(cudaGetLastError(), "launching general_gradients");
}

template <class Scalar>
void launch_neunorm_forward(const NeuNormForward<Scalar>& io, const LifOptions& options, int device, void* stream) {
  const DeviceGuard guard(device);
  const NeuNormSplit split = split_neunorm(io.features, io.positions, sizeof(Scalar));
  const NeuNormPlan plan = plan_neunorm(split, io, widest_pack(io), properties_of(device));
  visit_either_lif<Scalar>(PlainSurrogates(), options, [&](const auto& neuron) {
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
  visit_either_lif<Scalar>(PlainSurrogates(), options, [&](const auto& neuron) {
    visit_neunorm_tile<Scalar>(plan, [&](auto tile) {
      using Tile = decltype(tile);
      launch_blocks<Tile>(neunorm_backward<Tile, Scalar, std::decay_t<decltype(neuron)>>, plan, device, stream, io,
                          neuron);
    });
  });
  throw_on(cudaGetLastError(), "launching neunorm_backward");
}

#define STBP_INSTANTIATE(Scalar)                                                                               \
  template void launch_forward<Scalar>(const NeuronForward<Scalar>&, const LifOptions&, int, void*);           \
  template void launch_backward<Scalar>(const NeuronBackward<Scalar>&, const LifOptions&, int, void*);         \
  template void launch_general_forward<Scalar>(const NeuronForward<Scalar>&, const Extras<state_t<Scalar>>&,   \
                                               const NeuronOptions&, int, void*);                              \
  template void launch_general_backward<Scalar>(const NeuronBackward<Scalar>&, const Extras<state_t<Scalar>>&, \
                                                const NeuronOptions&, int, void*);                             \
  template void launch_neunorm_forward<Scalar>(const NeuNormForward<Scalar>&, const LifOptions&, int, void*);  \
  template void launch_neunorm_backward<Scalar>(const NeuNormBackward<Scalar>&, const LifOptions&, int, void*);
STBP_INSTANTIATE(float)
STBP_INSTANTIATE(double)
STBP_INSTANTIATE(Half)
STBP_INSTANTIATE(BFloat16)

}  // namespace cuda

int cuda_chunk() { return cuda::kChunk; }

int cuda_neunorm_chunk() { return cuda::kNeuNormChunk; }

}  // namespace stbp
