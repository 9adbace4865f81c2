// The operators of all neurons, from tensors to a device's kernels.
//
// Device gives kChunk, the K of "one state every K steps"; forward and backward(io, options, device_index), which run
// the kernels of plain LIF neurons; general_forward and general_backward(io, extras, options, device_index), which run
// any neuron; and general_partial<Scalar>(layout, extras, options), how many doubles the latter needs.
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "../core/io.h"
#include "checks.h"
#include "neuron_text.h"

namespace stbp {

// What is the same in the forward and the backward pass of a call.
class NeuronCall {
 public:
  NeuronCall(const Tensor& x, const std::optional<Tensor>& initial, const std::optional<Tensor>& parameters,
             const std::optional<Tensor>& lengths, int64_t steps, int64_t time_dim, bool constant,
             const std::string& neuron, const std::optional<Tensor>& numbers, int64_t potentials)
      : options(neuron_options(neuron, numbers, x)),
        shape(x, steps, time_dim, constant),
        type(x.scalar_type()),
        state(state_type(type)),
        potentials_(potentials),
        constant_(constant),
        x_(x) {
    check(potentials >= 0 && potentials <= 2, "potentials must be 0, 1 or 2, got ", potentials);
    if ((lengths || parameters) && !shape.samples_are_apart()) shape.make_contiguous();
    layout = shape.layout();
    input = with_strides(x, shape.input_strides());
    if (initial) initial_ = fitting("initial_potential", *initial, 1, state);
    if (parameters) take_parameters(*parameters);
    if (lengths) {
      check(sizes_of(*lengths) == std::vector<int64_t>{shape.batch()}, "lengths must have shape (", shape.batch(),
            ",), got ", shape_string(sizes_of(*lengths)));
      check(lengths->scalar_type() == ScalarType::Long, "lengths must be of dtype int64");
      check(lengths->device() == x.device(), "lengths must be on the device of x");
      lengths_ = with_strides(*lengths, {1});
    }
  }

  // A tensor with `count` entries where x has `steps`, checked and in the memory order of the call.
  Tensor fitting(const char* name, const Tensor& tensor, int64_t count, ScalarType of) const {
    return matching(name, tensor, shape.sizes_for(count), of, shape.strides_for(count), x_);
  }
  std::optional<Tensor> fitting(const char* name, const std::optional<Tensor>& tensor, int64_t count,
                                ScalarType of) const {
    if (!tensor) return {};
    return fitting(name, *tensor, count, of);
  }
  // A new one; empty where it is not asked for.
  Tensor result(int64_t count, ScalarType of, bool asked = true) const {
    return asked ? empty_with(shape.sizes_for(count), shape.strides_for(count), of, x_) : no_output(of, x_);
  }

  // The options where the kernels of plain LIF neurons do.
  const LifOptions* plain() const {
    const auto* lif = std::get_if<LifOptions>(&options);
    const bool general = parameters_ || lengths_ || constant_ || potentials_ != 0;
    return lif == nullptr || general || lif->needs_general() ? nullptr : lif;
  }

  template <class State>
  Extras<State> extras() const {
    Extras<State> of{};
    of.parameters = input_pointer<State>(parameters_);
    of.rows = rows_;
    of.group = group_;
    of.count = count_;
    of.affine = affine_;
    of.lengths = input_pointer<int64_t>(lengths_);
    of.sample = shape.batch() > 0 ? layout.neurons() / shape.batch() : 0;
    of.constant = constant_;
    of.after_reset = potentials_ == 2;
    return of;
  }

  NeuronOptions options;
  InputShape shape;
  Layout layout;
  ScalarType type, state;
  std::optional<Tensor> input;

  const std::optional<Tensor>& initial() const { return initial_; }
  const std::optional<Tensor>& parameters() const { return parameters_; }

 private:
  // [P, R, ...], where ... broadcasts to a sample of x: of its dimensions, all sizes but one are 1, or none is that
  // is not 1 in x.
  void take_parameters(const Tensor& parameters) {
    const std::vector<int64_t> sizes = sizes_of(parameters);
    const int64_t own = std::visit([](const auto& of) { return of.kParameters; }, options);
    check(parameters.scalar_type() == state, "parameters must have the dtype of potentials that goes with x's");
    check(parameters.device() == x_.device(), "parameters must be on the device of x");
    check(sizes.size() >= 2 && (sizes[0] == own || sizes[0] == own + 2) && (sizes[1] == 1 || sizes[1] == shape.steps),
          "parameters must have shape [", own, " or ", own + 2, ", 1 or ", shape.steps, ", ...], got ",
          shape_string(sizes));
    check(sizes.size() == 2 || sizes.size() == shape.sizes.size(),
          "parameters must have as many dimensions as x with its time, or 2, got ", shape_string(sizes));
    affine_ = sizes[0] != own;
    rows_ = sizes[1];
    std::vector<int64_t> strides = contiguous_strides(sizes);
    const std::vector<size_t> order = shape.sample_order();
    size_t shared = 0;  // dimensions of x that are not 1, and are here
    int64_t inner = 1;  // those within the only one that is here
    for (size_t d : order) {
      const int64_t size = sizes.size() == 2 ? 1 : sizes[d];
      check(size == 1 || size == shape.sizes[d], "parameters must broadcast to a sample of x, got ",
            shape_string(sizes), " for x of shape ", shape_string(shape.sizes));
      if (size == 1) {
        inner *= shared == 0 ? shape.sizes[d] : 1;
        continue;
      }
      ++shared;
      strides[d] = count_;
      count_ *= size;
    }
    check(shared <= 1 || shared == order.size(),
          "parameters must vary along one dimension of a sample or along all, got ", shape_string(sizes));
    group_ = count_ == 1 ? 1 : inner;
    strides[1] = count_;
    strides[0] = count_ * rows_;
    parameters_ = with_strides(parameters, strides);
  }

