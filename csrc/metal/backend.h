// Whether a stream's updates run as Metal kernels.
#pragma once

#include "mlx/stream.h"

namespace mlx_fused {

// True on a GPU stream of a Mac, and on every stream of the simulated
// extension; which answers is decided by what is linked.
bool runs_metal(const mlx::core::Stream& stream);

}  // namespace mlx_fused
