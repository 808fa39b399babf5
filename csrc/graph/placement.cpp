#include "graph/placement.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "mlx/utils.h"
#include "mlx_compat.h"
#include "strides.h"

namespace mlx_fused {

namespace {

// MLX's own limit (mlx/backend/common/utils.h): a small view must not keep a
// large buffer alive for as long as the model lives.
constexpr size_t donation_slack = 16384;

std::atomic<size_t> copied = 0;

// An update that does the same to all elements, in whatever order, keeps the
// order that they have in memory.
bool keeps_order(const mx::array& in, const GroupLayout& layout) {
  return layout.slots() == 1 && is_dense(in);
}

bool can_donate(const mx::array& in, const mx::array& out,
                const GroupLayout& layout) {
  return (in.flags().row_contiguous || keeps_order(in, layout)) &&
         in.is_donatable() && in.buffer_size() <= out.nbytes() + donation_slack;
}

}  // namespace

Placement::Placement(const Arrays& inputs, Arrays& outputs,
                     const GroupLayout& layout, std::function<Arrays()> restore,
                     const std::function<void()>& wait)
    : outputs_(outputs), restore_(std::move(restore)) {
  std::vector<const mx::array*> sources;  // of the outputs; null if unread
  size_t shared = 0;  // bytes with another owner, perhaps only work under way
  for (int tensor = 0; tensor < layout.tensors; ++tensor) {
    for (const int part : layout.written) {
      const auto& in = inputs[layout.input(tensor, part)];
      if (!layout.parts[part].is_read) {
        sources.push_back(nullptr);
        continue;
      }
      sources.push_back(&in);
      shared += in.data_shared_ptr().use_count() > 1 ? in.nbytes() : 0;
    }
  }
  if (wait && shared >= worth_waiting) {
    wait();
  }
  // A tracer's graph is walked again, and keeps its inputs.
  const bool is_traced =
      std::any_of(outputs.begin(), outputs.end(),
                  [](const mx::array& a) { return a.is_tracer(); });
  for (size_t i = 0; i < outputs.size() && !is_traced; ++i) {
    if (&outputs[i].inputs() != &inputs) {
      outputs[i].inputs().clear();
      released_ |= uint64_t{1} << i;
    }
  }
  try {
    for (size_t i = 0; i < outputs.size(); ++i) {
      auto& out = outputs[i];
      if (!sources[i]) {
        allocate(out);
        is_new_ |= uint64_t{1} << i;
        continue;
      }
      const auto& in = *sources[i];
      if (can_donate(in, out, layout)) {
        out.copy_shared_buffer(in);
        in_place_ |= uint64_t{1} << i;
        continue;
      }
      allocate(out);
      if (keeps_order(in, layout)) {
        out.copy_shared_buffer(out, in.strides(), in.flags(), in.data_size());
      }
    }
  } catch (...) {
    undo();
    throw;
  }
}

Placement::~Placement() {
  if (!is_committed_) {
    undo();
  }
}

void Placement::undo() {
  for (size_t i = 0; i < outputs_.size(); ++i) {
    auto& out = outputs_[i];
    out.copy_shared_buffer(mx::array(out.shape(), out.dtype(), nullptr, {}));
    if (released_ >> i & 1) {
      out.inputs() = restore_();
    }
  }
}

void Placement::commit() {
  is_committed_ = true;
  for (size_t i = 0; i < outputs_.size(); ++i) {
    copied += in_place(i) || is_new(i) ? 0 : outputs_[i].nbytes();
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

}  // namespace mlx_fused
