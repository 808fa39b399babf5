// What differs between the releases of MLX that we build for
// (cmake/mlx_versions.json), and nothing else.
#pragma once

#include "mlx/allocator.h"
#include "mlx/stream.h"

namespace mlx_fused {

// The buffer of what allocator::malloc returns: up to MLX 0.32.3 the buffer
// itself, from 0.32.4 on an allocator::Data that owns it. Either is what
// array::set_data takes.
template <typename Memory>
mlx::core::allocator::Buffer buffer_of(const Memory& memory) {
  if constexpr (requires { memory.buffer(); }) {
    return memory.buffer();
  } else {
    return memory;
  }
}

// Throws what a task of the stream has thrown, where the scheduler keeps it:
// from MLX 0.32.2 on.
template <typename Scheduler>
void check_error(Scheduler& scheduler, mlx::core::Stream stream) {
  if constexpr (requires { scheduler.check_error(stream); }) {
    scheduler.check_error(stream);
  }
}

}  // namespace mlx_fused
