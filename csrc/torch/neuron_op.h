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

// What both passes of a call are given.
struct NeuronInputs {
  const Tensor& x;
  const std::optional<Tensor>&initial, &parameters, &lengths;
  int64_t steps, time_dim;
  bool constant;
  const std::string& neuron;
  const std::optional<Tensor>& numbers;
  int64_t potentials;  // of all steps: 0 none, 1 before the reset, 2 after it
};

// The same, checked.
class NeuronCall {
 public:
  explicit NeuronCall(const NeuronInputs& of)
      : options(neuron_options(of.neuron, of.numbers, of.x)),
        shape(of.x, of.steps, of.time_dim, of.constant),
        type(of.x.scalar_type()),
        state(state_type(type)),
        potentials_(of.potentials),
        constant_(of.constant),
        x_(of.x) {
    const auto& [x, initial, parameters, lengths, steps, time_dim, constant, neuron, numbers, potentials] = of;
    check(potentials >= 0 && potentials <= 2, "potentials must be 0, 1 or 2, got ", potentials);
    if ((lengths || parameters) && !shape.samples_are_apart()) shape.make_contiguous();
    layout = shape.layout();
    input = with_strides(x, shape.input_strides());
    if (initial) initial_ = fitting("initial_potential", *initial, 1, state);
    if (parameters) take_parameters(*parameters);
    if (lengths) {
      check(sizes_of(*lengths) == std::vector<int64_t>{shape.batch()}, "lengths must have shape (", shape.batch(),
            ",), got ", ShapeText(sizes_of(*lengths)));
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
  // A new one, where it is asked for: each takes time.
  std::optional<Tensor> result(int64_t count, ScalarType of, bool asked = true) const {
    if (!asked) return {};
    return empty_with(shape.sizes_for(count), shape.strides_for(count), of, x_);
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
          ShapeText(sizes));
    check(sizes.size() == 2 || sizes.size() == shape.sizes.size(),
          "parameters must have as many dimensions as x with its time, or 2, got ", ShapeText(sizes));
    affine_ = sizes[0] != own;
    rows_ = sizes[1];
    std::vector<int64_t> strides = contiguous_strides(sizes);
    const std::vector<size_t> order = shape.sample_order();
    size_t shared = 0;  // dimensions of x that are not 1, and are here
    int64_t inner = 1;  // those within the only one that is here
    for (size_t d : order) {
      const int64_t size = sizes.size() == 2 ? 1 : sizes[d];
      check(size == 1 || size == shape.sizes[d], "parameters must broadcast to a sample of x, got ", ShapeText(sizes),
            " for x of shape ", ShapeText(shape.sizes));
      if (size == 1) {
        inner *= shared == 0 ? shape.sizes[d] : 1;
        continue;
      }
      ++shared;
      strides[d] = count_;
      count_ *= size;
    }
    check(shared <= 1 || shared == order.size(),
          "parameters must vary along one dimension of a sample or along all, got ", ShapeText(sizes));
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

// The output; the final state; the potentials of all steps; the state after every kChunk-th step but the last.
struct NeuronOutputs {
  std::optional<Tensor> output, final_state, potentials, states;
};

template <class Device>
NeuronOutputs run_forward(const NeuronInputs& of, bool return_output, bool return_final, bool save_states) {
  const NeuronCall call(of);
  const int64_t saved = (of.steps - 1) / Device::kChunk;
  NeuronOutputs outputs{call.result(of.steps, call.type, return_output), call.result(1, call.state, return_final),
                        call.result(of.steps, call.state, of.potentials != 0),
                        call.result(saved, call.state, save_states)};
  if (call.layout.neurons() > 0) {
    visit_scalar(call.type, [&](auto number) {
      using Scalar = decltype(number);
      using State = state_t<Scalar>;
      const NeuronForward<Scalar> io{call.layout,
                                     input_pointer<Scalar>(call.input),
                                     input_pointer<State>(call.initial()),
                                     output_pointer<Scalar>(outputs.output),
                                     output_pointer<State>(outputs.final_state),
                                     output_pointer<State>(outputs.states)};
      const LifOptions* const plain = call.plain();
      if (plain && return_output) return Device::forward(io, *plain, of.x.get_device_index());
      Extras<State> extras = call.extras<State>();
      extras.potentials = output_pointer<State>(outputs.potentials);
      Device::general_forward(io, extras, call.options, of.x.get_device_index());
    });
  }
  return outputs;
}

// dL/dx; dL/d(initial state); dL/dparameters.
struct NeuronGradients {
  Tensor grad_x;
  std::optional<Tensor> grad_initial, grad_parameters;
};

// Where there are no states, they are computed anew.
template <class Device>
NeuronGradients run_backward(const NeuronInputs& of, const std::optional<Tensor>& grad_output,
                             const std::optional<Tensor>& grad_final, const std::optional<Tensor>& grad_potentials,
                             const std::optional<Tensor>& states, bool return_grad_initial,
                             bool return_grad_parameters) {
  const NeuronCall call(of);
  const Tensor& x = of.x;
  check(!grad_potentials || of.potentials != 0, "grad_potentials needs potentials to be 1 or 2");
  const std::optional<Tensor> grad = call.fitting("grad_output", grad_output, of.steps, call.type);
  const std::optional<Tensor> grad_last = call.fitting("grad_final", grad_final, 1, call.state);
  const std::optional<Tensor> grad_all = call.fitting("grad_potentials", grad_potentials, of.steps, call.state);
  std::optional<Tensor> kept;
  if (const int64_t saved = (of.steps - 1) / Device::kChunk) {
    kept = states && states->numel() > 0 ? states : run_forward<Device>(of, true, false, true).states;
    kept = call.fitting("states", kept, saved, call.state);
  }
  check(!return_grad_parameters || of.parameters, "there are no parameters to return the gradient of");

  NeuronGradients gradients{empty_with(call.shape.input_sizes(), call.shape.input_strides(), call.type, x),
                            call.result(1, call.state, return_grad_initial),
                            {}};
  std::optional<Tensor>& grad_parameters = gradients.grad_parameters;
  if (return_grad_parameters)
    grad_parameters = empty_with(sizes_of(*of.parameters), strides_of(*call.parameters()), call.state, x);
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
                                      output_pointer<Scalar>(gradients.grad_x),
                                      output_pointer<State>(gradients.grad_initial)};
      const LifOptions* const plain = call.plain();
      if (plain && grad) return Device::backward(io, *plain, x.get_device_index());
      Extras<State> extras = call.extras<State>();
      extras.potentials = output_pointer<State>(grad_all);
      extras.grad_parameters = output_pointer<State>(grad_parameters);
      const int64_t partial = Device::template general_partial<Scalar>(call.layout, extras, call.options);
      const std::optional<Tensor> sums =
          partial ? empty_with({partial}, {1}, ScalarType::Double, x) : std::optional<Tensor>();
      extras.partial = output_pointer<double>(sums);
      Device::general_backward(io, extras, call.options, x.get_device_index());
    });
  } else if (return_grad_parameters) {
    torch::stable::zero_(*grad_parameters);
  }
  if (return_grad_parameters)
    grad_parameters = with_strides(*grad_parameters, contiguous_strides(sizes_of(*of.parameters)));
  return gradients;
}

