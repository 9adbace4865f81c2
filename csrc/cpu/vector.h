// Vectors of numbers, as wide as the registers of the instruction set being compiled for, in GCC's own notation, which
// Clang shares: arithmetic, comparisons and `mask ? a : b` work on them as on numbers.
#pragma once

#include <cstdint>
#include <cstring>

#include "../core/number.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace stbp {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T, int kCount>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * kCount)));
};
template <class T>
using Vector = typename VectorOf<T, kVectorBytes / sizeof(T)>::type;

constexpr int kFloats = kVectorBytes / sizeof(float);
using Floats = Vector<float>;
using Doubles = Vector<double>;
using Words = typename VectorOf<uint16_t, kFloats>::type;  // as many as Floats: the bits of half types

// A comparison and what it chooses. With AVX-512 by name: GCC would make each comparison anew for every choice.
template <class V>
struct MathOfVector {
  static STBP_FN auto at_least(V a, V b) { return a >= b; }
  static STBP_FN auto less(V a, V b) { return a < b; }
  template <class Mask>
  static STBP_FN V choose(Mask mask, V yes, V no) {
    return mask ? yes : no;
  }
  static STBP_FN V zero_times_plus(V a, V b) { return a * V{} + b; }
  static STBP_FN V plus_product(V sum, V a, V b) { return sum + a * b; }
};

#if defined(__AVX512F__)
template <>
struct MathOfVector<Floats> {
  static STBP_FN __mmask16 at_least(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
  static STBP_FN __mmask16 less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static STBP_FN Floats choose(__mmask16 mask, Floats yes, Floats no) { return _mm512_mask_blend_ps(mask, no, yes); }
  // A product with zero is exact: the fused operation rounds as the two do.
  static STBP_FN Floats zero_times_plus(Floats a, Floats b) { return _mm512_fmadd_ps(a, Floats{}, b); }
  // For sums of gradients, which nobody expects in one order.
  static STBP_FN Floats plus_product(Floats sum, Floats a, Floats b) { return _mm512_fmadd_ps(a, b, sum); }
};

template <>
struct MathOfVector<Doubles> {
  static STBP_FN __mmask8 at_least(Doubles a, Doubles b) { return _mm512_cmp_pd_mask(a, b, _CMP_GE_OQ); }
  static STBP_FN __mmask8 less(Doubles a, Doubles b) { return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ); }
  static STBP_FN Doubles choose(__mmask8 mask, Doubles yes, Doubles no) { return _mm512_mask_blend_pd(mask, no, yes); }
  static STBP_FN Doubles zero_times_plus(Doubles a, Doubles b) { return _mm512_fmadd_pd(a, Doubles{}, b); }
  // For sums of gradients, which nobody expects in one order.
  static STBP_FN Doubles plus_product(Doubles sum, Doubles a, Doubles b) { return _mm512_fmadd_pd(a, b, sum); }
};
#endif

template <>
struct Math<Floats> : MathOfVector<Floats> {
  using Bits = Vector<uint32_t>;
  static STBP_FN Floats magnitude(Floats x) { return bit_cast<Floats>(bit_cast<Bits>(x) & 0x7fffffffu); }
};

template <>
struct Math<Doubles> : MathOfVector<Doubles> {
  using Bits = Vector<uint64_t>;
  static STBP_FN Doubles magnitude(Doubles x) {
    return bit_cast<Doubles>(bit_cast<Bits>(x) & uint64_t(0x7fffffffffffffff));
  }
  template <class F>
  static STBP_FN Doubles each(Doubles x, const F& f) {
    for (size_t i = 0; i < sizeof(x) / sizeof(double); ++i) x[i] = f(x[i]);
    return x;
  }
  static STBP_FN Doubles exp(Doubles x) {
    return each(x, [](double e) { return ::exp(e); });
  }
  static STBP_FN Doubles erfc(Doubles x) {
    return each(x, [](double e) { return ::erfc(e); });
  }
  static STBP_FN Doubles atan(Doubles x) {
    return each(x, [](double e) { return ::atan(e); });
  }
};

template <class V, class T>
STBP_FN V load(const T* from) {
  V v;
  memcpy(&v, from, sizeof(v));
  return v;
}

