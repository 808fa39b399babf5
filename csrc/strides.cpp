#include "strides.h"

#include <stdexcept>
#include <string>

namespace mlx_fused {

Walk collapse(const mlx::core::array& a) {
  Walk walk;
  for (size_t i = 0; i < a.ndim(); ++i) {
    const int64_t size = a.shape()[i];
    const int64_t stride = a.strides()[i];
    if (size == 1) {
      continue;
    }
    if (!walk.shape.empty() && walk.strides.back() == size * stride) {
      walk.shape.back() *= size;
      walk.strides.back() = stride;
    } else {
      walk.shape.push_back(size);
      walk.strides.push_back(stride);
    }
  }
  if (walk.shape.empty()) {
    walk = {{1}, {1}};
  }
  if (walk.shape.size() > max_walk_dimensions) {
    throw std::invalid_argument(
        "[mlx_fused_optimizers] an array has " +
        std::to_string(walk.shape.size()) +
        " dimensions that cannot be walked as one; at most " +
        std::to_string(max_walk_dimensions) + " are supported.");
  }
  return walk;
}

}  // namespace mlx_fused
