#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

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
  throw_on(cudaDeviceGetAttribute(&properties.processors, cudaDevAttrMultiProcessorCount, device),
           "cudaDeviceGetAttribute");
  return properties;
}

}  // namespace

template <class Scalar>
void launch_forward(const LifForward<Scalar>& io, const LifOptions& options, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  const LifPlan plan = plan_lif(io.neurons, sizeof(Scalar), widest_pack(io), properties_of(device));
  visit_compiled_forward<Scalar>(options, [&](const auto& neuron) {
    visit_compiled_width<Scalar>(plan, [&](auto width) {
      lif_forward<decltype(width)::value><<<unsigned(plan.blocks), plan.threads, 0, on>>>(io, plan, neuron);
    });
  });
  throw_on(cudaGetLastError(), "launching lif_forward");
}

template <class Scalar>
void launch_backward(const LifBackward<Scalar>& io, const LifOptions& options, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  const LifPlan plan = plan_lif(io.neurons, sizeof(Scalar), widest_pack(io), properties_of(device));
  visit_compiled_backward<Scalar>(options, [&](const auto& neuron) {
    visit_compiled_width<Scalar>(plan, [&](auto width) {
      lif_backward<decltype(width)::value><<<unsigned(plan.blocks), plan.threads, 0, on>>>(io, plan, neuron);
    });
  });
  throw_on(cudaGetLastError(), "launching lif_backward");
}

template <class Scalar>
void launch_neunorm_forward(const NeuNormForward<Scalar>& io, const LifOptions& options, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  const NeuNormPlan plan = plan_neunorm_forward(io.batch, io.features, io.positions);
  visit_compiled_forward<Scalar>(options, [&](const auto& neuron) {
    neunorm_forward<kNeuNormWarps>
        <<<unsigned(plan.blocks), kNeuNormWarps * kStrip, size_t(plan.shared_bytes), on>>>(io, plan, neuron);
  });
  throw_on(cudaGetLastError(), "launching neunorm_forward");
}

template <class Scalar>
void launch_neunorm_backward(const NeuNormBackward<Scalar>& io, const LifOptions& options, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  const NeuNormPlan plan = plan_neunorm_backward(io.groups, io.positions);
  visit_compiled_backward<Scalar>(options, [&](const auto& neuron) {
    neunorm_backward<kNeuNormWarps><<<unsigned(plan.blocks), kNeuNormWarps * kStrip, 0, on>>>(io, plan, neuron);
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
