// The number types a tensor may hold, and their conversions to and from the type the state is kept in.
#pragma once

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
#define STBP_HOST_FN inline __attribute__((always_inline))

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

STBP_FN uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

STBP_FN float float_from(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

STBP_FN float to_state(float value) { return value; }
STBP_FN double to_state(double value) { return value; }
STBP_FN float to_state(BFloat16 value) { return float_from(uint32_t(value.bits) << 16); }
STBP_FN float to_state(Half value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  // Free of branches, so that loops over it vectorise. The multiplication moves the exponent's bias and makes
  // subnormal halves normal; infinity and NaN have the largest exponent and need the largest one back.
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t moved = bits_of(float_from(magnitude << 13) * 0x1p112f);
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return float_from(moved | special | (value.bits & 0x8000u) << 16);
#endif
}

template <class Scalar>
struct Rounded;  // Rounded<Scalar>::from(state): to nearest, ties to even

template <>
struct Rounded<float> {
  static STBP_FN float from(float value) { return value; }
};

template <>
struct Rounded<double> {
  static STBP_FN double from(double value) { return value; }
};

template <>
struct Rounded<BFloat16> {
  static STBP_FN BFloat16 from(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return {uint16_t(nan ? 0x7fc0u : rounded)};
  }
};

template <>
struct Rounded<Half> {
  static STBP_FN Half from(float value) {
#if defined(__CUDA_ARCH__)
    return {__half_as_ushort(__float2half_rn(value))};
#else
    const uint32_t bits = bits_of(value);
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Normal halves: round off 13 bits of the mantissa, then move the exponent's bias from 127 to 15.
    const uint32_t normal = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
    // Subnormal halves are multiples of 2^-24, which is the last place of 0.5f: the addition rounds.
    const uint32_t subnormal = bits_of(float_from(magnitude) + 0.5f) - bits_of(0.5f);
    const uint32_t is_subnormal = 0u - uint32_t(magnitude < 0x38800000u);  // a mask; GCC vectorises no choice here
    uint32_t half = (subnormal & is_subnormal) | (normal & ~is_subnormal);
    half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    return {uint16_t(half | (bits >> 16 & 0x8000u))};
#endif
  }
};

}  // namespace stbp
