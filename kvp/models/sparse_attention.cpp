// Attention of one query step over vectors stored as kept values and a bitmap: kvp/models/sparse_attention.py.
//
// A task is one sequence and one KV group. Its query heads share every vector that is expanded. Tokens are read twice:
// keys give scores, their softmax weighs values. A vector is expanded in registers, 8 channels at a time; where AVX2 is
// there, by one permutation per byte of the bitmap.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define KVP_AVX2 1
#endif

namespace {

constexpr int LANES = 8;     // channels of a byte of the bitmap
constexpr int TOGETHER = 4;  // tokens whose values are added in one pass over the outputs
constexpr int HEADS = 12;    // query heads that read an expanded key, at most

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

template <typename T, typename C = typename Computed<T>::type>
inline Eight<C> expanded(const T* kept, uint8_t bits) {
  Eight<C> made;
  for (int i = 0; i < LANES; ++i) {
    made.lane[i] = bits >> i & 1 ? widen(*kept) : C(0);
    kept += bits >> i & 1;
  }
  return made;
}

template <typename C>
C exponential(C* x, int64_t count, C largest) {
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

// For each byte of a bitmap, and each of its channels: which of the kept values it is, or a negative number.
struct Places {
  alignas(64) int8_t of[256][LANES];
  constexpr Places() : of() {
    for (int bits = 0; bits < 256; ++bits)
      for (int i = 0, seen = 0; i < LANES; ++i) of[bits][i] = bits >> i & 1 ? int8_t(seen++) : int8_t(-128);
  }
};
constexpr Places PLACES;

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
float exponential<float>(float* x, int64_t count, float largest) {
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

// The vectors of one sequence and group that are stored whole.
template <typename T>
struct Whole {
  const T* values;
  int64_t tokens, width, safe;

  Whole(const void* all, int64_t row, int64_t stride, int64_t tokens, int64_t width)
      : values(static_cast<const T*>(all) + row * stride), tokens(tokens), width(width), safe(tokens) {}

  struct Vector {
    const T* values;
    auto next() {
      const auto eight = whole<T>(values);
      values += LANES;
      return eight;
    }
  };
  Vector at(int64_t token) { return {values + token * width}; }
};

// Scores of keys and G queries: (G, width) at `queries`, (G, stride) at `scores`.
template <int G, typename C, typename Keys>
void score(Keys& keys, const C* queries, int64_t width, C* scores, int64_t stride) {
  for (int64_t token = 0; token < keys.tokens; ++token) {
    auto key = keys.at(token);
    Eight<C> sums[G];
    for (auto& sum : sums) sum = Eight<C>::zero();
    for (int64_t at = 0; at < width; at += LANES) {
      const auto eight = key.next();
      for (int g = 0; g < G; ++g) sums[g].add(Eight<C>::load(queries + g * width + at), eight);
    }
    for (int g = 0; g < G; ++g) scores[g * stride + token] = sums[g].sum();
  }
}

template <typename C, typename Keys>
void all_scores(Keys keys, const C* queries, int64_t heads, int64_t width, C* scores, int64_t stride) {
  using Scores = void (*)(Keys&, const C*, int64_t, C*, int64_t);
  static constexpr Scores WITH[HEADS] = {score<1, C, Keys>, score<2, C, Keys>, score<3, C, Keys>, score<4, C, Keys>,
                                         score<5, C, Keys>, score<6, C, Keys>, score<7, C, Keys>, score<8, C, Keys>,
                                         score<9, C, Keys>, score<10, C, Keys>, score<11, C, Keys>, score<12, C, Keys>};
  for (int64_t head = 0; head < heads; head += HEADS) {
    const int64_t now = std::min<int64_t>(HEADS, heads - head);
    WITH[now - 1](keys, queries + head * width, width, scores + head * stride, stride);
  }
}

// Adds N weighted values to every head's output: weights (heads, stride).
template <int N, typename C, typename Values>
inline void weigh(Values& all, int64_t token, const C* weights, int64_t stride, C* output, int64_t heads,
                  int64_t width) {
  typename Values::Vector value[N];
  for (int t = 0; t < N; ++t) value[t] = all.at(token + t);
  for (int64_t at = 0; at < width; at += LANES) {
    Eight<C> values[N];
    for (int t = 0; t < N; ++t) values[t] = value[t].next();
    for (int64_t head = 0; head < heads; ++head) {
      C* to = output + head * width + at;
      auto sum = Eight<C>::load(to);
      for (int t = 0; t < N; ++t) sum.add(weights[head * stride + token + t], values[t]);
      sum.store(to);
    }
  }
}

template <typename C, typename Values>
void weigh_all(Values values, const C* weights, int64_t stride, C* output, int64_t heads, int64_t width) {
  int64_t token = 0;
  for (; token + TOGETHER <= values.safe; token += TOGETHER)
    weigh<TOGETHER>(values, token, weights, stride, output, heads, width);
  for (; token < values.tokens; ++token) weigh<1>(values, token, weights, stride, output, heads, width);
}

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
  scores.resize(heads * tokens);

  int64_t from = 0;
  for (int64_t n = 0; n < step.count; from += step.segments[n++].tokens) {
    const Segment& part = step.segments[n];
    Sparse<T> keys(part.keys, part.key_bits, task, rows, part.tokens, step.kept_keys, key_width);
    all_scores(std::move(keys), queries, heads, key_width, scores.data() + from, tokens);
  }
  all_scores(Whole<T>(step.recent_keys, task, step.key_stride, recent, key_width), queries, heads, key_width,
             scores.data() + from, tokens);

  for (int64_t head = 0; head < heads; ++head) {
    C* own = scores.data() + head * tokens;
    C largest = -std::numeric_limits<C>::infinity();
    for (int64_t t = 0; t < tokens; ++t) {
      own[t] = own[t] * C(step.scaling) + (mask ? mask[t] : C(0));
      largest = std::max(largest, own[t]);
    }
    const C sum = exponential<C>(own, tokens, largest);
    for (int64_t t = 0; t < tokens; ++t) own[t] /= sum;
  }

  std::fill(output, output + heads * width, C(0));
  from = 0;
  for (int64_t n = 0; n < step.count; from += step.segments[n++].tokens) {
    const Segment& part = step.segments[n];
    Sparse<T> values(part.values, part.value_bits, task, rows, part.tokens, step.kept_values, width);
    weigh_all(std::move(values), scores.data() + from, tokens, output, heads, width);
  }
  weigh_all(Whole<T>(step.recent_values, task, step.value_stride, recent, width), scores.data() + from, tokens, output,
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
