// The words of update_rules.h and formats.h in the Metal Shading Language;
// csrc/rules.h has them for C++.

#define RULE(name)      \
  template <typename T> \
  struct name : RuleDefaults

#define COUNT_OF(a, b, c, d, e, f, g, h, i, count, ...) count
#define COUNT(...) COUNT_OF(__VA_ARGS__, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)

#define HYPERPARAMETERS(...) \
  Number<T> __VA_ARGS__;     \
  static constexpr constant int numbers = COUNT(__VA_ARGS__)

#define NON_NEGATIVE(...) static_assert(true, "")

#define STATES(...) static constexpr constant int states = COUNT(__VA_ARGS__)

// Rounded to float16, and to bfloat16.
METAL_FUNC float half_of(float x) { return float(half(x)); }
METAL_FUNC float bfloat_of(float x) { return float(bfloat(x)); }
