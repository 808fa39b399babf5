// eval_cpu: the rules over whole arrays, in blocks, on several threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../primitives.h"
#include "loops.h"
#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
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

  View(const mx::array& a)
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
  std::vector<int64_t> position(shape.size());
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

void copy_to(const mx::array& in, mx::array& out, mx::Stream stream) {
  mx::cpu::get_command_encoder(stream).dispatch(
      [from = View(in), to = View(out)] {
        for_each_piece({to.size}, [&](size_t, size_t, size_t start, size_t n) {
          gather(from, start, n, to.at(start));
        });
      });
}

}  // namespace

void FusedUpdate::eval_cpu(const std::vector<mx::array>& inputs,
                           std::vector<mx::array>& outputs) {
  place_outputs(
      inputs, outputs, layout_,
      [&](const mx::array& in, mx::array& out) { copy_to(in, out, stream()); },
      [&] { mx::synchronize(stream()); });

  std::vector<View> in_place(outputs.begin(), outputs.end());
  std::vector<View> gradients;
  std::vector<size_t> sizes;
  for (int tensor = 0; tensor < layout_.tensors; ++tensor) {
    sizes.push_back(outputs[layout_.output(tensor, 0)].size());
    if (layout_.reads_gradient) {
      gradients.push_back(inputs[layout_.gradient(tensor)]);
    }
  }
  const auto* learning_rate = inputs[layout_.learning_rate()].data<float>();
  const auto* step = inputs[layout_.step()].data<uint64_t>();
  const auto* scale =
      layout_.scaled ? inputs[layout_.gradient_scale()].data<float>() : nullptr;

  mx::cpu::get_command_encoder(stream()).dispatch(
      [=, rule = rule_, layout = layout_, h = float_hyperparameters(),
       in_place = std::move(in_place), gradients = std::move(gradients),
       sizes = std::move(sizes)] {
        const float rate = *learning_rate;
        const float count = static_cast<float>(*step);
        const float gradient_scale = scale ? *scale : 1;
        for_each_piece(sizes, [&](size_t, size_t tensor, size_t start,
                                  size_t n) {
          alignas(64) float buffers[4][cpu::block_size];
          for (size_t end = start + n; start < end; start += cpu::block_size) {
            const size_t block = std::min(cpu::block_size, end - start);
            float* values[3] = {};  // parameter and states
            for (int k = 0; k < layout.outputs_each(); ++k) {
              values[k] = load(in_place[layout.output(tensor, k)], start, block,
                               buffers[k]);
            }
            const float* gradient =
                layout.reads_gradient
                    ? load(gradients[tensor], start, block, buffers[3])
                    : nullptr;
            cpu::loops().update(rule, h.data(), rate, count, gradient_scale,
                                values[0], gradient, values[1], values[2],
                                block);
            for (int k = 0; k < layout.outputs_each(); ++k) {
              store(in_place[layout.output(tensor, k)], start, block,
                    values[k]);
            }
          }
        });
      });
}

void GlobalNorm::eval_cpu(const std::vector<mx::array>& inputs,
                          std::vector<mx::array>& outputs) {
  for (auto& output : outputs) {
    output.set_data(mx::allocator::malloc(output.nbytes()));
  }
  std::vector<View> views(inputs.begin(), inputs.end() - 1);
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
