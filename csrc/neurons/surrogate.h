// The surrogates: stand-ins for the derivative of the spike o = H(s) at s = potential - threshold. Each has a width, a
// gain, a derivative h(s) for training, of area 1 times the gain, and its antiderivative, a smooth spike that rises
// from 0, for checking gradients. Constants are computed in double and rounded once, as in stbp_cuda/surrogate.py.
#pragma once

#include <cmath>
#include <type_traits>

#include "../core/number.h"

namespace stbp {

struct SurrogateOptions {
  int place = 0;  // in Surrogates
  double width = 1;
  double gain = 1;
  double height = 0.15, scale = 6;  // of MultiGaussian

  bool is_plain() const;

  template <class Reader>
  void read(Reader& reader) {
    reader.surrogate("surrogate", place);
    reader.positive("width", width);
    reader.number("gain", gain);
    reader.number("height", height);
    reader.number("scale", scale);
  }
};

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
  State half_width, height, rise, gain;

  explicit Rectangular(const SurrogateOptions& of)
      : half_width(State(of.width / 2)),
        height(State(of.gain / of.width)),
        rise(State(1 / of.width)),
        gain(State(of.gain)) {}
  template <class V>
  STBP_FN V derivative(V s) const {
    return Math<V>::choose(Math<V>::less(magnitude(s), broadcast<V>(half_width)), broadcast<V>(height), V{});
  }
  template <class V>
  STBP_FN V antiderivative(V s) const {
    const V rising = s * rise + State(0.5);
    const V from_0 = rising < State(0) ? V{} : rising;
    return gain * (from_0 > State(1) ? broadcast<V>(State(1)) : from_0);
  }
};

template <class State>
struct Polynomial {
  static constexpr const char* kName = "polynomial";
  State end, peak, slope, half;

  explicit Polynomial(const SurrogateOptions& of)
      : end(State(2 / std::sqrt(of.width))),
        peak(State(of.gain * (std::sqrt(of.width) / 2))),
        slope(State(of.gain * (of.width / 4))),
        half(State(of.gain / 2)) {}
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
    return half + inside * (peak - State(0.5) * slope * magnitude(inside));
  }
};

template <class State>
struct Sigmoid {
  static constexpr const char* kName = "sigmoid";
  State height, rise, gain;

  explicit Sigmoid(const SurrogateOptions& of)
      : height(State(of.gain / of.width)), rise(State(1 / of.width)), gain(State(of.gain)) {}
  template <class V>
  STBP_FN V derivative(V s) const {
    const V e = exp_of_negative(-magnitude(s) * rise, State());
    const V sum = State(1) + e;
    return height * quotient(e, sum * sum);
  }
  template <class V>
  STBP_FN V antiderivative(V s) const {
    const V e = exp_of_negative(-magnitude(s) * rise, State());
    const V numerator = s < State(0) ? e : broadcast<V>(State(1));
    return gain * (numerator / (State(1) + e));
  }
};

template <class State>
struct Gaussian {
  static constexpr const char* kName = "gaussian";
  State peak, half_precision, root_half_precision, half;

  explicit Gaussian(const SurrogateOptions& of)
      : peak(State(of.gain / std::sqrt(2 * 3.14159265358979323846 * of.width))),
        half_precision(State(1 / (2 * of.width))),
        root_half_precision(State(1 / std::sqrt(2 * of.width))),
        half(State(of.gain / 2)) {}
  template <class V>
  STBP_FN V derivative(V s) const {
    return peak * exp_of_negative(-(s * s) * half_precision, State());
  }
  template <class V>
  STBP_FN V antiderivative(V s) const {
    return half * Math<V>::erfc(-s * root_half_precision);
  }
};

template <class State>
struct Atan {
  static constexpr const char* kName = "atan";
  State height, scale, gain;

  explicit Atan(const SurrogateOptions& of)
      : height(State(of.gain / of.width)), scale(State(3.14159265358979323846 / of.width)), gain(State(of.gain)) {}
  template <class V>
  STBP_FN V derivative(V s) const {
    const V scaled = s * scale;
    return height * reciprocal<State>(State(1) + scaled * scaled);
  }
  template <class V>
  STBP_FN V antiderivative(V s) const {
    return gain * (State(0.5) + Math<V>::atan(s * scale) * State(1 / 3.14159265358979323846));
  }
};

template <class State>
struct FastSigmoid {
  static constexpr const char* kName = "fast_sigmoid";
  State height, scale, half_width, half;

  explicit FastSigmoid(const SurrogateOptions& of)
      : height(State(of.gain / of.width)),
        scale(State(2 / of.width)),
        half_width(State(of.width / 2)),
        half(State(of.gain / 2)) {}
  template <class V>
  STBP_FN V derivative(V s) const {
    const V sum = State(1) + magnitude(s) * scale;
    return height * reciprocal<State>(sum * sum);
  }
  template <class V>
  STBP_FN V antiderivative(V s) const {
    return half + half * (s / (half_width + magnitude(s)));
  }
};

