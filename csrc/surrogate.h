// The surrogates: stand-ins for the derivative of the spike o = H(s) at s = potential - threshold. Each has a width,
// unit area, a derivative h(s) for training, and its antiderivative, a smooth spike that rises from 0 to 1, for
// checking gradients. Constants are computed in double and rounded once, as in stbp_cuda/surrogate.py.
#pragma once

#include <cmath>

#include "number.h"

namespace stbp {

STBP_FN float magnitude(float s) { return fabsf(s); }
STBP_FN double magnitude(double s) { return fabs(s); }

// e^x for x <= 0, without branches or calls on the CPU so that loops over it vectorise; within 1e-7 of the true value,
// or half a unit of the subnormal numbers at the end of the range.
STBP_FN float exp_of_negative(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);
#else
  x = x < -104.0f ? -104.0f : x;                        // where e^x rounds to 0; keeps NaN
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the nearest integer ends in the low bits
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts: the first product is exact
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = (p * r) * r + r;
  const float scale = float_from((bits_of(shifted) << 23) + 0x5f800000u);  // 2^(n + 64), always a normal number
  return (p * scale + scale) * 0x1p-64f;
#endif
}
STBP_FN double exp_of_negative(double x) { return exp(x); }

template <class State>
struct Rectangular {
  static constexpr const char* kName = "rectangular";
  State half_width, height;

  explicit Rectangular(double width) : half_width(State(width / 2)), height(State(1 / width)) {}
  STBP_FN State derivative(State s) const { return magnitude(s) < half_width ? height : State(0); }
  STBP_FN State antiderivative(State s) const {
    const State rising = s * height + State(0.5);
    return rising < State(0) ? State(0) : rising > State(1) ? State(1) : rising;
  }
};

template <class State>
struct Polynomial {
  static constexpr const char* kName = "polynomial";
  State end, peak, slope;

  explicit Polynomial(double width)
      : end(State(2 / std::sqrt(width))), peak(State(std::sqrt(width) / 2)), slope(State(width / 4)) {}
  STBP_FN State derivative(State s) const { return magnitude(s) < end ? peak - slope * magnitude(s) : State(0); }
  STBP_FN State antiderivative(State s) const {
    const State inside = s < -end ? -end : s > end ? end : s;
    return State(0.5) + inside * (peak - State(0.5) * slope * magnitude(inside));
  }
};

template <class State>
struct Sigmoid {
  static constexpr const char* kName = "sigmoid";
  State height;

  explicit Sigmoid(double width) : height(State(1 / width)) {}
  STBP_FN State derivative(State s) const {
    const State e = exp_of_negative(-magnitude(s) * height);
    const State sum = State(1) + e;
    return height * (e / (sum * sum));
  }
  STBP_FN State antiderivative(State s) const {
    const State e = exp_of_negative(-magnitude(s) * height);
    return (s < State(0) ? e : State(1)) / (State(1) + e);
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
  STBP_FN State derivative(State s) const { return peak * exp_of_negative(-(s * s) * half_precision); }
  STBP_FN State antiderivative(State s) const { return State(0.5) * erfc(-s * root_half_precision); }
};

template <class State>
struct Atan {
  static constexpr const char* kName = "atan";
  State height, scale;

  explicit Atan(double width) : height(State(1 / width)), scale(State(3.14159265358979323846 / width)) {}
  STBP_FN State derivative(State s) const {
    const State scaled = s * scale;
    return height * (State(1) / (State(1) + scaled * scaled));
  }
  STBP_FN State antiderivative(State s) const {
    return State(0.5) + atan(s * scale) * State(1 / 3.14159265358979323846);
  }
};

template <class State>
struct FastSigmoid {
  static constexpr const char* kName = "fast_sigmoid";
  State height, scale, half_width;

  explicit FastSigmoid(double width)
      : height(State(1 / width)), scale(State(2 / width)), half_width(State(width / 2)) {}
  STBP_FN State derivative(State s) const {
    const State sum = State(1) + magnitude(s) * scale;
    return height * (State(1) / (sum * sum));
  }
  STBP_FN State antiderivative(State s) const { return State(0.5) + State(0.5) * (s / (half_width + magnitude(s))); }
};

template <template <class> class... Surrogate>
struct SurrogateList {};

// The registry: dispatch, the operator's error message and the tests all read it.
using Surrogates = SurrogateList<Rectangular, Polynomial, Sigmoid, Gaussian, Atan, FastSigmoid>;

}  // namespace stbp
