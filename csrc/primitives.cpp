#include "primitives.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <sstream>
#include <stdexcept>

#include "composed.h"
#include "metal/backend.h"
#include "mlx/allocator.h"
#include "mlx/transforms.h"
#include "mlx/utils.h"
#include "mlx_compat.h"

namespace mlx_fused {

namespace {

using Function =
    std::function<std::vector<mx::array>(const std::vector<mx::array>&)>;

// MLX's own limit (mlx/backend/common/utils.h): a small view must not keep a
// large buffer alive for as long as the model lives.
constexpr size_t donation_slack = 16384;

// Bytes from which waiting is cheaper than a copy.
constexpr size_t worth_waiting = 1 << 16;

std::atomic<size_t> copied = 0;

// Bytes of the inputs whose memory is shared, perhaps only with work under way.
size_t shared_bytes(const std::vector<mx::array>& inputs,
                    const GroupLayout& layout) {
  size_t bytes = 0;
  for (int tensor = 0; tensor < layout.tensors; ++tensor) {
    for (int k = 0; k < layout.outputs_each(); ++k) {
      const auto& in = inputs[layout.input(tensor, k)];
      bytes += in.data_shared_ptr().use_count() > 1 ? in.nbytes() : 0;
    }
  }
  return bytes;
}

bool can_donate(const mx::array& in, const mx::array& out) {
  return in.flags().row_contiguous && in.is_donatable() &&
         in.buffer_size() <= out.nbytes() + donation_slack;
}

// The function of the selected inputs alone, the others held fixed.
Function restrict_to(const Function& function,
                     const std::vector<mx::array>& inputs,
                     const std::vector<int>& selected) {
  return [&function, &inputs, &selected](const std::vector<mx::array>& values) {
    auto all = inputs;
    for (size_t i = 0; i < selected.size(); ++i) {
      all[selected[i]] = values[i];
    }
    return function(all);
  };
}

template <typename Index>
std::vector<mx::array> select(const std::vector<mx::array>& arrays,
                              const std::vector<Index>& indices) {
  std::vector<mx::array> selected;
  for (const auto i : indices) {
    selected.push_back(arrays[i]);
  }
  return selected;
}

// Whether a transformation records what is done, or keeps graphs: whether an
// array that says it is a tracer is taken for one.
bool is_tracing() {
  mx::array probe({}, mx::bool_, nullptr, {});
  probe.set_tracer(true);
  return probe.is_tracer();
}

std::vector<mx::array> vjp_of(const Function& function,
                              const std::vector<mx::array>& primals,
                              const std::vector<mx::array>& cotangents,
                              const std::vector<int>& argnums) {
  return mx::vjp(restrict_to(function, primals, argnums),
                 select(primals, argnums), cotangents)
      .second;
}

std::vector<mx::array> jvp_of(const Function& function,
                              const std::vector<mx::array>& primals,
                              const std::vector<mx::array>& tangents,
                              const std::vector<int>& argnums) {
  return mx::jvp(restrict_to(function, primals, argnums),
                 select(primals, argnums), tangents)
      .second;
}

std::pair<std::vector<mx::array>, std::vector<int>> vmap_of(
    const Function& function, const std::vector<mx::array>& inputs,
    const std::vector<int>& axes) {
  auto outputs = mx::vmap(function, axes)(inputs);
  std::vector<int> output_axes(outputs.size(), 0);
  return {std::move(outputs), std::move(output_axes)};
}

}  // namespace

Placement::Placement(const std::vector<mx::array>& inputs,
                     std::vector<mx::array>& outputs, const GroupLayout& layout,
                     const std::vector<size_t>* pending,
                     const std::function<void()>& wait)
    : inputs_(inputs), outputs_(outputs), layout_(layout), pending_(pending) {
  if (wait && shared_bytes(inputs, layout) >= worth_waiting) {
    wait();
  }
  // A tracer's graph is walked again, and keeps its inputs.
  const bool is_traced =
      std::any_of(outputs.begin(), outputs.end(),
                  [](const mx::array& a) { return a.is_tracer(); });
  for (size_t i = 0; i < outputs.size() && !is_traced; ++i) {
    if (&outputs[i].inputs() != &inputs) {
      outputs[i].inputs().clear();
      released_ |= 1u << i;
    }
  }
  try {
    for (int tensor = 0; tensor < layout.tensors; ++tensor) {
      for (int k = 0; k < layout.outputs_each(); ++k) {
        const auto& in = inputs[layout.input(tensor, k)];
        auto& out = target(tensor, k);
        if (can_donate(in, out)) {
          out.copy_shared_buffer(in);
          in_place_ |= 1u << layout.output(tensor, k);
        } else {
          allocate(out);
        }
      }
    }
  } catch (...) {
    undo();
    throw;
  }
}

Placement::~Placement() {
  if (!committed_) {
    undo();
  }
}

void Placement::undo() {
  for (size_t i = 0; i < outputs_.size(); ++i) {
    auto& out = outputs_[i];
    out.copy_shared_buffer(mx::array(out.shape(), out.dtype(), nullptr, {}));
    if (released_ >> i & 1) {
      out.inputs() = pending_ ? select(inputs_, *pending_) : inputs_;
    }
  }
}

void Placement::commit() {
  committed_ = true;
  for (size_t i = 0; i < outputs_.size(); ++i) {
    copied += in_place_ >> i & 1 ? 0 : outputs_[i].nbytes();
  }
}

void allocate(mx::array& a) {
  auto data = mx::allocator::malloc(a.nbytes());
  auto buffer = buffer_of(data);
  // On the CPU MLX returns no memory rather than to throw.
  if (a.nbytes() > 0 && buffer.ptr() == nullptr) {
    std::ostringstream message;
    message << "[mlx_fused_optimizers] no memory for an array of shape "
            << a.shape() << ".";
    throw std::runtime_error(message.str());
  }
#if defined(__linux__)
  // Memory that comes in large pages is ready in a fraction of the time.
  constexpr uintptr_t page = 1 << 21;
  const auto start = reinterpret_cast<uintptr_t>(buffer.raw_ptr());
  const auto first = (start + page - 1) / page * page;
  const auto last = (start + a.nbytes()) / page * page;
  if (first < last) {
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  a.set_data(std::move(data));
}

size_t bytes_copied() { return copied; }

Walk collapse(const mx::array& a) {
  Walk walk;
  for (size_t i = 0; i < a.ndim(); ++i) {
    const int64_t size = a.shape()[i];
    const int64_t stride = a.strides()[i];
    if (size == 1) {
      continue;
    }
    if (!walk.shape.empty() && walk.strides.back() == size * stride) {
      walk.shape.back() *= size;
      walk.strides.back() = stride;
    } else {
      walk.shape.push_back(size);
      walk.strides.push_back(stride);
    }
  }
  if (walk.shape.empty()) {
    walk = {{1}, {1}};
  }
  if (walk.shape.size() > max_walk_dimensions) {
    throw std::invalid_argument(
        "[mlx_fused_optimizers] an array has " +
        std::to_string(walk.shape.size()) +
        " dimensions that cannot be walked as one; at most " +
        std::to_string(max_walk_dimensions) + " are supported.");
  }
  return walk;
}

std::vector<mx::array> FusedUpdate::make_outputs(
    std::shared_ptr<FusedUpdate> update, std::vector<mx::array> inputs,
    const std::vector<mx::array>& after) {
  // On a GPU the graph must show what a command buffer reads.
  const bool holds = !runs_metal(update->stream()) && !is_tracing();
  for (size_t i = 0; i < inputs.size() && holds; ++i) {
    if (!inputs[i].is_available()) {
      update->pending_.push_back(i);
    }
  }
  auto graph = holds ? select(inputs, update->pending_) : inputs;
  graph.insert(graph.end(), after.begin(), after.end());
  const auto& layout = update->layout_;
  std::vector<mx::array> outputs;
  outputs.reserve(layout.tensors * layout.outputs_each());
  for (int tensor = 0; tensor < layout.tensors; ++tensor) {
    for (int k = 0; k < layout.outputs_each(); ++k) {
      const auto& like = inputs[layout.input(tensor, k)];
      outputs.emplace_back(like.shape(), like.dtype(), update, graph);
    }
  }
  for (size_t i = 0; i < outputs.size(); ++i) {
    std::vector<mx::array> siblings;
    siblings.reserve(outputs.size() - 1);
    for (size_t j = 0; j < outputs.size(); ++j) {
      if (j != i) {
        siblings.push_back(outputs[j]);
      }
    }
    outputs[i].set_siblings(std::move(siblings), i);
  }
  if (holds) {
    static const mx::array nothing({}, mx::bool_, nullptr, {});
    for (const size_t i : update->pending_) {
      inputs[i] = nothing;
    }
    update->held_ = std::move(inputs);
    update->owner_ = outputs[0].id();
  }
  return outputs;
}

std::vector<mx::array> FusedUpdate::vjp(
    const std::vector<mx::array>& primals,
    const std::vector<mx::array>& cotangents, const std::vector<int>& argnums,
    const std::vector<mx::array>&) {
  return vjp_of(composed_update(rule_, hyperparameters_, layout_, stream()),
                primals, cotangents, argnums);
}

std::vector<mx::array> FusedUpdate::jvp(const std::vector<mx::array>& primals,
                                        const std::vector<mx::array>& tangents,
                                        const std::vector<int>& argnums) {
  return jvp_of(composed_update(rule_, hyperparameters_, layout_, stream()),
                primals, tangents, argnums);
}

std::pair<std::vector<mx::array>, std::vector<int>> FusedUpdate::vmap(
    const std::vector<mx::array>& inputs, const std::vector<int>& axes) {
  return vmap_of(composed_update(rule_, hyperparameters_, layout_, stream()),
                 inputs, axes);
}

// The rule decides states and reads_gradient, too.
bool FusedUpdate::is_equivalent(const mx::Primitive& other) const {
  const auto& update = static_cast<const FusedUpdate&>(other);
  return rule_ == update.rule_ && layout_.tensors == update.layout_.tensors &&
         layout_.scaled == update.layout_.scaled && held_.empty() &&
         update.held_.empty() && hyperparameters_ == update.hyperparameters_;
}

std::vector<mx::Shape> FusedUpdate::output_shapes(
    const std::vector<mx::array>& graph_inputs) {
  auto inputs = held_.empty() ? graph_inputs : held_;
  if (!held_.empty()) {
    add_pending(inputs, graph_inputs);
  }
  std::vector<mx::Shape> shapes;
  for (int tensor = 0; tensor < layout_.tensors; ++tensor) {
    for (int k = 0; k < layout_.outputs_each(); ++k) {
      shapes.push_back(inputs[layout_.input(tensor, k)].shape());
    }
  }
  return shapes;
}

std::vector<mx::array> GlobalNorm::vjp(const std::vector<mx::array>& primals,
                                       const std::vector<mx::array>& cotangents,
                                       const std::vector<int>& argnums,
                                       const std::vector<mx::array>&) {
  return vjp_of(composed_norm(stream()), primals, cotangents, argnums);
}

std::vector<mx::array> GlobalNorm::jvp(const std::vector<mx::array>& primals,
                                       const std::vector<mx::array>& tangents,
                                       const std::vector<int>& argnums) {
  return jvp_of(composed_norm(stream()), primals, tangents, argnums);
}

std::pair<std::vector<mx::array>, std::vector<int>> GlobalNorm::vmap(
    const std::vector<mx::array>& inputs, const std::vector<int>& axes) {
  return vmap_of(composed_norm(stream()), inputs, axes);
}

}  // namespace mlx_fused
