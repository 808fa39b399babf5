// One optimizer step, in place, for several tensors a launch.
//
// csrc/metal/kernel_source.cpp adds, for a rule and the dtypes of its slots,
// the type Slots with the pointers of one tensor, load_states and store_states,
// and the kernel that binds the arrays of a launch's tensors and calls
// update_tile. Each slot that is written has a pointer to read (parameter) and
// one to write (new_parameter): the same memory, unless work under way still
// holds the old one.

#include <metal_stdlib>

using namespace metal;

#include "launch.h"
#include "rule_language.h"
#include "storage.h"
#include "update_rules.h"

// A rule begins with its numbers, each of which is three floats.
template <typename Rule>
METAL_FUNC void set_numbers(thread Rule& rule, constant float* numbers) {
  thread float* fields = reinterpret_cast<thread float*>(&rule);
  for (int i = 0; i < 3 * Rule::numbers; ++i) {
    fields[i] = numbers[i];
  }
}

template <typename Rule, typename Slots>
METAL_FUNC void update_tile(const thread Slots& slots,
                            constant LaunchTensor& tensor,
                            constant int64_t* walks, const thread Rule& rule,
                            float gradient_scale, bool skip, uint tile,
                            uint thread_index) {
  const bool vectorized = tensor.vectorized != 0;
  for (int vector = 0; vector < vectors_each; ++vector) {
    const int64_t start =
        vector_start(tile, tensor.first_tile, thread_index, vector);
    if (start >= tensor.size) {
      return;
    }
    const int64_t rest = tensor.size - start;
    const int count = rest < vector_size ? int(rest) : vector_size;
    float p[vector_size] = {0, 0, 0, 0};
    float s[Rule::states + 1][vector_size];
    float g[vector_size];
    if constexpr (Rule::reads_parameter) {
      load_vector(slots.parameter, start, count, vectorized, p);
    }
    load_states(slots, start, count, vectorized, s);
    load_gradient(slots.gradient, tensor, walks, start, count, g);
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
    if constexpr (Rule::writes_parameter) {
      store_vector(p, start, count, vectorized, slots.new_parameter);
    }
    store_states(s, start, count, vectorized, slots);
    if constexpr (Rule::writes_gradient) {
      store_vector(g, start, count, vectorized, slots.new_gradient);
    }
  }
}
