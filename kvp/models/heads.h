// The query heads of a group read keys and values of one sequence: scores, their softmax, and sums of weighted values.
#pragma once

#include "eight.h"

#include <limits>

namespace {

constexpr int TOGETHER = 4;  // tokens whose values are added in one pass over the outputs
constexpr int HEADS = 12;    // query heads that read an expanded key, at most
constexpr int AHEAD = 8;     // tokens by which a vector is asked for before it is read

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
  Vector at(int64_t token) {
    const T* own = values + token * width;
    for (int64_t line = 0; line < width; line += LINE / int64_t(sizeof(T))) __builtin_prefetch(own + AHEAD * width + line);
    return {own};
  }
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

// Numbers from the scores of one head to those of the next: an odd number of cache lines, so that heads share no set.
inline int64_t spaced(int64_t tokens) { return (tokens / 16 | 1) * 16 + 32; }

// Makes weights of scores (heads, stride); `mask` (tokens) is added to them, or null.
template <typename C>
void softmax(C* scores, int64_t heads, int64_t tokens, int64_t stride, C scaling, const C* mask) {
  for (int64_t head = 0; head < heads; ++head) {
    C* own = scores + head * stride;
    C largest = -std::numeric_limits<C>::infinity();
    for (int64_t t = 0; t < tokens; ++t) {
      own[t] = own[t] * scaling + (mask ? mask[t] : C(0));
      largest = std::max(largest, own[t]);
    }
    const C sum = exponential<C>(own, tokens, largest);
    for (int64_t t = 0; t < tokens; ++t) own[t] /= sum;
  }
}

}  // namespace
