// One optimizer step, in place, for several tensors a launch.
//
// csrc/metal/kernel_source.cpp adds, for a rule and the dtypes of its slots,
// the type Slots with the pointers of one tensor, load_states and store_states,
// and the kernel that binds the arrays of a launch's tensors and calls
// update_tile or update_block. Each slot that is written has a pointer to read
// (parameter) and one to write (new_parameter): the same memory, unless work
// under way still holds the old one.

// a * b + c in two roundings, as on the CPU; memory is what a step waits for.
#pragma METAL fp contract(off)

#include <metal_stdlib>

using namespace metal;

#include "launch.h"
#include "storage.h"
#include "gradients.h"
#include "rule_language.h"
#include "update_rules.h"
#include "formats.h"
#include "operations.h"
#include "held.h"

// A rule, and behind its states an average of the weights.
template <typename Rule>
struct Averaged {
  static constexpr constant int numbers = Rule::numbers + 1;
  static constexpr constant int states = Rule::states + 1;
  static constexpr constant bool writes_gradient = Rule::writes_gradient;

  Number<float> ema;
  Rule rule;

  void prepare(float rate, float step) thread { rule.prepare(rate, step); }
  void prepare(float rate, float step, float coefficient) thread {
    rule.prepare(rate, step, coefficient);
  }

  void update(thread float& g, thread float& p, thread float* s) const thread {
    rule.update(g, p, s);
    s[Rule::states] = moving_average(ema, s[Rule::states], p);
  }
};

// A rule begins with its numbers, each of which is three floats.
template <typename Rule>
METAL_FUNC void set_numbers(thread Rule& rule, constant float* numbers) {
  thread float* fields = reinterpret_cast<thread float*>(&rule);
  for (int i = 0; i < 3 * Rule::numbers; ++i) {
    fields[i] = numbers[i];
  }
}

// Four elements as memory holds them, where that is not what a rule computes
// with: a step that is skipped gives back the same bits.
template <int states>
struct Raw {
  int codes[states + 1][vector_size];
  float weights[vector_size];
  int errors[vector_size];
};

// Four elements of a tensor, by their gradients g. Index is that of the first
// in the tile.
template <typename Rule, typename Slots>
METAL_FUNC void update_vector(
    const thread Slots& slots,
    const thread Elements& at,
    int index,
    const thread Rule& rule,
    float gradient_scale,
    bool skip,
    thread float* g) {
  float p[vector_size] = {0, 0, 0, 0};
  float s[Rule::states + 1][vector_size];
  Raw<Rule::states> raw;
  slots.load(at, index, raw, p, s);
  if (!skip) {
    FOR_EACH_OF_VECTOR {
      float states[Rule::states + 1];
      for (int k = 0; k < Rule::states; ++k) {
        states[k] = s[k][i];
      }
      g[i] = g[i] * gradient_scale;
      rule.update(g[i], p[i], states);
      for (int k = 0; k < Rule::states; ++k) {
        s[k][i] = states[k];
      }
    }
  }
  slots.store(at, index, skip, raw, p, s);
  if constexpr (Rule::writes_gradient) {
    store_vector(g, at, slots.new_gradient);
  }
}

// A tile of neighbouring elements. The scales of its blocks of codes lie in
// threadgroup memory meanwhile, so that each line of them is read once.
template <typename Rule, typename Slots>
METAL_FUNC void update_tile(
    const thread Slots& slots,
    constant LaunchTensor& tensor,
    constant int64_t* walks,
    const thread Rule& rule,
    float gradient_scale,
    bool skip,
    uint tile,
    uint thread_index) {
  if (skip && slots.is_in_place()) {
    return;  // all that would be written is there
  }
  const int64_t start = int64_t(tile - tensor.first_tile) * tile_size;
  if constexpr (Slots::coded > 0) {
    for (int j = int(thread_index); j < tile_size / Slots::block_size;
         j += tile_threads) {
      slots.load_scales(
          j, scale_of_tile<Slots::block_size>(j, start, tensor.size));
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  for (int vector = 0; vector < vectors_each; ++vector) {
    const Elements at = neighbours(
        vector_start(tile, tensor.first_tile, thread_index, vector),
        tensor.size,
        tensor.vectorized != 0);
    float g[vector_size];
    load_gradient(slots.gradient, tensor, walks, at, g);
    const int index = (vector * tile_threads + int(thread_index)) * vector_size;
    update_vector(slots, at, index, rule, gradient_scale, skip, g);
  }
  if constexpr (Slots::coded > 0) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int j = int(thread_index); j < tile_size / Slots::block_size;
         j += tile_threads) {
      slots.store_scales(
          j, scale_of_tile<Slots::block_size>(j, start, tensor.size));
    }
  }
}

// A tile of a tensor whose gradient is transposed: a block of it.
template <int rows, int columns, typename Rule, typename Slots, typename G>
METAL_FUNC void update_block(
    const thread Slots& slots,
    constant LaunchTensor& tensor,
    constant int64_t* walks,
    const thread Rule& rule,
    float gradient_scale,
    bool skip,
    uint tile,
    uint thread_index,
    threadgroup G* stage) {
  if (skip && slots.is_in_place()) {
    return;
  }
  const Block at = block_of_tile<rows, columns>(
      tile - tensor.first_tile, walks + tensor.walk, tensor.dimensions);
  const bool may_vectorize = tensor.vectorized != 0;
  stage_block<rows, columns>(
      slots.gradient, at, may_vectorize, thread_index, stage);
  if constexpr (Slots::coded > 0) {
    for (int j = int(thread_index); j < rows * columns / Slots::block_size;
         j += tile_threads) {
      slots.load_scales(j, scale_of_block<Slots::block_size, columns>(j, at));
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int vector = 0; vector < BlockShape<rows, columns>::vectors; ++vector) {
    float g[vector_size];
    const Elements elements = load_staged<rows, columns>(
        stage, at, may_vectorize, vector, thread_index, g);
    const int index = (vector * tile_threads + int(thread_index)) * vector_size;
    update_vector(slots, elements, index, rule, gradient_scale, skip, g);
  }
  if constexpr (Slots::coded > 0) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int j = int(thread_index); j < rows * columns / Slots::block_size;
         j += tile_threads) {
      slots.store_scales(j, scale_of_block<Slots::block_size, columns>(j, at));
    }
  }
}
