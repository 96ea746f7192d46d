// Attention of one query step over vectors stored as kept values and a bitmap: kvp/models/sparse_attention.py.
//
// A task is one sequence and one KV group. Its query heads share every vector that is expanded. Tokens are read twice:
// keys give scores, their softmax weighs values.

#include "sparse.h"

#include <utility>

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
    Sparse<T> keys(part.keys, part.key_bits, task, rows, part.tokens, part.tokens, step.kept_keys, key_width);
    all_scores(std::move(keys), queries, heads, key_width, scores.data() + from, stride);
  }
  all_scores(Whole<T>(step.recent_keys, task, step.key_stride, recent, key_width), queries, heads, key_width,
             scores.data() + from, stride);

  softmax(scores.data(), heads, tokens, stride, C(step.scaling), mask);
  std::fill(output, output + heads * width, C(0));
  from = 0;
  for (int64_t n = 0; n < step.count; from += step.segments[n++].tokens) {
    const Segment& part = step.segments[n];
    Sparse<T> values(part.values, part.value_bits, task, rows, part.tokens, part.tokens, step.kept_values, width);
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
