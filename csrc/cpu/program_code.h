// A program as the CPU runs it: operation by operation over blocks, each result
// in a register, a block of its own, or where its slot is written.
#pragma once

#include <cstddef>
#include <cstdint>

#include "operations.h"

namespace mlx_fused::cpu {

// Registers of a program at most: with the slots they stay in the second-level
// cache, and those of most programs in the first.
constexpr int max_registers = 24;

// Beside the operations, some at a time: fewer trips through the cache. They
// round where the single ones do.
enum class Code : uint8_t {
  copy = operation_count,
  product_sum,       // a * b + c * d
  multiply_add,      // a * b + c
  subtract_product,  // c - a * b
  divide_by_root,    // a / (sqrt(b) + c)
  count,
};

struct CodeOperand {
  enum Kind : uint8_t { slot, in_register, written, number, scalar };
  Kind kind = number;
  uint16_t index = 0;  // of `written`, the slot
};

struct CodeStep {
  uint8_t code;
  uint8_t operands;
  uint8_t uniform;  // a bit for each operand that is one number
  CodeOperand in[4];
  uint16_t result;  // a register,
  int16_t slot;     // unless it is written to this slot, if not negative
};

struct ProgramCode {
  const CodeStep* first;
  size_t steps;
};

}  // namespace mlx_fused::cpu
