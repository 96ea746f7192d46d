// Products of a matrix with a few vectors, at the speed at which memory gives the matrix: kvp/models/skinny_linear.py.
//
// The vectors lie side by side, eight in a register, so that one weight multiplies all of them. A task holds the sums of
// several outputs in registers and reads each of their weights once.

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 8;       // vectors of a register
constexpr int SUMS = 12;       // registers of sums; the other four hold vectors and a weight
constexpr int LINE = 16;       // floats of a cache line

#if defined(__AVX2__) && defined(__FMA__)
struct Eight {
  __m256 lanes;
  static Eight zero() { return {_mm256_setzero_ps()}; }
  static Eight load(const float* from) { return {_mm256_loadu_ps(from)}; }
  void store(float* to) const { _mm256_storeu_ps(to, lanes); }
  void add(const float* weight, const Eight& x) { lanes = _mm256_fmadd_ps(_mm256_broadcast_ss(weight), x.lanes, lanes); }
};
#else
struct Eight {
  float lanes[LANES];
  static Eight zero() { return {}; }
  static Eight load(const float* from) {
    Eight made;
    std::copy(from, from + LANES, made.lanes);
    return made;
  }
  void store(float* to) const { std::copy(lanes, lanes + LANES, to); }
  void add(const float* weight, const Eight& x) {
    for (int i = 0; i < LANES; ++i) lanes[i] += *weight * x.lanes[i];
  }
};
#endif

// Writes (O, V * 8) products of O rows of a matrix with vectors (width, V * 8).
template <int V, int O>
inline void multiply(const float* vectors, const float* matrix, int64_t width, float* products) {
  Eight sums[O][V];
  for (auto& row : sums)
    for (auto& sum : row) sum = Eight::zero();
  for (int64_t at = 0; at < width; ++at) {
    if (at % LINE == 0)  // the next task's weights come while these are multiplied
      for (int o = 0; o < O; ++o) __builtin_prefetch(matrix + (o + O) * width + at, 0, 2);
    Eight x[V];
    for (int v = 0; v < V; ++v) x[v] = Eight::load(vectors + (at * V + v) * LANES);
#pragma GCC unroll 16
    for (int o = 0; o < O; ++o)  // sums stay in registers once this is unrolled
      for (int v = 0; v < V; ++v) sums[o][v].add(matrix + o * width + at, x[v]);
  }
  for (int o = 0; o < O; ++o)
    for (int v = 0; v < V; ++v) sums[o][v].store(products + (o * V + v) * LANES);
}

// Vectors side by side: (chunks, width, V * 8) of (rows, width).
template <int V>
std::vector<float> beside(const float* states, int64_t rows, int64_t width) {
  constexpr int ROWS = V * LANES;
  std::vector<float> made((rows + ROWS - 1) / ROWS * width * ROWS);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t at = 0; at < width; ++at)
      made[(row / ROWS * width + at) * ROWS + row % ROWS] = states[row * width + at];
  return made;
}

template <int V>
void linear(const float* states, const float* matrix, const float* bias, float* output, int64_t rows, int64_t width,
            int64_t outputs, int threads) {
  constexpr int O = SUMS / V, ROWS = V * LANES;
  const std::vector<float> vectors = beside<V>(states, rows, width);
  const auto task = [&](auto count, int64_t from) {
    float products[count * ROWS];
    for (int64_t first = 0; first < rows; first += ROWS) {
      multiply<V, count>(vectors.data() + first * width, matrix + from * width, width, products);
      for (int64_t row = first; row < std::min(first + ROWS, rows); ++row)
        for (int o = 0; o < count; ++o)
          output[row * outputs + from + o] = products[o * ROWS + row - first] + (bias ? bias[from + o] : 0);
    }
  };
  const int64_t whole = outputs - outputs % O;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t from = 0; from < whole; from += O) task(std::integral_constant<int, O>(), from);
  for (int64_t from = whole; from < outputs; ++from) task(std::integral_constant<int, 1>(), from);
}

}  // namespace

// output (rows, outputs) = states (rows, width) times matrix (outputs, width), transposed, plus bias, all contiguous;
// `bias` may be null.
extern "C" void kvp_linear_float32(const float* states, const float* matrix, const float* bias, float* output,
                                   int64_t rows, int64_t width, int64_t outputs, int64_t threads) {
  (rows <= LANES ? linear<1> : linear<2>)(states, matrix, bias, output, rows, width, outputs, int(threads));
}
