// The surrogates: stand-ins for the derivative of the spike o = H(s) at s = potential - threshold. Each has a width,
// unit area, a derivative h(s) for training, and its antiderivative, a smooth spike that rises from 0 to 1, for
// checking gradients. Constants are computed in double and rounded once, as in stbp_cuda/surrogate.py.
#pragma once

#include <cmath>
#include <type_traits>

#include "../core/number.h"

namespace stbp {

// e^x for x <= 0, in arithmetic that vectors have; within 1e-7 of the true value, or half a unit of the subnormal
// numbers at the end of the range.
template <class V>
STBP_FN V exp_of_negative(V x, float) {
#if defined(__CUDA_ARCH__)
  return Math<V>::exp_of_negative(x);
#else
  using Bits = typename Math<V>::Bits;
  x = x < -104.0f ? broadcast<V>(-104.0f) : x;      // where e^x rounds to 0; keeps NaN
  const V shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the nearest integer ends in the low bits
  const V n = shifted - 12582912.0f;
  const V r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts: the first product is exact
  V p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = (p * r) * r + r;
  const V scale = bit_cast<V>((bit_cast<Bits>(shifted) << 23) + 0x5f800000u);  // 2^(n + 64), always a normal number
  return (p * scale + scale) * 0x1p-64f;
#endif
}
template <class V>
STBP_FN V exp_of_negative(V x, double) {
  return Math<V>::exp(x);
}

// 1 / x for x >= 1, and y / x for x from 1 to 4 within 2 ulp. On CUDA without a division, which takes twice as many
// instructions and a branch.
template <class State, class V>
STBP_FN V reciprocal(V x) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<V, float>) return Math<float>::reciprocal(x);
#endif
  return State(1) / x;
}
template <class V>
STBP_FN V quotient(V y, V x) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<V, float>) return y * Math<float>::approximate_reciprocal(x);
#endif
  return y / x;
}

template <class State>
struct Rectangular {
  static constexpr const char* kName = "rectangular";
  State half_width, height;

  explicit Rectangular(double width) : half_width(State(width / 2)), height(State(1 / width)) {}
  template <class V>
  STBP_FN V derivative(V s) const {
    return Math<V>::choose(Math<V>::less(magnitude(s), broadcast<V>(half_width)), broadcast<V>(height), V{});
  }
  template <class V>
  STBP_FN V antiderivative(V s) const {
    const V rising = s * height + State(0.5);
    const V from_0 = rising < State(0) ? V{} : rising;
    return from_0 > State(1) ? broadcast<V>(State(1)) : from_0;
  }
};

template <class State>
struct Polynomial {
  static constexpr const char* kName = "polynomial";
  State end, peak, slope;

  explicit Polynomial(double width)
      : end(State(2 / std::sqrt(width))), peak(State(std::sqrt(width) / 2)), slope(State(width / 4)) {}
  template <class V>
  STBP_FN V derivative(V s) const {
    const V distance = magnitude(s);
    const V triangle = peak - slope * distance;
    return Math<V>::choose(Math<V>::less(distance, broadcast<V>(end)), triangle, V{});
  }
  template <class V>
  STBP_FN V antiderivative(V s) const {
    const V from_left = s < -end ? broadcast<V>(-end) : s;
    const V inside = from_left > end ? broadcast<V>(end) : from_left;
    return State(0.5) + inside * (peak - State(0.5) * slope * magnitude(inside));
  }
};

template <class State>
struct Sigmoid {
  static constexpr const char* kName = "sigmoid";
  State height;

  explicit Sigmoid(double width) : height(State(1 / width)) {}
  template <class V>
  STBP_FN V derivative(V s) const {
    const V e = exp_of_negative(-magnitude(s) * height, State());
    const V sum = State(1) + e;
    return height * quotient(e, sum * sum);
  }
  template <class V>
  STBP_FN V antiderivative(V s) const {
    const V e = exp_of_negative(-magnitude(s) * height, State());
    const V numerator = s < State(0) ? e : broadcast<V>(State(1));
    return numerator / (State(1) + e);
  }
};

