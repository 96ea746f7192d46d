// Vectors stored as kept values and a bitmap: read as they are, and written.
//
// A vector is expanded in registers, 8 channels at a time; where AVX2 is there, by one permutation per byte of the bitmap.
#pragma once

#include "heads.h"

#include <functional>
#include <vector>

namespace {

template <typename T, typename C = typename Computed<T>::type>
inline Eight<C> expanded(const T* kept, uint8_t bits) {
  Eight<C> made;
  for (int i = 0; i < LANES; ++i) {
    made.lane[i] = bits >> i & 1 ? widen(*kept) : C(0);
    kept += bits >> i & 1;
  }
  return made;
}

#ifdef KVP_AVX2
// For each byte of a bitmap, and each of its channels: which of the kept values it is, or a negative number.
struct Places {
  alignas(64) int8_t of[256][LANES];
  constexpr Places() : of() {
    for (int bits = 0; bits < 256; ++bits)
      for (int i = 0, seen = 0; i < LANES; ++i) of[bits][i] = bits >> i & 1 ? int8_t(seen++) : int8_t(-128);
  }
};
constexpr Places PLACES;

template <typename T>
inline Eight<float> permuted(const T* kept, uint8_t bits) {
  const int64_t* places = reinterpret_cast<const int64_t*>(PLACES.of[bits]);
  const __m256i index = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(places)));
  const __m256 moved = _mm256_permutevar8x32_ps(loaded(kept), index);
  return {_mm256_blendv_ps(moved, _mm256_setzero_ps(), _mm256_castsi256_ps(index))};
}
template <>
inline Eight<float> expanded<float>(const float* kept, uint8_t bits) {
  return permuted(kept, bits);
}
template <>
inline Eight<float> expanded<BFloat16>(const BFloat16* kept, uint8_t bits) {
  return permuted(kept, bits);
}
template <>
inline Eight<float> expanded<Half>(const Half* kept, uint8_t bits) {
  return permuted(kept, bits);
}
#endif

// The vectors of one sequence and group, each with 8 values that may be read from any of its places. One of `rows` lies
// `space` vectors behind the other.
template <typename T>
struct Sparse {
  const T* values;
  const uint8_t* bits;
  int64_t tokens, kept, words, safe;  // from `safe` on, a vector is read from a copy
  std::vector<T> copy;

  Sparse(const void* all, const uint8_t* all_bits, int64_t row, int64_t rows, int64_t space, int64_t tokens,
         int64_t kept, int64_t width)
      : tokens(tokens), kept(kept), words(width / LANES), copy(kept + LANES) {
    values = static_cast<const T*>(all) + row * space * kept;
    bits = all_bits + row * space * words;
    const int64_t left = (rows - row) * space * kept - LANES;  // values from here on, but those of one read
    safe = std::min(tokens, std::max<int64_t>(left / kept, 0));
  }

  struct Vector {
    const T* kept;
    const uint8_t* bits;
    auto next() {
      const auto eight = expanded<T>(kept, *bits);
      kept += __builtin_popcount(*bits++);
      return eight;
    }
  };
  Vector at(int64_t token) {
    const T* own = values + token * kept;
    for (int64_t line = 0; line < kept; line += LINE / int64_t(sizeof(T))) __builtin_prefetch(own + AHEAD * kept + line);
    __builtin_prefetch(bits + (token + AHEAD) * words);
    if (token >= safe) {
      std::copy(own, own + kept, copy.begin());
      own = copy.data();
    }
    return {own, bits + token * words};
  }
};

// Keeps the `kept` values of largest magnitude of a vector, in order, and their bitmap. Of equal ones the first are kept.
inline void pack(const float* vector, int64_t width, int64_t kept, float* values, uint8_t* bits,
                 std::vector<float>& sizes) {
  const auto size = [&](int64_t at) {
    return std::isnan(vector[at]) ? std::numeric_limits<float>::infinity() : std::fabs(vector[at]);
  };
  sizes.resize(width);
  for (int64_t at = 0; at < width; ++at) sizes[at] = size(at);
  std::nth_element(sizes.begin(), sizes.begin() + kept - 1, sizes.end(), std::greater<float>());
  const float least = sizes[kept - 1];
  int64_t equal = kept;  // of the least magnitude that stays, how many stay
  for (int64_t at = 0; at < width; ++at) equal -= size(at) > least;
  std::fill(bits, bits + width / LANES, uint8_t(0));
  for (int64_t at = 0; at < width; ++at) {
    if (size(at) < least || (size(at) == least && equal-- <= 0)) continue;
    *values++ = vector[at];
    bits[at / LANES] |= uint8_t(1 << at % LANES);
  }
}

}  // namespace
