// The operations that a program may have.
#pragma once

#include <cstdint>

namespace mlx_fused {

// As OPERATION(name, MLX's primitive, operands, whether it gives a truth
// value). metal/operations.h has op_name.
#define MLX_FUSED_OPERATIONS(OPERATION)             \
  OPERATION(add, "Add", 2, false)                   \
  OPERATION(subtract, "Subtract", 2, false)         \
  OPERATION(multiply, "Multiply", 2, false)         \
  OPERATION(divide, "Divide", 2, false)             \
  OPERATION(maximum, "Maximum", 2, false)           \
  OPERATION(minimum, "Minimum", 2, false)           \
  OPERATION(power, "Power", 2, false)               \
  OPERATION(arctan2, "ArcTan2", 2, false)           \
  OPERATION(negative, "Negative", 1, false)         \
  OPERATION(absolute, "Abs", 1, false)              \
  OPERATION(sign, "Sign", 1, false)                 \
  OPERATION(square, "Square", 1, false)             \
  OPERATION(square_root, "Sqrt", 1, false)          \
  OPERATION(reciprocal_root, "Rsqrt", 1, false)     \
  OPERATION(exponential, "Exp", 1, false)           \
  OPERATION(exponential_minus_1, "Expm1", 1, false) \
  OPERATION(logarithm, "Log", 1, false)             \
  OPERATION(logarithm_of_1_plus, "Log1p", 1, false) \
  OPERATION(hyperbolic_tangent, "Tanh", 1, false)   \
  OPERATION(sigmoid, "Sigmoid", 1, false)           \
  OPERATION(sine, "Sin", 1, false)                  \
  OPERATION(cosine, "Cos", 1, false)                \
  OPERATION(arctan, "ArcTan", 1, false)             \
  OPERATION(floor, "Floor", 1, false)               \
  OPERATION(ceiling, "Ceil", 1, false)              \
  OPERATION(rounded, "Round", 1, false)             \
  OPERATION(to_float16, "to float16", 1, false)     \
  OPERATION(to_bfloat16, "to bfloat16", 1, false)   \
  OPERATION(to_bool, "to bool", 1, true)            \
  OPERATION(equal, "Equal", 2, true)                \
  OPERATION(not_equal, "NotEqual", 2, true)         \
  OPERATION(greater, "Greater", 2, true)            \
  OPERATION(greater_equal, "GreaterEqual", 2, true) \
  OPERATION(less, "Less", 2, true)                  \
  OPERATION(less_equal, "LessEqual", 2, true)       \
  OPERATION(logical_and, "LogicalAnd", 2, true)     \
  OPERATION(logical_or, "LogicalOr", 2, true)       \
  OPERATION(logical_not, "LogicalNot", 1, true)     \
  OPERATION(select, "Select", 3, false)

enum class Operation : uint8_t {
#define MLX_FUSED_NAME(name, primitive, operands, is_truth) name,
  MLX_FUSED_OPERATIONS(MLX_FUSED_NAME)
#undef MLX_FUSED_NAME
};

constexpr int operation_count = static_cast<int>(Operation::select) + 1;

}  // namespace mlx_fused
