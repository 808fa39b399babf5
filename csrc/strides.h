// How arrays that are not row-contiguous are walked.
#pragma once

#include <cstdint>
#include <vector>

#include "mlx/array.h"

namespace mlx_fused {

// An array's dimensions, outermost first, where neighbours that can be walked
// as one are merged and those of size 1 left out; at least one. Strides count
// elements.
struct Walk {
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;
};

constexpr size_t max_walk_dimensions = 64;

// Throws std::invalid_argument for more than max_walk_dimensions.
Walk collapse(const mlx::core::array& a);

}  // namespace mlx_fused
