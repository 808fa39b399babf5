// Rules over blocks whose arrays are of one dtype.
#pragma once

#include <utility>

#include "cpu/vectors.h"

namespace mlx_fused::cpu {

namespace {

template <typename R>
R prepared(const float* numbers, float learning_rate, float step,
           float coefficient) {
  R rule;
  // A rule begins with its numbers.
  memcpy(static_cast<void*>(&rule), numbers,
         R::numbers * sizeof(Number<float>));
  prepare(rule, learning_rate, step, coefficient);
  return rule;
}

// Updates n elements, which stand in float32.
template <size_t n, typename R>
MLX_FUSED_INLINE void update_row(const R& rule, float gradient_scale, float* p,
                                 float** s, float* g) {
  MLX_FUSED_VECTORIZE
  for (size_t i = 0; i < n; ++i) {
    float states[R::states + 1];
    for (int k = 0; k < R::states; ++k) {
      states[k] = s[k][i];
    }
    float gradient = g[i] * gradient_scale;
    float parameter = p[i];
    rule.update(gradient, parameter, states);
    p[i] = parameter;
    g[i] = gradient;
    for (int k = 0; k < R::states; ++k) {
      s[k][i] = states[k];
    }
  }
}

// Loads, updates and stores a tile's elements.
template <typename R, typename F>
MLX_FUSED_INLINE void update_tile(const R& rule, float gradient_scale,
                                  const Block<typename F::Type>& block,
                                  size_t start) {
  constexpr int first_state = R::reads_parameter;
  constexpr int gradient_slot = first_state + R::states;
  using Tile = float[F::vectors][row_size];
  Tile p = {}, s[R::states + 1], g;
  if constexpr (R::reads_parameter) {
    load<F>(block.in[0] + start, p);
  }
  for (int k = 0; k < R::states; ++k) {
    load<F>(block.in[first_state + k] + start, s[k]);
  }
  load<F>(block.in[gradient_slot] + start, g);
  for (size_t row = 0; row < F::vectors; ++row) {
    float* states[R::states + 1];
    for (int k = 0; k < R::states; ++k) {
      states[k] = s[k][row];
    }
    update_row<row_size>(rule, gradient_scale, p[row], states, g[row]);
  }
  if constexpr (R::writes_parameter) {
    store<F>(p, block.out[0] + start);
  }
  for (int k = 0; k < R::states; ++k) {
    store<F>(s[k], block.out[first_state + k] + start);
  }
  if constexpr (R::writes_gradient) {
    store<F>(g, block.out[gradient_slot] + start);
  }
}

template <int index, typename F>
void update_with(const float* numbers, float learning_rate, float step,
                 float coefficient, float gradient_scale,
                 const Block<typename F::Type>& block, size_t n) {
  using R = typename RegisteredRule<index>::template Type<float>;
  using Type = typename F::Type;
  constexpr size_t tile_size = F::vectors * row_size;
  const auto rule = prepared<R>(numbers, learning_rate, step, coefficient);
  size_t i = 0;
  for (; i + tile_size <= n; i += tile_size) {
    for (int k = 0; k < R::reads_parameter + R::states + 1; ++k) {
      prefetch(block.in[k] + i + block.ahead, tile_size * sizeof(Type));
    }
    update_tile<R, F>(rule, gradient_scale, block, i);
  }
  if (i == n) {
    return;
  }
  // The rest, as a tile of its own.
  const size_t bytes = (n - i) * sizeof(Type);
  Type rest[max_slots][tile_size] = {};
  Block<Type> rest_block;
  for (int k = 0; k < max_slots; ++k) {
    if (block.in[k]) {
      memcpy(rest[k], block.in[k] + i, bytes);
    }
    rest_block.in[k] = rest_block.out[k] = rest[k];
  }
  update_tile<R, F>(rule, gradient_scale, rest_block, 0);
  for (int k = 0; k < max_slots; ++k) {
    if (block.out[k]) {
      memcpy(block.out[k] + i, rest[k], bytes);
    }
  }
}

void average(const float* numbers, const float* x, const float* in, float* out,
             size_t n) {
  const Number<float> ema{numbers[0], numbers[1], numbers[2]};
  MLX_FUSED_VECTORIZE
  for (size_t i = 0; i < n; ++i) {
    out[i] = moving_average(ema, in[i], x[i]);
  }
}

template <typename F, int... index>
void update_by_index(int rule, const float* numbers, float learning_rate,
                     float step, float coefficient, float gradient_scale,
                     const Block<typename F::Type>& block, size_t n,
                     std::integer_sequence<int, index...>) {
  static constexpr decltype(&update_with<0, F>) table[] = {
      update_with<index, F>...};
  table[rule](numbers, learning_rate, step, coefficient, gradient_scale, block,
              n);
}

template <typename F>
void update(int rule, const float* numbers, float learning_rate, float step,
            float coefficient, float gradient_scale,
            const Block<typename F::Type>& block, size_t n) {
  update_by_index<F>(rule, numbers, learning_rate, step, coefficient,
                     gradient_scale, block, n,
                     std::make_integer_sequence<int, rule_count>());
}

}  // namespace

}  // namespace mlx_fused::cpu
