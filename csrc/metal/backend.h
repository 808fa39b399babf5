// What the rest of the code has to know of the Metal code.
#pragma once

#include <stdexcept>

#include "mlx/stream.h"

namespace mlx_fused {

// A kernel that the device's compiler refuses, or cannot run as it has to.
class KernelError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// True on a GPU stream of a Mac, and on every stream of the simulated
// extension; which answers is decided by what is linked.
bool runs_metal(const mlx::core::Stream& stream);

}  // namespace mlx_fused
