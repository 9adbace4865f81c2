// The operators of LIF neurons with normalisation, from tensors to a device's kernels.
//
// Device gives kNeuNormChunk, the K of "one state every K steps"; kCarriesInMemory, whether gradients go from chunk to
// chunk through a tensor; neunorm_parts(shape, type, decays), into how many groups of samples and strips of positions
// it splits the backward pass; neunorm_forward and neunorm_backward(io, options, device_index); and sum_groups(total,
// parts), which adds up the groups.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../core/io.h"
#include "checks.h"
#include "neuron_text.h"

namespace stbp {

// What the two operators with normalisation check, and the shapes and the memory order of what goes with
// x [T, B, C, ...] or [T*B, C, ...]: that of x where it is contiguous or channels_last, with the features innermost,
// else contiguous. Where both are the same memory, that is called contiguous.
struct NeuNormShape {
  int64_t steps, batch, features, positions;
  std::vector<int64_t> sizes, own;  // of x; of the weight
  bool channels_last;

  NeuNormShape(const Tensor& x, const Tensor& weight, int64_t steps_)
      : steps(steps_), sizes(sizes_of(x)), own(sizes_of(weight)) {
    check(steps >= 1, "steps must be at least 1, got ", steps);
    check(!own.empty(), "weight must have shape (C, ...), got ()");
    check(sizes.size() > own.size() && std::equal(own.begin(), own.end(), sizes.end() - int64_t(own.size())),
          "x must end in the shape of weight, ", ShapeText(own), ", got ", ShapeText(sizes));
    features = own[0];
    positions = 1;
    for (size_t d = 1; d < own.size(); ++d) positions *= own[d];
    check(features > 0, "weight must have at least one feature, got ", ShapeText(own));
    int64_t samples = 1;
    for (size_t d = 0; d < sizes.size() - own.size(); ++d) samples *= sizes[d];
    check(samples % steps == 0, "the first dimensions of x must hold a multiple of steps = ", steps,
          " samples, got x of shape ", ShapeText(sizes));
    batch = samples / steps;
    channels_last = !has_strides(x, contiguous_strides(sizes)) && has_strides(x, features_innermost(sizes, own.size()));
  }

  // In the order of x, the strides of a tensor whose `last` last dimensions are features and positions.
  std::vector<int64_t> strides_for(const std::vector<int64_t>& of, size_t last) const {
    return channels_last ? features_innermost(of, last) : contiguous_strides(of);
  }

  bool empty() const { return batch * positions == 0; }
  std::vector<int64_t> maps() const { return {steps, batch, positions}; }
  std::vector<int64_t> states(int64_t chunk) const { return {(steps - 1) / chunk, batch, features, positions}; }

