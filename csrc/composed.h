// The same updates from plain MLX operations: what autograd and vmap see, and
// what is used for dtypes and shapes that have no kernel. Dtypes promote as
// they do in mlx.optimizers.
#pragma once

#include <functional>
#include <vector>

#include "mlx/array.h"
#include "primitives.h"

namespace mlx_fused {

// Takes and gives arrays in the order of FusedUpdate.
std::function<std::vector<mx::array>(const std::vector<mx::array>&)>
composed_update(Rule rule, std::vector<double> hyperparameters,
                GroupLayout layout, mx::Stream stream);

// Takes and gives arrays in the order of GlobalNorm.
std::function<std::vector<mx::array>(const std::vector<mx::array>&)>
composed_norm(mx::Stream stream);

}  // namespace mlx_fused
