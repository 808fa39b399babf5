// Compiled once for each instruction set, under the name MLX_FUSED_LOOPS, with
// that set's compiler flags. It must not use inline functions of the standard
// library: the linker keeps one copy of each, perhaps one that this machine
// cannot run.
#include "cpu/loops.h"

#include "cpu/code_loops.h"
#include "cpu/factored_loops.h"
#include "cpu/packed_loops.h"
#include "cpu/program_loops.h"
#include "cpu/turn_loops.h"
#include "cpu/update_loops.h"

namespace mlx_fused::cpu {

namespace {

template <typename F>
MLX_FUSED_INLINE void add_each(const float* x, size_t n, double* lanes,
                               F term) {
  double sums[sum_lanes];
  memcpy(sums, lanes, sizeof(sums));
  size_t i = 0;
  for (; i + sum_lanes <= n; i += sum_lanes) {
    for (size_t lane = 0; lane < sum_lanes; ++lane) {
      sums[lane] += term(x[i + lane]);
    }
  }
  for (size_t lane = 0; i < n; ++i, ++lane) {
    sums[lane] += term(x[i]);
  }
  memcpy(lanes, sums, sizeof(sums));
}

void add_squares(const float* x, size_t n, float scale, double* lanes) {
  add_each(x, n, lanes, [scale](float value) {
    const double scaled = value * scale;
    return scaled * scaled;
  });
}

void add_nonzero(const float* x, size_t n, double* lanes) {
  add_each(x, n, lanes, [](float value) { return value != 0 ? 1.0 : 0.0; });
}

}  // namespace

extern const Loops MLX_FUSED_LOOPS;
const Loops MLX_FUSED_LOOPS = {MLX_FUSED_INSTRUCTION_SET,
                               update<Float32>,
                               update<Float16>,
                               update<BFloat16Alone>,
                               update_packed,
                               average,
                               run_program,
                               add_squares,
                               add_nonzero,
                               sum_squares,
                               sum_direction,
                               write_factored_row,
                               turn,
                               load_codes,
                               store_codes,
                               load_split,
                               store_split,
                               round_stochastically,
                               Float16::load,
                               Float16::store,
                               BFloat16::load,
                               BFloat16::store};

}  // namespace mlx_fused::cpu
