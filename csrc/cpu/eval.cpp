// eval_cpu: the rules over whole arrays, in blocks, on several threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <optional>
#include <vector>

#include "../primitives.h"
#include "loops.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/device.h"
#include "parallel.h"

namespace mlx_fused {

namespace {

// Elements that a thread takes at a time. Boundaries do not depend on the
// number of threads, and neither does any result.
constexpr size_t piece_size = 64 * cpu::block_size;

// Where an array's elements are. Taken while the graph is evaluated: the arrays
// themselves may be gone when the work runs, but MLX keeps their memory.
struct View {
  char* data;
  mx::Dtype::Val dtype;
  size_t size;
  size_t itemsize;
  bool row_contiguous;
  Walk walk;

  explicit View(const mx::array& a)
      : data(const_cast<char*>(a.data<char>())),
        dtype(a.dtype().val()),
        size(a.size()),
        itemsize(a.itemsize()),
        row_contiguous(a.flags().row_contiguous) {
    if (!row_contiguous) {
      walk = collapse(a);
    }
  }

  char* at(size_t i) const { return data + i * itemsize; }
};

// Copies n elements, from the one with row-major index start on.
template <typename T>
void gather(const View& view, size_t start, size_t n, char* out) {
  const auto& [shape, strides] = view.walk;
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
  if (view.row_contiguous) {
    std::memcpy(out, view.at(start), n * view.itemsize);
  } else if (view.itemsize == 4) {
    gather<uint32_t>(view, start, n, out);
  } else {
    gather<uint16_t>(view, start, n, out);
  }
}

// The elements of a block as float32: in place for float32, else in buffer.
float* load(const View& view, size_t start, size_t n, float* buffer) {
  const bool converts = view.dtype != mx::Dtype::Val::float32;
  alignas(64) char gathered[cpu::block_size * sizeof(float)];
  char* source = view.at(start);
  if (!view.row_contiguous) {
    source = converts ? gathered : reinterpret_cast<char*>(buffer);
    gather(view, start, n, source);
  }
  if (!converts) {
    return reinterpret_cast<float*>(source);
  }
  const auto* half = reinterpret_cast<const uint16_t*>(source);
  if (view.dtype == mx::Dtype::Val::float16) {
    cpu::loops().load_float16(half, buffer, n);
  } else {
    cpu::loops().load_bfloat16(half, buffer, n);
  }
  return buffer;
}

// Rounds a block to the array's dtype, unless it was updated in place.
void store(const View& view, size_t start, size_t n, const float* values) {
  auto* half = reinterpret_cast<uint16_t*>(view.at(start));
  if (view.dtype == mx::Dtype::Val::float16) {
    cpu::loops().store_float16(values, half, n);
  } else if (view.dtype == mx::Dtype::Val::bfloat16) {
    cpu::loops().store_bfloat16(values, half, n);
  }
}

// Work of several arrays, cut into pieces: calls piece(tensor, start, n).
template <typename F>
void for_each_piece(const std::vector<size_t>& sizes, F piece) {
  std::vector<size_t> first = {0};  // the number of each array's first piece
  for (const size_t size : sizes) {
    first.push_back(first.back() + (size + piece_size - 1) / piece_size);
  }
  cpu::parallel_for(first.back(), [&](size_t i) {
    const size_t tensor =
        std::upper_bound(first.begin(), first.end(), i) - first.begin() - 1;
    const size_t start = (i - first[tensor]) * piece_size;
    piece(i, tensor, start, std::min(piece_size, sizes[tensor] - start));
  });
}

}  // namespace

void FusedUpdate::eval_cpu(const std::vector<mx::array>& inputs,
                           std::vector<mx::array>& outputs) {
  if (is_placed(outputs)) {
    return;
  }
  // With a GPU, this stream may itself wait for work that the GPU gets only
  // when the graph has been walked to its end.
  const auto wait = [&] { mx::synchronize(stream()); };
  const bool can_wait = !mx::is_available(mx::Device(mx::Device::gpu));
  Placement placement(inputs, outputs, layout_,
                      can_wait ? std::function<void()>(wait) : nullptr);

  struct Tensor {
    std::vector<View> targets;                 // parameter and states
    std::vector<std::optional<View>> sources;  // where not in place
    std::optional<View> gradient;
  };
  std::vector<Tensor> tensors(layout_.tensors);
  std::vector<size_t> sizes;
  for (int i = 0; i < layout_.tensors; ++i) {
    auto& tensor = tensors[i];
    for (int k = 0; k < layout_.outputs_each(); ++k) {
      tensor.targets.emplace_back(placement.target(i, k));
      tensor.sources.emplace_back();
      if (!placement.in_place(i, k)) {
        tensor.sources.back().emplace(inputs[layout_.input(i, k)]);
      }
    }
    if (layout_.reads_gradient) {
      tensor.gradient.emplace(inputs[layout_.gradient(i)]);
    }
    sizes.push_back(tensor.targets[0].size);
  }
  const auto* learning_rate = inputs[layout_.learning_rate()].data<float>();
  const auto* step = inputs[layout_.step()].data<uint64_t>();
  const auto* scale =
      layout_.scaled ? inputs[layout_.gradient_scale()].data<float>() : nullptr;

  // The only dispatch: when it throws, nothing has been done.
  mx::cpu::get_command_encoder(stream()).dispatch(
      [=, rule = rule_, layout = layout_, h = float_hyperparameters(),
       tensors = std::move(tensors), sizes = std::move(sizes)] {
        const float rate = *learning_rate;
        const float count = static_cast<float>(*step);
        const float gradient_scale = scale ? *scale : 1;
        // A negative scale says that nothing is to change.
        const bool skip = gradient_scale < 0;
        for_each_piece(sizes, [&](size_t, size_t i, size_t start, size_t n) {
          const auto& tensor = tensors[i];
          alignas(64) float buffers[4][cpu::block_size];
          for (size_t end = start + n; start < end; start += cpu::block_size) {
            const size_t block = std::min(cpu::block_size, end - start);
            for (int k = 0; k < layout.outputs_each(); ++k) {
              if (tensor.sources[k]) {
                gather(*tensor.sources[k], start, block,
                       tensor.targets[k].at(start));
              }
            }
            if (skip) {
              continue;
            }
            float* values[3] = {};  // parameter and states
            for (int k = 0; k < layout.outputs_each(); ++k) {
              values[k] = load(tensor.targets[k], start, block, buffers[k]);
            }
            const float* gradient =
                tensor.gradient
                    ? load(*tensor.gradient, start, block, buffers[3])
                    : nullptr;
            cpu::loops().update(rule, h.data(), rate, count, gradient_scale,
                                values[0], gradient, values[1], values[2],
                                block);
            for (int k = 0; k < layout.outputs_each(); ++k) {
              store(tensor.targets[k], start, block, values[k]);
            }
          }
        });
      });
  placement.commit();
}

void GlobalNorm::eval_cpu(const std::vector<mx::array>& inputs,
                          std::vector<mx::array>& outputs) {
  for (auto& output : outputs) {
    allocate(output);
  }
  std::vector<View> views;
  for (size_t i = 0; i + 1 < inputs.size(); ++i) {
    views.emplace_back(inputs[i]);
  }
  std::vector<size_t> sizes;
  size_t pieces = 0;
  for (const auto& view : views) {
    sizes.push_back(view.size);
    pieces += (view.size + piece_size - 1) / piece_size;
  }
  mx::cpu::get_command_encoder(stream()).dispatch(
      [views = std::move(views), sizes = std::move(sizes), pieces,
       max_norm = inputs.back().data<float>(), norm = outputs[0].data<float>(),
       factor = outputs[1].data<float>()] {
        std::vector<double> partials(pieces);
        for_each_piece(sizes, [&](size_t piece, size_t tensor, size_t start,
                                  size_t n) {
          alignas(64) float buffer[cpu::block_size];
          float lanes[cpu::sum_lanes] = {};
          for (size_t end = start + n; start < end; start += cpu::block_size) {
            const size_t block = std::min(cpu::block_size, end - start);
            cpu::loops().add_squares(load(views[tensor], start, block, buffer),
                                     block, lanes);
          }
          for (const float lane : lanes) {
            partials[piece] += lane;
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
