#include "rule_traits.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

#include "program.h"
#include "rules.h"

namespace mlx_fused {

namespace {

// "a, b, c" in parts.
std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == ',') {
      parts.emplace_back();
    } else if (c != ' ' && c != '\n') {
      parts.back() += c;
    }
  }
  return parts;
}

std::string joined(const std::vector<std::string>& parts) {
  std::string text;
  for (const auto& part : parts) {
    text += (text.empty() ? "" : ", ") + part;
  }
  return text;
}

template <int index>
RuleTraits traits_of() {
  using Rule = typename RegisteredRule<index>::template Type<float>;
  RuleTraits traits{index,
                    RegisteredRule<index>::type,
                    {},
                    {},
                    Rule::reads_learning_rate,
                    Rule::reads_step,
                    Rule::reads_coefficient,
                    {}};
  if constexpr (Rule::numbers > 0) {
    traits.hyperparameters = split(Rule::number_names);
  }
  if constexpr (Rule::reads_parameter) {
    traits.slots.push_back({Role::parameter, Rule::writes_parameter});
  }
  if constexpr (Rule::states > 0) {
    traits.states = split(Rule::state_names);
  }
  [&]<int... state>(std::integer_sequence<int, state...>) {
    (traits.slots.push_back(
         {Role::state, true, is_never_negative<Rule>(state)}),
     ...);
  }(std::make_integer_sequence<int, Rule::states>());
  traits.slots.push_back({Role::gradient, Rule::writes_gradient});
  return traits;
}

RuleTraits traits_of_adafactor(int index, bool is_matrix, bool has_moment) {
  using Rule = Adafactor<float>;
  RuleTraits traits{
      index, "Adafactor", split(Rule::number_names), {}, true, true, false, {}};
  traits.name += is_matrix ? "Matrix" : "Vector";
  traits.states =
      is_matrix ? std::vector<std::string>{"exp_avg_sq_row", "exp_avg_sq_col"}
                : std::vector<std::string>{"exp_avg_sq"};
  traits.means = static_cast<int>(traits.states.size());
  if (has_moment) {
    traits.name += "WithMoment";
    traits.states.push_back("exp_avg");
  }
  traits.slots = {{Role::parameter, true}};
  traits.slots.insert(traits.slots.end(), traits.states.size(),
                      {Role::state, true});
  traits.slots.push_back({Role::gradient, false});
  return traits;
}

}  // namespace

namespace {

// The rules above, and behind them those of which each keeps an average.
std::vector<RuleTraits> with_averages(std::vector<RuleTraits> rules) {
  for (size_t i = 0, count = rules.size(); i < count; ++i) {
    if (rules[i].is_factored() || !rules[i].slots[0].is_written ||
        rules[i].slots[0].role != Role::parameter) {
      continue;
    }
    auto rule = rules[i];
    rule.averaged = std::exchange(rule.name, rule.name + "Averaged");
    rule.hyperparameters.insert(rule.hyperparameters.begin(), "ema");
    rule.states.push_back("weight_average");
    rule.slots.insert(rule.slots.end() - 1, {Role::state, true, false, true});
    rules.push_back(std::move(rule));
  }
  return rules;
}

}  // namespace

mlx::core::Shape RuleTraits::shape(int slot,
                                   const mlx::core::Shape& parameter) const {
  auto shape = parameter;
  if (means == 2 && is_mean(slot)) {
    shape.erase(shape.end() - slot);  // of rows the last, of columns the other
  }
  return shape;
}

const std::vector<RuleTraits>& all_rules() {
  static const auto rules =
      []<int... index>(std::integer_sequence<int, index...>) {
        std::vector<RuleTraits> rules{traits_of<index>()...};
        for (int i = 0; i < 4; ++i) {
          rules.push_back(
              traits_of_adafactor(rule_count + i, i / 2 == 0, i % 2 == 1));
        }
        return with_averages(std::move(rules));
      }(std::make_integer_sequence<int, rule_count>());
  return rules;
}

const RuleTraits* with_average(const RuleTraits& rule) {
  for (const auto& other : all_rules()) {
    if (other.averaged == rule.name) {
      return &other;
    }
  }
  return nullptr;
}

const RuleTraits& rule_named(const std::string& name) {
  if (const auto* program = program_named(name)) {
    return *program;
  }
  std::vector<std::string> known;
  for (const auto& rule : all_rules()) {
    if (rule.name == name) {
      return rule;
    }
    known.push_back(rule.name);
  }
  throw std::invalid_argument("[fused_update] rule is \"" + name +
                              "\"; expected one of " + joined(known) + ".");
}

Hyperparameters in_order(const RuleTraits& rule, const NamedValues& named) {
  Hyperparameters ordered;
  for (const auto& name : rule.hyperparameters) {
    if (const auto found = named.find(name); found != named.end()) {
      ordered.push_back(found->second);
    }
  }
  if (ordered.size() != rule.hyperparameters.size() ||
      named.size() != ordered.size()) {
    std::vector<std::string> given;
    for (const auto& [name, value] : named) {
      given.push_back(name);
    }
    throw std::invalid_argument(
        "[fused_update] hyperparameters of " + rule.name + " are {" +
        joined(given) + "}; expected {" + joined(rule.hyperparameters) + "}.");
  }
  return ordered;
}

std::vector<float> numbers(const Hyperparameters& hyperparameters) {
  std::vector<float> result;
  for (const auto& value : hyperparameters) {
    const double x = std::get<double>(value);
    for (const double part : {x, 1 - x, std::log(x)}) {
      result.push_back(static_cast<float>(part));
    }
  }
  return result;
}

}  // namespace mlx_fused
