// Adafactor's passes on the CPU.
#pragma once

#include <functional>

#include "graph/layout.h"
#include "graph/placement.h"

namespace mlx_fused {

// A group's update as the stream's thread runs it; it holds what it reads.
std::function<void()> factored_task(const GroupUpdate& update,
                                    const Arrays& inputs, const Arrays& outputs,
                                    const Placement& placement);

}  // namespace mlx_fused
