// The sum of squares of each of any number of arrays, and their global norm; or
// the same of arrays of ones where theirs are not zero, which counts those.
#pragma once

#include "graph/composed.h"
#include "mlx/primitives.h"

namespace mlx_fused {

// Squares of numbers above 1.8e19 overflow float32. Where their sum does, the
// norm is that of the numbers times this, divided by it.
constexpr float norm_scale = 0x1p-80f;

using mx::array;  // MLX's DEFINE_ macros name it without its namespace

// Inputs: the arrays, then max_norm, a float32 scalar. Outputs, in float32: the
// sums, one per array; the norm, the root of their sum; the clip factor
// min(max_norm / (norm + 1e-6), 1); and two numbers whose squares add up to the
// sum more exactly than the norm's does where it is summed in double precision.
// With these among its arrays a later sum goes on as if there had been no cut.
class SumsOfSquares : public mx::Primitive {
 public:
  SumsOfSquares(bool counts, mx::Stream stream)
      : Primitive(stream), counts_(counts) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  void eval_gpu(const Arrays& inputs, Arrays& outputs) override;

  DEFINE_GRADS()
  DEFINE_VMAP()
  DEFINE_NAME(SumsOfSquares)
  bool is_equivalent(const Primitive& other) const override {
    return counts_ == static_cast<const SumsOfSquares&>(other).counts_;
  }
  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    return {{static_cast<int>(inputs.size()) - 1}, {}, {}, {2}};
  }

  static Arrays make_outputs(const Arrays& arrays, const mx::array& max_norm,
                             bool counts, mx::Stream stream);

 private:
  bool counts_;

  Function composed() { return composed_sums(counts_, stream()); }
};

}  // namespace mlx_fused
