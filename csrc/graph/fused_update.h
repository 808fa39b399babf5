// The graph node of an update: one rule applied to a group of tensors.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "graph/composed.h"
#include "graph/layout.h"
#include "mlx/primitives.h"

namespace mlx_fused {

using mx::array;  // MLX's DEFINE_ macros name it without its namespace

// Inputs of a primitive that stay out of MLX's graph.
//
// MLX walks a graph slowly, and copies the list of inputs for each output. So
// an input that is computed already when the graph is built does not enter it:
// the primitive holds it here. The graph has the pending inputs alone, and
// evaluation puts the two together again.
//
// - The place of a pending input has a stand-in. If it held the array as well,
//   a long graph would be taken apart by recursion, through the primitives.
// - The outputs for which the graph was built own what is held: their
//   evaluation may overwrite it, and clears it. mx.compile may have captured
//   the graph and evaluate it any number of times for outputs of its own; those
//   get copies, and the second owner keeps the memory from being overwritten.
class HeldInputs {
 public:
  bool empty() const { return inputs_.empty(); }

  // Holds the inputs that are computed; returns those that the graph must have.
  Arrays hold(Arrays inputs);
  void set_owner(const mx::array& first_output) { owner_ = first_output.id(); }
  bool is_owner(const mx::array& first_output) const {
    return owner_ == first_output.id() && !first_output.is_tracer();
  }

  // All inputs in their order: for the owner those that are held, which are
  // completed in place, for others copies.
  Arrays& complete(const Arrays& graph_inputs, bool for_owner, Arrays& copies);
  // The part of all inputs that the graph has.
  Arrays graph_part(const Arrays& inputs) const;
  void clear() { inputs_.clear(); }

 private:
  Arrays inputs_;
  std::vector<size_t> pending_;  // places of those that the graph has
  std::uintptr_t owner_ = 0;
};

// Inputs and outputs stand in the order of the layout. A slot has one format in
// all tensors of a group.
// Outputs are in place wherever nothing else holds the input (placement.h).
class FusedUpdate : public mx::Primitive {
 public:
  FusedUpdate(mx::Stream stream, GroupUpdate update)
      : Primitive(stream),
        update_(std::move(update)),
        name_("FusedUpdate " + update_.layout->rule->name) {}

  // The outputs for these inputs, as mx::array::make_arrays. The arrays of
  // `after` are computed before them.
  static Arrays make_outputs(std::shared_ptr<FusedUpdate> update, Arrays inputs,
                             const Arrays& after);

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  void eval_gpu(const Arrays& inputs, Arrays& outputs) override;

  DEFINE_GRADS()
  DEFINE_VMAP()
  const char* name() const override { return name_.c_str(); }
  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override;

 private:
  Function composed() {
    return composed_update(update_, /*keep_dtypes=*/true, stream());
  }

  GroupUpdate update_;
  std::string name_;  // as graphs show it
  HeldInputs held_;
};

}  // namespace mlx_fused
