// metal/launch.h as C++.
#pragma once

#include <cstdint>

#define constant const

namespace mlx_fused {
#include "../../metal/launch.h"
}  // namespace mlx_fused

#undef constant
