// The graph nodes: one rule applied to a group of tensors, and the global norm.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "mlx/array.h"
#include "mlx/primitives.h"
#include "rules.h"

namespace mlx_fused {

namespace mx = mlx::core;
using mx::array;  // MLX's DEFINE_ macros name it without its namespace

// Tensors a primitive and a Metal launch serve at most. Four arrays a tensor
// (Adam) and the launch's own arguments stay below Metal's 31 buffers, and the
// cost of MLX's sibling lists, quadratic in the outputs, stays small.
constexpr int max_group_size = 6;

// Where the arrays of a group stand. Inputs: for each tensor its parameter, its
// states and its gradient; then learning rate (float32), step (uint64) and, if
// scaled, the factor that multiplies every gradient (float32). Outputs: for
// each tensor its parameter and states.
struct GroupLayout {
  int tensors;
  int states;
  bool reads_gradient;
  bool scaled;

  int outputs_each() const { return 1 + states; }
  int inputs_each() const { return outputs_each() + reads_gradient; }
  int input(int tensor, int k) const { return tensor * inputs_each() + k; }
  int output(int tensor, int k) const { return tensor * outputs_each() + k; }
  int gradient(int tensor) const { return input(tensor, outputs_each()); }
  int learning_rate() const { return tensors * inputs_each(); }
  int step() const { return learning_rate() + 1; }
  int gradient_scale() const { return learning_rate() + 2; }
};

// Updates a group of parameters and their states by a rule, in place wherever
// nobody else holds the array. All parameters of a group have one dtype, all
// gradients one, all states one.
class FusedUpdate : public mx::Primitive {
 public:
  FusedUpdate(mx::Stream stream, Rule rule, std::vector<double> hyperparameters,
              GroupLayout layout)
      : Primitive(stream),
        rule_(rule),
        hyperparameters_(std::move(hyperparameters)),
        layout_(layout) {}

  void eval_cpu(const std::vector<mx::array>& inputs,
                std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs,
                std::vector<mx::array>& outputs) override;

  DEFINE_GRADS()
  DEFINE_VMAP()
  DEFINE_NAME(FusedUpdate)
  bool is_equivalent(const mx::Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(
      const std::vector<mx::array>& inputs) override;

 private:
  std::vector<float> float_hyperparameters() const {
    return {hyperparameters_.begin(), hyperparameters_.end()};
  }

  Rule rule_;
  std::vector<double> hyperparameters_;
  GroupLayout layout_;
};

// Global L2 norm of any number of arrays, in float32.
// Inputs: the arrays, then max_norm (float32 scalar).
// Outputs: the norm, and min(max_norm / (norm + 1e-6), 1), both float32.
class GlobalNorm : public mx::Primitive {
 public:
  explicit GlobalNorm(mx::Stream stream) : Primitive(stream) {}

  void eval_cpu(const std::vector<mx::array>& inputs,
                std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs,
                std::vector<mx::array>& outputs) override;

  DEFINE_GRADS()
  DEFINE_VMAP()
  DEFINE_NAME(GlobalNorm)
  DEFINE_DEFAULT_IS_EQUIVALENT()
  std::vector<mx::Shape> output_shapes(
      const std::vector<mx::array>& inputs) override {
    return {{}, {}};
  }
};

// Gives each output of a group the memory that it is updated in. That is the
// matching input's own memory when nothing else holds it; otherwise new memory,
// and copy(input, output) is called to fill it (output is row-contiguous).
// Earlier work that is still under way holds what it reads: wait(), if given,
// returns when that is done, and is called when enough depends on it.
// Nothing may throw once copies or updates are on their way, so every
// allocation is made before the first call of copy.
void place_outputs(
    const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs,
    const GroupLayout& layout,
    const std::function<void(const mx::array&, mx::array&)>& copy,
    const std::function<void()>& wait = nullptr);

// Bytes that place_outputs could not update in place, since the process began.
size_t bytes_copied();

// An array's strides with the dimensions that can be walked as one merged and
// those of size 1 left out: at least one dimension, outermost first.
struct Walk {
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;
};
Walk collapse(const mx::array& a);

}  // namespace mlx_fused
