// eval_cpu: the rules over whole arrays, in blocks, on several threads.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <list>
#include <memory>
#include <numeric>
#include <vector>

#include "cpu/loops.h"
#include "cpu/parallel.h"
#include "graph/fused_update.h"
#include "graph/placement.h"
#include "graph/sums_of_squares.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/device.h"
#include "strides.h"

namespace mlx_fused {

namespace {

// Elements that a thread takes at a time, at least. Boundaries do not depend on
// the number of threads, and neither does any result.
constexpr size_t piece_size = 64 * cpu::block_size;
// A large tensor's pieces are larger, up to this.
constexpr size_t large_piece_size = 8 * piece_size;

// Where an array's elements are. Taken while the graph is evaluated: the arrays
// themselves may be gone when the work runs.
struct View {
  char* data = nullptr;
  const Walk* walk = nullptr;  // unless row-contiguous
  mx::Dtype::Val dtype = mx::Dtype::Val::float32;
  uint8_t itemsize = 0;

  bool row_contiguous() const { return walk == nullptr; }
  char* at(size_t i) const { return data + i * itemsize; }
};

// What a task holds on to until it is done.
struct Kept {
  std::vector<std::shared_ptr<mx::array::Data>> data;
  std::list<Walk> walks;

  View view(const mx::array& a) {
    const Walk* walk =
        a.flags().row_contiguous ? nullptr : &walks.emplace_back(collapse(a));
    return {const_cast<char*>(a.data<char>()), walk, a.dtype().val(),
            static_cast<uint8_t>(a.itemsize())};
  }
  // Of an array that nobody else need hold.
  View held(const mx::array& a) {
    data.push_back(a.data_shared_ptr());
    return view(a);
  }
};

// Copies n elements, from the one with row-major index start on.
template <typename T>
void gather(const View& view, size_t start, size_t n, char* out) {
  const auto& [shape, strides] = *view.walk;
  const int last = static_cast<int>(shape.size()) - 1;
  // Nothing here may throw: other threads are at work on the same tensors.
  int64_t position[max_walk_dimensions];
  const T* in = reinterpret_cast<const T*>(view.data);
  int64_t rest = static_cast<int64_t>(start);
  for (int d = last; d >= 0; --d) {
    position[d] = rest % shape[d];
    rest /= shape[d];
    in += position[d] * strides[d];
  }
  T* result = reinterpret_cast<T*>(out);
  while (n > 0) {
    const size_t run =
        std::min<size_t>(n, static_cast<size_t>(shape[last] - position[last]));
    for (size_t i = 0; i < run; ++i) {
      result[i] = in[static_cast<int64_t>(i) * strides[last]];
    }
    result += run;
    n -= run;
    in += static_cast<int64_t>(run) * strides[last];
    position[last] += static_cast<int64_t>(run);
    for (int d = last; d > 0 && position[d] == shape[d]; --d) {
      in += strides[d - 1] - shape[d] * strides[d];
      position[d] = 0;
      ++position[d - 1];
    }
  }
}

void gather(const View& view, size_t start, size_t n, char* out) {
  if (view.row_contiguous()) {
    std::memcpy(out, view.at(start), n * view.itemsize);
  } else if (view.itemsize == 4) {
    gather<uint32_t>(view, start, n, out);
  } else {
    gather<uint16_t>(view, start, n, out);
  }
}

// Arrays whose elements the loops read and write where they are.
bool is_direct(const View& view,
               mx::Dtype::Val dtype = mx::Dtype::Val::float32) {
  return view.dtype == dtype && view.row_contiguous();
}

float* direct(const View& view, size_t start) {
  return reinterpret_cast<float*>(view.at(start));
}

// The elements of a block as float32: where they are, or in buffer.
const float* load(const View& view, size_t start, size_t n, float* buffer) {
  if (is_direct(view)) {
    return direct(view, start);
  }
  if (view.dtype == mx::Dtype::Val::float32) {
    gather(view, start, n, reinterpret_cast<char*>(buffer));
    return buffer;
  }
  alignas(64) uint16_t gathered[cpu::block_size];
  const auto* half = gathered;
  if (view.row_contiguous()) {
    half = reinterpret_cast<const uint16_t*>(view.at(start));
  } else {
    gather(view, start, n, reinterpret_cast<char*>(gathered));
  }
  if (view.dtype == mx::Dtype::Val::float16) {
    cpu::loops().load_float16(half, buffer, n);
  } else {
    cpu::loops().load_bfloat16(half, buffer, n);
  }
  return buffer;
}

// Rounds a block to the array's dtype, unless it was written in place.
void store(const View& view, size_t start, size_t n, const float* values) {
  auto* half = reinterpret_cast<uint16_t*>(view.at(start));
  if (view.dtype == mx::Dtype::Val::float16) {
    cpu::loops().store_float16(values, half, n);
  } else if (view.dtype == mx::Dtype::Val::bfloat16) {
    cpu::loops().store_bfloat16(values, half, n);
  }
}

double sum_of_squares(const View& view, size_t start, size_t n) {
  alignas(64) float buffer[cpu::block_size];
  float lanes[cpu::sum_lanes] = {};
  const size_t block = is_direct(view) ? n : cpu::block_size;
  for (size_t end = start + n; start < end; start += block) {
    const size_t size = std::min(block, end - start);
    cpu::loops().add_squares(load(view, start, size, buffer), size, lanes);
  }
  return std::accumulate(std::begin(lanes), std::end(lanes), 0.0);
}

// Elements from which a second thread is worth its while.
constexpr size_t worth_sharing = 2 * piece_size;

// Work of several arrays, cut into pieces: calls piece(number, tensor, start,
// n).
template <typename F>
void for_each_piece(const std::vector<size_t>& sizes, size_t size, F piece) {
  std::vector<size_t> first = {0};  // the number of each array's first piece
  size_t total = 0;
  for (const size_t elements : sizes) {
    first.push_back(first.back() + (elements + size - 1) / size);
    total += elements;
  }
  const auto run = [&](size_t i) {
    const size_t tensor =
        std::upper_bound(first.begin(), first.end(), i) - first.begin() - 1;
    const size_t start = (i - first[tensor]) * size;
    piece(i, tensor, start, std::min(size, sizes[tensor] - start));
  };
  if (total >= worth_sharing) {
    cpu::parallel_for(first.back(), run);
    return;
  }
  for (size_t i = 0; i < first.back(); ++i) {
    run(i);
  }
}

// One group's update, as the stream's thread runs it.
struct UpdateTask {
  struct Tensor {
    View sources[max_slots];  // as they are
    View targets[max_slots];  // as they will be, perhaps in the same memory
    size_t size = 0;
    Entry entry = {};
  };
  // One value, or one for each tensor of the step.
  template <typename T>
  struct Scalar {
    const T* values = nullptr;
    int64_t stride = 0;

