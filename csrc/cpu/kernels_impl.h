// The bodies of the CPU kernels, for the one instruction set that STBP_ISA names and the compiler's flags enable.

#include "../dispatch.h"
#include "../scan.h"
#include "kernels.h"

namespace stbp::cpu::STBP_ISA {
namespace {

// A tile works in place: its rows are the memory itself.
struct Tile {
  static constexpr int kWidth = kTile;
  static constexpr int kChunk = cpu::kChunk;
  static constexpr int kStepsAtOnce = 2;  // more rows than that crowd each other out of the cache
  int count;

  STBP_FN int width() const { return count; }
  template <class Scalar>
  STBP_FN const Scalar* read(const Scalar* from) const {
    return from;
  }
  template <class Scalar>
  STBP_FN Scalar* write(Scalar* to) const {
    return to;
  }
  template <class Scalar>
  STBP_FN void flush(Scalar*, Scalar*) const {}
};

STBP_FN Tile tile_at(int64_t first, int64_t last) { return Tile{last - first < kTile ? int(last - first) : kTile}; }

template <class Scalar>
void forward(const LifForward<Scalar>& io, const LifOptions& options, int64_t first, int64_t last) {
  visit_forward_neuron<Scalar>(options, [&](const auto& neuron) {
    for (int64_t n = first; n < last; n += kTile) forward_scan(tile_at(n, last), neuron, io, n);
  });
}

template <class Scalar>
void backward(const LifBackward<Scalar>& io, const LifOptions& options, int64_t first, int64_t last) {
  visit_backward_neuron<Scalar>(options, [&](const auto& neuron) {
    for (int64_t n = first; n < last; n += kTile) backward_scan(tile_at(n, last), neuron, io, n);
  });
}

}  // namespace

template <class Scalar>
Kernels<Scalar> kernels() {
  return {forward<Scalar>, backward<Scalar>};
}
template Kernels<float> kernels<float>();
template Kernels<double> kernels<double>();
template Kernels<Half> kernels<Half>();
template Kernels<BFloat16> kernels<BFloat16>();

}  // namespace stbp::cpu::STBP_ISA
