// In the simulated extension the Metal code runs wherever the CPU's would.
#include "graph/fused_update.h"
#include "graph/sums_of_squares.h"
#include "metal/backend.h"
#include "mlx/backend/metal/device.h"

namespace mlx_fused {

bool runs_metal(const mx::Stream&) { return true; }

void FusedUpdate::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  const mx::metal::Evaluation evaluation(stream());
  eval_gpu(inputs, outputs);
}

void SumsOfSquares::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  const mx::metal::Evaluation evaluation(stream());
  eval_gpu(inputs, outputs);
}

}  // namespace mlx_fused
