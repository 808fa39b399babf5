// The same updates from plain MLX operations: what autograd and vmap see, what
// is used for dtypes and shapes that have no kernel, and what kernels are
// checked against.
#pragma once

#include <functional>

#include "graph/layout.h"
#include "mlx/stream.h"

namespace mlx_fused {

using Function = std::function<Arrays(const Arrays&)>;

// Takes and gives arrays in the order of the group's layout. Half precision is
// computed in float32 and rounded once; other dtypes promote as they do in
// mlx.optimizers, and so do the results unless keep_dtypes is set. Complex
// numbers are pairs of float32 where a rule squares gradients. A learning rate
// may have any shape.
Function composed_update(GroupUpdate update, bool keep_dtypes,
                         mx::Stream stream);

// Takes and gives arrays in the order of SumsOfSquares.
Function composed_sums(bool counts, mx::Stream stream);

}  // namespace mlx_fused
