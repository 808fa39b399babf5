#include "metal/backend.h"

namespace mlx_fused {

bool runs_metal(const mlx::core::Stream& stream) {
  return stream.device == mlx::core::Device::gpu;
}

}  // namespace mlx_fused
