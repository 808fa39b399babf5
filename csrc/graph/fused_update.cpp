#include "graph/fused_update.h"

#include "graph/transforms.h"
#include "metal/backend.h"

namespace mlx_fused {

namespace {

// Whether a transformation records what is done, or keeps graphs: whether an
// array that says it is a tracer is taken for one.
bool is_tracing() {
  mx::array probe({}, mx::bool_, nullptr, {});
  probe.set_tracer(true);
  return probe.is_tracer();
}

}  // namespace

Arrays HeldInputs::hold(Arrays inputs) {
  static const mx::array stand_in({}, mx::bool_, nullptr, {});
  Arrays graph;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!inputs[i].is_available()) {
      pending_.push_back(i);
      graph.push_back(std::exchange(inputs[i], stand_in));
    }
  }
  inputs_ = std::move(inputs);
  return graph;
}

Arrays& HeldInputs::complete(const Arrays& graph_inputs, bool for_owner,
                             Arrays& copies) {
  auto& all = for_owner ? inputs_ : copies = inputs_;
  for (size_t i = 0; i < pending_.size(); ++i) {
    all[pending_[i]] = graph_inputs[i];
  }
  return all;
}

Arrays HeldInputs::graph_part(const Arrays& inputs) const {
  return select(inputs, pending_);
}

Arrays FusedUpdate::make_outputs(std::shared_ptr<FusedUpdate> update,
                                 Arrays inputs, const Arrays& after) {
  const auto& layout = *update->update_.layout;
  Arrays likes;  // of the outputs
  for (int tensor = 0; tensor < layout.tensors; ++tensor) {
    for (const int part : layout.written) {
      likes.push_back(inputs[layout.input(tensor, part)]);
    }
  }
  // A transformation has to see all inputs; and on a GPU the graph must show
  // what a command buffer reads.
  const bool holds = !runs_metal(update->stream()) && !is_tracing();
  auto graph =
      holds ? update->held_.hold(std::move(inputs)) : std::move(inputs);
  graph.insert(graph.end(), after.begin(), after.end());
  Arrays outputs;
  outputs.reserve(likes.size());
  for (const auto& like : likes) {
    outputs.emplace_back(like.shape(), like.dtype(), update, graph);
  }
  for (size_t i = 0; i < outputs.size(); ++i) {
    Arrays siblings;
    siblings.reserve(outputs.size() - 1);
    for (size_t j = 0; j < outputs.size(); ++j) {
      if (j != i) {
        siblings.push_back(outputs[j]);
      }
    }
    outputs[i].set_siblings(std::move(siblings), i);
  }
  if (holds) {
    update->held_.set_owner(outputs[0]);
  }
  return outputs;
}

MLX_FUSED_COMPOSED_TRANSFORMS(FusedUpdate)

std::vector<mx::Shape> FusedUpdate::output_shapes(const Arrays& graph_inputs) {
  Arrays copies;
  const auto& inputs =
      held_.empty() ? graph_inputs
                    : held_.complete(graph_inputs, /*for_owner=*/false, copies);
  const auto& layout = *update_.layout;
  std::vector<mx::Shape> shapes;
  for (int tensor = 0; tensor < layout.tensors; ++tensor) {
    for (const int part : layout.written) {
      shapes.push_back(inputs[layout.input(tensor, part)].shape());
    }
  }
  return shapes;
}

}  // namespace mlx_fused
