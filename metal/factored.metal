// Adafactor in three passes, for several tensors a launch.
//
//   factored_sums     squares of the gradient by rows and columns, and of the
//                     parameter
//   factored_means    a small one: the running means, and from them factors
//   factored_squares  the squares of the update, which is not stored
//   factored_write    the update again; moment and parameter, in place
//
// csrc/metal/factored.cpp adds the kernels, which bind the arrays of a launch
// and call the functions below. Every sum is added in one order, without
// atomics: the same arrays give the same bits on every run.

// a * b + c in two roundings, as on the CPU; memory is what a step waits for.
#pragma METAL fp contract(off)

#include <metal_stdlib>

using namespace metal;

#include "rule_language.h"
#include "update_rules.h"
#include "factored.h"

// The rule begins with its numbers, each of which is three floats.
METAL_FUNC void set_numbers(
    thread Adafactor<float>& rule,
    constant float* numbers) {
  thread float* fields = reinterpret_cast<thread float*>(&rule);
  for (int i = 0; i < 3 * Adafactor<float>::numbers; ++i) {
    fields[i] = numbers[i];
  }
}

#define FOR_EACH_OF_FOUR \
  _Pragma("clang loop unroll(full)") for (int i = 0; i < 4; ++i)

template <typename T>
METAL_FUNC void load_four(
    const device T* in,
    int64_t stride,
    int count,
    bool vectorized,
    thread float* out) {
  if (vectorized && count == 4) {
    const float4 values =
        float4(*reinterpret_cast<const device vec<T, 4>*>(in));
    FOR_EACH_OF_FOUR { out[i] = values[i]; }
  } else {
    FOR_EACH_OF_FOUR {
      out[i] = i < count ? static_cast<float>(in[i * stride]) : 0.0f;
    }
  }
}

template <typename T>
METAL_FUNC void store_four(
    const thread float* values,
    int count,
    bool vectorized,
    device T* out) {
  if (vectorized && count == 4) {
    vec<T, 4> rounded;
    FOR_EACH_OF_FOUR { rounded[i] = static_cast<T>(values[i]); }
    *reinterpret_cast<device vec<T, 4>*>(out) = rounded;
  } else {
    FOR_EACH_OF_FOUR {
      if (i < count) {
        out[i] = static_cast<T>(values[i]);
      }
    }
  }
}

// Of a mean of squares, what float16 can hold: no step is to meet infinity.
METAL_FUNC float saturated(float x, half) { return x > 65504 ? 65504 : x; }
METAL_FUNC float saturated(float x, float) { return x; }
METAL_FUNC float saturated(float x, bfloat) { return x; }

METAL_FUNC uint tensor_of_tile(uint tile, constant FactoredTensor* tensors) {
  uint tensor = 0;
  while (tile >= tensors[tensor + 1].first_tile) {
    ++tensor;
  }
  return tensor;
}

METAL_FUNC uint tensor_of_group(uint group, constant FactoredTensor* tensors) {
  uint tensor = 0;
  while (group >= tensors[tensor + 1].first_group) {
    ++tensor;
  }
  return tensor;
}

// Which thread of a threadgroup this is.
struct Thread {
  uint index;
  uint simdgroup;
  uint lane;
};

