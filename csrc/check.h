// A kernel's results on small tensors against plain MLX operations in float32:
// what the self check prints, and what decides whether a GPU's kernel is used.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "graph/layout.h"
#include "mlx/utils.h"

namespace mlx_fused {

// What is wrong with the kernel that updates slots of these formats; nothing if
// it agrees. A compiler's message is such an answer. It runs on copies and in
// place; must_be_in_place asks for the memory itself, which a GPU that is busy
// may still hold.
std::optional<std::string> check_update(const RuleTraits& rule,
                                        const Formats& formats,
                                        mlx::core::Stream stream,
                                        bool must_be_in_place = false);

// The same of the sums of squares of arrays of a dtype.
std::optional<std::string> check_sums(mlx::core::Dtype dtype, bool counts,
                                      mlx::core::Stream stream);

// Whether the kernel passes its check on this stream's device. It is checked
// when it is first asked for; a failure is kept for take_failures().
bool is_trusted(const RuleTraits& rule, const Formats& formats,
                mlx::core::Stream stream);
bool is_trusted_sum(mlx::core::Dtype dtype, bool counts,
                    mlx::core::Stream stream);

// The failures since the last call, a line each.
std::string take_failures();

// Forgets what was found, so that every kernel is checked anew.
void reset_trust();

}  // namespace mlx_fused
