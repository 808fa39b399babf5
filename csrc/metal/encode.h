// What the evaluations on Metal share.
#pragma once

#include <functional>
#include <string>

#include "mlx/array.h"
#include "mlx/backend/metal/device.h"

namespace mlx_fused {

namespace mx = mlx::core;

using Pipeline = MTL::ComputePipelineState*;

// A kernel by its name, compiled when it is first needed.
Pipeline build(mx::Stream stream, const std::string& name,
               const std::function<std::string()>& source);

// An array of any strides into a row-contiguous one.
void copy_array(const mx::array& in, mx::array& out, mx::Stream stream);

}  // namespace mlx_fused
