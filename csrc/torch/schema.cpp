// The extension module: every operator's schema, and build_info().

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#include "build_info.h"

STABLE_TORCH_LIBRARY(stbp_cuda, m) {
  // With gradients, rules for vmap and numbers that may change in a compiled graph: stbp_cuda/autograd.py.
  m.def(
      "neuron_forward(Tensor x, Tensor? initial, Tensor? parameters, Tensor? lengths, SymInt steps, int time_dim, "
      "bool constant, str neuron, Tensor? numbers, int potentials, bool return_output, bool return_final, "
      "bool save_states) -> (Tensor output, Tensor final_state, Tensor potentials, Tensor states)");
  m.def(
      "neuron_backward(Tensor? grad_output, Tensor? grad_final, Tensor? grad_potentials, Tensor x, Tensor? initial, "
      "Tensor? parameters, Tensor? lengths, Tensor? states, SymInt steps, int time_dim, bool constant, str neuron, "
      "Tensor? numbers, int potentials, bool return_grad_initial, bool return_grad_parameters) "
      "-> (Tensor grad_x, Tensor grad_initial, Tensor grad_parameters)");
  m.def(
      "neunorm_lif_forward(Tensor x, Tensor weight, Tensor? decays, SymInt steps, str neuron, Tensor? numbers, "
      "float norm_decay, bool squared, bool save_states) "
      "-> (Tensor normalised, Tensor sums, Tensor maps, Tensor states)");
  m.def(
      "neunorm_lif_backward(Tensor grad_normalised, Tensor x, Tensor weight, Tensor? decays, Tensor sums, Tensor maps, "
      "Tensor states, SymInt steps, str neuron, Tensor? numbers, float norm_decay, bool squared, "
      "bool return_grad_decays) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_decays)");

  // Those of neurons without all that, which costs microseconds: what the package's autograd functions call when
  // nothing but autograd looks on.
  m.def(
      "_neuron_forward(Tensor x, Tensor? initial, Tensor? parameters, Tensor? lengths, int steps, str neuron, "
      "int asked) -> (Tensor?, Tensor?, Tensor?, Tensor?)");
  m.def(
      "_neuron_backward(Tensor? grad_output, Tensor? grad_final, Tensor? grad_potentials, Tensor x, Tensor? initial, "
      "Tensor? parameters, Tensor? lengths, Tensor? states, int steps, str neuron, int asked) "
      "-> (Tensor, Tensor?, Tensor?)");

  // What compilers trace, implemented in stbp_cuda/autograd.py by the operators above. A Scalar, unlike a float, may be
  // a number that changes from call to call. `kind` is the neuron without its numbers; `version` is the package's, so
  // that what an older version made of the same call is not found in a compiler's cache.
  m.def(
      "neuron(Tensor x, Tensor? initial, Tensor? parameters, Tensor? lengths, SymInt steps, int time_dim, "
      "bool constant, Scalar[] numbers, str kind, int potentials, bool return_output, bool return_final, str version) "
      "-> (Tensor output, Tensor final_state, Tensor potentials)");
  m.def(
      "neunorm_lif(Tensor x, Tensor weight, Tensor? decays, SymInt steps, Scalar[] numbers, Scalar norm_decay, "
      "bool squared, str kind, str version) -> Tensor");
}

namespace {

// pybind11 has no limited API, and one binary is to serve every Python: hence a plain C function.
PyObject* build_info(PyObject*, PyObject*) {
#if defined(STBP_CUDA)
  const char* const cuda_compiler = STBP_CUDA_COMPILER;
  const char* const cuda_architectures = STBP_CUDA_ARCHITECTURES;
  const int cuda_chunk = stbp::cuda_chunk();
  const int cuda_neunorm_chunk = stbp::cuda_neunorm_chunk();
#else
  const char* const cuda_compiler = nullptr;
  const char* const cuda_architectures = "";
  const int cuda_chunk = 0;
  const int cuda_neunorm_chunk = 0;
#endif
  return Py_BuildValue("{s:s, s:s, s:s, s:i, s:i, s:z, s:s, s:i, s:i}", "torch_headers", TORCH_VERSION, "cxx_compiler",
                       __VERSION__, "cpu_instruction_set", stbp::cpu_instruction_set(), "cpu_chunk", stbp::cpu_chunk(),
                       "cpu_neunorm_chunk", stbp::cpu_neunorm_chunk(), "cuda_compiler", cuda_compiler,
                       "cuda_architectures", cuda_architectures, "cuda_chunk", cuda_chunk, "cuda_neunorm_chunk",
                       cuda_neunorm_chunk);
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS, "How this extension was built and what it chose on this machine."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
