// How arrays that are not row-contiguous are walked.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "mlx/array.h"

namespace mlx_fused {

// An array's dimensions, outermost first, where neighbours that can be walked
// as one are merged and those of size 1 left out; at least one. Strides count
// elements.
struct Walk {
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;

  // The strides of a row-contiguous array of this shape.
  std::vector<int64_t> row_major() const;
};

constexpr size_t max_walk_dimensions = 64;

// Throws std::invalid_argument for more than max_walk_dimensions.
Walk collapse(const mlx::core::array& a);

// Whether an array's elements fill its memory, in whatever order of dimensions.
// What is done to each alike may then take them in the order of memory.
bool is_dense(const mlx::core::array& a);

// An array as matrices whose columns are contiguous, such as the gradient that
// a linear layer's weight has. Elements of a row are column_stride apart;
// matrix_strides, as row_stride, are those of a row-contiguous array.
struct Transposed {
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
  int64_t column_stride;
  Walk matrices;  // where the matrices begin
  std::vector<int64_t> matrix_strides;

  int64_t count() const;  // of the matrices
  // Where a matrix begins: in the array, and in a row-contiguous one.
  std::pair<int64_t, int64_t> locate(int64_t matrix) const;
};

// None for an array of other strides, and for matrices with fewer rows or
// columns than this.
std::optional<Transposed> as_transposed(const Walk& walk, int64_t least);

}  // namespace mlx_fused
