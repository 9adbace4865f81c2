// The number types a tensor may hold, their conversions to and from the type the state is kept in, and the few
// functions that the neurons and surrogates need beside arithmetic.
//
// Everything that computes is a template of V, what is computed with at once: a number, or on a CPU a vector of numbers
// (cpu/vector.h). The operators of C++ serve both.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define STBP_FN __host__ __device__ __forceinline__
#else
// Always inlined: the same headers are compiled once per instruction set, and a function shared by the linker between
// those objects could run AVX-512 code on a machine that has none.
#define STBP_FN inline __attribute__((always_inline))
#endif
#define STBP_INLINE __attribute__((always_inline))
#define STBP_HOST_FN inline STBP_INLINE

namespace stbp {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

// The state is kept in float, and in double for double input, whatever the number type of the tensors.
template <class Scalar>
struct StateOf {
  using type = float;
};
template <>
struct StateOf<double> {
  using type = double;
};
template <class Scalar>
using state_t = typename StateOf<Scalar>::type;

// What differs between a number and a vector of them: the type of its bits, and what C++ has for one alone, or what
// compilers make too much of.
template <class V>
struct Math;

template <class V>
struct MathOfNumber {
  static STBP_FN bool at_least(V a, V b) { return a >= b; }
  static STBP_FN bool less(V a, V b) { return a < b; }
  static STBP_FN V choose(bool condition, V yes, V no) { return condition ? yes : no; }
  static STBP_FN V zero_times_plus(V a, V b) { return a * V(0) + b; }
  static STBP_FN V plus_product(V sum, V a, V b) { return sum + a * b; }
};

template <>
struct Math<float> : MathOfNumber<float> {
  using Bits = uint32_t;
  static STBP_FN float magnitude(float x) { return fabsf(x); }
#if defined(__CUDA_ARCH__)
  // Eight instructions: the hardware's 2^x, with the argument in two parts.
  static STBP_FN float exp_of_negative(float x) { return expf(x); }
  // Within 1 ulp.
  static STBP_FN float approximate_reciprocal(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
  }
  // For x >= 1: 1 / x rounded to nearest, or 0 where that is a subnormal number. For such x nvcc compiles an IEEE
  // reciprocal to the same three instructions, but behind a test and a branch for all other x.
  static STBP_FN float reciprocal(float x) {
    const float near = approximate_reciprocal(x);
    const float refined = __fmaf_rn(near, __fmaf_rn(-x, near, 1.0f), near);
    return x < 0x1p126f ? refined : near;
  }
#endif
};

template <>
struct Math<double> : MathOfNumber<double> {
  using Bits = uint64_t;
  static STBP_FN double magnitude(double x) { return fabs(x); }
  static STBP_FN double exp(double x) { return ::exp(x); }
  static STBP_FN double erfc(double x) { return ::erfc(x); }
  static STBP_FN double atan(double x) { return ::atan(x); }
};

template <class To, class From>
STBP_FN To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a cast of bits keeps all of them");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <class V>
STBP_FN V magnitude(V x) {
  return Math<V>::magnitude(x);
}

template <class V, class Number>
STBP_FN V broadcast(Number x) {
  return x - V{};  // the conversion that a vector has; exact, -0 included
}

// The bits of half types, in words of 32, to float and back. Free of branches and of operations that some instruction
// set has not for vectors.
template <class V, class Bits>
STBP_FN V float_of_bfloat16(Bits bits) {
  return bit_cast<V>(bits << 16);
}

template <class V, class Bits = typename Math<V>::Bits>
STBP_FN Bits bfloat16_of_float(V value) {  // to nearest, ties to even
  const Bits bits = bit_cast<Bits>(value);
  const Bits rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return (bits & 0x7fffffffu) > 0x7f800000u ? broadcast<Bits>(0x7fc0u) : rounded;
}

template <class V, class Bits>
STBP_FN V float_of_half(Bits bits) {
  // The multiplication moves the exponent's bias and makes subnormal halves normal; infinity and NaN have the largest
  // exponent and need the largest one back.
  const Bits magnitude = bits & 0x7fffu;
  const Bits moved = bit_cast<Bits>(bit_cast<V>(magnitude << 13) * 0x1p112f);
  const Bits special = magnitude >= 0x7c00u ? broadcast<Bits>(0x7f800000u) : Bits{};
  return bit_cast<V>(moved | special | (bits & 0x8000u) << 16);
}

template <class V, class Bits = typename Math<V>::Bits>
STBP_FN Bits half_of_float(V value) {  // to nearest, ties to even
  const Bits bits = bit_cast<Bits>(value);
  const Bits magnitude = bits & 0x7fffffffu;
  // Normal halves: round off 13 bits of the mantissa, then move the exponent's bias from 127 to 15.
  const Bits normal = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
  // Subnormal halves are multiples of 2^-24, which is the last place of 0.5f: the addition rounds.
  const Bits subnormal = bit_cast<Bits>(bit_cast<V>(magnitude) + 0.5f) - 0x3f000000u;
  Bits half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? broadcast<Bits>(0x7c00u) : half;  // 65520 and above
  half = magnitude > 0x7f800000u ? broadcast<Bits>(0x7e00u) : half;
  return half | (bits >> 16 & 0x8000u);
}

STBP_FN float to_state(float value) { return value; }
STBP_FN double to_state(double value) { return value; }
STBP_FN float to_state(BFloat16 value) { return float_of_bfloat16<float>(uint32_t(value.bits)); }
STBP_FN float to_state(Half value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  return float_of_half<float>(uint32_t(value.bits));
#endif
}

template <class Scalar>
struct Rounded {  // from(state): to nearest, ties to even
  static STBP_FN Scalar from(Scalar value) { return value; }
};

// The bits of a spike in a half type, from those of 0.0f or 1.0f.
template <class Bits>
STBP_FN Bits spike_bits(Bits bits, BFloat16) {
  return bits >> 16;
}
template <class Bits>
STBP_FN Bits spike_bits(Bits bits, Half) {
  return bits >> 16 & 0x3c00u;
}

template <>
struct Rounded<BFloat16> {
  static STBP_FN BFloat16 from(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return {bits};
#else
    return {uint16_t(bfloat16_of_float(value))};
#endif
  }
};

template <>
struct Rounded<Half> {
  static STBP_FN Half from(float value) {
#if defined(__CUDA_ARCH__)
    return {__half_as_ushort(__float2half_rn(value))};
#else
    return {uint16_t(half_of_float(value))};
#endif
  }
};

// Two numbers of a half type side by side, the first in the low bits.
template <class Half_>
STBP_FN uint32_t rounded_pair(float low, float high) {
  return uint32_t(Rounded<Half_>::from(low).bits) | uint32_t(Rounded<Half_>::from(high).bits) << 16;
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
template <>
STBP_FN uint32_t rounded_pair<BFloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
STBP_FN uint32_t rounded_pair<Half>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
#endif

}  // namespace stbp
