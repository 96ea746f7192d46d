// All layers of a decoder for one token of every sequence, by one team of threads: kvp/models/decode_layers.py.
//
// Hidden states lie with sequences side by side, eight in a register: norms and products take them as they are. A layer
// has five phases, and every thread a share of each. Threads wait for one another where a phase reads what others wrote.

#include "skinny.h"
#include "sparse.h"

#include <atomic>
#include <thread>
#include <utility>

#ifdef _OPENMP
#include <omp.h>
#endif

extern "C" {

// Matrices are (outputs, inputs), contiguous; biases may be null. Without heads a layer has no attention, without neurons
// no MLP. Keys and values are (batch, groups, length, width). `cos` and `sin` are (groups or 1, key width), one group
// `table_stride` behind the other; null: keys do not turn.
//
// With bitmaps a cache is sparse: (batch, groups, length, kept), and bitmaps (..., width / 8). Its newest tokens are whole,
// (batch, groups, newest, width); token t has place t % newest, until token t + newest takes it.
struct Layer {
  const float *input_norm, *post_norm, *q, *k, *v, *o, *gate, *up, *down;
  const float *q_bias, *k_bias, *v_bias, *o_bias, *gate_bias, *up_bias, *down_bias;
  float *keys, *values;
  const float *cos, *sin;
  uint8_t *key_bits, *value_bits;
  float *newest_keys, *newest_values;
  int64_t heads, groups, key_width, value_width, neurons, length, table_stride, kept_keys, kept_values, newest;
  double scaling;
};

// One step: `hidden` (batch, width) is read and written, keys and values of every layer are written at `position`.
struct DecodeStep {
  float* hidden;
  const Layer* layers;
  int64_t count, batch, width, position, threads;
  double eps;
};
}

namespace {

constexpr int SPINS = 128;  // looks at a barrier before a thread lets others have its core

// Where threads of a team wait for one another.
class Barrier {
 public:
  void wait(int team) {
    const int round = round_.load(std::memory_order_relaxed);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == team) {
      waiting_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int looks = 0; round_.load(std::memory_order_acquire) == round; ++looks) {
      if (looks > SPINS) std::this_thread::yield();
#ifdef KVP_AVX2
      else _mm_pause();
#endif
    }
  }

 private:
  std::atomic<int> waiting_{0}, round_{0};
};

// The share of one thread: tasks [from, to).
struct Share {
  int64_t from, to;
  Share(int64_t tasks, int me, int team) : from(tasks * me / team), to(tasks * (me + 1) / team) {}
};

// What all threads of a step read and write.
template <int V>
struct Team {
  static constexpr int ROWS = V * LANES;
  const DecodeStep& step;
  const int64_t chunks;
  std::vector<float> hidden, queries, keys, values, attended, inner;
  Barrier barrier;

  explicit Team(const DecodeStep& step) : step(step), chunks((step.batch + ROWS - 1) / ROWS) {
    int64_t q = 0, k = 0, v = 0, read = 0, neurons = 0;
    for (int64_t n = 0; n < step.count; ++n) {
      const Layer& layer = step.layers[n];
      q = std::max(q, layer.heads * layer.key_width);
      k = std::max(k, layer.groups * layer.key_width);
      v = std::max(v, layer.groups * layer.value_width);
      read = std::max(read, layer.heads * layer.value_width);
      neurons = std::max(neurons, layer.neurons);
    }
    queries.resize(step.batch * q), keys.resize(step.batch * k), values.resize(step.batch * v);
    attended.resize(step.batch * read), inner.resize(chunks * neurons * ROWS);
    hidden.resize(beside<V>(step.batch, step.width));
    lay_beside<V>(step.hidden, step.batch, step.width, hidden.data());
  }

  void take_back() const {
    for (int64_t row = 0; row < step.batch; ++row)
      for (int64_t at = 0; at < step.width; ++at)
        step.hidden[row * step.width + at] = hidden[(row / ROWS * step.width + at) * ROWS + row % ROWS];
  }
};

// One thread's part of a step.
template <int V>
class Worker {
 public:
  static constexpr int ROWS = V * LANES, O = OUTPUTS;

  Worker(Team<V>& team, int me, int threads) : team_(team), step_(team.step), me_(me), threads_(threads) {
    normed_.resize(team.hidden.size());
    vectors_.resize(team.chunks * ROWS * (team.attended.size() / step_.batch));
  }

  void layer(const Layer& layer) {
    if (layer.heads) {
      norm(layer.input_norm);
      project(layer.q, layer.q_bias, layer.heads * layer.key_width, team_.queries.data());
      project(layer.k, layer.k_bias, layer.groups * layer.key_width, team_.keys.data());
      project(layer.v, layer.v_bias, layer.groups * layer.value_width, team_.values.data());
      meet();
      const Share share(step_.batch * layer.groups, me_, threads_);
      for (int64_t task = share.from; task < share.to; ++task) attend(layer, task);
      meet();
      const int64_t read = layer.heads * layer.value_width;
      lay_beside<V>(team_.attended.data(), step_.batch, read, vectors_.data());
      add(vectors_.data(), layer.o, layer.o_bias, read);
      meet();
    }
    if (layer.neurons) {
      norm(layer.post_norm);
      gate(layer);
      meet();
      add(team_.inner.data(), layer.down, layer.down_bias, layer.neurons);
      meet();
    }
  }

