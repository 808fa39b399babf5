// The graph nodes: one rule applied to a group of tensors, and the global norm.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
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

// Tensors that a primitive and a Metal launch serve at most. Five arrays a
// tensor (the parameter counts twice, see fused_update.metal) and the launch's
// own arguments stay within Metal's 31 buffers, and the cost of MLX's sibling
// lists, quadratic in the outputs, stays small.
constexpr int max_group_size(int states) { return states == 2 ? 4 : 6; }

// Where the arrays of a group stand. Inputs: for each tensor its parameter, its
// states and its gradient; then learning rate (float32), step (uint64) and, if
// scaled, the factor that multiplies every gradient (float32), or a negative
// number: then nothing is changed.
// Outputs: for each tensor its parameter and states.
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

  // The outputs for these inputs, as mx::array::make_arrays. Whatever is to be
  // computed before them stands in `after`.
  static std::vector<mx::array> make_outputs(
      std::shared_ptr<FusedUpdate> update, std::vector<mx::array> inputs,
      const std::vector<mx::array>& after);

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
  // Completes a copy of held_, or held_ itself, with what the graph has.
  void add_pending(std::vector<mx::array>& inputs,
                   const std::vector<mx::array>& graph_inputs) const {
    for (size_t i = 0; i < pending_.size(); ++i) {
      inputs[pending_[i]] = graph_inputs[i];
    }
  }

  // MLX walks a graph slowly, and each output has a list of inputs of its own.
  // So unless a transformation is to see them, inputs that were there when the
  // graph was built stand here alone, and the graph has the others, which stand
  // at pending_ among all. Those are not held as well: MLX takes long graphs
  // apart without recursion, but not what a primitive holds.
  std::vector<mx::array> held_;
  std::vector<size_t> pending_;
  // The first of the outputs that held_ is for. mx.compile may have captured
  // the graph, and evaluates it any number of times for outputs of its own.
  std::uintptr_t owner_ = 0;
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

// The memory in which a group's outputs are computed: the matching input's own
// when nothing else holds it, otherwise new memory, row-contiguous, which the
// caller fills from the input.
//
// Each output of a primitive holds the list of its inputs, so that none of them
// would ever be donatable; the other outputs are made to let go of theirs.
// Until commit() all that is undone when an exception comes: what MLX's streams
// and allocators throw leaves the graph such that it can be evaluated again.
class Placement {
 public:
  // Earlier work that is still under way holds what it reads: wait(), if given,
  // returns when that is done, and is called when enough depends on it. The
  // graph has all of the inputs, or the pending ones.
  Placement(const std::vector<mx::array>& inputs,
            std::vector<mx::array>& outputs, const GroupLayout& layout,
            const std::vector<size_t>* pending = nullptr,
            const std::function<void()>& wait = nullptr);
  ~Placement();
  Placement(const Placement&) = delete;
  Placement& operator=(const Placement&) = delete;

  // The output that takes the place of input(tensor, k).
  mx::array& target(int tensor, int k) {
    return outputs_[layout_.output(tensor, k)];
  }
  // Whether that is the input's memory.
  bool in_place(int tensor, int k) const {
    return in_place_ >> layout_.output(tensor, k) & 1;
  }
  // The work on the outputs is under way: they keep their memory.
  void commit();

 private:
  void undo();

  const std::vector<mx::array>& inputs_;
  std::vector<mx::array>& outputs_;
  GroupLayout layout_;
  const std::vector<size_t>* pending_;
  uint32_t released_ = 0;  // a bit for each output, as in_place_
  uint32_t in_place_ = 0;
  bool committed_ = false;
};

// Whether an earlier evaluation put the work under way before MLX threw. It
// must not be done twice.
inline bool is_placed(const std::vector<mx::array>& outputs) {
  return outputs[0].data_shared_ptr() != nullptr;
}

// Memory for an array; throws std::runtime_error if there is none.
void allocate(mx::array& a);

// Bytes that could not be updated in place, since the process began.
size_t bytes_copied();

// An array's strides with the dimensions that can be walked as one merged and
// those of size 1 left out: at least one dimension, outermost first. Throws
// std::invalid_argument for more than max_walk_dimensions.
constexpr size_t max_walk_dimensions = 64;
struct Walk {
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;
};
Walk collapse(const mx::array& a);

}  // namespace mlx_fused