    T of(const Tensor& tensor, T otherwise) const {
      return values ? values[stride * tensor.entry.scalar] : otherwise;
    }
  };

  const RuleTraits* rule;
  std::vector<std::vector<float>> numbers = {};  // of each set
  Scalar<float> learning_rate = {};
  Scalar<uint64_t> step = {};
  Scalar<float> gradient_scale = {};
  Scalar<bool> skip = {};
  std::vector<Tensor> tensors = {};
  Kept kept = {};

  void operator()() const {
    std::vector<size_t> sizes;
    for (const auto& tensor : tensors) {
      sizes.push_back(tensor.size);
    }
    const size_t total = std::accumulate(sizes.begin(), sizes.end(), size_t{0});
    const size_t size = std::clamp(total / 16 / piece_size * piece_size,
                                   piece_size, large_piece_size);
    for_each_piece(sizes, size, [&](size_t, size_t i, size_t start, size_t n) {
      const auto& tensor = tensors[i];
      const auto dtype = tensor.sources[0].dtype;
      const auto& loops = cpu::loops();
      if (skip.of(tensor, false)) {
        keep(tensor, start, n);
      } else if (!are_direct(tensor, dtype)) {
        for (size_t end = start + n; start < end; start += cpu::block_size) {
          update_block(tensor, start, std::min(cpu::block_size, end - start));
        }
      } else if (dtype == mx::Dtype::Val::float32) {
        update_direct<float>(loops.update, tensor, start, n);
      } else {
        update_direct<uint16_t>(dtype == mx::Dtype::Val::float16
                                    ? loops.update_float16
                                    : loops.update_bfloat16,
                                tensor, start, n);
      }
    });
  }

