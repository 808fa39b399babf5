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

#include "../primitives.h"
#include "loops.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/device.h"
#include "parallel.h"

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
    View sources[3];  // parameter and states, as they are
    View targets[3];  // as they will be, perhaps in the same memory
    View gradient;    // if the rule reads one
    size_t size = 0;
  };

  Rule rule;
  GroupLayout layout;
  std::array<float, max_hyperparameters> hyperparameters = {};
  const float* learning_rate = nullptr;
  const uint64_t* step = nullptr;
  const float* gradient_scale = nullptr;  // if not 1
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
    const float scale = gradient_scale ? *gradient_scale : 1;
    for_each_piece(sizes, size, [&](size_t, size_t i, size_t start, size_t n) {
      const auto& tensor = tensors[i];
      const auto dtype = tensor.targets[0].dtype;
      const auto& loops = cpu::loops();
      if (scale < 0) {  // nothing is to change
        keep(tensor, start, n);
      } else if (!are_direct(tensor, dtype)) {
        for (size_t end = start + n; start < end; start += cpu::block_size) {
          update_block(tensor, start, std::min(cpu::block_size, end - start),
                       scale);
        }
      } else if (dtype == mx::Dtype::Val::float32) {
        update_direct<float>(loops.update, tensor, start, n, scale);
      } else {
        update_direct<uint16_t>(dtype == mx::Dtype::Val::float16
                                    ? loops.update_float16
                                    : loops.update_bfloat16,
                                tensor, start, n, scale);
      }
    });
  }

 private:
  bool are_direct(const Tensor& tensor, mx::Dtype::Val dtype) const {
    bool direct = !layout.reads_gradient || is_direct(tensor.gradient, dtype);
    for (int k = 0; k < layout.outputs_each(); ++k) {
      direct = direct && is_direct(tensor.sources[k], dtype) &&
               is_direct(tensor.targets[k], dtype);
    }
    return direct;
  }

  void keep(const Tensor& tensor, size_t start, size_t n) const {
    for (int k = 0; k < layout.outputs_each(); ++k) {
      if (tensor.sources[k].data != tensor.targets[k].data) {
        gather(tensor.sources[k], start, n, tensor.targets[k].at(start));
      }
    }
  }

  // Where all arrays are contiguous and of one dtype.
  template <typename T>
  void update_direct(cpu::Update<T> loop, const Tensor& tensor, size_t start,
                     size_t n, float scale) const {
    const T* in[3] = {};
    T* out[3] = {};
    for (int k = 0; k < layout.outputs_each(); ++k) {
      in[k] = reinterpret_cast<const T*>(tensor.sources[k].at(start));
      out[k] = reinterpret_cast<T*>(tensor.targets[k].at(start));
    }
    loop(rule, hyperparameters.data(), *learning_rate,
         static_cast<float>(*step), scale,
         reinterpret_cast<const T*>(tensor.gradient.at(start)), in, out, n);
  }

  // At most block_size elements, as float32.
  void update_block(const Tensor& tensor, size_t start, size_t n,
                    float scale) const {
    const int each = layout.outputs_each();
    alignas(64) float buffers[4][cpu::block_size];
    const float* in[3] = {};
    float* out[3] = {};
    for (int k = 0; k < each; ++k) {
      in[k] = load(tensor.sources[k], start, n, buffers[k]);
      out[k] = is_direct(tensor.targets[k]) ? direct(tensor.targets[k], start)
                                            : buffers[k];
    }
    const float* gradient = layout.reads_gradient
                                ? load(tensor.gradient, start, n, buffers[3])
                                : nullptr;
    cpu::loops().update(rule, hyperparameters.data(), *learning_rate,
                        static_cast<float>(*step), scale, gradient, in, out, n);
    for (int k = 0; k < each; ++k) {
      store(tensor.targets[k], start, n, out[k]);
    }
  }
};

}  // namespace

