// What every operator checks before it computes anything, and how it sees its tensors' memory.
//
// stbp_cuda.functional checks its arguments with the user's names and words for them. These checks are the last line:
// they keep a direct call of the operator from reading or writing outside a tensor.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace stbp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Part>
void check(bool condition, const Part&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << "stbp_cuda: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape_string(const std::vector<int64_t>& sizes) {
  std::ostringstream text;
  text << '(';
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << (sizes.size() == 1 ? ",)" : ")");
  return text.str();
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

inline std::vector<int64_t> strides_of(const Tensor& tensor) {
  const auto strides = tensor.strides();
  return {strides.begin(), strides.end()};
}

inline ScalarType state_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(1, sizes[d])) strides[d] = stride;
  return strides;
}

// The shape and memory order that the input shares with every other tensor of one call. The first dimension counts time
// steps, or, where the batch is folded into it, steps * batch entries.
struct Layout {
  std::vector<int64_t> sizes, strides;
  int64_t steps, neurons;
  bool input_fits;  // false: the input is to be copied to these strides first

  Layout(const Tensor& x, int64_t steps_) : sizes(sizes_of(x)), strides(strides_of(x)), steps(steps_) {
    check(!sizes.empty(), "x must have a time dimension, got a scalar");
    check(steps >= 1, "steps must be at least 1, got ", steps);
    check(sizes[0] % steps == 0, "the first dimension of x must be a multiple of steps = ", steps, ", got x of shape ",
          shape_string(sizes));
    neurons = x.numel() / steps;
    input_fits = is_dense_and_time_major();
    if (!input_fits) strides = contiguous_strides(sizes);
  }

  // The shape of a tensor that has `count` entries where x has `steps`: 1 for a potential.
  std::vector<int64_t> sizes_for(int64_t count) const {
    std::vector<int64_t> result = sizes;
    result[0] = sizes[0] / steps * count;
    return result;
  }

 private:
  // Elements fill their memory without gaps or overlaps, and one step lies wholly before the next.
  bool is_dense_and_time_major() const {
    std::vector<size_t> order;
    for (size_t d = 0; d < sizes.size(); ++d)
      if (sizes[d] != 1) order.push_back(d);
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return strides[a] < strides[b]; });
    int64_t expected = 1;
    for (size_t d : order) {
      if (strides[d] != expected) return sizes_are_empty();
      expected *= sizes[d];
    }
    return steps == 1 || order.empty() || order.back() == 0 || sizes_are_empty();
  }

  bool sizes_are_empty() const { return std::find(sizes.begin(), sizes.end(), 0) != sizes.end(); }
};

inline int32_t dtype_code(ScalarType type) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
}

inline Tensor empty_with(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType type,
                         const Tensor& like) {
  const auto device = like.device();
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype_code(type),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(device.type())),
                               like.get_device_index(), &handle));
  return Tensor(handle);
}

inline bool has_strides(const Tensor& tensor, const std::vector<int64_t>& strides) {
  const auto own_sizes = tensor.sizes();
  const auto own_strides = tensor.strides();
  bool same = true;
  for (size_t d = 0; d < strides.size(); ++d) same &= own_sizes[d] == 1 || own_strides[d] == strides[d];
  return same || tensor.numel() == 0;
}

// The tensor itself if its memory has the wanted order, else a copy that does.
inline Tensor with_strides(const Tensor& tensor, const std::vector<int64_t>& strides) {
  if (has_strides(tensor, strides)) return tensor;
  Tensor copy = empty_with(sizes_of(tensor), strides, tensor.scalar_type(), tensor);
  torch::stable::copy_(copy, tensor);
  return copy;
}

// Checks a tensor that must go with x, and gives it a memory order.
inline Tensor matching(const char* name, const Tensor& tensor, const std::vector<int64_t>& sizes, ScalarType type,
                       const std::vector<int64_t>& strides, const Tensor& x) {
  check(sizes_of(tensor) == sizes, name, " must have shape ", shape_string(sizes), ", got ",
        shape_string(sizes_of(tensor)));
  check(tensor.scalar_type() == type, name, " must have the dtype that goes with x's");
  check(tensor.device() == x.device(), name, " must be on the device of x");
  return with_strides(tensor, strides);
}

}  // namespace stbp
