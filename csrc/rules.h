// metal/update_rules.h as C++, and the table that names every rule.
#pragma once

// MSL's words for C++. They are taken back below, so that no other header sees
// them.
#define constant const
#define thread

namespace mlx_fused {

// Compiled once for each instruction set (see cpu/loops.cpp), and the copies
// must not be merged by the linker: hence the unnamed namespace.
namespace {

namespace metal {
inline float abs(float x) { return __builtin_fabsf(x); }
inline float pow(float x, float y) { return __builtin_powf(x, y); }
namespace precise {
inline float sqrt(float x) { return __builtin_sqrtf(x); }
}  // namespace precise
}  // namespace metal

#include "../metal/update_rules.h"

}  // namespace

// One line a rule: its type in update_rules.h and its name in Python.
#define MLX_FUSED_FOR_EACH_RULE(apply)                                        \
  apply(SGD, "sgd") apply(Momentum, "momentum") apply(Adam, "adam")           \
      apply(Lion, "lion") apply(RMSprop, "rmsprop") apply(Adagrad, "adagrad") \
          apply(AdaDelta, "adadelta") apply(Adamax, "adamax")                 \
              apply(Adafactor, "adafactor")                                   \
                  apply(AdafactorWithMoment, "adafactor_with_moment")         \
                      apply(MuonMoment, "muon_moment") apply(Scale, "scale")

enum class Rule {
#define MLX_FUSED_RULE(type, name) type,
  MLX_FUSED_FOR_EACH_RULE(MLX_FUSED_RULE)
#undef MLX_FUSED_RULE
};

struct RuleTraits {
  const char* name;  // in Python
  const char* type;  // in update_rules.h
  int states;        // arrays of state a parameter
  bool reads_gradient;
  int hyperparameters;
};

constexpr RuleTraits rule_table[] = {
#define MLX_FUSED_RULE(type, name) \
  {name, #type, type::states, type::reads_gradient, type::hyperparameters},
    MLX_FUSED_FOR_EACH_RULE(MLX_FUSED_RULE)
#undef MLX_FUSED_RULE
};

constexpr int max_hyperparameters = [] {
  int most = 0;
  for (const auto& rule : rule_table) {
    most = rule.hyperparameters > most ? rule.hyperparameters : most;
  }
  return most;
}();

constexpr const RuleTraits& traits(Rule rule) {
  return rule_table[static_cast<int>(rule)];
}

}  // namespace mlx_fused

#undef constant
#undef thread
