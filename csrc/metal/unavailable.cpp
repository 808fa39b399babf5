// eval_gpu where there is no Metal.
#include <stdexcept>

#include "../primitives.h"

namespace mlx_fused {

void FusedUpdate::eval_gpu(const std::vector<mx::array>&,
                           std::vector<mx::array>&) {
  throw std::runtime_error("[FusedUpdate] built without Metal.");
}

void GlobalNorm::eval_gpu(const std::vector<mx::array>&,
                          std::vector<mx::array>&) {
  throw std::runtime_error("[GlobalNorm] built without Metal.");
}

}  // namespace mlx_fused