 private:
  size_t slots() const { return rule->slots.size(); }
  bool is_written(size_t slot) const { return rule->slots[slot].is_written; }

  bool are_direct(const Tensor& tensor, mx::Dtype::Val dtype) const {
    bool direct = true;
    for (size_t k = 0; k < slots(); ++k) {
      direct = direct && is_direct(tensor.sources[k], dtype);
    }
    return direct;
  }

  void keep(const Tensor& tensor, size_t start, size_t n) const {
    for (size_t k = 0; k < slots(); ++k) {
      if (is_written(k) && tensor.sources[k].data != tensor.targets[k].data) {
        gather(tensor.sources[k], start, n, tensor.targets[k].at(start));
      }
    }
  }

  template <typename T>
  void run(cpu::Update<T> loop, const Tensor& tensor,
           const cpu::Block<T>& block, size_t n) const {
    loop(rule->index, numbers[tensor.entry.hyperparameters].data(),
         learning_rate.of(tensor, 0), static_cast<float>(step.of(tensor, 0)),
         gradient_scale.of(tensor, 1), block, n);
  }

  // Where all arrays are contiguous and of one dtype.
  template <typename T>
  void update_direct(cpu::Update<T> loop, const Tensor& tensor, size_t start,
                     size_t n) const {
    cpu::Block<T> block;
    for (size_t k = 0; k < slots(); ++k) {
      block.in[k] = reinterpret_cast<const T*>(tensor.sources[k].at(start));
      if (is_written(k)) {
        block.out[k] = reinterpret_cast<T*>(tensor.targets[k].at(start));
      }
    }
    run(loop, tensor, block, n);
  }