// The sum over the threadgroup, in every thread.
METAL_FUNC float
sum_of_all(float value, threadgroup float* shared, const thread Thread& at) {
  value = simd_sum(value);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (at.lane == 0) {
    shared[at.simdgroup] = value;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float sum = 0;
  for (int i = 0; i < factored_threads / 32; ++i) {
    sum += shared[i];
  }
  return sum;
}

// The sum of n floats, in every thread.
METAL_FUNC float sum_of_array(
    const device float* values,
    uint n,
    threadgroup float* shared,
    const thread Thread& at) {
  float sum = 0;
  for (uint i = at.index; i < n; i += factored_threads) {
    sum += values[i];
  }
  return sum_of_all(sum, shared, at);
}

// A threadgroup's part of a tensor, and a simdgroup's place in it.
struct Tile {
  uint number;  // in the tensor
  int64_t matrix;
  int64_t gradient;  // where the matrix begins
  int64_t first_row;
  int64_t end_row;
  int64_t first_column;
  int64_t end_column;
  int64_t columns_at_once;  // of all simdgroups
  int64_t column;           // the thread's first, of columns_at_once
  uint down;                // the simdgroup's row, of rows_at_once
};

METAL_FUNC Tile tile_of(
    uint tile,
    constant FactoredTensor& tensor,
    constant int64_t* walks,
    const thread Thread& at) {
  Tile t;
  t.number = tile - tensor.first_tile;
  const uint tiles = tensor.tiles_down * tensor.tiles_across;
  t.matrix = t.number / tiles;
  const uint in_matrix = t.number % tiles;
  t.first_row = int64_t(in_matrix / tensor.tiles_across) * tensor.tile_rows;
  t.first_column =
      int64_t(in_matrix % tensor.tiles_across) * tensor.tile_columns;
  t.end_row = min(t.first_row + int64_t(tensor.tile_rows), tensor.rows);
  t.end_column =
      min(t.first_column + int64_t(tensor.tile_columns), tensor.columns);
  const uint beside = factored_threads / 32 / tensor.rows_at_once;
  t.columns_at_once = int64_t(beside) * simdgroup_columns;
  t.down = at.simdgroup % tensor.rows_at_once;
  t.column = int64_t(at.simdgroup / tensor.rows_at_once) * simdgroup_columns +
             at.lane * 4;
  t.gradient = 0;
  int64_t rest = t.matrix;
  constant int64_t* walk = walks + tensor.walk;
  for (int d = int(tensor.dimensions) - 1; d >= 0; --d) {
    t.gradient += (rest % walk[d]) * walk[int(tensor.dimensions) + d];
    rest /= walk[d];
  }
  return t;
}

METAL_FUNC int count_of_four(int64_t first, int64_t end) {
  const int64_t rest = end - first;
  return rest < 0 ? 0 : rest < 4 ? int(rest) : 4;
}

template <typename P, typename G>
METAL_FUNC void sum_squares(
    const device P* parameter,
    const device G* gradient,
    constant FactoredTensor& tensor,
    constant int64_t* walks,
    float scale,
    device float* partials,
    threadgroup float* shared,
    uint tile,
    const thread Thread& at) {
  const Tile t = tile_of(tile, tensor, walks, at);
  const int64_t chunks =
      (tensor.columns + simdgroup_columns - 1) / simdgroup_columns;
  for (int64_t first = t.first_column; first < t.end_column;
       first += t.columns_at_once) {
    const int64_t column = first + t.column;
    const int count = count_of_four(column, t.end_column);
    float sums[4] = {0, 0, 0, 0};
    for (int64_t row = t.first_row + t.down; row < t.end_row;
         row += tensor.rows_at_once) {
      float g[4];
      load_four(
          gradient + t.gradient + row * tensor.row_stride +
              (count > 0 ? column : 0) * tensor.column_stride,
          tensor.column_stride,
          count,
          tensor.vectorized != 0,
          g);
      float sum = 0;
      FOR_EACH_OF_FOUR {
        g[i] = g[i] * scale;
        g[i] = g[i] * g[i];
        sums[i] += g[i];
        sum += g[i];
      }
      sum = simd_sum(sum);
      if (at.lane == 0 && count > 0) {
        partials
            [tensor.across_sums + (t.matrix * tensor.rows + row) * chunks +
             column / simdgroup_columns] = sum;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    FOR_EACH_OF_FOUR {
      shared[at.simdgroup * simdgroup_columns + at.lane * 4 + i] = sums[i];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int64_t c = at.index;
         c < t.columns_at_once && first + c < t.end_column;
         c += factored_threads) {
      const int64_t start =
          c / simdgroup_columns * tensor.rows_at_once * simdgroup_columns +
          c % simdgroup_columns;
      float sum = 0;
      for (uint d = 0; d < tensor.rows_at_once; ++d) {
        sum += shared[start + d * simdgroup_columns];
      }
      const int64_t band =
          t.matrix * tensor.tiles_down + t.first_row / tensor.tile_rows;
      partials[tensor.down_sums + band * tensor.columns + first + c] = sum;
    }
  }
  // Any part of the parameter's elements will do.
  const int64_t start = int64_t(t.number) * tensor.parameter_share;
  const int64_t end = min(start + int64_t(tensor.parameter_share), tensor.size);
  float sum = 0;
  for (int64_t i = start + at.index * 4; i < end; i += factored_threads * 4) {
    float p[4];
    load_four(
        parameter + i,
        1,
        count_of_four(i, end),
        tensor.parameter_vectorized != 0,
        p);
    FOR_EACH_OF_FOUR { sum += p[i] * p[i]; }
  }
  sum = sum_of_all(sum, shared, at);
  if (at.index == 0) {
    partials[tensor.parameter_sums + t.number] = sum;
  }
}

// The running mean in float32, before it is rounded.
template <typename S>
METAL_FUNC float update_mean(
    const device S* before,
    device S* after,
    float mean,
    const thread Adafactor<float>& rule,
    bool skip) {
  mean = rule.running_mean(float(*before), mean);
  *after = skip ? *before : S(saturated(mean, *before));
  return mean;
}

// A group of a matrix' running means: of rows, or of columns.
template <typename R, typename C>
METAL_FUNC void update_means(
    const device R* row,
    device R* new_row,
    const device C* column,
    device C* new_column,
    constant FactoredTensor& tensor,
    const thread Adafactor<float>& rule,
    bool skip,
    const device float* partials,
    device float* factors,
    threadgroup float* shared,
    uint group,
    const thread Thread& at) {
  const uint groups = tensor.row_groups + tensor.column_groups;
  const int64_t matrix = (group - tensor.first_group) / groups;
  const uint number = (group - tensor.first_group) % groups;
  const bool is_row = number < tensor.row_groups;
  const bool is_down = is_row != (tensor.is_swapped != 0);
  const int64_t size = is_down ? tensor.rows : tensor.columns;
  const int64_t i =
      int64_t(is_row ? number : number - tensor.row_groups) * factored_threads +
      at.index;
  const int64_t place = matrix * size + i;
  const int64_t factor =
      place + (is_down ? tensor.down_factors : tensor.across_factors);
  const bool has_mean = !is_row || tensor.is_vector == 0;
  float mean = 0;
  if (i < size && has_mean) {
    const int64_t chunks =
        (tensor.columns + simdgroup_columns - 1) / simdgroup_columns;
    const device float* sums =
        is_down ? partials + tensor.across_sums + place * chunks
                : partials + tensor.down_sums +
                      matrix * tensor.tiles_down * tensor.columns + i;
    const int64_t step = is_down ? 1 : tensor.columns;
    const int64_t count = is_down ? chunks : int64_t(tensor.tiles_down);
    for (int64_t k = 0; k < count; ++k) {
      mean += sums[k * step];
    }
    mean = mean / float(is_down ? tensor.columns : tensor.rows);
    if (is_row) {
      mean = update_mean(row + place, new_row + place, mean, rule, skip);
    } else {
      mean = update_mean(column + place, new_column + place, mean, rule, skip);
    }
    factors[factor] = rule.factor(mean);
  } else if (i < size) {  // a vector's row
    mean = 1;
    factors[factor] = 1;
  }
  if (is_row) {
    const float sum = sum_of_all(mean, shared, at);
    if (at.index == 0) {
      factors[tensor.row_sums + matrix * tensor.row_groups + number] = sum;
    }
  }
}

// The root of the mean of a matrix' rows.
METAL_FUNC float root_mean(
    constant FactoredTensor& tensor,
    const device float* factors,
    threadgroup float* shared,
    const thread Tile& t,
    const thread Thread& at) {
  const float sum = sum_of_array(
      factors + tensor.row_sums + t.matrix * tensor.row_groups,
      tensor.row_groups,
      shared,
      at);
  return square_root(
      sum / float(tensor.is_swapped != 0 ? tensor.columns : tensor.rows));
}

// The factors of the columns that all simdgroups are about to read; the
// thread's four.
METAL_FUNC void load_across(
    constant FactoredTensor& tensor,
    const device float* factors,
    threadgroup float* shared,
    const thread Tile& t,
    int64_t first,
    const thread Thread& at,
    thread float* across) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int64_t c = at.index; c < t.columns_at_once; c += factored_threads) {
    shared[c] = first + c < t.end_column
                    ? factors
                          [tensor.across_factors + t.matrix * tensor.columns +
                           first + c]
                    : 0.0f;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  FOR_EACH_OF_FOUR { across[i] = shared[t.column + i]; }
}

// The factors of a simdgroup's next rows, one to each lane.
METAL_FUNC float load_down(
    constant FactoredTensor& tensor,
    const device float* factors,
    const thread Tile& t,
    int64_t row,
    int64_t end) {
  return row < end ? factors[tensor.down_factors + t.matrix * tensor.rows + row]
                   : 0.0f;
}

// A part of the gradient in threadgroup memory.
struct Stage {
  threadgroup float* values;
  bool is_used;
  int pitch;
  int64_t row;  // its first
  int64_t column;
};

template <typename G>
METAL_FUNC void stage_gradient(
    const device G* gradient,
    constant FactoredTensor& tensor,
    const thread Tile& t,
    const thread Stage& stage,
    int64_t rows,
    int64_t columns,
    const thread Thread& at) {
  const bool by_columns = tensor.row_stride == 1;
  const int64_t neighbours = by_columns ? rows : columns;
  const int64_t others = by_columns ? columns : rows;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int64_t i = at.simdgroup; i < others; i += factored_threads / 32) {
    for (int64_t j = at.lane; j < neighbours; j += 32) {
      const int64_t row = by_columns ? j : i;
      const int64_t column = by_columns ? i : j;
      stage.values[row * stage.pitch + column] = static_cast<float>(
          gradient
              [t.gradient + (stage.row + row) * tensor.row_stride +
               (stage.column + column) * tensor.column_stride]);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

template <typename G>
METAL_FUNC void load_gradient(
    const device G* gradient,
    constant FactoredTensor& tensor,
    const thread Tile& t,
    const thread Stage& stage,
    int64_t row,
    int64_t column,
    int count,
    thread float* g) {
  if (stage.is_used) {
    const int64_t start =
        (row - stage.row) * stage.pitch + column - stage.column;
    FOR_EACH_OF_FOUR { g[i] = i < count ? stage.values[start + i] : 0.0f; }
  } else {
    load_four(
        gradient + t.gradient + row * tensor.row_stride +
            (count > 0 ? column : 0) * tensor.column_stride,
        tensor.column_stride,
        count,
        tensor.vectorized != 0,
        g);
  }
}

// The sum of squares of a tile of the update's direction, in every thread.
template <typename G>
METAL_FUNC float sum_of_direction(
    const device G* gradient,
    constant FactoredTensor& tensor,
    const thread Tile& t,
    const thread Stage& stage,
    float root,
    float scale,
    const device float* factors,
    threadgroup float* shared,
    const thread Thread& at) {
  float sum = 0;
  for (int64_t first = t.first_column; first < t.end_column;
       first += t.columns_at_once) {
    const int64_t column = first + t.column;
    const int count = count_of_four(column, t.end_column);
    float across[4];
    load_across(tensor, factors, shared, t, first, at, across);
    const int64_t h = tensor.rows_at_once;
    for (int64_t top = t.first_row + t.down; top < t.end_row; top += 32 * h) {
      const float downs =
          load_down(tensor, factors, t, top + at.lane * h, t.end_row);
      for (int k = 0; k < 32 && top + k * h < t.end_row; ++k) {
        const float down = simd_broadcast(downs, k) * root;
        float g[4];
        load_gradient(
            gradient, tensor, t, stage, top + k * h, column, count, g);
        FOR_EACH_OF_FOUR {
          const float u = direction(down, across[i], g[i] * scale);
          sum += u * u;
        }
      }
    }
  }
  return sum_of_all(sum, shared, at);
}

template <typename G>
METAL_FUNC void sum_update_squares(
    const device G* gradient,
    constant FactoredTensor& tensor,
    constant int64_t* walks,
    float scale,
    const device float* factors,
    device float* updates,
    threadgroup float* shared,
    uint tile,
    const thread Thread& at) {
  const Tile t = tile_of(tile, tensor, walks, at);
  const float root = root_mean(tensor, factors, shared, t, at);
  const Stage none = {shared, false, 0, 0, 0};
  const float sum = sum_of_direction(
      gradient, tensor, t, none, root, scale, factors, shared, at);
  if (at.index == 0) {
    updates[tensor.update_sums + t.number] = sum;
  }
}

// The arrays of a tensor in the last pass: read here, written there; the same
// memory, unless work under way still holds the old one.
template <typename P, typename G, typename M>
struct WriteSlots {
  const device P* parameter;
  device P* new_parameter;
  const device M* moment;
  device M* new_moment;
  const device G* gradient;
};

template <bool has_moment, typename Slots>
METAL_FUNC void write_update(
    const thread Slots& slots,
    constant FactoredTensor& tensor,
    constant int64_t* walks,
    const thread Adafactor<float>& rule,
    float scale,
    bool skip,
    const device float* partials,
    const device float* factors,
    const device float* updates,
    threadgroup float* shared,
    threadgroup float* stage,
    uint tile,
    const thread Thread& at) {
  const Tile t = tile_of(tile, tensor, walks, at);
  const float root = root_mean(tensor, factors, shared, t, at);
  const float scaled_rate = rule.scaled_rate(
      sum_of_array(partials + tensor.parameter_sums, tensor.sums, shared, at) /
      float(tensor.size));
  // A small tensor's gradient is read once, and its third launch left out.
  const bool is_whole = tensor.is_whole != 0;
  Stage part = {
      stage,
      is_whole || tensor.is_staged != 0,
      int(is_whole ? tensor.columns + 1 : simdgroup_columns + 1),
      0,
      0};
  float sum;
  if (is_whole) {
    stage_gradient(
        slots.gradient, tensor, t, part, tensor.rows, tensor.columns, at);
    sum = sum_of_direction(
        slots.gradient, tensor, t, part, root, scale, factors, shared, at);
  } else {
    sum = sum_of_array(updates + tensor.update_sums, tensor.sums, shared, at);
  }
  const float size = rule.clipped(scaled_rate, sum / float(tensor.size));
  for (int64_t first = t.first_column; first < t.end_column;
       first += t.columns_at_once) {
    const int64_t column = first + t.column;
    const int count = count_of_four(column, t.end_column);
    float across[4];
    load_across(tensor, factors, shared, t, first, at, across);
    for (int64_t top = t.first_row; top < t.end_row; top += turned_rows) {
      const int64_t bottom = min(top + int64_t(turned_rows), t.end_row);
      if (part.is_used && !is_whole) {
        part.row = top;
        part.column = first;
        stage_gradient(
            slots.gradient,
            tensor,
            t,
            part,
            bottom - top,
            min(t.columns_at_once, t.end_column - first),
            at);
      }
      const int64_t h = tensor.rows_at_once;
      const float downs =
          load_down(tensor, factors, t, top + t.down + at.lane * h, bottom);
      for (int k = 0; top + t.down + k * h < bottom; ++k) {
        const int64_t row = top + t.down + k * h;
        const float down = simd_broadcast(downs, k) * root;
        float g[4];
        load_gradient(slots.gradient, tensor, t, part, row, column, count, g);
        const int64_t place = (t.matrix * tensor.rows + row) * tensor.columns +
                              (count > 0 ? column : 0);
        const bool vectorized =
            tensor.parameter_vectorized != 0 && tensor.columns % 4 == 0;
        float p[4];
        float m[4];
        load_four(slots.parameter + place, 1, count, vectorized, p);
        if constexpr (has_moment) {
          load_four(slots.moment + place, 1, count, vectorized, m);
        }
        if (!skip) {
          FOR_EACH_OF_FOUR {
            float u = direction(down, across[i], g[i] * scale) * size;
            if constexpr (has_moment) {
              rule.average(u, m[i]);
            }
            rule.write(u, scaled_rate, p[i]);
          }
        }
        store_four(p, count, vectorized, slots.new_parameter + place);
        if constexpr (has_moment) {
          store_four(m, count, vectorized, slots.new_moment + place);
        }
      }
    }
  }
}
