// The public operations: check the arguments, build the graph.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "mlx/array.h"
#include "mlx/utils.h"
#include "rules.h"

namespace mlx_fused {

namespace mx = mlx::core;

using Arrays = std::vector<mx::array>;

// One optimizer step by the rule of that name. states[k][i] is state k of
// parameter i; every gradient is multiplied by gradient_scale first, if given,
// and a negative gradient_scale changes nothing. A gradient or state of a wider
// dtype widens what it is added to, unless keep_dtypes is set. Kernels run when
// the arrays of `after` are computed; no result depends on those.
// Returns the new parameters and states in the same order. Throws
// std::invalid_argument before anything is changed.
std::pair<Arrays, std::vector<Arrays>> fused_update(
    const std::string& rule, const std::vector<double>& hyperparameters,
    const Arrays& parameters, const Arrays& gradients,
    const std::vector<Arrays>& states, const mx::array& learning_rate,
    const mx::array& step, const std::optional<mx::array>& gradient_scale,
    bool keep_dtypes = false, const Arrays& after = {},
    mx::StreamOrDevice s = {});

// The global L2 norm of the arrays, and min(max_norm / (norm + 1e-6), 1); both
// float32 scalars. float32, float16 and bfloat16 arrays of any shape.
std::pair<mx::array, mx::array> global_norm(const Arrays& arrays,
                                            const mx::array& max_norm,
                                            mx::StreamOrDevice s = {});

// The arrays times a float32 scalar, in their own dtype and, where nobody else
// holds them, in their own memory.
Arrays scale(const Arrays& arrays, const mx::array& factor,
             mx::StreamOrDevice s = {});

// The rule of that name; throws std::invalid_argument with the known ones.
Rule rule_named(const std::string& name);

// True for the dtypes that kernels load and store.
bool has_kernels(mx::Dtype dtype);

}  // namespace mlx_fused