  int64_t potentials_;
  bool constant_;
  const Tensor& x_;
  std::optional<Tensor> initial_, parameters_, lengths_;
  int64_t rows_ = 1, group_ = 1, count_ = 1;
  bool affine_ = false;
};

// The output; the final state; the potentials of all steps, before (potentials 1) or after (2) the reset, or none; the
// state after every kChunk-th step but the last. Without tensors for what nobody asks for, as each takes time.
struct NeuronOutputs {
  Tensor output, final_state;
  std::optional<Tensor> potentials;
  Tensor states;
};

template <class Device>
NeuronOutputs run_forward(const Tensor& x, const std::optional<Tensor>& initial,
                          const std::optional<Tensor>& parameters, const std::optional<Tensor>& lengths, int64_t steps,
                          int64_t time_dim, bool constant, const std::string& neuron,
                          const std::optional<Tensor>& numbers, int64_t potentials, bool return_output,
                          bool return_final, bool save_states) {
  const NeuronCall call(x, initial, parameters, lengths, steps, time_dim, constant, neuron, numbers, potentials);
  const int64_t saved = save_states ? (steps - 1) / Device::kChunk : 0;
  const Tensor output = call.result(steps, call.type, return_output);
  const Tensor final_state = call.result(1, call.state, return_final);
  std::optional<Tensor> all_potentials;
  if (potentials != 0) all_potentials = call.result(steps, call.state);
  const Tensor states = call.result(saved, call.state);
  if (call.layout.neurons() > 0) {
    visit_scalar(call.type, [&](auto number) {
      using Scalar = decltype(number);
      using State = state_t<Scalar>;
      const NeuronForward<Scalar> io{call.layout,
                                     input_pointer<Scalar>(call.input),
                                     input_pointer<State>(call.initial()),
                                     output_pointer<Scalar>(output),
                                     output_pointer<State>(final_state),
                                     output_pointer<State>(states)};
      const LifOptions* const plain = call.plain();
      if (plain && return_output) return Device::forward(io, *plain, x.get_device_index());
      Extras<State> extras = call.extras<State>();
      extras.potentials = all_potentials ? output_pointer<State>(*all_potentials) : nullptr;
      Device::general_forward(io, extras, call.options, x.get_device_index());
    });
  }
  return {output, final_state, all_potentials, states};
}

// -> all of that; what is not asked for is empty.
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> neuron_forward(const Tensor& x, const std::optional<Tensor>& initial,
                                                          const std::optional<Tensor>& parameters,
                                                          const std::optional<Tensor>& lengths, int64_t steps,
                                                          int64_t time_dim, bool constant, std::string neuron,
                                                          const std::optional<Tensor>& numbers, int64_t potentials,
                                                          bool return_output, bool return_final, bool save_states) {
  const NeuronOutputs of = run_forward<Device>(x, initial, parameters, lengths, steps, time_dim, constant, neuron,
                                               numbers, potentials, return_output, return_final, save_states);
  return {of.output, of.final_state, of.potentials ? *of.potentials : no_output(state_type(x.scalar_type()), x),
          of.states};
}

// dL/dx; dL/d(initial state); dL/dparameters, or none. Where `states` is empty, they are computed anew.
struct NeuronGradients {
  Tensor grad_x, grad_initial;
  std::optional<Tensor> grad_parameters;
};

template <class Device>
NeuronGradients run_backward(const std::optional<Tensor>& grad_output, const std::optional<Tensor>& grad_final,
                             const std::optional<Tensor>& grad_potentials, const Tensor& x,
                             const std::optional<Tensor>& initial, const std::optional<Tensor>& parameters,
                             const std::optional<Tensor>& lengths, const Tensor& states, int64_t steps,
                             int64_t time_dim, bool constant, const std::string& neuron,
                             const std::optional<Tensor>& numbers, int64_t potentials, bool return_grad_initial,
                             bool return_grad_parameters) {
  const NeuronCall call(x, initial, parameters, lengths, steps, time_dim, constant, neuron, numbers, potentials);
  check(!grad_potentials || potentials != 0, "grad_potentials needs potentials to be 1 or 2");
  const std::optional<Tensor> grad = call.fitting("grad_output", grad_output, steps, call.type);
  const std::optional<Tensor> grad_last = call.fitting("grad_final", grad_final, 1, call.state);
  std::optional<Tensor> grad_all = call.fitting("grad_potentials", grad_potentials, steps, call.state);
  std::optional<Tensor> kept;
  const int64_t saved = (steps - 1) / Device::kChunk;
  if (saved) {
    const bool anew = states.numel() == 0;
    const Tensor& known = anew ? run_forward<Device>(x, initial, parameters, lengths, steps, time_dim, constant, neuron,
                                                     numbers, 0, true, false, true)
                                     .states
                               : states;
    kept = call.fitting("states", known, saved, call.state);
  }
  check(!return_grad_parameters || parameters, "there are no parameters to return the gradient of");

  const Tensor grad_x = empty_with(call.shape.input_sizes(), call.shape.input_strides(), call.type, x);
  const Tensor grad_initial = call.result(1, call.state, return_grad_initial);
  std::optional<Tensor> grad_parameters;
  if (return_grad_parameters)
    grad_parameters = empty_with(sizes_of(*parameters), strides_of(*call.parameters()), call.state, x);
  if (call.layout.neurons() > 0) {
    visit_scalar(call.type, [&](auto number) {
      using Scalar = decltype(number);
      using State = state_t<Scalar>;
      const NeuronBackward<Scalar> io{call.layout,
                                      input_pointer<Scalar>(call.input),
                                      input_pointer<State>(call.initial()),
                                      input_pointer<State>(kept),
                                      input_pointer<Scalar>(grad),
                                      input_pointer<State>(grad_last),
                                      output_pointer<Scalar>(grad_x),
                                      output_pointer<State>(grad_initial)};
      const LifOptions* const plain = call.plain();
      if (plain && grad) return Device::backward(io, *plain, x.get_device_index());
      Extras<State> extras = call.extras<State>();
      extras.potentials = grad_all ? output_pointer<State>(*grad_all) : nullptr;
      extras.grad_parameters = grad_parameters ? output_pointer<State>(*grad_parameters) : nullptr;
      const int64_t partial = Device::template general_partial<Scalar>(call.layout, extras, call.options);
      const Tensor sums = empty_with({partial}, {1}, ScalarType::Double, x);
      extras.partial = output_pointer<double>(sums);
      Device::general_backward(io, extras, call.options, x.get_device_index());
    });
  } else if (return_grad_parameters) {
    torch::stable::zero_(*grad_parameters);
  }
  if (return_grad_parameters)
    grad_parameters = with_strides(*grad_parameters, contiguous_strides(sizes_of(*parameters)));
  return {grad_x, grad_initial, grad_parameters};
}

// -> all of that; what is not asked for is empty.
template <class Device>
std::tuple<Tensor, Tensor, Tensor> neuron_backward(
    const std::optional<Tensor>& grad_output, const std::optional<Tensor>& grad_final,
    const std::optional<Tensor>& grad_potentials, const Tensor& x, const std::optional<Tensor>& initial,
    const std::optional<Tensor>& parameters, const std::optional<Tensor>& lengths, const Tensor& states, int64_t steps,
    int64_t time_dim, bool constant, std::string neuron, const std::optional<Tensor>& numbers, int64_t potentials,
    bool return_grad_initial, bool return_grad_parameters) {
  const NeuronGradients of = run_backward<Device>(grad_output, grad_final, grad_potentials, x, initial, parameters,
                                                  lengths, states, steps, time_dim, constant, neuron, numbers,
                                                  potentials, return_grad_initial, return_grad_parameters);
  return {of.grad_x, of.grad_initial,
          of.grad_parameters ? *of.grad_parameters : no_output(state_type(x.scalar_type()), x)};
}

// The two for plain neurons with few arguments, each of which costs time.
template <class Device>
std::tuple<Tensor, Tensor, Tensor> eager_neuron_forward(const Tensor& x, const std::optional<Tensor>& initial,
                                                        int64_t steps, int64_t time_dim, std::string neuron,
                                                        bool return_final, bool save_states) {
  const NeuronOutputs of =
      run_forward<Device>(x, initial, {}, {}, steps, time_dim, false, neuron, {}, 0, true, return_final, save_states);
  return {of.output, of.final_state, of.states};
}

template <class Device>
std::tuple<Tensor, Tensor> eager_neuron_backward(const Tensor& grad_output, const std::optional<Tensor>& grad_final,
                                                 const Tensor& x, const std::optional<Tensor>& initial,
                                                 const Tensor& states, int64_t steps, int64_t time_dim,
                                                 std::string neuron, bool return_grad_initial) {
  const NeuronGradients of = run_backward<Device>(grad_output, grad_final, {}, x, initial, {}, {}, states, steps,
                                                  time_dim, false, neuron, {}, 0, return_grad_initial, false);
  return {of.grad_x, of.grad_initial};
}

}  // namespace stbp
