// A kernel's results on small tensors against plain MLX operations in float32:
// what the self check prints, and what decides whether a GPU's kernel is used.
#pragma once

#include <optional>
#include <string>

#include "mlx/array.h"
#include "mlx/utils.h"
#include "rules.h"

namespace mlx_fused {

// What is wrong with the kernel that updates parameters, gradients and states
// of these dtypes; nothing if it agrees. A compiler's message is such an
// answer.
std::optional<std::string> check_update(Rule rule, mlx::core::Dtype parameter,
                                        mlx::core::Dtype gradient,
                                        mlx::core::Dtype state,
                                        mlx::core::Stream stream);

std::optional<std::string> check_norm(mlx::core::Dtype dtype,
                                      mlx::core::Stream stream);

// Whether the kernel passes its check on this stream's device. It is checked
// when it is first asked for; a failure is kept for take_failures().
bool is_trusted(Rule rule, mlx::core::Dtype parameter,
                mlx::core::Dtype gradient, mlx::core::Dtype state,
                mlx::core::Stream stream);
bool is_trusted_norm(mlx::core::Dtype dtype, mlx::core::Stream stream);

// The failures since the last call, a line each.
std::string take_failures();

// Forgets what was found, so that every kernel is checked anew.
void reset_trust();

}  // namespace mlx_fused
