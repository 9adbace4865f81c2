// The leaky integrator, a read-out that does not spike: v[t] = decay v[t-1] + i[t], which is also its output.
#pragma once

#include "../core/number.h"

namespace stbp {

struct LiOptions {
  static constexpr const char* kName = "li";
  static constexpr int kParameters = 1;  // decay
  double decay = 0.25;

  template <class Reader>
  void read(Reader& reader) {
    reader.number("decay", decay);
  }

  bool is_smooth() const { return false; }
};

template <class V>
struct LiValues {
  V decay;
};

template <class State_>
struct Li {
  using State = State_;
  static constexpr int kParameters = LiOptions::kParameters;
  static constexpr bool kBinary = false;
  State decay;

  explicit Li(const LiOptions& options) : decay(State(options.decay)) {}
  STBP_FN State parameter(int) const { return decay; }
  template <class V>
  STBP_FN LiValues<V> values(const V (&of)[kParameters]) const {
    return {of[0]};
  }

  template <class V>
  STBP_FN V step(const LiValues<V>& p, V& v, V current, V& o) const {
    return o = v = p.decay * v + current;
  }
  template <class V>
  STBP_FN V step_back(const LiValues<V>& p, V before, V, V grad_output, V grad_u, V& grad_v, V* gradients) const {
    grad_u = (grad_output + grad_v) + grad_u;
    gradients[0] = Math<V>::plus_product(gradients[0], grad_u, before);
    grad_v = grad_u * p.decay;
    return grad_u;
  }
  // It has no surrogate.
  template <class V>
  STBP_FN V step_back(const LiValues<V>& p, V before, V u, V, V grad_output, V grad_u, V& grad_v, V* gradients) const {
    return step_back(p, before, u, grad_output, grad_u, grad_v, gradients);
  }
  STBP_FN bool learns(int) const { return true; }
  template <bool kSame, class ParametersAt, class V>
  STBP_FN void derivatives_of(const ParametersAt&, const V*, int64_t, V*, int64_t, int, int) const {}
  template <class V, int kCount>
  STBP_FN void derivatives_at(const LiValues<V> (&)[kCount], const V (&)[kCount], V (&)[kCount]) const {}
};

}  // namespace stbp
