// The bodies of the CPU kernels, for the one instruction set that STBP_ISA names and the compiler's flags enable.

#include <type_traits>

#include "general.h"
#include "lanes.h"
#include "neunorm_impl.h"
#include "scan.h"

namespace stbp::cpu::STBP_ISA {
namespace {

// Tile after tile of [first, last), each in one row of the layout; scan(lanes, n) runs the neurons that lanes hold,
// from n on.
template <class Tile, class State, class Scan>
STBP_FN void each_tile(const Layout& layout, int64_t first, int64_t last, const Scan& scan) {
  constexpr int64_t kNeurons = Tile::kWidth * Tile::kLanes;
  for (int64_t n = first; n < last;) {
    int64_t count = last - n < kNeurons ? last - n : kNeurons;
    if (layout.outer > 1) count = least(count, layout.inner - n % layout.inner);
    if (count >= Tile::kLanes) {
      scan(Tile{int(count)}, n);
    } else {
      scan(Remainder<State>{int(count)}, n);
    }
    n += count;
  }
}

// In the caches, rows of one tile crowd each other out: they often lie a multiple of 4 KB apart. So two steps at once,
// of tiles that leave the state, and backward the potentials of a chunk, their room. Memory itself likes long rows.
template <class Scalar>
void forward(const NeuronForward<Scalar>& io, const LifOptions& options, int64_t first, int64_t last,
             bool past_caches) {
  using State = state_t<Scalar>;
  visit_reset<State>(options, NoSurrogate(), [&](const auto& neuron) {
    const auto scan = [&](const auto& lanes, int64_t n) { forward_scan(lanes, neuron, io, n); };
    if (past_caches) {
      each_tile<Tile<State, 8192, 4, true>, State>(io.layout, first, last, scan);
    } else {
      each_tile<Tile<State, 4096, 2, false>, State>(io.layout, first, last, scan);
    }
  });
  if (past_caches) end_of_streams();
}

template <class Scalar>
void backward(const NeuronBackward<Scalar>& io, const LifOptions& options, int64_t first, int64_t last,
              bool past_caches) {
  using State = state_t<Scalar>;
  const auto with_surrogate = [&](const auto& surrogate) {
    visit_reset<State>(options, surrogate, [&](const auto& neuron) {
      const auto scan = [&](const auto& lanes, int64_t n) { backward_scan(lanes, neuron, io, n); };
      if (past_caches) {
        each_tile<Tile<State, 4096, 2, true>, State>(io.layout, first, last, scan);
      } else {
        each_tile<Tile<State, 2048, 2, false>, State>(io.layout, first, last, scan);
      }
    });
  };
  // What people train with gets kernels for each surrogate.
  if constexpr (std::is_same_v<Scalar, float> || std::is_same_v<Scalar, BFloat16>) {
    visit_surrogate<State>(PlainSurrogates(), options.surrogate, with_surrogate);
  } else {
    with_surrogate(AnyPlainSurrogateOf<State>(options.surrogate));
  }
  if (past_caches) end_of_streams();
}

}  // namespace

template <class Scalar>
Kernels<Scalar> kernels() {
  return {forward<Scalar>,          backward<Scalar>,        general_forward<Scalar>,
          general_backward<Scalar>, neunorm_forward<Scalar>, neunorm_backward<Scalar>};
}
template Kernels<float> kernels<float>();
template Kernels<double> kernels<double>();
template Kernels<Half> kernels<Half>();
template Kernels<BFloat16> kernels<BFloat16>();

}  // namespace stbp::cpu::STBP_ISA
