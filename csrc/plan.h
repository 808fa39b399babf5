// From a step's tensors to groups: what follows from shapes, dtypes and options
// alone is planned once and kept.
#pragma once

#include <optional>

#include "graph/layout.h"
#include "mlx/utils.h"

namespace mlx_fused {

// A step's arrays: slots[k][i] is that of slot k of tensor i.
struct Tensors {
  explicit Tensors(const RuleTraits& rule)
      : slots(rule.slots.size()), companions(rule.slots.size()) {}

  std::vector<Arrays> slots;
  // Scales and errors; of tensors that have none anything, and of a slot that
  // never has any nothing.
  std::vector<Arrays> companions;
  // How slot k of tensor i is held, at i * slots.size() + k; all plain if
  // empty.
  std::vector<Storage> storage = {};
};

// What a rule does not read is ignored. With per_tensor each may have one entry
// per tensor.
struct Scalars {
  std::array<std::optional<mx::array>, scalar_count> values;
  bool per_tensor = false;
};

struct Request {
  const RuleTraits& rule;
  Sets sets;                          // of hyper-parameters
  std::vector<uint32_t> set_of = {};  // per tensor; if empty, the first for all
  Scalars scalars = {};
  bool keep_dtypes = false;  // a wider gradient widens nothing
  Arrays after = {};         // computed before the update
  // Per tensor, if they are not all whole tensors of the step.
  std::vector<Numbers> numbers = {};
  // Of a program, the scalars that it reads, by rows; and each tensor's row.
  std::vector<Arrays> rows = {};
  std::vector<uint32_t> row_of = {};
};

// One optimizer step: replaces the arrays that the rule writes. Kernels do it
// where they can, plain operations for other dtypes and shapes, and where a
// GPU's kernel is not trusted (check.h). Throws std::invalid_argument before
// anything is changed.
void fused_update(Tensors& tensors, Request request, mx::StreamOrDevice s = {});

// The sums of squares of arrays of kernels' dtypes, their norm and the clip
// factor and the carry, or how many of their elements are not zero, as
// SumsOfSquares.
struct Norm {
  mx::array sums;
  mx::array norm;
  mx::array factor;
  mx::array carry;
};
Norm sums_of_squares(const Arrays& arrays, const mx::array& max_norm,
                     bool counts = false, mx::StreamOrDevice s = {});

// The arrays times a float32 scalar, in their own dtype and, where nothing else
// holds them, in their own memory.
Arrays scale(Arrays arrays, const mx::array& factor, mx::StreamOrDevice s = {});

// Forgets all plans, and with them which kernels are trusted.
void reset_plans();

}  // namespace mlx_fused
