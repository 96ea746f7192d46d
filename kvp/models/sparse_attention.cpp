// Attention of one query step over vectors stored as kept values and a bitmap: kvp/models/sparse_attention.py.
//
// A task is one sequence and one KV group. Its query heads share every vector that is expanded. Tokens are read twice:
// keys give scores, their softmax weighs values. A vector is expanded in registers, 8 channels at a time; where AVX2 is
// there, by one permutation per byte of the bitmap.

#include "heads.h"

#include <utility>
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

}  // namespace

extern "C" {

// Older tokens, contiguous: values (batch, groups, tokens, kept) and bitmaps (batch, groups, tokens, width / 8).
struct Segment {
  const void* keys;
  const uint8_t* key_bits;
  const void* values;
  const uint8_t* value_bits;
  int64_t tokens;
};

// One step. Newest tokens: (batch, groups, tokens, width), one sequence and group `key_stride` or `value_stride` elements
// behind the other, contiguous in itself. `queries` (batch, groups, heads of a group, key width) and `output` (…, value
// width) are in the dtype of the computation, and so is `mask`: null, or (batch or 1, all tokens), added to the scores.
// Places at the end that it hides are not read.
struct Step {
  const void* queries;
  void* output;
  const void* mask;
  const Segment* segments;
  const void* recent_keys;
  const void* recent_values;
  int64_t count, recent, key_stride, value_stride, batch, groups, heads, key_width, value_width, kept_keys, kept_values,
      mask_stride, threads;
  double scaling;
};
}

namespace {

// The vectors of one sequence and group in a segment, each with 8 values that may be read from any of its places.
template <typename T>
struct Sparse {
  const T* values;
  const uint8_t* bits;
  int64_t tokens, kept, words, safe;  // from `safe` on, a vector is read from a copy
  std::vector<T> copy;

  Sparse(const void* all, const uint8_t* all_bits, int64_t row, int64_t rows, int64_t tokens, int64_t kept,
         int64_t width)
      : tokens(tokens), kept(kept), words(width / LANES), copy(kept + LANES) {
    values = static_cast<const T*>(all) + row * tokens * kept;
    bits = all_bits + row * tokens * words;
    const int64_t left = (rows - row) * tokens * kept - LANES;  // values from here on, but those of one read
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
    if (token >= safe) {
      std::copy(own, own + kept, copy.begin());
      own = copy.data();
    }
    return {own, bits + token * words};
  }
};

template <typename T>
void attend(const Step& step, int64_t task) {
  using C = typename Computed<T>::type;
  const int64_t rows = step.batch * step.groups, heads = step.heads, key_width = step.key_width;
  const int64_t width = step.value_width;
  const C* mask = static_cast<const C*>(step.mask);
  if (mask) mask += task / step.groups * step.mask_stride;
  int64_t recent = step.recent, tokens = recent;
  for (int64_t n = 0; n < step.count; ++n) tokens += step.segments[n].tokens;
  for (; mask && recent > 1 && mask[tokens - 1] == -std::numeric_limits<C>::infinity(); --tokens) --recent;
  const C* queries = static_cast<const C*>(step.queries) + task * heads * key_width;
  C* output = static_cast<C*>(step.output) + task * heads * width;
  static thread_local std::vector<C> scores;
  const int64_t stride = spaced(tokens);
  scores.resize(heads * stride);

  int64_t from = 0;
  for (int64_t n = 0; n < step.count; from += step.segments[n++].tokens) {
    const Segment& part = step.segments[n];
    Sparse<T> keys(part.keys, part.key_bits, task, rows, part.tokens, step.kept_keys, key_width);
    all_scores(std::move(keys), queries, heads, key_width, scores.data() + from, stride);
  }
  all_scores(Whole<T>(step.recent_keys, task, step.key_stride, recent, key_width), queries, heads, key_width,
             scores.data() + from, stride);

  softmax(scores.data(), heads, tokens, stride, C(step.scaling), mask);
  std::fill(output, output + heads * width, C(0));
  from = 0;
  for (int64_t n = 0; n < step.count; from += step.segments[n++].tokens) {
    const Segment& part = step.segments[n];
    Sparse<T> values(part.values, part.value_bits, task, rows, part.tokens, step.kept_values, width);
    weigh_all(std::move(values), scores.data() + from, stride, output, heads, width);
  }
  weigh_all(Whole<T>(step.recent_values, task, step.value_stride, recent, width), scores.data() + from, stride, output,
            heads, width);
}

template <typename T>
void attend_all(const Step* step) {
#pragma omp parallel for schedule(static) num_threads(step->threads)
  for (int64_t task = 0; task < step->batch * step->groups; ++task) attend<T>(*step, task);
}

}  // namespace

extern "C" {
void kvp_attend_float32(const Step* step) { attend_all<float>(step); }
void kvp_attend_float64(const Step* step) { attend_all<double>(step); }
void kvp_attend_float16(const Step* step) { attend_all<Half>(step); }
void kvp_attend_bfloat16(const Step* step) { attend_all<BFloat16>(step); }
}
