// From a step's tensors to groups: what follows from shapes, dtypes and options
// alone is planned once and kept.
#pragma once

#include <optional>

#include "graph/layout.h"
#include "mlx/utils.h"

namespace mlx_fused {

// A step's arrays, by slots. All lists have one entry per tensor, but those of
// slots that the rule does not have, which are empty.
struct Tensors {
  Arrays parameters;
  std::vector<Arrays> states;  // states[k][i] is state k of tensor i
  Arrays gradients;
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
};

// One optimizer step: replaces the arrays that the rule writes. Kernels do it
// where they can, plain operations for other dtypes and shapes, and where a
// GPU's kernel is not trusted (check.h). Throws std::invalid_argument before
// anything is changed.
void fused_update(Tensors& tensors, Request request, mx::StreamOrDevice s = {});

// The sums of squares of arrays of kernels' dtypes, their norm and the clip
// factor, as SumsOfSquares.
struct Norm {
  mx::array sums;
  mx::array norm;
  mx::array factor;
};
Norm sums_of_squares(const Arrays& arrays, const mx::array& max_norm,
                     mx::StreamOrDevice s = {});

// The arrays times a float32 scalar, in their own dtype and, where nothing else
// holds them, in their own memory.
Arrays scale(Arrays arrays, const mx::array& factor, mx::StreamOrDevice s = {});

// Forgets all plans, and with them which kernels are trusted.
void reset_plans();

}  // namespace mlx_fused
