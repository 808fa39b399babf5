// Adafactor's passes on Metal.
#pragma once

#include "graph/layout.h"

namespace mlx_fused {

// Evaluates a group's update.
void eval_factored(const GroupUpdate& update, const Arrays& inputs,
                   Arrays& outputs, mx::Stream stream);

}  // namespace mlx_fused
