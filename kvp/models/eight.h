// Eight numbers at a time: loaded in the dtype they are stored in, computed in float32 or float64.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define KVP_AVX2 1
#endif

namespace {

constexpr int LANES = 8;
constexpr int LINE = 64;  // bytes of a cache line

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename T>
struct Computed {
  using type = float;
};
template <>
struct Computed<double> {
  using type = double;
};

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
inline float widen(Half x) {  // subnormal numbers, too: a power of two moves the exponent
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = uint32_t(x.bits & 0x7fff) << 13;
  float wide;
  std::memcpy(&wide, &rest, sizeof wide);
  wide *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &wide, sizeof bits);
  if (rest >= uint32_t(0x7c00) << 13) bits |= 0x7f800000;  // infinite, or no number
  bits |= sign;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// Eight numbers.
template <typename C>
struct Eight {
  C lane[LANES];
  static Eight zero() { return Eight{}; }
  static Eight load(const C* from) {
    Eight made;
    std::copy(from, from + LANES, made.lane);
    return made;
  }
  void store(C* to) const { std::copy(lane, lane + LANES, to); }
  void add(const Eight& a, const Eight& b) {
    for (int i = 0; i < LANES; ++i) lane[i] += a.lane[i] * b.lane[i];
  }
  void add(C a, const Eight& b) {
    for (int i = 0; i < LANES; ++i) lane[i] += a * b.lane[i];
  }
  C sum() const {
    C all = 0;
    for (int i = 0; i < LANES; ++i) all += lane[i];
    return all;
  }
};

template <typename T, typename C = typename Computed<T>::type>
inline Eight<C> whole(const T* from) {
  Eight<C> made;
  for (int i = 0; i < LANES; ++i) made.lane[i] = widen(from[i]);
  return made;
}

template <typename C>
inline C exponential(C* x, int64_t count, C largest) {
  C sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += x[i] = std::exp(x[i] - largest);
  return sum;
}

#ifdef KVP_AVX2
template <>
struct Eight<float> {
  __m256 lanes;
  static Eight zero() { return {_mm256_setzero_ps()}; }
  static Eight load(const float* from) { return {_mm256_loadu_ps(from)}; }
  void store(float* to) const { _mm256_storeu_ps(to, lanes); }
  void add(const Eight& a, const Eight& b) { lanes = _mm256_fmadd_ps(a.lanes, b.lanes, lanes); }
  void add(float a, const Eight& b) { lanes = _mm256_fmadd_ps(_mm256_set1_ps(a), b.lanes, lanes); }
  float sum() const {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
};

inline __m256 loaded(const float* from) { return _mm256_loadu_ps(from); }
inline __m256 loaded(const BFloat16* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
#ifdef __F16C__
inline __m256 loaded(const Half* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
#else
inline __m256 loaded(const Half* from) {
  float wide[LANES];
  for (int i = 0; i < LANES; ++i) wide[i] = widen(from[i]);
  return _mm256_loadu_ps(wide);
}
#endif

template <>
inline Eight<float> whole<float>(const float* from) {
  return {loaded(from)};
}
template <>
inline Eight<float> whole<BFloat16>(const BFloat16* from) {
  return {loaded(from)};
}
template <>
inline Eight<float> whole<Half>(const Half* from) {
  return {loaded(from)};
}

// exp of eight numbers that are at most 0: 2^n times a polynomial (Cephes' expf), to 2 units of the last place
inline __m256 exponential(__m256 x) {
  const __m256 alive = _mm256_cmp_ps(x, _mm256_set1_ps(-87.0f), _CMP_GT_OQ);
  x = _mm256_max_ps(x, _mm256_set1_ps(-87.0f));
  const __m256 n =
      _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  x = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  x = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), x);
  __m256 y = _mm256_set1_ps(1.9875691500e-4f);
  for (float factor : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    y = _mm256_fmadd_ps(y, x, _mm256_set1_ps(factor));
  y = _mm256_add_ps(_mm256_fmadd_ps(_mm256_mul_ps(x, x), y, x), _mm256_set1_ps(1.0f));
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_and_ps(_mm256_mul_ps(y, _mm256_castsi256_ps(power)), alive);
}
template <>
inline float exponential<float>(float* x, int64_t count, float largest) {
  __m256 sums = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    const __m256 y = exponential(_mm256_sub_ps(_mm256_loadu_ps(x + i), _mm256_set1_ps(largest)));
    _mm256_storeu_ps(x + i, y);
    sums = _mm256_add_ps(sums, y);
  }
  float sum = Eight<float>{sums}.sum();
  for (; i < count; ++i) sum += x[i] = std::exp(x[i] - largest);
  return sum;
}
#endif

}  // namespace
