#include "graph/sums_of_squares.h"

#include <memory>

#include "graph/transforms.h"

namespace mlx_fused {

Arrays SumsOfSquares::make_outputs(const Arrays& arrays,
                                   const mx::array& max_norm, bool counts,
                                   mx::Stream stream) {
  auto inputs = arrays;
  inputs.push_back(max_norm);
  return mx::array::make_arrays(
      {{static_cast<int>(arrays.size())}, {}, {}, {2}},
      std::vector(4, mx::float32),
      std::make_shared<SumsOfSquares>(counts, stream), inputs);
}

MLX_FUSED_COMPOSED_TRANSFORMS(SumsOfSquares)

}  // namespace mlx_fused
