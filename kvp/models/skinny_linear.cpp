// Products of a matrix with a few vectors, at the speed at which memory gives the matrix: kvp/models/skinny_linear.py.
//
// The vectors lie side by side, eight in a register, so that one weight multiplies all of them. A task holds the sums of
// several outputs in registers and reads each of their weights once.

#include "skinny.h"

#include <type_traits>
#include <vector>

namespace {

template <int V>
void linear(const float* states, const float* matrix, const float* bias, float* output, int64_t rows, int64_t width,
            int64_t outputs, int threads) {
  constexpr int O = OUTPUTS, ROWS = V * LANES;
  std::vector<float> vectors(beside<V>(rows, width));
  lay_beside<V>(states, rows, width, vectors.data());
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