  // At most block_size elements, as float32.
  void update_block(const Tensor& tensor, size_t start, size_t n) const {
    alignas(64) float buffers[max_slots][cpu::block_size];
    cpu::Block<float> block;
    for (size_t k = 0; k < slots(); ++k) {
      block.in[k] = load(tensor.sources[k], start, n, buffers[k]);
      if (is_written(k)) {
        block.out[k] = is_direct(tensor.targets[k])
                           ? direct(tensor.targets[k], start)
                           : buffers[k];
      }
    }
    run(cpu::loops().update, tensor, block, n);
    for (size_t k = 0; k < slots(); ++k) {
      if (is_written(k)) {
        store(tensor.targets[k], start, n, block.out[k]);
      }
    }
  }
};

}  // namespace

void FusedUpdate::eval_cpu(const Arrays& graph_inputs, Arrays& outputs) {
  if (is_placed(outputs)) {
    return;
  }
  const bool holds = !held_.empty();
  const bool is_owner = holds && held_.is_owner(outputs[0]);
  Arrays copies;
  const auto& inputs =
      holds ? held_.complete(graph_inputs, is_owner, copies) : graph_inputs;
  // With a GPU, this stream may itself wait for work that the GPU gets only
  // when the graph has been walked to its end.
  static const bool can_wait = !mx::is_available(mx::Device(mx::Device::gpu));
  const auto& layout = update_.layout;
  Placement placement(
      inputs, outputs, layout,
      [&] { return holds ? held_.graph_part(inputs) : inputs; },
      can_wait ? std::function<void()>([this] { mx::synchronize(stream()); })
               : nullptr);

  UpdateTask task{layout.rule};
  for (const auto& set : *update_.sets) {
    task.numbers.push_back(numbers(set));
  }
  auto& kept = task.kept;
  kept.data.reserve(outputs.size() + inputs.size());
  task.tensors.resize(layout.tensors);
  int output = 0;
  for (int i = 0; i < layout.tensors; ++i) {
    auto& tensor = task.tensors[i];
    for (int k = 0; k < layout.slots(); ++k) {
      const auto& input = inputs[layout.input(i, k)];
      if (!layout.rule->slots[k].is_written) {
        tensor.sources[k] = kept.held(input);
        continue;
      }
      // MLX holds an output for whoever reads it: not for an update that only
      // waits for this one.
      tensor.targets[k] = kept.held(outputs[output]);
      tensor.sources[k] =
          placement.in_place(output) ? tensor.targets[k] : kept.held(input);
      ++output;
    }
    tensor.entry = update_.entries[i];
    tensor.size = inputs[layout.input(i, 0)].size();
  }
  const auto scalar = [&]<typename T>(UpdateTask::Scalar<T>& target,
                                      int input) {
    if (input >= 0) {
      const auto& a = inputs[input];
      target = {reinterpret_cast<const T*>(kept.held(a).data),
                update_.per_tensor && a.size() > 1 ? a.strides(0) : 0};
    }
  };
  scalar(task.learning_rate, layout.learning_rate());
  scalar(task.step, layout.step());
  scalar(task.gradient_scale, layout.gradient_scale());
  scalar(task.skip, layout.skip());

  // The only dispatch: when it throws, nothing has been done.
  mx::cpu::get_command_encoder(stream()).dispatch(std::move(task));
  placement.commit();
  if (is_owner) {
    held_.clear();
  }
  // The task keeps what it reads. MLX would keep all of it a second time.
  for (auto& out : outputs) {
    if (&out.inputs() == &inputs && !out.is_tracer()) {
      out.inputs().clear();
      break;
    }
  }
}

void SumsOfSquares::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  for (auto& output : outputs) {
    allocate(output);
  }
  Kept kept;
  std::vector<View> views;
  std::vector<size_t> sizes;
  size_t pieces = 0;
  for (size_t i = 0; i + 1 < inputs.size(); ++i) {
    views.push_back(kept.view(inputs[i]));
    sizes.push_back(inputs[i].size());
    pieces += (inputs[i].size() + large_piece_size - 1) / large_piece_size;
  }
  mx::cpu::get_command_encoder(stream()).dispatch(
      [kept = std::move(kept), views = std::move(views),
       sizes = std::move(sizes), pieces, max_norm = inputs.back().data<float>(),
       sums = outputs[0].data<float>(), norm = outputs[1].data<float>(),
       factor = outputs[2].data<float>()] {
        struct Partial {
          size_t tensor;
          double sum;
        };
        std::vector<Partial> partials(pieces);
        for_each_piece(
            sizes, large_piece_size,
            [&](size_t piece, size_t tensor, size_t start, size_t n) {
              partials[piece].tensor = tensor;
              for (size_t end = start + n; start < end; start += piece_size) {
                partials[piece].sum += sum_of_squares(
                    views[tensor], start, std::min(piece_size, end - start));
              }
            });
        std::vector<double> totals(sizes.size());
        double total = 0;
        for (const auto& [tensor, sum] : partials) {
          totals[tensor] += sum;
          total += sum;
        }
        std::copy(totals.begin(), totals.end(), sums);
        *norm = std::sqrt(static_cast<float>(total));
        *factor = std::min(*max_norm / (*norm + 1e-6f), 1.0f);
      });
}

}  // namespace mlx_fused