// A mask of the lanes from the given one on, of at most as many as there are.
template <class Bits>
STBP_FN Bits lanes_from(int first) {
  constexpr int kLanes = kVectorBytes / sizeof(Bits{}[0]);
  static const auto masks = [] {
    struct {
      decltype(Bits{}[0] + 0) lane[2 * kLanes];
    } of{};
    for (int i = kLanes; i < 2 * kLanes; ++i) of.lane[i] = ~decltype(Bits{}[0] + 0)(0);
    return of;
  }();
  return load<Bits>(masks.lane + kLanes - first);
}

// Sums in double of what a vector's lanes hold.
template <class V>
struct DoublesOf {
  static constexpr int kCount = sizeof(V{}[0]) == sizeof(double) ? 1 : 2;
  Doubles part[kCount];
};
STBP_FN void add_in_double(DoublesOf<Floats>& sums, Floats v) {
  using Half = typename VectorOf<float, kFloats / 2>::type;
  for (int k = 0; k < 2; ++k) {
    Half half;
    memcpy(&half, reinterpret_cast<const char*>(&v) + k * sizeof(half), sizeof(half));
    sums.part[k] += __builtin_convertvector(half, Doubles);
  }
}
STBP_FN void add_in_double(DoublesOf<Doubles>& sums, Doubles v) { sums.part[0] += v; }
template <class V>
STBP_FN double sum_of(const DoublesOf<V>& sums) {
  constexpr int kLanes = kVectorBytes / sizeof(double);
  double lane[kLanes];
  const Doubles all = DoublesOf<V>::kCount == 1 ? sums.part[0] : sums.part[0] + sums.part[DoublesOf<V>::kCount - 1];
  memcpy(lane, &all, sizeof(lane));
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

// What a tensor holds, to and from a vector of the state's type. The conversions of 16 to 32 bits are named where there
// are instructions for them: GCC 12 takes several for __builtin_convertvector.
STBP_FN Floats widen(Floats v, float) { return v; }
STBP_FN Doubles widen(Doubles v, double) { return v; }
STBP_FN Vector<uint32_t> wide_bits(Words bits) {
#if defined(__AVX512F__)
  return bit_cast<Vector<uint32_t>>(_mm512_maskz_cvtepu16_epi32(__mmask16(-1), bit_cast<__m256i>(bits)));
#elif defined(__AVX2__)
  return bit_cast<Vector<uint32_t>>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(bits)));
#else
  return __builtin_convertvector(bits, Vector<uint32_t>);
#endif
}
STBP_FN Words narrow_bits(Vector<uint32_t> bits) {
#if defined(__AVX512F__)
  return bit_cast<Words>(_mm512_maskz_cvtepi32_epi16(__mmask16(-1), bit_cast<__m512i>(bits)));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32(bit_cast<__m256i>(bits), bit_cast<__m256i>(bits));
  return bit_cast<Words>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  return __builtin_convertvector(bits, Words);
#endif
}

STBP_FN Floats widen(Words bits, BFloat16) { return float_of_bfloat16<Floats>(wide_bits(bits)); }
STBP_FN Floats widen(Words bits, Half) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(__mmask16(-1), bit_cast<__m256i>(bits));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(bit_cast<__m128i>(bits));
#else
  return float_of_half<Floats>(wide_bits(bits));
#endif
}

STBP_FN Floats narrow(Floats v, float) { return v; }
STBP_FN Doubles narrow(Doubles v, double) { return v; }
// A spike, or a share of one in Doubles.
STBP_FN Floats narrow_spike(Floats o, float) { return o; }
STBP_FN Doubles narrow_spike(Doubles o, double) { return o; }
template <class HalfType>
STBP_FN Words narrow_spike(Floats o, HalfType type) {
  return narrow_bits(spike_bits(bit_cast<Vector<uint32_t>>(o), type));
}

STBP_FN Words narrow(Floats v, BFloat16) { return narrow_bits(bfloat16_of_float(v)); }
STBP_FN Words narrow(Floats v, Half) {
#if defined(__AVX512F__)
  return bit_cast<Words>(_mm512_maskz_cvtps_ph(__mmask16(-1), v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  return bit_cast<Words>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  return narrow_bits(half_of_float(v));
#endif
}

// Past the caches, and so without reading first what is about to be overwritten. `to` is aligned to the vector's size.
// Less than half a cache line at once would leave lines half written, which is slower than reading them.
template <class V, class T>
STBP_FN void stream(T* to, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bit_cast<__m512i>(v));
    return;
  }
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bit_cast<__m256i>(v));
    return;
  }
#endif
  memcpy(to, &v, sizeof(v));
}

// After the last stream(), for other threads to see what was written.
STBP_FN void end_of_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

}  // namespace stbp
