// metal/update_rules.h and metal/formats.h as C++, and a register of the rules.
#pragma once

#include <algorithm>
#include <string_view>
#include <tuple>
#include <utility>

#include "half.h"

// MSL's words for C++. They are taken back below, so that no other header sees
// them.
#define constant const
#define thread
#define METAL_FUNC inline

// A rule enters itself in the register. The names are parsed from the macros'
// arguments (rule_traits.cpp).
#define RULE(name)                                        \
  template <typename T>                                   \
  struct name;                                            \
  template <>                                             \
  struct RegisteredRule<__COUNTER__ - before_rules - 1> { \
    template <typename T>                                 \
    using Type = name<T>;                                 \
    static constexpr const char* type = #name;            \
  };                                                      \
  template <typename T>                                   \
  struct name : RuleDefaults

#define COUNT_OF(a, b, c, d, e, f, g, h, i, count, ...) count
#define COUNT(...) COUNT_OF(__VA_ARGS__, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)

#define HYPERPARAMETERS(...)                                \
  Number<T> __VA_ARGS__;                                    \
  static constexpr int numbers = COUNT(__VA_ARGS__);        \
  static constexpr const char* number_names = #__VA_ARGS__; \
  auto all_numbers() { return std::tie(__VA_ARGS__); }      \
  static_assert(true)

#define STATES(...)                                 \
  static constexpr int states = COUNT(__VA_ARGS__); \
  static constexpr const char* state_names = #__VA_ARGS__

#define NON_NEGATIVE(...) \
  static constexpr const char* non_negative_names = #__VA_ARGS__

namespace mlx_fused {

// Compiled once for each instruction set (see cpu/loops.cpp), and the copies
// must not be merged by the linker: hence the unnamed namespace.
namespace {

namespace metal {
inline float abs(float x) { return __builtin_fabsf(x); }
inline float floor(float x) { return __builtin_floorf(x); }
// Below 2^22, by the rounding of an addition: it vectorises everywhere.
inline float rint(float x) { return x + 12582912.0f - 12582912.0f; }
namespace precise {
inline float exp(float x) { return __builtin_expf(x); }
inline float pow(float x, float y) { return __builtin_powf(x, y); }
inline float sqrt(float x) { return __builtin_sqrtf(x); }
}  // namespace precise
}  // namespace metal

template <int index>
struct RegisteredRule;

// The i-th of the names in a macro's arguments.
consteval std::string_view name_in(std::string_view names, int i) {
  for (; i > 0; --i) {
    names.remove_prefix(names.find(", ") + 2);
  }
  return names.substr(0, names.find(", "));
}

// Whether a rule's state of that number never is negative.
template <typename Rule>
consteval bool is_never_negative(int state) {
  if constexpr (requires { Rule::non_negative_names; }) {
    constexpr std::string_view names = Rule::non_negative_names;
    const auto name = name_in(Rule::state_names, state);
    for (int i = 0; i <= std::count(names.begin(), names.end(), ','); ++i) {
      if (name_in(names, i) == name) {
        return true;
      }
    }
  }
  return false;
}

constexpr int before_rules = __COUNTER__;

#include "../metal/update_rules.h"

// What depends on no element; few rules take the third number.
template <typename Rule, typename T>
inline void prepare(Rule& rule, T rate, T step, T coefficient) {
  if constexpr (Rule::reads_coefficient) {
    rule.prepare(rate, step, coefficient);
  } else {
    rule.prepare(rate, step);
  }
}

inline float half_of(float x) { return from_float16(to_float16(x)); }

#include "../metal/formats.h"

constexpr int rule_count = __COUNTER__ - before_rules - 1;

// Slots of the rule that has the most: parameter, states, an average of the
// parameter, and gradient. Programs (program.h) have no more than this either.
constexpr int max_slots =
    []<int... index>(std::integer_sequence<int, index...>) {
      int most = 9;
      ((most = most < RegisteredRule<index>::template Type<float>::states
                   ? RegisteredRule<index>::template Type<float>::states
                   : most),
       ...);
      return most + 3;
    }(std::make_integer_sequence<int, rule_count>());

}  // namespace

}  // namespace mlx_fused

#undef constant
#undef thread
#undef METAL_FUNC
#undef RULE
#undef COUNT_OF
#undef COUNT
#undef HYPERPARAMETERS
#undef STATES
#undef NON_NEGATIVE