 private:
  Team<V>& team_;
  const DecodeStep& step_;
  const int me_, threads_;
  std::vector<float> normed_, vectors_, scores_, sizes_;

  void meet() { team_.barrier.wait(threads_); }

  // RMSNorm of all hidden states, by every thread for itself.
  void norm(const float* weight) {
    for (int64_t chunk = 0; chunk < team_.chunks; ++chunk) {
      const float* from = team_.hidden.data() + chunk * step_.width * ROWS;
      float* to = normed_.data() + chunk * step_.width * ROWS;
      float root[ROWS] = {};
      for (int64_t at = 0; at < step_.width; ++at)
        for (int row = 0; row < ROWS; ++row) root[row] += from[at * ROWS + row] * from[at * ROWS + row];
      for (float& sum : root) sum = 1 / std::sqrt(sum / float(step_.width) + float(step_.eps));
      for (int64_t at = 0; at < step_.width; ++at)
        for (int row = 0; row < ROWS; ++row) to[at * ROWS + row] = from[at * ROWS + row] * root[row] * weight[at];
    }
  }

  // Calls take(output, chunk, products of the rows) for this thread's outputs of a matrix.
  template <typename Take>
  void products(const float* vectors, const float* matrix, int64_t width, int64_t outputs, Take take) {
    float sums[O * ROWS];
    const int64_t whole = outputs / O, rest = me_ + 1 == threads_ ? outputs % O : 0;
    const Share share(whole, me_, threads_);
    for (int64_t tile = share.from; tile < share.to; ++tile)
      for (int64_t chunk = 0; chunk < team_.chunks; ++chunk) {
        multiply<V, O>(vectors + chunk * width * ROWS, matrix + tile * O * width, width, sums);
        for (int o = 0; o < O; ++o) take(tile * O + o, chunk, sums + o * ROWS);
      }
    for (int64_t output = whole * O; output < whole * O + rest; ++output)
      for (int64_t chunk = 0; chunk < team_.chunks; ++chunk) {
        multiply<V, 1>(vectors + chunk * width * ROWS, matrix + output * width, width, sums);
        take(output, chunk, sums);
      }
  }

  // Rows (batch, outputs) of the normed states.
  void project(const float* matrix, const float* bias, int64_t outputs, float* to) {
    products(normed_.data(), matrix, step_.width, outputs, [&](int64_t output, int64_t chunk, const float* sums) {
      const int64_t first = chunk * ROWS, rows = std::min<int64_t>(ROWS, step_.batch - first);
      for (int64_t row = 0; row < rows; ++row) to[(first + row) * outputs + output] = sums[row] + (bias ? bias[output] : 0);
    });
  }

  // Adds a projection to the hidden states.
  void add(const float* vectors, const float* matrix, const float* bias, int64_t width) {
    products(vectors, matrix, width, step_.width, [&](int64_t output, int64_t chunk, const float* sums) {
      float* to = team_.hidden.data() + (chunk * step_.width + output) * ROWS;
      for (int row = 0; row < ROWS; ++row) to[row] += sums[row] + (bias ? bias[output] : 0);
    });
  }

  // silu(gate) * up, side by side.
  void gate(const Layer& layer) {
    float* inner = team_.inner.data();
    const auto place = [&](int64_t output, int64_t chunk) { return inner + (chunk * layer.neurons + output) * ROWS; };
    products(normed_.data(), layer.gate, step_.width, layer.neurons, [&](int64_t output, int64_t chunk, const float* sums) {
      float* to = place(output, chunk);
      for (int row = 0; row < ROWS; ++row) to[row] = sums[row] + (layer.gate_bias ? layer.gate_bias[output] : 0);
    });
    products(normed_.data(), layer.up, step_.width, layer.neurons, [&](int64_t output, int64_t chunk, const float* sums) {
      float* to = place(output, chunk);
      float power[ROWS];
      for (int row = 0; row < ROWS; ++row) power[row] = -std::fabs(to[row]);
      exponential<float>(power, ROWS, 0);
      const float bias = layer.up_bias ? layer.up_bias[output] : 0;
      for (int row = 0; row < ROWS; ++row) to[row] *= (to[row] < 0 ? power[row] : 1) / (1 + power[row]) * (sums[row] + bias);
    });
  }

