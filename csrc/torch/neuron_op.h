// The operators, from tensors to a device's kernels: what the IMPL blocks of all devices share.
//
// Device gives kChunk, the K of "one state every K steps"; and forward(io, options, device_index) and backward(...),
// which run the kernels. For the neurons with normalisation, kNeuNormChunk; kCarriesInMemory, whether gradients go from
// chunk to chunk through a tensor; neunorm_parts(io), into how many groups of samples and strips of positions a device
// splits the backward pass; neunorm_forward and neunorm_backward; and sum_groups(total, parts), which adds up the
// groups.
#pragma once

#include <torch/csrc/stable/library.h>

#include <charconv>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <tuple>
#include <unordered_map>

#include "../core/io.h"
#include "../neurons/surrogate.h"
#include "checks.h"

namespace stbp {

template <template <class> class... Surrogate>
int surrogate_place(SurrogateList<Surrogate...>, const std::string& name) {
  int place = 0;
  int found = -1;
  ((found = name == Surrogate<double>::kName ? place : found, ++place), ...);
  if (found < 0) {
    std::ostringstream known;
    ((known << ' ' << Surrogate<double>::kName), ...);
    check(false, "surrogate must be one of", known.str(), ", got ", name);
  }
  return found;
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

// What stbp_cuda/ops.py writes, such as
//   "lif decay=0.25 v_threshold=0.75 v_reset=0.0 width=1.0 reset=hard detach_reset=0 spatial_only=0
//   strict_threshold=0 smooth=0 surrogate=rectangular"
// in one line: one argument that explains itself, as each one costs a call some tenth of a microsecond.
class NeuronText {
 public:
  explicit NeuronText(const std::string& text) : text_(text), rest_(text) {
    take("lif");
    options.decay = number(" decay=");
    options.v_threshold = number(" v_threshold=");
    options.v_reset = number(" v_reset=");
    options.width = number(" width=");
    options.soft_reset = word(" reset=") == "soft";
    options.detach_reset = number(" detach_reset=") != 0;
    options.spatial_only = number(" spatial_only=") != 0;
    options.strict_threshold = number(" strict_threshold=") != 0;
    options.smooth = number(" smooth=") != 0;
    options.surrogate = surrogate_place(Surrogates{}, word(" surrogate="));
    check(rest_.empty(), "neuron has more than it should, got ", text_);
    check(options.width > 0, "width must be positive, got ", options.width);
  }

  LifOptions options;

 private:
  void take(std::string_view key) {
    check(rest_.substr(0, key.size()) == key, "neuron must go on with '", key, "' at '", rest_, "', got ", text_);
    rest_.remove_prefix(key.size());
  }
  std::string word(std::string_view key) {
    take(key);
    const std::string found(rest_.substr(0, rest_.find(' ')));
    rest_.remove_prefix(found.size());
    return found;
  }
  double number(std::string_view key) {
    take(key);
    double value = 0;
    const auto [end, error] = std::from_chars(rest_.data(), rest_.data() + rest_.size(), value);
    check(error == std::errc(), "neuron must have a number after '", key, "', got ", text_);
    rest_.remove_prefix(size_t(end - rest_.data()));
    return value;
  }

  const std::string& text_;
  std::string_view rest_;
};

// `numbers` are decay, v_threshold, v_reset, width and, with normalisation, norm_decay: a tensor [4] or [5] in float64
// on the CPU. Where it is given, they hold in place of those in `neuron`. A compiled graph is then right for all
// values.
inline LifOptions options_from(const std::string& neuron, const std::optional<Tensor>& numbers, const Tensor& x,
                               double* norm_decay = nullptr) {
  static thread_local std::unordered_map<std::string, LifOptions> known;
  auto found = known.find(neuron);
  if (found == known.end()) {
    if (known.size() >= 1000) known.clear();  // someone changes the width in every step
    found = known.emplace(neuron, NeuronText(neuron).options).first;
  }
  LifOptions options = found->second;
  check(!options.smooth || x.scalar_type() == ScalarType::Double, "the smooth spike needs x in float64");
  if (numbers) {
    const int64_t count = norm_decay ? 5 : 4;
    check(numbers->is_cpu() && numbers->scalar_type() == ScalarType::Double && has_strides(*numbers, {1}) &&
              sizes_of(*numbers) == std::vector<int64_t>{count},
          "numbers must be a contiguous tensor of ", count, " values in float64 on the CPU");
    const double* const value = static_cast<const double*>(numbers->const_data_ptr());
    options.decay = value[0];
    options.v_threshold = value[1];
    options.v_reset = value[2];
    options.width = value[3];
    if (norm_decay) *norm_decay = value[4];
    check(options.width > 0, "width must be positive, got ", options.width);
  }
  return options;
}

// Stands for an output that was not asked for.
inline Tensor no_output(ScalarType type, const Tensor& x) { return empty_with({0}, {1}, type, x); }

template <class T>
const T* input_pointer(const std::optional<Tensor>& tensor) {
  return tensor && tensor->numel() > 0 ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

template <class T>
T* output_pointer(const Tensor& tensor) {
  return tensor.numel() > 0 ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}

// -> spikes; the final potential; the state after every kChunk-th step but the last. The last two are empty
// unless asked for.
template <class Device>
std::tuple<Tensor, Tensor, Tensor> lif_forward(const Tensor& x, const std::optional<Tensor>& initial_potential,
                                               int64_t steps, std::string neuron, const std::optional<Tensor>& numbers,
                                               bool return_potential, bool save_states) {
  const LifOptions options = options_from(neuron, numbers, x);
  const Layout layout(x, steps);
  const ScalarType state = state_type(x.scalar_type());
  const Tensor input = layout.input_fits ? x : with_strides(x, layout.strides);
  std::optional<Tensor> initial;
  if (initial_potential)
    initial = matching("initial_potential", *initial_potential, layout.sizes_for(1), state, layout.strides, x);

  const int64_t saved = save_states ? (steps - 1) / Device::kChunk : 0;
  const Tensor spikes = empty_with(layout.sizes, layout.strides, x.scalar_type(), x);
  const Tensor final_potential =
      return_potential ? empty_with(layout.sizes_for(1), layout.strides, state, x) : no_output(state, x);
  const Tensor states = empty_with(layout.sizes_for(saved), layout.strides, state, x);

  if (layout.neurons > 0) {
    visit_scalar(x.scalar_type(), [&](auto type) {
      using Scalar = decltype(type);
      using State = state_t<Scalar>;
      const LifForward<Scalar> io{layout.steps,
                                  layout.neurons,
                                  input_pointer<Scalar>(input),
                                  input_pointer<State>(initial),
                                  output_pointer<Scalar>(spikes),
                                  output_pointer<State>(final_potential),
                                  output_pointer<State>(states)};
      Device::forward(io, options, x.get_device_index());
    });
  }
  return {spikes, final_potential, states};
}

// -> dL/dx; dL/d(initial potential) if asked for. Where `states` is empty, they are computed anew.
template <class Device>
std::tuple<Tensor, Tensor> lif_backward(const Tensor& grad_spikes, const std::optional<Tensor>& grad_final,
                                        const Tensor& x, const std::optional<Tensor>& initial_potential,
                                        const Tensor& states, int64_t steps, std::string neuron,
                                        const std::optional<Tensor>& numbers, bool return_grad_initial) {
  const LifOptions options = options_from(neuron, numbers, x);
  const Layout layout(x, steps);
  const ScalarType state = state_type(x.scalar_type());
  const Tensor input = layout.input_fits ? x : with_strides(x, layout.strides);
  const Tensor grad = matching("grad_spikes", grad_spikes, layout.sizes, x.scalar_type(), layout.strides, x);
  std::optional<Tensor> initial, grad_last, kept;
  if (initial_potential)
    initial = matching("initial_potential", *initial_potential, layout.sizes_for(1), state, layout.strides, x);
  if (grad_final) grad_last = matching("grad_final", *grad_final, layout.sizes_for(1), state, layout.strides, x);
  const int64_t saved = (steps - 1) / Device::kChunk;
  if (saved) {
    const bool anew = states.numel() == 0;
    const Tensor& known =
        anew ? std::get<2>(lif_forward<Device>(x, initial_potential, steps, neuron, numbers, false, true)) : states;
    kept = matching("states", known, layout.sizes_for(saved), state, layout.strides, x);
  }

  const Tensor grad_x = empty_with(layout.sizes, layout.strides, x.scalar_type(), x);
  const Tensor grad_initial =
      return_grad_initial ? empty_with(layout.sizes_for(1), layout.strides, state, x) : no_output(state, x);

  if (layout.neurons > 0) {
    visit_scalar(x.scalar_type(), [&](auto type) {
      using Scalar = decltype(type);
      using State = state_t<Scalar>;
      const LifBackward<Scalar> io{layout.steps,
                                   layout.neurons,
                                   input_pointer<Scalar>(input),
                                   input_pointer<State>(initial),
                                   input_pointer<State>(kept),
                                   input_pointer<Scalar>(grad),
                                   input_pointer<State>(grad_last),
                                   output_pointer<Scalar>(grad_x),
                                   output_pointer<State>(grad_initial)};
      Device::backward(io, options, x.get_device_index());
    });
  }
  return {grad_x, grad_initial};
}

// The two without `numbers`: each argument costs time.
template <class Device>
std::tuple<Tensor, Tensor, Tensor> eager_lif_forward(const Tensor& x, const std::optional<Tensor>& initial_potential,
                                                     int64_t steps, std::string neuron, bool return_potential,
                                                     bool save_states) {
  return lif_forward<Device>(x, initial_potential, steps, std::move(neuron), {}, return_potential, save_states);
}

template <class Device>
std::tuple<Tensor, Tensor> eager_lif_backward(const Tensor& grad_spikes, const std::optional<Tensor>& grad_final,
                                              const Tensor& x, const std::optional<Tensor>& initial_potential,
                                              const Tensor& states, int64_t steps, std::string neuron,
                                              bool return_grad_initial) {
  return lif_backward<Device>(grad_spikes, grad_final, x, initial_potential, states, steps, std::move(neuron), {},
                              return_grad_initial);
}

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
          "x must end in the shape of weight, ", shape_string(own), ", got ", shape_string(sizes));
    features = own[0];
    positions = 1;
    for (size_t d = 1; d < own.size(); ++d) positions *= own[d];
    check(features > 0, "weight must have at least one feature, got ", shape_string(own));
    int64_t samples = 1;
    for (size_t d = 0; d < sizes.size() - own.size(); ++d) samples *= sizes[d];
    check(samples % steps == 0, "the first dimensions of x must hold a multiple of steps = ", steps,
          " samples, got x of shape ", shape_string(sizes));
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
  const LifOptions options = options_from(neuron, numbers, x, &norm_decay);
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
  const LifOptions options = options_from(neuron, numbers, x, &norm_decay);
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

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> eager_neunorm_lif_forward(const Tensor& x, const Tensor& weight,
                                                                     const std::optional<Tensor>& decays, int64_t steps,
                                                                     std::string neuron, double norm_decay,
                                                                     bool squared) {
  return neunorm_lif_forward<Device>(x, weight, decays, steps, std::move(neuron), {}, norm_decay, squared, true);
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> eager_neunorm_lif_backward(const Tensor& grad_normalised, const Tensor& x,
                                                              const Tensor& weight, const std::optional<Tensor>& decays,
                                                              const Tensor& sums, const Tensor& maps,
                                                              const Tensor& states, int64_t steps, std::string neuron,
                                                              double norm_decay, bool squared,
                                                              bool return_grad_decays) {
  return neunorm_lif_backward<Device>(grad_normalised, x, weight, decays, sums, maps, states, steps, std::move(neuron),
                                      {}, norm_decay, squared, return_grad_decays);
}

// Every device has the same operators.
template <class Device, class Library>
void implement(Library& m) {
  m.impl("lif_forward", TORCH_BOX(&lif_forward<Device>));
  m.impl("lif_backward", TORCH_BOX(&lif_backward<Device>));
  m.impl("neunorm_lif_forward", TORCH_BOX(&neunorm_lif_forward<Device>));
  m.impl("neunorm_lif_backward", TORCH_BOX(&neunorm_lif_backward<Device>));
  m.impl("_lif_forward", TORCH_BOX(&eager_lif_forward<Device>));
  m.impl("_lif_backward", TORCH_BOX(&eager_lif_backward<Device>));
  m.impl("_neunorm_lif_forward", TORCH_BOX(&eager_neunorm_lif_forward<Device>));
  m.impl("_neunorm_lif_backward", TORCH_BOX(&eager_neunorm_lif_backward<Device>));
}

}  // namespace stbp
