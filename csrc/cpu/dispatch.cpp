// Chooses the loops for the machine that the process runs on.
#include <cstdlib>
#include <cstring>

#include "cpu/loops.h"

namespace mlx_fused::cpu {

extern const Loops loops_default;
#if defined(__x86_64__)
extern const Loops loops_v3;
extern const Loops loops_v4;
#endif

namespace {

const Loops& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_v3 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") &&
      __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool has_v4 = has_v3 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") &&
                      __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  // A smaller set than the machine's own, for the tests.
  const char* wanted = std::getenv("MLX_FUSED_INSTRUCTION_SET");
  const auto allows = [&](const char* set) {
    return !wanted || !*wanted || std::strcmp(wanted, set) == 0;
  };
  if (has_v4 && allows("v4")) {
    return loops_v4;
  }
  if (has_v3 && allows("v3")) {
    return loops_v3;
  }
#endif
  return loops_default;
}

}  // namespace

const Loops& loops() {
  static const Loops& chosen = choose();
  return chosen;
}

}  // namespace mlx_fused::cpu
