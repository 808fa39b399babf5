#include "strides.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace mlx_fused {

std::vector<int64_t> Walk::row_major() const {
  std::vector<int64_t> result(shape.size(), 1);
  for (size_t d = shape.size(); d-- > 1;) {
    result[d - 1] = result[d] * shape[d];
  }
  return result;
}

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

bool is_dense(const mlx::core::array& a) {
  return a.flags().contiguous && a.data_size() == a.size() &&
         std::all_of(a.strides().begin(), a.strides().end(),
                     [](int64_t stride) { return stride >= 0; });
}

int64_t Transposed::count() const {
  int64_t count = 1;
  for (const int64_t size : matrices.shape) {
    count *= size;
  }
  return count;
}

std::pair<int64_t, int64_t> Transposed::locate(int64_t matrix) const {
  int64_t in_array = 0, in_row_major = 0;
  for (size_t d = matrices.shape.size(); d-- > 0;) {
    const int64_t position = matrix % matrices.shape[d];
    matrix /= matrices.shape[d];
    in_array += position * matrices.strides[d];
    in_row_major += position * matrix_strides[d];
  }
  return {in_array, in_row_major};
}

std::optional<Transposed> as_transposed(const Walk& walk, int64_t least) {
  const auto unit = std::find(walk.strides.begin(), walk.strides.end(), 1);
  if (walk.strides.back() <= 1 || unit == walk.strides.end()) {
    return std::nullopt;
  }
  const size_t row = unit - walk.strides.begin();
  const size_t column = walk.shape.size() - 1;
  if (walk.shape[row] < least || walk.shape[column] < least) {
    return std::nullopt;
  }
  const auto strides = walk.row_major();
  Transposed result{walk.shape[row],
                    walk.shape[column],
                    strides[row],
                    walk.strides[column],
                    {},
                    {}};
  for (size_t d = 0; d < column; ++d) {
    if (d != row) {
      result.matrices.shape.push_back(walk.shape[d]);
      result.matrices.strides.push_back(walk.strides[d]);
      result.matrix_strides.push_back(strides[d]);
    }
  }
  return result;
}

}  // namespace mlx_fused