template <class State>
struct Gaussian {
  static constexpr const char* kName = "gaussian";
  State peak, half_precision, root_half_precision;

  explicit Gaussian(double width)
      : peak(State(1 / std::sqrt(2 * 3.14159265358979323846 * width))),
        half_precision(State(1 / (2 * width))),
        root_half_precision(State(1 / std::sqrt(2 * width))) {}
  template <class V>
  STBP_FN V derivative(V s) const {
    return peak * exp_of_negative(-(s * s) * half_precision, State());
  }
  template <class V>
  STBP_FN V antiderivative(V s) const {
    return State(0.5) * Math<V>::erfc(-s * root_half_precision);
  }
};

template <class State>
struct Atan {
  static constexpr const char* kName = "atan";
  State height, scale;

  explicit Atan(double width) : height(State(1 / width)), scale(State(3.14159265358979323846 / width)) {}
  template <class V>
  STBP_FN V derivative(V s) const {
    const V scaled = s * scale;
    return height * reciprocal<State>(State(1) + scaled * scaled);
  }
  template <class V>
  STBP_FN V antiderivative(V s) const {
    return State(0.5) + Math<V>::atan(s * scale) * State(1 / 3.14159265358979323846);
  }
};

template <class State>
struct FastSigmoid {
  static constexpr const char* kName = "fast_sigmoid";
  State height, scale, half_width;

  explicit FastSigmoid(double width)
      : height(State(1 / width)), scale(State(2 / width)), half_width(State(width / 2)) {}
  template <class V>
  STBP_FN V derivative(V s) const {
    const V sum = State(1) + magnitude(s) * scale;
    return height * reciprocal<State>(sum * sum);
  }
  template <class V>
  STBP_FN V antiderivative(V s) const {
    return State(0.5) + State(0.5) * (s / (half_width + magnitude(s)));
  }
};

template <template <class> class... Surrogate>
struct SurrogateList {};

// The registry: dispatch, the operator's error message and the tests all read it. bench/compiled.py compiles one alone,
// to count its instructions.
#ifndef STBP_SURROGATES
#define STBP_SURROGATES Rectangular, Polynomial, Sigmoid, Gaussian, Atan, FastSigmoid
#endif
using Surrogates = SurrogateList<STBP_SURROGATES>;

// One of the list, chosen while a kernel runs.
template <class State, class List>
class AnySurrogate;
template <class State, template <class> class... Surrogate>
class AnySurrogate<State, SurrogateList<Surrogate...>> : Surrogate<State>... {
 public:
  AnySurrogate(int place, double width) : Surrogate<State>(width)..., place_(place) {}
  // Calls f with the one that was chosen.
  template <class F>
  STBP_FN void visit(const F& f) const {
    int place = 0;
    const auto is = [&](const auto& surrogate) { return place++ == place_ && (f(surrogate), true); };
    // Without a way past all of them, what f sets needs no registers before.
    if (!(is(static_cast<const Surrogate<State>&>(*this)) || ...)) __builtin_unreachable();
  }
  template <class V>
  STBP_FN V derivative(V s) const {
    V result{};
    visit([&](const auto& chosen) { result = chosen.derivative(s); });
    return result;
  }
  template <class V>
  STBP_FN V antiderivative(V s) const {
    V result{};
    visit([&](const auto& chosen) { result = chosen.antiderivative(s); });
    return result;
  }

 private:
  int place_;
};

// h[i] = derivative(s[i]): a surrogate that is chosen while a kernel runs is chosen once for all of them.
template <class Surrogate, class V, int kCount>
STBP_FN void derivatives(const Surrogate& surrogate, const V (&s)[kCount], V (&h)[kCount]) {
  for (int i = 0; i < kCount; ++i) h[i] = surrogate.derivative(s[i]);
}
template <class State, class List, class V, int kCount>
STBP_FN void derivatives(const AnySurrogate<State, List>& surrogate, const V (&s)[kCount], V (&h)[kCount]) {
  surrogate.visit([&](const auto& chosen) { derivatives(chosen, s, h); });
}

}  // namespace stbp
