#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "../build_info.h"
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

DeviceProperties properties_of(int device) {
  DeviceProperties properties{};
  const auto ask = [device](int& value, cudaDeviceAttr attribute) {
    throw_on(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  };
  ask(properties.processors, cudaDevAttrMultiProcessorCount);
  ask(properties.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return properties;
}

// Neurons with normalisation. More shared memory than any block may have is asked for first.
template <class Kernel, class Io, class Neuron>
void launch_blocks(Kernel kernel, const NeuNormPlan& plan, void* stream, const Io& io, const Neuron& neuron) {
  if (plan.shared_bytes > 0)
    throw_on(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes),
             "cudaFuncSetAttribute");
  kernel<<<unsigned(plan.blocks), kNeuNormThreads, size_t(plan.shared_bytes), static_cast<cudaStream_t>(stream)>>>(
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
  const NeuNormPlan plan =
      plan_neunorm_forward(io.batch, io.features, io.positions, sizeof(Scalar), properties_of(device));
  visit_compiled_forward<Scalar>(options, [&](const auto& neuron) {
    launch_blocks(neunorm_forward<kNeuNormThreads, Scalar, std::decay_t<decltype(neuron)>>, plan, stream, io, neuron);
  });
  throw_on(cudaGetLastError(), "launching neunorm_forward");
}

template <class Scalar>
void launch_neunorm_backward(const NeuNormBackward<Scalar>& io, const LifOptions& options, int device, void* stream) {
  const DeviceGuard guard(device);
  const NeuNormPlan plan =
      plan_neunorm_backward(io.groups, io.features, io.positions, sizeof(Scalar), properties_of(device));
  visit_compiled_backward<Scalar>(options, [&](const auto& neuron) {
    launch_blocks(neunorm_backward<kNeuNormThreads, Scalar, std::decay_t<decltype(neuron)>>, plan, stream, io, neuron);
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