  // One sequence and group: turns its queries and its key, stores key and value, and reads all tokens.
  void attend(const Layer& layer, int64_t task) {
    const int64_t group = task % layer.groups, heads = layer.heads / layer.groups, width = layer.value_width;
    float* queries = team_.queries.data() + task * heads * layer.key_width;
    float* key = team_.keys.data() + task * layer.key_width;
    if (layer.cos) {
      const int64_t table = group * layer.table_stride;
      for (int64_t head = 0; head < heads; ++head) turn(queries + head * layer.key_width, layer, table);
      turn(key, layer, table);
    }
    const float* value = team_.values.data() + task * width;
    float* output = team_.attended.data() + task * heads * width;
    layer.key_bits ? read_sparse(layer, task, heads, queries, key, value, output)
                   : read_whole(layer, task, heads, queries, key, value, output);
  }

  void read_whole(const Layer& layer, int64_t task, int64_t heads, const float* queries, const float* key,
                  const float* value, float* output) {
    const int64_t tokens = step_.position + 1;
    store(key, layer.key_width, layer.keys, task * layer.length + step_.position);
    store(value, layer.value_width, layer.values, task * layer.length + step_.position);
    const Whole<float> keys(layer.keys, task, layer.length * layer.key_width, tokens, layer.key_width);
    const Whole<float> values(layer.values, task, layer.length * layer.value_width, tokens, layer.value_width);
    const int64_t stride = room_for_scores(heads, tokens);
    all_scores(std::move(keys), queries, heads, layer.key_width, scores_.data(), stride);
    softmax<float>(scores_.data(), heads, tokens, stride, float(layer.scaling), nullptr);
    std::fill(output, output + heads * layer.value_width, 0.0f);
    weigh_all(std::move(values), scores_.data(), stride, output, heads, layer.value_width);
  }

  // The token whose place the new one takes is packed first.
  void read_sparse(const Layer& layer, int64_t task, int64_t heads, const float* queries, const float* key,
                   const float* value, float* output) {
    const int64_t tokens = step_.position + 1, newest = std::min(layer.newest, tokens), older = tokens - newest;
    const int64_t place = task * layer.newest + step_.position % layer.newest, packed = task * layer.length + older - 1;
    const int64_t rows = step_.batch * layer.groups, key_width = layer.key_width, width = layer.value_width;
    if (older) {
      pack(layer.newest_keys + place * key_width, key_width, layer.kept_keys, layer.keys + packed * layer.kept_keys,
           layer.key_bits + packed * key_width / LANES, sizes_);
      pack(layer.newest_values + place * width, width, layer.kept_values, layer.values + packed * layer.kept_values,
           layer.value_bits + packed * width / LANES, sizes_);
    }
    store(key, key_width, layer.newest_keys, place);
    store(value, width, layer.newest_values, place);
    Sparse<float> keys(layer.keys, layer.key_bits, task, rows, layer.length, older, layer.kept_keys, key_width);
    Sparse<float> values(layer.values, layer.value_bits, task, rows, layer.length, older, layer.kept_values, width);
    const Whole<float> new_keys(layer.newest_keys, task, layer.newest * key_width, newest, key_width);
    const Whole<float> new_values(layer.newest_values, task, layer.newest * width, newest, width);
    const int64_t stride = room_for_scores(heads, tokens);
    float* scores = scores_.data();
    all_scores(std::move(keys), queries, heads, key_width, scores, stride);
    all_scores(new_keys, queries, heads, key_width, scores + older, stride);
    softmax<float>(scores, heads, tokens, stride, float(layer.scaling), nullptr);
    std::fill(output, output + heads * width, 0.0f);
    weigh_all(std::move(values), scores, stride, output, heads, width);
    weigh_all(new_values, scores + older, stride, output, heads, width);
  }

  static void store(const float* vector, int64_t width, float* all, int64_t place) {
    std::copy(vector, vector + width, all + place * width);
  }

  // Makes room for the scores of the heads; returns the distance from one head to the next.
  int64_t room_for_scores(int64_t heads, int64_t tokens) {
    const int64_t stride = spaced(tokens);
    scores_.resize(heads * stride);
    return stride;
  }

  static void turn(float* states, const Layer& layer, int64_t table) {
    const float *cos = layer.cos + table, *sin = layer.sin + table;
    for (int64_t at = 0, half = layer.key_width / 2; at < half; ++at) {
      const float first = states[at], second = states[at + half];
      states[at] = first * cos[at] - second * sin[at];
      states[at + half] = second * cos[at + half] + first * sin[at + half];
    }
  }
};

template <int V>
void decode(const DecodeStep& step) {
  Team<V> team(step);
#pragma omp parallel num_threads(int(step.threads))
  {
    int me = 0, threads = 1;
#ifdef _OPENMP
    me = omp_get_thread_num(), threads = omp_get_num_threads();
#endif
    Worker<V> worker(team, me, threads);
    for (int64_t n = 0; n < step.count; ++n) worker.layer(step.layers[n]);
  }
  team.take_back();
}

}  // namespace

extern "C" void kvp_decode_layers_float32(const DecodeStep* step) {
  step->batch <= LANES ? decode<1>(*step) : decode<2>(*step);
}
