// What stands for the Metal code where there is none.
#include <stdexcept>

#include "../primitives.h"
#include "backend.h"

namespace mlx_fused {

bool runs_metal(const mx::Stream&) { return false; }

void FusedUpdate::eval_gpu(const std::vector<mx::array>&,
                           std::vector<mx::array>&) {
  throw std::runtime_error("[FusedUpdate] built without Metal.");
}

void GlobalNorm::eval_gpu(const std::vector<mx::array>&,
                          std::vector<mx::array>&) {
  throw std::runtime_error("[GlobalNorm] built without Metal.");
}

}  // namespace mlx_fused
