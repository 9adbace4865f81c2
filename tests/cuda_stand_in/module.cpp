// The CUDA kernels on NumPy arrays, with a submodule for each number type.

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "run.h"

namespace stbp::cuda {

// In kernels.cpp.
#define STBP_ELSEWHERE(Scalar)                                                                                         \
  extern template void run_forward<Scalar>(const NeuronForward<Scalar>&, const LifOptions&, const LifPlan&, int64_t);  \
  extern template void run_backward<Scalar>(const NeuronBackward<Scalar>&, const LifOptions&, const LifPlan&,          \
                                            int64_t);                                                                  \
  extern template void run_general(const NeuronForward<Scalar>&, const Extras<state_t<Scalar>>&, const NeuronOptions&, \
                                   const GeneralPlan&);                                                                \
  extern template void run_general(const NeuronBackward<Scalar>&, const Extras<state_t<Scalar>>&,                      \
                                   const NeuronOptions&, const GeneralPlan&);                                          \
  extern template void run_neunorm(const NeuNormForward<Scalar>&, const LifOptions&, const NeuNormPlan&);              \
  extern template void run_neunorm(const NeuNormBackward<Scalar>&, const LifOptions&, const NeuNormPlan&);
STBP_ELSEWHERE(float)
STBP_ELSEWHERE(double)
STBP_ELSEWHERE(Half)
STBP_ELSEWHERE(BFloat16)

namespace {

namespace py = pybind11;
using Array = std::optional<py::array>;  // with elements of the right size, whatever their dtype: NumPy has no bfloat16

template <class T>
T* pointer(Array array) {
  if (!array) return nullptr;
  if (array->itemsize() != py::ssize_t(sizeof(T))) throw std::invalid_argument("an array has elements of a wrong size");
  return static_cast<T*>(array->mutable_data());
}

template <class Scalar, class State = state_t<Scalar>>
NeuronForward<Scalar> forward(int64_t steps, int64_t neurons, const Array& x, const Array& initial, const Array& output,
                              const Array& final_state, const Array& states) {
  NeuronForward<Scalar> io{};
  io.layout = {1, steps, neurons};
  io.x = pointer<Scalar>(x);
  io.initial = pointer<State>(initial);
  io.output = pointer<Scalar>(output);
  io.final_state = pointer<State>(final_state);
  io.states = pointer<State>(states);
  return io;
}

template <class Scalar, class State = state_t<Scalar>>
NeuronBackward<Scalar> backward(int64_t steps, int64_t neurons, const Array& x, const Array& initial,
                                const Array& states, const Array& grad_output, const Array& grad_final,
                                const Array& grad_x, const Array& grad_initial) {
  NeuronBackward<Scalar> io{};
  io.layout = {1, steps, neurons};
  io.x = pointer<Scalar>(x);
  io.initial = pointer<State>(initial);
  io.states = pointer<State>(states);
  io.grad_output = pointer<Scalar>(grad_output);
  io.grad_final = pointer<State>(grad_final);
  io.grad_x = pointer<Scalar>(grad_x);
  io.grad_initial = pointer<State>(grad_initial);
  return io;
}

// By the general kernel, of packs or of single neurons, with the constants of the launch.
template <class Scalar, class Io>
void launch_general(const Io& io, const LifOptions& options, bool packs) {
  const Extras<state_t<Scalar>> extras{};
  const int widest = packs ? widest_pack(io, extras) : 1;
  run_general(io, extras, options, plan_general<Scalar>(io.layout, extras, options, widest, {0, 0}));
}

LifOptions options_of(double decay, double v_threshold, double v_reset, bool soft_reset, bool detach_reset,
                      bool spatial_only, bool strict_threshold, bool smooth, int surrogate, double width) {
  LifOptions options;
  options.decay = decay;
  options.v_threshold = options.subtract = v_threshold;
  options.v_reset = v_reset;
  options.soft_reset = soft_reset;
  options.detach_reset = detach_reset;
  options.spatial_only = spatial_only;
  options.strict_threshold = strict_threshold;
  options.smooth = smooth;
  options.surrogate.place = surrogate;
  options.surrogate.width = width;
  return options;
}

template <class Scalar, class State = state_t<Scalar>>
NeuNormForward<Scalar> neunorm_forward_of(std::array<int64_t, 4> shape, double norm_decay, bool squared,
                                          bool channels_last, const Array& x, const Array& weight, const Array& decays,
                                          const Array& normalised, const Array& sums, const Array& maps,
                                          const Array& states) {
  return {shape[0],
          shape[1],
          shape[2],
          shape[3],
          State(norm_decay),
          squared,
          channels_last,
          pointer<Scalar>(x),
          pointer<State>(weight),
          pointer<State>(decays),
          pointer<Scalar>(normalised),
          pointer<State>(sums),
          pointer<State>(maps),
          pointer<State>(states)};
}

template <class Scalar, class State = state_t<Scalar>>
NeuNormBackward<Scalar> neunorm_backward_of(std::array<int64_t, 4> shape, double norm_decay, bool squared,
                                            bool channels_last, int64_t groups, const Array& x, const Array& weight,
                                            const Array& decays, const Array& sums, const Array& maps,
                                            const Array& states, const Array& grad_normalised, const Array& grad_x,
                                            const Array& grad_weight, const Array& grad_decays, const Array& carried) {
  return {shape[0],
          shape[1],
          shape[2],
          shape[3],
          State(norm_decay),
          squared,
          channels_last,
          groups,
          pointer<Scalar>(x),
          pointer<State>(weight),
          pointer<State>(decays),
          pointer<State>(sums),
          pointer<State>(maps),
          pointer<State>(states),
          pointer<Scalar>(grad_normalised),
          pointer<Scalar>(grad_x),
          pointer<State>(grad_weight),
          pointer<State>(grad_decays),
          pointer<State>(carried)};
}

template <class Io>
NeuNormPlan plan_of(const Io& io, const NeuNormSplit& split, int widest, int shared_bytes) {
  return plan_neunorm(split, io, widest, {0, shared_bytes});
}

template <class Scalar>
void bind(py::module_ m) {
  m.def("compiled_plans", &compiled_plans<Scalar>);
  // Neither keeps its arrays alive.
  py::class_<NeuronForward<Scalar>>(m, "Forward")
      .def(py::init(&forward<Scalar>))
      .def("widest_pack", [](const NeuronForward<Scalar>& io) { return int(widest_pack(io)); })
      .def("launch_general", &launch_general<Scalar, NeuronForward<Scalar>>)
      .def("launch", &run_forward<Scalar>, py::arg("options"), py::arg("plan"), py::arg("first_block") = 0);
  py::class_<NeuronBackward<Scalar>>(m, "Backward")
      .def(py::init(&backward<Scalar>))
      .def("widest_pack", [](const NeuronBackward<Scalar>& io) { return widest_pack(io); })
      .def("launch_general", &launch_general<Scalar, NeuronBackward<Scalar>>)
      .def("launch", &run_backward<Scalar>, py::arg("options"), py::arg("plan"), py::arg("first_block") = 0);
  py::class_<NeuNormForward<Scalar>>(m, "NeuNormForward")
      .def(py::init(&neunorm_forward_of<Scalar>))
      .def("plan", &plan_of<NeuNormForward<Scalar>>)
      .def("widest_pack", [](const NeuNormForward<Scalar>& io) { return widest_pack(io); })
      .def("launch", &run_neunorm<NeuNormForward<Scalar>>);
  py::class_<NeuNormBackward<Scalar>>(m, "NeuNormBackward")
      .def(py::init(&neunorm_backward_of<Scalar>))
      .def("plan", &plan_of<NeuNormBackward<Scalar>>)
      .def("widest_pack", [](const NeuNormBackward<Scalar>& io) { return widest_pack(io); })
      .def("launch", &run_neunorm<NeuNormBackward<Scalar>>);
}

template <template <class> class... Surrogate>
std::vector<std::string> names(SurrogateList<Surrogate...>) {
  return {Surrogate<float>::kName...};
}

PYBIND11_MODULE(stand_in, m) {
  m.attr("surrogates") = names(Surrogates{});
  m.attr("chunk") = kChunk;
  m.attr("threads") = kMostThreads;
  py::class_<LifPlan>(m, "Plan")
      .def(py::init<int, int, int, int64_t>(), py::arg("rows"), py::arg("width"), py::arg("threads"), py::arg("blocks"))
      .def_readonly("rows", &LifPlan::rows)
      .def_readonly("width", &LifPlan::width)
      .def_readonly("threads", &LifPlan::threads)
      .def_readonly("blocks", &LifPlan::blocks);
  m.def("plan_lif", [](int64_t steps, int64_t neurons, int scalar_bytes, bool backward, int widest, int processors) {
    return plan_lif(steps, neurons, scalar_bytes, backward, widest, {processors, 0});
  });
  m.attr("neunorm_chunk") = kNeuNormChunk;
  py::class_<NeuNormSplit>(m, "NeuNormSplit")
      .def(py::init<int, int, int, int>(), py::arg("pack"), py::arg("teams"), py::arg("lanes"), py::arg("strip"))
      .def_readonly("pack", &NeuNormSplit::pack)
      .def_readonly("teams", &NeuNormSplit::teams)
      .def_readonly("lanes", &NeuNormSplit::lanes)
      .def_readonly("strip", &NeuNormSplit::strip);
  py::class_<NeuNormPlan, NeuNormSplit>(m, "NeuNormPlan")
      .def_readonly("tile_positions", &NeuNormPlan::tile_positions)
      .def_readonly("tile_features", &NeuNormPlan::tile_features)
      .def_readonly("rows", &NeuNormPlan::rows)
      .def_readonly("strips", &NeuNormPlan::strips)
      .def_readonly("blocks", &NeuNormPlan::blocks)
      .def_readonly("tiles", &NeuNormPlan::tiles)
      .def_readonly("shared_bytes", &NeuNormPlan::shared_bytes)
      .def_property_readonly("threads", &NeuNormPlan::threads);
  m.def("split_neunorm", &split_neunorm);
  m.def("neunorm_groups", &neunorm_groups);
  m.def("neunorm_strips", &neunorm_strips);
  py::class_<LifOptions>(m, "Options").def(py::init(&options_of));
  bind<double>(m.def_submodule("float64"));
  bind<float>(m.def_submodule("float32"));
  bind<Half>(m.def_submodule("float16"));
  bind<BFloat16>(m.def_submodule("bfloat16"));
}

}  // namespace
}  // namespace stbp::cuda
