// CUDA's IMPL block.

#include <dlfcn.h>
#include <torch/csrc/stable/library.h>

#include <utility>

#include "../torch/implement.h"
#include "../torch/neunorm_op.h"
#include "../torch/neuron_op.h"
#include "launch.h"
#include "plan.h"

namespace stbp {
namespace {

// torch's current stream. Looked up by name: this binary must also load beside a torch without CUDA, and the libraries
// of a torch with CUDA are not in the scope where the loader would resolve a weak symbol of ours.
void* current_stream(int device) {
  using Function = AOTITorchError (*)(int32_t device_index, void** stream);
  static const Function function = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* const symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Function>(symbol);
  }();
  check(function != nullptr, "this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return stream;
}

struct Cuda {
  static constexpr int kChunk = cuda::kChunk;
  static constexpr int kNeuNormChunk = cuda::kNeuNormChunk;
  static constexpr bool kCarriesInMemory = true;

  template <class Scalar>
  static void forward(const NeuronForward<Scalar>& io, const LifOptions& options, int device) {
    cuda::launch_forward(io, options, device, current_stream(device));
  }
  template <class Scalar>
  static void backward(const NeuronBackward<Scalar>& io, const LifOptions& options, int device) {
    cuda::launch_backward(io, options, device, current_stream(device));
  }
  template <class Scalar>
  static void general_forward(const NeuronForward<Scalar>& io, const Extras<state_t<Scalar>>& extras,
                              const NeuronOptions& options, int device) {
    cuda::launch_general_forward(io, extras, options, device, current_stream(device));
  }
  template <class Scalar>
  static void general_backward(const NeuronBackward<Scalar>& io, const Extras<state_t<Scalar>>& extras,
                               const NeuronOptions& options, int device) {
    cuda::launch_general_backward(io, extras, options, device, current_stream(device));
  }
  template <class Scalar>
  static int64_t general_partial(const Layout& layout, const Extras<state_t<Scalar>>& extras,
                                 const NeuronOptions& options) {
    return cuda::general_partial<Scalar>(layout, extras, options);
  }
  static std::pair<int64_t, int64_t> neunorm_parts(const NeuNormShape& shape, ScalarType type, bool) {
    int bytes = 0;
    visit_scalar(type, [&](auto number) { bytes = sizeof(number); });
    return {cuda::neunorm_groups(shape.batch, shape.features, shape.positions, bytes),
            cuda::neunorm_strips(shape.features, shape.positions, bytes)};
  }
  template <class Scalar>
  static void neunorm_forward(const NeuNormForward<Scalar>& io, const LifOptions& options, int device) {
    cuda::launch_neunorm_forward(io, options, device, current_stream(device));
  }
  template <class Scalar>
  static void neunorm_backward(const NeuNormBackward<Scalar>& io, const LifOptions& options, int device) {
    cuda::launch_neunorm_backward(io, options, device, current_stream(device));
  }
  // torch's own sum: on CUDA its order is the same for every number of a result.
  static void sum_groups(const Tensor& total, const Tensor& parts) {
    const std::vector<int64_t> groups{0};
    Tensor result = total;
    torch::stable::sum_out(result, parts, torch::headeronly::IntHeaderOnlyArrayRef(groups));
  }
};

}  // namespace
}  // namespace stbp

STABLE_TORCH_LIBRARY_IMPL(stbp_cuda, CUDA, m) { stbp::implement<stbp::Cuda>(m); }