// The public operators, whose results are tensors: what is not asked for is empty.
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> neuron_forward(const Tensor& x, const std::optional<Tensor>& initial,
                                                          const std::optional<Tensor>& parameters,
                                                          const std::optional<Tensor>& lengths, int64_t steps,
                                                          int64_t time_dim, bool constant, std::string neuron,
                                                          const std::optional<Tensor>& numbers, int64_t potentials,
                                                          bool return_output, bool return_final, bool save_states) {
  const NeuronOutputs of =
      run_forward<Device>({x, initial, parameters, lengths, steps, time_dim, constant, neuron, numbers, potentials},
                          return_output, return_final, save_states);
  const ScalarType state = state_type(x.scalar_type());
  return {or_empty(of.output, x.scalar_type(), x), or_empty(of.final_state, state, x),
          or_empty(of.potentials, state, x), or_empty(of.states, state, x)};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> neuron_backward(
    const std::optional<Tensor>& grad_output, const std::optional<Tensor>& grad_final,
    const std::optional<Tensor>& grad_potentials, const Tensor& x, const std::optional<Tensor>& initial,
    const std::optional<Tensor>& parameters, const std::optional<Tensor>& lengths, const std::optional<Tensor>& states,
    int64_t steps, int64_t time_dim, bool constant, std::string neuron, const std::optional<Tensor>& numbers,
    int64_t potentials, bool return_grad_initial, bool return_grad_parameters) {
  const NeuronGradients of = run_backward<Device>(
      {x, initial, parameters, lengths, steps, time_dim, constant, neuron, numbers, potentials}, grad_output,
      grad_final, grad_potentials, states, return_grad_initial, return_grad_parameters);
  const ScalarType state = state_type(x.scalar_type());
  return {of.grad_x, or_empty(of.grad_initial, state, x), or_empty(of.grad_parameters, state, x)};
}

// What is asked of the eager operators: the small arguments of the public ones as the bits of one number, as each
// argument costs time; ops.py names them.
struct Asked {
  int64_t bits;

  int64_t time_dim() const { return bits & 1; }
  bool constant() const { return bits & 2; }
  int64_t potentials() const { return bits >> 2 & 3; }
  bool output() const { return bits & 16; }
  bool final_state() const { return bits & 32; }
  bool states() const { return bits & 64; }
  bool grad_initial() const { return bits & 128; }
  bool grad_parameters() const { return bits & 256; }
};

template <class Device>
std::tuple<std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>>
eager_neuron_forward(const Tensor& x, const std::optional<Tensor>& initial, const std::optional<Tensor>& parameters,
                     const std::optional<Tensor>& lengths, int64_t steps, std::string neuron, int64_t bits) {
  const Asked asked{bits};
  NeuronOutputs of = run_forward<Device>(
      {x, initial, parameters, lengths, steps, asked.time_dim(), asked.constant(), neuron, {}, asked.potentials()},
      asked.output(), asked.final_state(), asked.states() && steps > Device::kChunk);
  return {of.output, of.final_state, of.potentials, of.states};
}

template <class Device>
std::tuple<Tensor, std::optional<Tensor>, std::optional<Tensor>> eager_neuron_backward(
    const std::optional<Tensor>& grad_output, const std::optional<Tensor>& grad_final,
    const std::optional<Tensor>& grad_potentials, const Tensor& x, const std::optional<Tensor>& initial,
    const std::optional<Tensor>& parameters, const std::optional<Tensor>& lengths, const std::optional<Tensor>& states,
    int64_t steps, std::string neuron, int64_t bits) {
  const Asked asked{bits};
  const NeuronGradients of = run_backward<Device>(
      {x, initial, parameters, lengths, steps, asked.time_dim(), asked.constant(), neuron, {}, asked.potentials()},
      grad_output, grad_final, grad_potentials, states, asked.grad_initial(), asked.grad_parameters());
  return {of.grad_x, of.grad_initial, of.grad_parameters};
}

}  // namespace stbp
