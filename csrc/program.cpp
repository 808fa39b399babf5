#include "program.h"

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <utility>

namespace mlx_fused {

namespace {

constexpr OperationTraits all_operations[] = {
#define MLX_FUSED_TRAITS(name, primitive, operands, is_truth) \
  {#name, primitive, operands, is_truth},
    MLX_FUSED_OPERATIONS(MLX_FUSED_TRAITS)
#undef MLX_FUSED_TRAITS
};

std::mutex mutex;
std::map<std::string, std::unique_ptr<const RuleTraits>> programs;
std::map<std::string, const RuleTraits*> by_name;

std::string text_of(const Operand& operand) {
  return std::string(1, "sxnc"[operand.kind]) + std::to_string(operand.index);
}

using cpu::Code;
using cpu::CodeOperand;
using cpu::CodeStep;

// Turns a program into steps over blocks: some operations at a time, in
// registers that are used again.
class CodeMaker {
 public:
  explicit CodeMaker(const Program& program)
      : program_(program), uses_(program.instructions.size()) {
    for (const auto& instruction : program.instructions) {
      for (int k = 0; k < traits_of(instruction.operation).operands; ++k) {
        count(instruction.operands[k]);
      }
    }
    for (const auto& result : program.results) {
      if (result) {
        count(*result);
      }
    }
  }

  std::vector<CodeStep> make() {
    select();
    place();
    return std::move(steps_);
  }

 private:
  // A step before places are known: its operands are the program's.
  struct Draft {
    uint8_t code;
    std::vector<Operand> operands;
    int result;  // of which instruction; a copy of a slot has one behind them
  };

  void count(const Operand& operand) {
    if (operand.kind == Operand::result) {
      ++uses_[operand.index];
    }
  }

  // The instruction of this operation that makes an operand, if only this use
  // has it.
  const Instruction* only(const Operand& operand, Operation operation) const {
    if (operand.kind != Operand::result || uses_[operand.index] != 1) {
      return nullptr;
    }
    const auto& made = program_.instructions[operand.index];
    return made.operation == operation ? &made : nullptr;
  }

  static bool is_uniform(const Operand& operand) {
    return operand.kind == Operand::number || operand.kind == Operand::scalar;
  }

  // A product's factors, a number first.
  static std::array<Operand, 2> factors(const Instruction& product) {
    auto [a, b, _] = product.operands;
    if (is_uniform(b)) {
      std::swap(a, b);
    }
    return {a, b};
  }

  void select() {
    const auto& instructions = program_.instructions;
    std::vector<bool> is_inside(instructions.size());
    std::vector<Draft> drafts(instructions.size());
    for (size_t i = instructions.size(); i-- > 0;) {
      const auto& [operation, operands] = instructions[i];
      auto& draft = drafts[i];
      draft.result = static_cast<int>(i);
      const auto inside = [&](const Operand& operand) {
        is_inside[operand.index] = true;
      };
      const auto& [a, b, c] = operands;
      const auto* left = only(a, Operation::multiply);
      const auto* right = only(b, Operation::multiply);
      const auto* sum = only(b, Operation::add);
      if (is_inside[i]) {
        continue;
      }
      if (operation == Operation::add && left && right) {
        const auto x = factors(*left), y = factors(*right);
        draft.code = static_cast<uint8_t>(Code::product_sum);
        draft.operands = {x[0], x[1], y[0], y[1]};
        inside(a);
        inside(b);
      } else if (operation == Operation::add && (left || right)) {
        const auto x = factors(left ? *left : *right);
        draft.code = static_cast<uint8_t>(Code::multiply_add);
        draft.operands = {x[0], x[1], left ? b : a};
        inside(left ? a : b);
      } else if (operation == Operation::subtract && right) {
        const auto x = factors(*right);
        draft.code = static_cast<uint8_t>(Code::subtract_product);
        draft.operands = {x[0], x[1], a};
        inside(b);
      } else if (const auto* root =
                     sum && operation == Operation::divide && !is_uniform(a)
                         ? only(sum->operands[0], Operation::square_root)
                         : nullptr;
                 root && is_uniform(sum->operands[1])) {
        draft.code = static_cast<uint8_t>(Code::divide_by_root);
        draft.operands = {a, root->operands[0], sum->operands[1]};
        inside(b);
        inside(sum->operands[0]);
      } else {
        draft.code = static_cast<uint8_t>(operation);
        draft.operands.assign(operands.begin(),
                              operands.begin() + traits_of(operation).operands);
      }
    }
    const size_t slots = program_.results.size();
    results_ = program_.results;
    int copies = static_cast<int>(instructions.size());
    // What a slot that is written held goes elsewhere first.
    for (size_t k = 0; k < slots; ++k) {
      auto& result = results_[k];
      if (result && result->kind == Operand::slot &&
          program_.results[result->index] && result->index != k) {
        drafts_.push_back(
            {static_cast<uint8_t>(Code::copy), {*result}, copies});
        result = Operand{Operand::result, static_cast<uint16_t>(copies++)};
      }
    }
    for (size_t i = 0; i < drafts.size(); ++i) {
      if (!is_inside[i]) {
        drafts_.push_back(std::move(drafts[i]));
      }
    }
    // What is no step's result is copied last.
    for (size_t k = 0; k < slots; ++k) {
      auto& result = results_[k];
      const bool is_again =
          result && std::find(results_.begin(), results_.begin() + k, result) !=
                        results_.begin() + k;
      if (result && (result->kind != Operand::result || is_again)) {
        drafts_.push_back(
            {static_cast<uint8_t>(Code::copy), {*result}, copies});
        result = Operand{Operand::result, static_cast<uint16_t>(copies++)};
      }
    }
    values_ = copies;
  }

  void place() {
    // The last steps that read each value, and each slot as it was.
    std::vector<size_t> last_of_value(values_), last_of_slot(results_.size());
    for (size_t i = 0; i < drafts_.size(); ++i) {
      for (const auto& operand : drafts_[i].operands) {
        if (operand.kind == Operand::result) {
          last_of_value[operand.index] = i;
        } else if (operand.kind == Operand::slot) {
          last_of_slot[operand.index] = i;
        }
      }
    }
    std::vector<CodeOperand> place_of(values_);
    std::vector<int> free;
    int registers = 0;
    const auto take = [&] {
      if (free.empty()) {
        return registers++;
      }
      const int taken = free.back();
      free.pop_back();
      return taken;
    };
    std::vector<std::pair<int, int>> late;  // slots, and registers for them
    for (size_t i = 0; i < drafts_.size(); ++i) {
      const auto& draft = drafts_[i];
      CodeStep step{};
      step.code = draft.code;
      step.operands = static_cast<uint8_t>(draft.operands.size());
      step.slot = -1;
      for (size_t k = 0; k < draft.operands.size(); ++k) {
        const auto& operand = draft.operands[k];
        step.in[k] = operand.kind == Operand::result ? place_of[operand.index]
                     : operand.kind == Operand::slot
                         ? CodeOperand{CodeOperand::slot, operand.index}
                     : operand.kind == Operand::number
                         ? CodeOperand{CodeOperand::number, operand.index}
                         : CodeOperand{CodeOperand::scalar, operand.index};
        step.uniform |= static_cast<uint8_t>(is_uniform(operand) << k);
      }
      // A register whose last reader this is can be its result's too.
      for (const auto& operand : draft.operands) {
        if (operand.kind == Operand::result &&
            last_of_value[operand.index] == i) {
          auto& place = place_of[operand.index];
          if (place.kind == CodeOperand::in_register) {
            free.push_back(place.index);
            place.kind = CodeOperand::number;  // once, if it is read twice
          }
        }
      }
      const auto found = std::find(
          results_.begin(), results_.end(),
          Operand{Operand::result, static_cast<uint16_t>(draft.result)});
      const auto slot = found - results_.begin();
      auto& place = place_of[draft.result];
      if (found != results_.end() && last_of_slot[slot] <= i) {
        step.slot = static_cast<int16_t>(slot);
        place = {CodeOperand::written, static_cast<uint16_t>(slot)};
      } else {
        place = {CodeOperand::in_register, static_cast<uint16_t>(take())};
        step.result = place.index;
        if (found != results_.end()) {
          late.emplace_back(static_cast<int>(slot), place.index);
          last_of_value[draft.result] = drafts_.size();  // not to be reused
        }
      }
      steps_.push_back(step);
    }
    for (const auto& [slot, place] : late) {
      CodeStep step{};
      step.code = static_cast<uint8_t>(Code::copy);
      step.operands = 1;
      step.in[0] = {CodeOperand::in_register, static_cast<uint16_t>(place)};
      step.slot = static_cast<int16_t>(slot);
      steps_.push_back(step);
    }
    if (registers > cpu::max_registers) {
      steps_.clear();
    }
  }

  const Program& program_;
  std::vector<int> uses_;
  std::vector<std::optional<Operand>> results_;
  std::vector<Draft> drafts_;
  int values_ = 0;
  std::vector<CodeStep> steps_;
};

}  // namespace

const OperationTraits& traits_of(Operation operation) {
  return all_operations[static_cast<size_t>(operation)];
}

std::optional<Operation> operation_of(const std::string& primitive) {
  const auto found = std::find_if(
      std::begin(all_operations), std::end(all_operations),
      [&](const OperationTraits& o) { return primitive == o.primitive; });
  if (found == std::end(all_operations)) {
    return std::nullopt;
  }
  return static_cast<Operation>(found - std::begin(all_operations));
}

std::string text_of(const Program& program) {
  std::ostringstream text;
  for (size_t i = 0; i < program.instructions.size(); ++i) {
    const auto& [operation, operands] = program.instructions[i];
    text << "x" << i << " = " << traits_of(operation).name << "(";
    for (int k = 0; k < traits_of(operation).operands; ++k) {
      text << (k > 0 ? ", " : "") << text_of(operands[k]);
    }
    text << ")\n";
  }
  const size_t slots = program.results.size();
  for (size_t k = 0; k < slots; ++k) {
    const bool is_gradient = k + 1 == slots;
    const auto name = k == 0 && program.has_parameter ? "parameter"
                      : is_gradient ? "gradient"
                                    : program.states[k - program.has_parameter];
    text << "s" << k << " " << name << (program.is_read[k] ? "" : " unread")
         << (program.is_never_negative[k] ? " >= 0" : "");
    if (program.results[k]) {
      text << " = " << text_of(*program.results[k]);
    }
    text << "\n";
  }
  return text.str();
}

const RuleTraits& rule_of(Program program) {
  const auto text = text_of(program);
  const std::lock_guard lock(mutex);
  auto& known = programs[text];
  if (!known) {
    const int number = static_cast<int>(programs.size()) - 1;
    RuleTraits traits{static_cast<int>(all_rules().size()) + number,
                      "Program" + std::to_string(number),
                      {},
                      program.states,
                      program.scalars > 0,
                      false,
                      false,
                      {}};
    for (int i = 0; i < program.numbers; ++i) {
      traits.hyperparameters.push_back("n" + std::to_string(i));
    }
    for (size_t k = 0; k < program.results.size(); ++k) {
      const bool is_gradient = k + 1 == program.results.size();
      traits.slots.push_back({k == 0 && program.has_parameter ? Role::parameter
                              : is_gradient                   ? Role::gradient
                                                              : Role::state,
                              program.results[k].has_value(),
                              program.is_never_negative[k], false,
                              program.is_read[k]});
    }
    program.code = CodeMaker(program).make();
    traits.program = std::make_shared<const Program>(std::move(program));
    known = std::make_unique<const RuleTraits>(std::move(traits));
    by_name[known->name] = known.get();
  }
  return *known;
}

const RuleTraits* program_named(const std::string& name) {
  const std::lock_guard lock(mutex);
  const auto found = by_name.find(name);
  return found == by_name.end() ? nullptr : found->second;
}

}  // namespace mlx_fused
