// A group: tensors that share a primitive, and on Metal a launch.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "mlx/array.h"
#include "rule_traits.h"

namespace mlx_fused {

namespace mx = mlx::core;

using Arrays = std::vector<mx::array>;

// True for the dtypes that kernels load and store.
inline bool has_kernels(mx::Dtype dtype) {
  return dtype == mx::float32 || dtype == mx::float16 || dtype == mx::bfloat16;
}

// The dtype of a slot after an update, for tensors of these dtypes, by the
// arithmetic of mlx.optimizers: a wider gradient widens what it is added to.
mx::Dtype promoted(const RuleTraits& rule, const std::vector<mx::Dtype>& slots,
                   int slot);

// Tensors that a primitive and a Metal launch serve at most. Metal has 31
// buffers; the launch's own arguments take seven, and a slot takes one, or two
// where old and new value may lie apart (metal/fused_update.metal). And the
// cost of MLX's lists of siblings is quadratic in the outputs.
size_t max_group_size(const RuleTraits& rule);

// What a step has beside its tensors: arrays, so that they can change under
// mx.compile. Each is a scalar, or has one entry per tensor.
enum Scalar { learning_rate, step, gradient_scale, skip, scalar_count };

struct ScalarKind {
  const char* name;
  mx::Dtype dtype;  // as kernels read it
  const char* type;
};
inline const ScalarKind scalar_kinds[scalar_count] = {
    {"learning_rate", mx::float32, "float"},
    {"step", mx::uint64, "uint64_t"},
    {"gradient_scale", mx::float32, "float"},
    {"skip", mx::bool_, "bool"},  // nothing changes
};

// How the arrays of a group are ordered. Inputs: for each tensor its slots;
// then the scalars that there are. Outputs: for each tensor the slots that its
// rule writes.
struct GroupLayout {
  const RuleTraits* rule;
  int tensors;
  std::array<bool, scalar_count> has;

  int slots() const { return static_cast<int>(rule->slots.size()); }
  int input(int tensor, int slot) const { return tensor * slots() + slot; }
  int gradient(int tensor) const { return input(tensor, slots() - 1); }
  // -1 for a scalar that is not there.
  int input(Scalar scalar) const {
    return has[scalar] ? tensors * slots() +
                             std::count(has.begin(), has.begin() + scalar, true)
                       : -1;
  }
};

// A tensor's own scalars.
struct Entry {
  uint32_t hyperparameters;  // which of the step's sets
  uint32_t scalar;           // its place where a scalar has several entries
};

using Sets = std::vector<Hyperparameters>;

// Everything of a group's update but its arrays.
struct GroupUpdate {
  GroupLayout layout;
  std::shared_ptr<const Sets> sets;
  std::vector<Entry> entries;  // one per tensor
  bool per_tensor = false;     // whether scalars may have several entries
};

}  // namespace mlx_fused
