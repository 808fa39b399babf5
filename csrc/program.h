// A program: what somebody's own optimizer does to one element, read from the
// graph of its apply_single (graph/trace.h). Each program is a rule of its own,
// which kernels, loops and plain operations carry out as those of
// metal/update_rules.h.
#pragma once

#include <array>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

#include "cpu/program_code.h"
#include "operations.h"
#include "rule_traits.h"

namespace mlx_fused {

struct OperationTraits {
  const char* name;
  const char* primitive;
  int operands;
  bool gives_truth;
};
const OperationTraits& traits_of(Operation operation);
// That of one of MLX's primitives, if there is one.
std::optional<Operation> operation_of(const std::string& primitive);

struct Operand {
  enum Kind : uint8_t {
    slot,    // what the slot holds before the update
    result,  // of an earlier instruction
    number,  // known to the host: a hyper-parameter
    scalar,  // on the device
  };
  Kind kind = number;
  uint16_t index = 0;
  bool operator==(const Operand&) const = default;
};

struct Instruction {
  Operation operation;
  std::array<Operand, 3> operands = {};
};

struct Program {
  int numbers = 0;
  int scalars = 0;
  std::vector<Instruction> instructions = {};
  // What each slot holds after the update; nothing where it is not written.
  std::vector<std::optional<Operand>> results = {};
  // By slots, as keys of a parameter's state, or "#0", "#1", ... for arrays
  // that are no entries of it.
  std::vector<std::string> states = {};
  bool has_parameter = false;      // is the first slot
  std::vector<bool> is_read = {};  // by slots
  std::vector<bool> is_never_negative = {};
  std::vector<cpu::CodeStep> code = {};  // made by rule_of
};

// The rule that carries out a program, the same for equal ones. It lives as
// long as the process.
const RuleTraits& rule_of(Program program);

// That of rule_of with this name; null if there is none.
const RuleTraits* program_named(const std::string& name);

// Of the name of an array that is no entry of the state, its number.
inline size_t number_of_extra(const std::string& name) {
  return std::strtoul(name.c_str() + 1, nullptr, 10);
}

// What distinguishes programs, and what a person can read.
std::string text_of(const Program& program);

}  // namespace mlx_fused
