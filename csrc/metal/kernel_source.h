// The Metal source of the kernels that serve several tensors a launch: the
// templates of metal/, and a kernel that binds the arrays and calls them.
#pragma once

#include <string>
#include <vector>

#include "graph/layout.h"

namespace mlx_fused {

// Indices of the arguments that the tensors of an update share; the arrays of
// the tensors stand before them.
enum SharedBuffer {
  coefficient_buffer = 22,  // where there is one; otherwise it is a tensor's
  seed_buffer,              // the same
  scalars_buffer,
  numbers_buffer = scalars_buffer + 4,
  tensors_buffer,
  walks_buffer,
};
inline int buffer_of_scalar(Scalar kind) {
  return kind >= coefficient
             ? static_cast<int>(coefficient_buffer) + kind - coefficient
             : static_cast<int>(scalars_buffer) + kind;
}

// Arrays that a launch of the sums takes, and the arguments behind them.
constexpr int max_sums_group = 24;
enum SumsBuffer { partials_buffer = max_sums_group, sums_tensors, sums_walks };

// Rows and columns of the blocks in which a transposed gradient is read, as
// BlockShape in metal/gradients.h; whole lines of every array.
struct BlockSize {
  int rows;
  int columns;
};

// A kernel for the formats of a group's slots.
struct UpdateKernel {
  const GroupLayout& layout;
  // Whether states are read and written through pointers of their own, because
  // work under way still holds the old ones. Otherwise they are in place.
  bool separate_states = false;
  // Whether some gradient is transposed, and goes through threadgroup memory.
  bool stages_gradient = false;

  // Whether an array takes two buffers, the first to read and the second to
  // write. The parameter always does: it is held most often.
  bool is_separate(const Part& part) const;
  BlockSize block_size() const;
  int buffers_per_tensor() const;
  int tensors_per_launch() const;
  std::string name() const;
  std::string source() const;
};

std::string metal_type(mx::Dtype dtype);

// The kernel of this name sums the squares of up to max_sums_group arrays, or
// counts what is not zero.
std::string sums_kernel_name(mx::Dtype dtype, bool counts);
std::string sums_kernel_source(mx::Dtype dtype, bool counts);

}  // namespace mlx_fused