 private:
  static std::vector<int64_t> features_innermost(std::vector<int64_t> of, size_t last) {
    std::rotate(of.end() - last, of.end() - last + 1, of.end());
    std::vector<int64_t> strides = contiguous_strides(of);
    std::rotate(strides.end() - last, strides.end() - 1, strides.end());
    return strides;
  }
};

// -> spikes less U a; the sums of spikes and the maps a [T, B, P]; the state after every kNeuNormChunk-th step but the
// last, or nothing.
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> neunorm_lif_forward(const Tensor& x, const Tensor& weight,
                                                               const std::optional<Tensor>& decays, int64_t steps,
                                                               std::string neuron, const std::optional<Tensor>& numbers,
                                                               double norm_decay, bool squared, bool save_states) {
  const LifOptions options = lif_options(neuron, numbers, x, norm_decay);
  const NeuNormShape shape(x, weight, steps);
  const ScalarType type = x.scalar_type(), state = state_type(type);
  const std::vector<int64_t> strides = shape.strides_for(shape.sizes, shape.own.size());
  const std::vector<int64_t> of_maps = shape.maps(), of_states = shape.states(Device::kNeuNormChunk);
  const Tensor input = with_strides(x, strides);
  const Tensor u = matching("weight", weight, shape.own, state, shape.strides_for(shape.own, shape.own.size()), x);
  std::optional<Tensor> both;
  if (decays) both = matching("decays", *decays, {2}, state, {1}, x);

  const Tensor normalised = empty_with(shape.sizes, strides, type, x);
  const Tensor sums = empty_with(of_maps, contiguous_strides(of_maps), state, x);
  const Tensor maps = empty_with(of_maps, contiguous_strides(of_maps), state, x);
  const Tensor states = empty_with(of_states, shape.strides_for(of_states, 2), state, x);
  if (!shape.empty()) {
    visit_scalar(type, [&](auto number) {
      using Scalar = decltype(number);
      using State = state_t<Scalar>;
      const NeuNormForward<Scalar> io{shape.steps,
                                      shape.batch,
                                      shape.features,
                                      shape.positions,
                                      State(norm_decay),
                                      squared,
                                      shape.channels_last,
                                      input_pointer<Scalar>(input),
                                      input_pointer<State>(u),
                                      input_pointer<State>(both),
                                      output_pointer<Scalar>(normalised),
                                      output_pointer<State>(sums),
                                      output_pointer<State>(maps),
                                      output_pointer<State>(states)};
      Device::neunorm_forward(io, options, x.get_device_index());
    });
  }
  return {normalised, sums, maps, save_states ? states : no_output(state, x)};
}

// -> dL/dx; dL/dU; dL/d(both decays) [2] if asked for. Where `states` is empty, they are computed anew.
template <class Device>
std::tuple<Tensor, Tensor, Tensor> neunorm_lif_backward(const Tensor& grad_normalised, const Tensor& x,
                                                        const Tensor& weight, const std::optional<Tensor>& decays,
                                                        const Tensor& sums, const Tensor& maps, const Tensor& states,
                                                        int64_t steps, std::string neuron,
                                                        const std::optional<Tensor>& numbers, double norm_decay,
                                                        bool squared, bool return_grad_decays) {
  const LifOptions options = lif_options(neuron, numbers, x, norm_decay);
  const NeuNormShape shape(x, weight, steps);
  const ScalarType type = x.scalar_type(), state = state_type(type);
  const std::vector<int64_t> strides = shape.strides_for(shape.sizes, shape.own.size());
  const std::vector<int64_t> of_weight = shape.strides_for(shape.own, shape.own.size());
  const std::vector<int64_t> of_maps = shape.maps(), of_states = shape.states(Device::kNeuNormChunk);
  const Tensor input = with_strides(x, strides);
  const Tensor grad = matching("grad_normalised", grad_normalised, shape.sizes, type, strides, x);
  const Tensor u = matching("weight", weight, shape.own, state, of_weight, x);
  std::optional<Tensor> both;
  if (decays) both = matching("decays", *decays, {2}, state, {1}, x);
  const Tensor sum = matching("sums", sums, of_maps, state, contiguous_strides(of_maps), x);
  const Tensor map = matching("maps", maps, of_maps, state, contiguous_strides(of_maps), x);
  const bool anew = of_states[0] > 0 && states.numel() == 0;
  const Tensor known = anew ? std::get<3>(neunorm_lif_forward<Device>(x, weight, decays, steps, neuron, numbers,
                                                                      norm_decay, squared, true))
                            : states;
  const Tensor kept =
      of_states[0] == 0 ? known : matching("states", known, of_states, state, shape.strides_for(of_states, 2), x);

  const auto [groups, strips] = Device::neunorm_parts(shape, type, return_grad_decays);
  std::vector<int64_t> partial = shape.own;
  partial.insert(partial.begin(), groups);
  const std::vector<int64_t> of_partial = shape.strides_for(partial, shape.own.size());
  const bool carries = Device::kCarriesInMemory && shape.steps > Device::kNeuNormChunk;
  const Tensor grad_x = empty_with(shape.sizes, strides, type, x);
  Tensor grad_weights = empty_with(partial, of_partial, state, x);
  Tensor grad_decays =
      return_grad_decays ? empty_with({groups, strips, 2}, {strips * 2, 2, 1}, state, x) : no_output(state, x);
  const Tensor carried = carries ? empty_with(partial, of_partial, state, x) : no_output(state, x);
  if (!shape.empty()) {
    visit_scalar(type, [&, groups = groups](auto number) {
      using Scalar = decltype(number);
      using State = state_t<Scalar>;
      const NeuNormBackward<Scalar> io{shape.steps,
                                       shape.batch,
                                       shape.features,
                                       shape.positions,
                                       State(norm_decay),
                                       squared,
                                       shape.channels_last,
                                       groups,
                                       input_pointer<Scalar>(input),
                                       input_pointer<State>(u),
                                       input_pointer<State>(both),
                                       input_pointer<State>(sum),
                                       input_pointer<State>(map),
                                       input_pointer<State>(kept),
                                       input_pointer<Scalar>(grad),
                                       output_pointer<Scalar>(grad_x),
                                       output_pointer<State>(grad_weights),
                                       output_pointer<State>(grad_decays),
                                       output_pointer<State>(carried)};
      Device::neunorm_backward(io, options, x.get_device_index());
    });
  } else {
    torch::stable::zero_(grad_weights);
    torch::stable::zero_(grad_decays);
  }
  // The order of these sums follows from the shape alone, too.
  const std::vector<int64_t> over_parts{0, 1};
  Tensor grad_weight = empty_with(shape.own, of_weight, state, x);
  Device::sum_groups(grad_weight, grad_weights);
  if (return_grad_decays)
    grad_decays = torch::stable::sum(grad_decays, torch::headeronly::IntHeaderOnlyArrayRef(over_parts));
  return {grad_x, with_strides(grad_weight, contiguous_strides(shape.own)), grad_decays};
}

}  // namespace stbp
