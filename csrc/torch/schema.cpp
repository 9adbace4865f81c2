// The extension module: every operator's schema, and build_info().

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#include "build_info.h"

STABLE_TORCH_LIBRARY(stbp_cuda, m) {
  // With gradients, rules for vmap and numbers that may change in a compiled graph: stbp_cuda/autograd.py.
  m.def(
      "lif_forward(Tensor x, Tensor? initial_potential, SymInt steps, str neuron, Tensor? numbers, "
      "bool return_potential, bool save_states) -> (Tensor spikes, Tensor final_potential, Tensor states)");
  m.def(
      "lif_backward(Tensor grad_spikes, Tensor? grad_final, Tensor x, Tensor? initial_potential, Tensor states, "
      "SymInt steps, str neuron, Tensor? numbers, bool return_grad_initial) -> (Tensor grad_x, Tensor grad_initial)");
  m.def(
      "neunorm_lif_forward(Tensor x, Tensor weight, Tensor? decays, SymInt steps, str neuron, Tensor? numbers, "
      "float norm_decay, bool squared, bool save_states) "
      "-> (Tensor normalised, Tensor sums, Tensor maps, Tensor states)");
  m.def(
      "neunorm_lif_backward(Tensor grad_normalised, Tensor x, Tensor weight, Tensor? decays, Tensor sums, Tensor maps, "
      "Tensor states, SymInt steps, str neuron, Tensor? numbers, float norm_decay, bool squared, "
      "bool return_grad_decays) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_decays)");

  // The same without all that, which costs microseconds: what the package's autograd functions call when nothing but
  // autograd looks on.
  m.def(
      "_lif_forward(Tensor x, Tensor? initial_potential, int steps, str neuron, bool return_potential, "
      "bool save_states) -> (Tensor, Tensor, Tensor)");
  m.def(
      "_lif_backward(Tensor grad_spikes, Tensor? grad_final, Tensor x, Tensor? initial_potential, Tensor states, "
      "int steps, str neuron, bool return_grad_initial) -> (Tensor, Tensor)");
  m.def(
      "_neunorm_lif_forward(Tensor x, Tensor weight, Tensor? decays, int steps, str neuron, float norm_decay, "
      "bool squared) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "_neunorm_lif_backward(Tensor grad_normalised, Tensor x, Tensor weight, Tensor? decays, Tensor sums, "
      "Tensor maps, Tensor states, int steps, str neuron, float norm_decay, bool squared, bool return_grad_decays) "
      "-> (Tensor, Tensor, Tensor)");

  // What compilers trace, implemented in stbp_cuda/autograd.py by the operators above. A Scalar, unlike a float, may be
  // a number that changes from call to call. `version` is the package's, so that what an older version made of the same
  // call is not found in a compiler's cache.
  m.def(
      "lif(Tensor x, Tensor? initial_potential, SymInt steps, Scalar decay, Scalar v_threshold, Scalar v_reset, "
      "Scalar width, str switches, bool return_potential, str version) -> (Tensor spikes, Tensor final_potential)");
  m.def(
      "neunorm_lif(Tensor x, Tensor weight, Tensor? decays, SymInt steps, Scalar decay, Scalar v_threshold, "
      "Scalar v_reset, Scalar width, Scalar norm_decay, bool squared, str switches, str version) -> Tensor");
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
