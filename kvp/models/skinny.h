// Products of a matrix with a few vectors that lie side by side, eight in a register: each weight is read once.
#pragma once

#include "eight.h"

namespace {

constexpr int OUTPUTS = 6;  // rows of a matrix that are read side by side: fewer or more are slower

// Writes (O, V * 8) products of O rows of a matrix with vectors (width, V * 8).
template <int V, int O>
inline void multiply(const float* vectors, const float* matrix, int64_t width, float* products) {
  Eight<float> sums[O][V];
  for (auto& row : sums)
    for (auto& sum : row) sum = Eight<float>::zero();
  for (int64_t at = 0; at < width; ++at) {
    if (at % (LINE / sizeof(float)) == 0)  // the next task's weights come while these are multiplied
      for (int o = 0; o < O; ++o) __builtin_prefetch(matrix + (o + O) * width + at, 0, 2);
    Eight<float> x[V];
    for (int v = 0; v < V; ++v) x[v] = Eight<float>::load(vectors + (at * V + v) * LANES);
#pragma GCC unroll 16
    for (int o = 0; o < O; ++o)  // sums stay in registers once this is unrolled
      for (int v = 0; v < V; ++v) sums[o][v].add(matrix[o * width + at], x[v]);
  }
  for (int o = 0; o < O; ++o)
    for (int v = 0; v < V; ++v) sums[o][v].store(products + (o * V + v) * LANES);
}

// Lays vectors (rows, width) side by side, as (chunks, width, V * 8); lanes without a row stay as they are.
template <int V>
void lay_beside(const float* states, int64_t rows, int64_t width, float* vectors) {
  constexpr int ROWS = V * LANES;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t at = 0; at < width; ++at)
      vectors[(row / ROWS * width + at) * ROWS + row % ROWS] = states[row * width + at];
}

// Floats of its result, with the lanes that have no row.
template <int V>
int64_t beside(int64_t rows, int64_t width) {
  constexpr int ROWS = V * LANES;
  return (rows + ROWS - 1) / ROWS * ROWS * width;
}

}  // namespace
