// What the host knows of a rule, all of it derived from its declaration in
// metal/update_rules.h.
#pragma once

#include <memory>
#include <string>
#include <unordered_map>
#include <variant>
#include <vector>

#include "mlx/array.h"

namespace mlx_fused {

struct Program;

// A slot is one logical array per tensor: its parameter, one of its states or
// its gradient. Slots stand in this order everywhere.
enum class Role { parameter, state, gradient };

struct Slot {
  Role role;
  bool is_written;
  bool is_never_negative = false;
  // A state that is an average of the parameter; it has a dtype of its own.
  bool is_average = false;
  bool is_read = true;  // otherwise its input has a shape and a dtype alone
};

struct RuleTraits {
  int index;  // in the register of rules.h, behind which Adafactor's stand
  std::string name;
  std::vector<std::string> hyperparameters;
  std::vector<std::string> states;
  bool reads_learning_rate;
  bool reads_step;
  bool reads_coefficient;
  std::vector<Slot> slots;
  // Of Adafactor, the states that are running means of squares, which come
  // first: of a matrix' rows and columns, or one of a vector. Rules of one
  // element have none.
  int means = 0;
  // Of a rule that is another with an average of the weights behind its states,
  // the other's name. Its first hyper-parameter is the average's.
  std::string averaged = {};
  // Of a rule that was read from somebody's apply_single (program.h). Its
  // learning rate is all of its scalars.
  std::shared_ptr<const Program> program = nullptr;

  bool averages() const { return !averaged.empty(); }
  // The name of the struct in metal/update_rules.h.
  const std::string& type() const { return averages() ? averaged : name; }
  bool is_factored() const { return means > 0; }
  bool is_mean(int slot) const { return slot > 0 && slot <= means; }
  // Of a slot, by that of the parameter, which for Adafactor must be of as many
  // dimensions as the rule takes.
  mlx::core::Shape shape(int slot, const mlx::core::Shape& parameter) const;
};

const std::vector<RuleTraits>& all_rules();

// The rule of that name, or the program; throws std::invalid_argument with the
// known ones.
const RuleTraits& rule_named(const std::string& name);

// The rule that also keeps an average of the weights, if it can.
const RuleTraits* with_average(const RuleTraits& rule);

// The values of a rule's hyper-parameters, in the order of its declaration.
// No kernel takes an array; plain operations do.
using Value = std::variant<double, mlx::core::array>;
using Hyperparameters = std::vector<Value>;
using NamedValues = std::unordered_map<std::string, Value>;

// Throws std::invalid_argument with the right names where one is missing or
// unknown.
Hyperparameters in_order(const RuleTraits& rule, const NamedValues& named);

// As the kernels take them: each value, 1 - value and log(value), derived in
// double and rounded once.
std::vector<float> numbers(const Hyperparameters& hyperparameters);

}  // namespace mlx_fused
