#include "graph/layout.h"

#include <algorithm>

namespace mlx_fused {

mx::Dtype promoted(const RuleTraits& rule, const std::vector<mx::Dtype>& slots,
                   int slot) {
  const auto& [role, is_written] = rule.slots[slot];
  if (!is_written) {
    return slots[slot];
  }
  // A state takes in the gradient; everything else, the states too. Adafactor's
  // take in the parameter's scale.
  if (role == Role::state && !rule.is_factored() &&
      !rule.slots.back().is_written) {
    return mx::promote_types(slots[slot], slots.back());
  }
  auto widest = slots[slot];
  for (const auto dtype : slots) {
    widest = mx::promote_types(widest, dtype);
  }
  return widest;
}

size_t max_group_size(const RuleTraits& rule) {
  constexpr size_t most = 6;
  if (rule.is_factored()) {
    return most;  // its launches have groups of their own
  }
  size_t buffers = 0;
  for (const auto& [role, is_written] : rule.slots) {
    buffers += role != Role::state && is_written ? 2 : 1;
  }
  return std::min<size_t>(most, (31 - 7) / buffers);
}

}  // namespace mlx_fused
