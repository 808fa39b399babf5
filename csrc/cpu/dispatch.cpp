// Chooses the loops for the machine that the process runs on.
#include "loops.h"

namespace mlx_fused::cpu {

extern const Loops loops_default;
#if defined(__x86_64__)
extern const Loops loops_v3;
extern const Loops loops_v4;
#endif

const Loops& loops() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  static const bool v3 = __builtin_cpu_supports("avx2") &&
                         __builtin_cpu_supports("f16c") &&
                         __builtin_cpu_supports("fma");
  static const bool v4 = v3 && __builtin_cpu_supports("avx512f") &&
                         __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512dq") &&
                         __builtin_cpu_supports("avx512vl");
  return v4 ? loops_v4 : v3 ? loops_v3 : loops_default;
#else
  return loops_default;
#endif
}

}  // namespace mlx_fused::cpu