// Of width a: a Gaussian of variance a, 1 + height times, less two of variance scale^2 a, height times, at a distance
// of sqrt(a) on either side.
template <class State>
struct MultiGaussian {
  static constexpr const char* kName = "multi_gaussian";
  State middle, side, distance;
  Gaussian<State> narrow, wide;

  explicit MultiGaussian(const SurrogateOptions& of)
      : middle(State(1 + of.height)),
        side(State(of.height)),
        distance(State(std::sqrt(of.width))),
        narrow(of),
        wide(widened(of)) {}
  template <class V>
  STBP_FN V derivative(V s) const {
    return middle * narrow.derivative(s) - side * (wide.derivative(s - distance) + wide.derivative(s + distance));
  }
  template <class V>
  STBP_FN V antiderivative(V s) const {
    return middle * narrow.antiderivative(s) -
           side * (wide.antiderivative(s - distance) + wide.antiderivative(s + distance));
  }

 private:
  static SurrogateOptions widened(SurrogateOptions of) {
    of.width *= of.scale * of.scale;
    return of;
  }
};

template <template <class> class... Surrogate>
struct SurrogateList {
  static constexpr int kCount = sizeof...(Surrogate);
};

// The registry: dispatch, the operator's error message and the tests all read it. The plain kernels and those with
// normalisation have the first ones, as MultiGaussian would take registers from all; the general kernels have all.
// bench/compiled.py compiles one alone, to count its instructions.
#ifndef STBP_SURROGATES
#define STBP_SURROGATES Rectangular, Polynomial, Sigmoid, Gaussian, Atan, FastSigmoid
#endif
using PlainSurrogates = SurrogateList<STBP_SURROGATES>;
using Surrogates = SurrogateList<STBP_SURROGATES, MultiGaussian>;

inline bool SurrogateOptions::is_plain() const { return place < PlainSurrogates::kCount; }

// One of the list, chosen while a kernel runs.
template <class State, class List>
class AnySurrogate;
template <class State, template <class> class First, template <class> class... Others>
class AnySurrogate<State, SurrogateList<First, Others...>> : First<State>, Others<State>... {
 public:
  explicit AnySurrogate(const SurrogateOptions& of) : First<State>(of), Others<State>(of)..., place_(of.place) {}
  // Calls f with the one that was chosen.
  template <class F>
  STBP_FN void visit(const F& f) const {
    int place = 0;
    const auto is = [&](const auto& surrogate) { return place++ == place_ && (f(surrogate), true); };
    // Without a way past all of them, what f sets needs no registers before.
    if (is(first())) return;
    if (!(is(static_cast<const Others<State>&>(*this)) || ...)) __builtin_unreachable();
  }
  STBP_FN bool is_first() const { return place_ == 0; }
  STBP_FN const First<State>& first() const { return *this; }
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
STBP_FN void visit_derivatives(const AnySurrogate<State, List>& surrogate, const V (&s)[kCount], V (&h)[kCount]) {
  surrogate.visit([&](const auto& chosen) { derivatives(chosen, s, h); });
}
#if defined(__CUDACC__)
template <class State, class List, class V, int kCount>
STBP_FN void derivatives(const AnySurrogate<State, List>& surrogate, const V (&s)[kCount], V (&h)[kCount]) {
  visit_derivatives(surrogate, s, h);
}
#else
// The first of the list, the default, in place; the others in a function that is compiled once. V tells the instruction
// sets apart.
template <class State, class List, class V, int kCount>
__attribute__((noinline)) void derivatives_of_others(const AnySurrogate<State, List>& surrogate, const V (&s)[kCount],
                                                     V (&h)[kCount]) {
  visit_derivatives(surrogate, s, h);
}
template <class State, class List, class V, int kCount>
STBP_FN void derivatives(const AnySurrogate<State, List>& surrogate, const V (&s)[kCount], V (&h)[kCount]) {
  if (surrogate.is_first()) return derivatives(surrogate.first(), s, h);
  derivatives_of_others(surrogate, s, h);
}

// h = derivative(u - threshold) in rows, in a function that is compiled once. V tells the instruction sets apart.
template <class State, class List, class V>
__attribute__((noinline)) void derivatives(const AnySurrogate<State, List>& surrogate, V threshold, const V* u,
                                           int64_t u_row, V* h, int64_t h_row, int rows, int count) {
  surrogate.visit([&](const auto& of) {
    const auto chosen = of;  // its constants stay in registers
    for (int row = 0; row < rows; ++row)
      for (int i = 0; i < count; ++i) h[row * h_row + i] = chosen.derivative(u[row * u_row + i] - threshold);
  });
}
#endif

}  // namespace stbp
