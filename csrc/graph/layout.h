// A group: tensors that share a primitive, and on Metal a launch.
#pragma once

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

// How the arrays of a group are ordered. Inputs: for each tensor its slots;
// then, as far as there are any, learning rate (float32), step (uint64),
// gradient scale (float32) and skip (bool). Each of these is a scalar, or has
// an entry for each tensor of the step. Outputs: for each tensor the slots that
// its rule writes.
struct GroupLayout {
  const RuleTraits* rule;
  int tensors;
  bool is_scaled;
  bool is_skippable;

  int slots() const { return static_cast<int>(rule->slots.size()); }
  int input(int tensor, int slot) const { return tensor * slots() + slot; }
  int gradient(int tensor) const { return input(tensor, slots() - 1); }

  // Inputs behind the tensors'; -1 for one that is not there.
  int learning_rate() const { return scalar(rule->reads_learning_rate, 0); }
  int step() const {
    return scalar(rule->reads_step, rule->reads_learning_rate);
  }
  int gradient_scale() const {
    return scalar(is_scaled, rule->reads_learning_rate + rule->reads_step);
  }
  int skip() const {
    return scalar(is_skippable,
                  rule->reads_learning_rate + rule->reads_step + is_scaled);
  }

 private:
  int scalar(bool is_there, int position) const {
    return is_there ? tensors * slots() + position : -1;
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