void FusedUpdate::eval_cpu(const std::vector<mx::array>& graph_inputs,
                           std::vector<mx::array>& outputs) {
  if (is_placed(outputs)) {
    return;
  }
  // A graph that is not the owner's, or that is evaluated again, has copies of
  // what is held: a second owner keeps the memory from being written to.
  const bool holds = !held_.empty();
  const bool is_owner =
      holds && outputs[0].id() == owner_ && !outputs[0].is_tracer();
  std::vector<mx::array> copies;
  if (holds && !is_owner) {
    copies = held_;
  }
  auto& all = is_owner ? held_ : copies;
  if (holds) {
    add_pending(all, graph_inputs);
  }
  const auto& inputs = holds ? all : graph_inputs;
  // With a GPU, this stream may itself wait for work that the GPU gets only
  // when the graph has been walked to its end.
  static const bool can_wait = !mx::is_available(mx::Device(mx::Device::gpu));
  const auto wait = [this] { mx::synchronize(stream()); };
  Placement placement(inputs, outputs, layout_, holds ? &pending_ : nullptr,
                      can_wait ? std::function<void()>(wait) : nullptr);

  UpdateTask task;
  task.rule = rule_;
  task.layout = layout_;
  std::copy(hyperparameters_.begin(), hyperparameters_.end(),
            task.hyperparameters.begin());
  auto& kept = task.kept;
  kept.data.reserve(outputs.size() + inputs.size());
  task.tensors.resize(layout_.tensors);
  for (int i = 0; i < layout_.tensors; ++i) {
    auto& tensor = task.tensors[i];
    for (int k = 0; k < layout_.outputs_each(); ++k) {
      // MLX holds an output for whoever reads it: not for an update that only
      // waits for this one.
      tensor.targets[k] = kept.held(placement.target(i, k));
      tensor.sources[k] = placement.in_place(i, k)
                              ? tensor.targets[k]
                              : kept.held(inputs[layout_.input(i, k)]);
    }
    if (layout_.reads_gradient) {
      tensor.gradient = kept.held(inputs[layout_.gradient(i)]);
    }
    tensor.size = placement.target(i, 0).size();
  }
  const auto scalar = [&](int index) { return kept.held(inputs[index]).data; };
  task.learning_rate =
      reinterpret_cast<const float*>(scalar(layout_.learning_rate()));
  task.step = reinterpret_cast<const uint64_t*>(scalar(layout_.step()));
  task.gradient_scale =
      layout_.scaled
          ? reinterpret_cast<const float*>(scalar(layout_.gradient_scale()))
          : nullptr;

  // The only dispatch: when it throws, nothing has been done.
  mx::cpu::get_command_encoder(stream()).dispatch(std::move(task));
  placement.commit();
  if (is_owner) {
    held_.clear();
  }
  // The task keeps what it reads. MLX would keep all of it a second time.
  for (auto& output : outputs) {
    if (&output.inputs() == &inputs && !output.is_tracer()) {
      output.inputs().clear();
      break;
    }
  }
}

void GlobalNorm::eval_cpu(const std::vector<mx::array>& inputs,
                          std::vector<mx::array>& outputs) {
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
       norm = outputs[0].data<float>(), factor = outputs[1].data<float>()] {
        std::vector<double> partials(pieces);
        for_each_piece(
            sizes, large_piece_size,
            [&](size_t piece, size_t tensor, size_t start, size_t n) {
              for (size_t end = start + n; start < end; start += piece_size) {
                partials[piece] += sum_of_squares(
                    views[tensor], start, std::min(piece_size, end - start));
              }
            });
        double sum = 0;
        for (const double partial : partials) {
          sum += partial;
        }
        *norm = std::sqrt(static_cast<float>(sum));
        *factor = std::min(*max_norm / (*norm + 1e-6f), 1.0f);
      });
}

}  // namespace mlx_fused
