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

#include "../core/io.h"

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

// A shape in a message; written only where there is one.
struct ShapeText {
  const std::vector<int64_t>& sizes;

  explicit ShapeText(const std::vector<int64_t>& of) : sizes(of) {}
  friend std::ostream& operator<<(std::ostream& text, const ShapeText& shape) {
    text << '(';
    for (size_t i = 0; i < shape.sizes.size(); ++i) text << (i ? ", " : "") << shape.sizes[i];
    return text << (shape.sizes.size() == 1 ? ",)" : ")");
  }
};

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

// The shape and memory order that the input shares with every other tensor of one call. Time is the first dimension,
// which may also hold the batch, steps * batch entries, or the second, [batch, steps, ...]; a constant input has none,
// and its shape is taken for that of its repetition.
struct InputShape {
  std::vector<int64_t> sizes;
  int64_t steps, time_dim;

  InputShape(const Tensor& x, int64_t steps_, int64_t time_dim_, bool constant_)
      : sizes(sizes_of(x)), steps(steps_), time_dim(time_dim_), strides_(strides_of(x)), constant_(constant_) {
    check(time_dim == 0 || time_dim == 1, "time_dim must be 0 or 1, got ", time_dim);
    check(steps >= 1, "steps must be at least 1, got ", steps);
    if (constant_) {
      check(int64_t(sizes.size()) >= time_dim, "x must have at least ", time_dim, " dimensions, got ",
            ShapeText(sizes));
      sizes.insert(sizes.begin() + time_dim, steps);
      strides_.insert(strides_.begin() + time_dim, 0);
    }
    check(int64_t(sizes.size()) > time_dim, "x must have a time dimension, got shape ", ShapeText(sizes));
    check(time_dim == 0 ? sizes[0] % steps == 0 : sizes[1] == steps,
          time_dim == 0 ? "the first dimension of x must be a multiple of steps = " : "x must be [B, T, ...] with T = ",
          steps, ", got x of shape ", ShapeText(sizes));
    neurons_ = 1;
    for (int64_t size : sizes) neurons_ *= size;
    neurons_ /= steps;
    if (!is_dense()) make_contiguous();
  }

  Layout layout() const {
    const int64_t outer = time_dim == 0 ? 1 : sizes[0];
    return {outer, steps, outer > 0 ? neurons_ / outer : 0};
  }
  int64_t batch() const { return time_dim == 1 ? sizes[0] : sizes.size() > 1 ? sizes[1] : 1; }

  // The shape and strides of a tensor that has `count` entries where x has `steps`: 1 for a potential.
  const std::vector<int64_t>& sizes_for(int64_t count) const {
    if (count == steps) return sizes;  // a copy costs time
    other_sizes_ = sizes;
    other_sizes_[size_t(time_dim)] = sizes[size_t(time_dim)] / steps * count;
    return other_sizes_;
  }
  const std::vector<int64_t>& strides_for(int64_t count) const {
    if (time_dim == 0 && !constant_) return strides_;
    std::vector<int64_t>& result = other_strides_ = strides_;
    if (time_dim == 1) {
      result[1] = sizes[0] > 0 ? neurons_ / sizes[0] : 1;
      result[0] = result[1] * count;
    } else if (constant_) {
      result[0] = neurons_;
    }
    return result;
  }
  // Of x itself.
  std::vector<int64_t> input_strides() const {
    if (time_dim == 0 && !constant_) return strides_;
    std::vector<int64_t> result = strides_for(1);
    if (constant_) result.erase(result.begin() + time_dim);
    return constant_ || time_dim == 0 ? result : strides_for(steps);
  }
  std::vector<int64_t> input_sizes() const {
    std::vector<int64_t> result = sizes;
    if (constant_) result.erase(result.begin() + time_dim);
    return result;
  }

  // The dimensions of a sample, from the innermost in memory to the outermost.
  std::vector<size_t> sample_order() const {
    std::vector<size_t> order;
    for (size_t d = 2; d < sizes.size(); ++d)
      if (sizes[d] != 1) order.push_back(d);
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return strides_[a] < strides_[b]; });
    return order;
  }
  bool samples_are_apart() const {  // the batch is the outermost dimension of a step
    for (size_t d = 2; d < sizes.size(); ++d)
      if (sizes[d] != 1 && sizes[1 - size_t(time_dim)] != 1 && strides_[d] > strides_[1 - size_t(time_dim)])
        return false;
    return true;
  }
  // Take a contiguous copy of the input instead, if it is not contiguous.
  void make_contiguous() { strides_ = contiguous_strides(sizes); }

 private:
  // Elements fill their memory without gaps or overlaps, and one step of the batch, or of a sample, lies before the
  // next.
  bool is_dense() const {
    std::vector<size_t> order;
    for (size_t d = 0; d < sizes.size(); ++d)
      if (sizes[d] != 1 && !(constant_ && d == size_t(time_dim))) order.push_back(d);
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return strides_[a] < strides_[b]; });
    int64_t expected = 1;
    for (size_t d : order) {
      if (strides_[d] != expected) return is_empty();
      expected *= sizes[d];
    }
    if (is_empty() || (steps == 1 && time_dim == 0)) return true;
    for (size_t outermost : {size_t(0), size_t(time_dim)}) {  // with time second, the batch comes before it
      if (order.empty() || sizes[outermost] == 1 || (constant_ && outermost == size_t(time_dim))) continue;
      if (order.back() != outermost) return false;
      order.pop_back();
      if (time_dim == 0) break;
    }
    return true;
  }

  bool is_empty() const { return std::find(sizes.begin(), sizes.end(), 0) != sizes.end(); }

  std::vector<int64_t> strides_;
  mutable std::vector<int64_t> other_sizes_, other_strides_;  // of the last call
  int64_t neurons_;
  bool constant_;
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
  const std::vector<int64_t> own = sizes_of(tensor);
  check(own == sizes, name, " must have shape ", ShapeText(sizes), ", got ", ShapeText(own));
  check(tensor.scalar_type() == type, name, " must have the dtype that goes with x's");
  check(tensor.device() == x.device(), name, " must be on the device of x");
  return with_strides(tensor, strides);
}

// Stands for an output that was not asked for.
inline Tensor no_output(ScalarType type, const Tensor& x) { return empty_with({0}, {1}, type, x); }
inline Tensor or_empty(const std::optional<Tensor>& output, ScalarType type, const Tensor& x) {
  return output ? *output : no_output(type, x);
}

template <class T>
const T* input_pointer(const std::optional<Tensor>& tensor) {
  return tensor && tensor->numel() > 0 ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

template <class T>
T* output_pointer(const std::optional<Tensor>& tensor) {
  return tensor && tensor->numel() > 0 ? static_cast<T*>(tensor->mutable_data_ptr()) : nullptr;
}

template <class Run>
void visit_scalar(ScalarType type, const Run& run) {
  switch (type) {
    case ScalarType::Float:
      return run(float());
    case ScalarType::Double:
      return run(double());
    case ScalarType::Half:
      return run(Half());
    case ScalarType::BFloat16:
      return run(BFloat16());
    default:
      check(false, "x must be float64, float32, float16 or bfloat16");
  }
}

}  // namespace stbp
