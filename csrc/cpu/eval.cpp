// eval_cpu: the rules over whole arrays, in blocks, on several threads.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <list>
#include <memory>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/factored.h"
#include "cpu/loops.h"
#include "cpu/parallel.h"
#include "graph/fused_update.h"
#include "graph/placement.h"
#include "graph/sums_of_squares.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/device.h"
#include "program.h"
#include "strides.h"

namespace mlx_fused {

namespace {

// Elements that a thread takes at a time, at least. Boundaries do not depend on
// the number of threads, and neither does any result.
constexpr size_t piece_size = 64 * cpu::block_size;
// A large tensor's pieces are larger, up to this.
constexpr size_t large_piece_size = 8 * piece_size;

// A transposed gradient is turned block by block, in the second-level cache:
// these bytes of each of so many columns at a time. Matrices with fewer rows or
// columns are gathered element by element.
constexpr size_t turned_bytes = 256;
constexpr size_t turned_columns = 1024;
constexpr int64_t worth_turning = 8;

// Where an array's elements are. Taken while the graph is evaluated: the arrays
// themselves may be gone when the work runs.
struct View {
  char* data = nullptr;
  const Walk* walk = nullptr;              // unless row-contiguous
  const Transposed* transposed = nullptr;  // if it is that
  mx::Dtype::Val dtype = mx::Dtype::Val::float32;
  uint8_t itemsize = 0;

  bool row_contiguous() const { return walk == nullptr; }
  char* at(size_t i) const { return data + i * itemsize; }
};

// What a task holds on to until it is done.
struct Kept {
  std::vector<std::shared_ptr<mx::array::Data>> data;
  std::list<Walk> walks;
  std::list<Transposed> transposed;

  View view(const mx::array& a, bool in_memory_order = false) {
    View view{const_cast<char*>(a.data<char>()), nullptr, nullptr,
              a.dtype().val(), static_cast<uint8_t>(a.itemsize())};
    if (!a.flags().row_contiguous && !(in_memory_order && is_dense(a))) {
      view.walk = &walks.emplace_back(collapse(a));
      if (auto found = as_transposed(*view.walk, worth_turning)) {
        view.transposed = &transposed.emplace_back(std::move(*found));
      }
    }
    return view;
  }
  // Of an array that nobody else need hold.
  View held(const mx::array& a, bool in_memory_order = false) {
    data.push_back(a.data_shared_ptr());
    return view(a, in_memory_order);
  }
};

// Parts of the tensors of a rule: a gradient has no companion.
constexpr int max_parts = 2 * max_slots - 1;

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
    if (strides[last] == 1) {
      std::memcpy(result, in, run * sizeof(T));
    } else {
      for (size_t i = 0; i < run; ++i) {
        result[i] = in[static_cast<int64_t>(i) * strides[last]];
      }
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
  } else if (view.itemsize == 2) {
    gather<uint16_t>(view, start, n, out);
  } else {
    gather<uint8_t>(view, start, n, out);
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

// Of n elements times scale or, where it is 0, how many are not zero.
double sum_of_squares(const View& view, size_t start, size_t n, float scale) {
  alignas(64) float buffer[cpu::block_size];
  double lanes[cpu::sum_lanes] = {};
  const size_t block = is_direct(view) ? n : cpu::block_size;
  for (size_t end = start + n; start < end; start += block) {
    const size_t size = std::min(block, end - start);
    const auto* values = load(view, start, size, buffer);
    if (scale == 0) {
      cpu::loops().add_nonzero(values, size, lanes);
    } else {
      cpu::loops().add_squares(values, size, scale, lanes);
    }
  }
  return std::accumulate(std::begin(lanes), std::end(lanes), 0.0);
}

// Whether each run of rows that is turned at a time begins with a block of
// codes.
bool turns_whole_blocks(const View& view) {
  constexpr int64_t block = 64;
  const auto* t = view.transposed;
  return t && (t->columns % block == 0 ||
               (t->count() == 1 && t->row_stride == t->columns &&
                t->columns <= static_cast<int64_t>(turned_columns)));
}

// One group's update, as the stream's thread runs it.
struct UpdateTask {
  struct Tensor {
    View sources[max_parts];  // as they are
    View targets[max_parts];  // as they will be, perhaps in the same memory
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

  std::shared_ptr<const GroupLayout> layout;
  std::vector<std::vector<float>> numbers = {};  // of each set
  Scalar<float> learning_rate = {};
  Scalar<uint64_t> step = {};
  Scalar<float> gradient_scale = {};
  Scalar<bool> skip = {};
  Scalar<float> coefficient = {};
  Scalar<uint32_t> seed = {};
  std::vector<Tensor> tensors = {};
  Kept kept = {};

  void operator()() const {
    size_t total = 0;
    for (const auto& tensor : tensors) {
      total += tensor.size;
    }
    const size_t size = std::clamp(total / 16 / piece_size * piece_size,
                                   piece_size, large_piece_size);
    std::vector<size_t> counts;
    for (const auto& tensor : tensors) {
      counts.push_back(is_turned(tensor) ? turned_pieces(gradient(tensor), size)
                                         : divided_up(tensor.size, size));
    }
    for_each_piece(counts, total, [&](size_t, size_t i, size_t piece) {
      const auto& tensor = tensors[i];
      if (is_turned(tensor)) {
        update_turned(tensor, piece, size);
      } else {
        const size_t start = piece * size;
        update(tensor, start, std::min(size, tensor.size - start), nullptr);
      }
    });
  }

 private:
  size_t slots() const { return layout->formats.size(); }
  bool is_written(size_t slot) const {
    return layout->rule->slots[slot].is_written;
  }
  bool is_read(size_t slot) const { return layout->rule->slots[slot].is_read; }
  const View& gradient(const Tensor& tensor) const {
    return tensor.sources[layout->parts.size() - 1];
  }
  bool is_turned(const Tensor& tensor) const {
    return gradient(tensor).transposed && !skip.of(tensor, false);
  }

  // The rows of a matrix that make a piece of about this many elements.
  static size_t rows_of_piece(const View& view, size_t size) {
    const size_t rows = turned_bytes / view.itemsize;
    return divided_up(divided_up(size, view.transposed->columns), rows) * rows;
  }
  static size_t turned_pieces(const View& view, size_t size) {
    const auto& t = *view.transposed;
    return t.count() * divided_up(t.rows, rows_of_piece(view, size));
  }

  // Some rows of one of the gradient's matrices: turns a block that fits into
  // the cache, then updates its elements in row-major order.
  void update_turned(const Tensor& tensor, size_t piece, size_t size) const {
    const auto& view = gradient(tensor);
    const auto& t = *view.transposed;
    const size_t rows_each = rows_of_piece(view, size);
    const size_t pieces = divided_up(t.rows, rows_each);
    const auto [in_gradient, begin] = t.locate(piece / pieces);
    const size_t first_row = piece % pieces * rows_each;
    const size_t end_row = std::min<size_t>(t.rows, first_row + rows_each);
    const size_t columns_each = std::min<size_t>(t.columns, turned_columns);
    const size_t rows_at_once =
        turned_columns / columns_each * (turned_bytes / view.itemsize);
    alignas(64) char block[turned_bytes * turned_columns];
    for (size_t row = first_row; row < end_row; row += rows_at_once) {
      const size_t rows = std::min(rows_at_once, end_row - row);
      for (size_t column = 0; column < static_cast<size_t>(t.columns);
           column += columns_each) {
        const size_t columns =
            std::min<size_t>(columns_each, t.columns - column);
        const auto address = [&](size_t row, size_t column) {
          return view.at(in_gradient + row + column * t.column_stride);
        };
        const char* next = column + columns < static_cast<size_t>(t.columns)
                               ? address(row, column + columns)
                           : row + rows < end_row ? address(row + rows, 0)
                                                  : nullptr;
        cpu::loops().turn(view.itemsize, address(row, column), next,
                          t.column_stride, rows, columns, block);
        const size_t start = begin + row * t.row_stride + column;
        if (t.row_stride == static_cast<int64_t>(columns)) {
          update(tensor, start, rows * columns, block);
          continue;
        }
        for (size_t i = 0; i < rows; ++i) {
          update(tensor, start + i * t.row_stride, columns,
                 block + i * columns * view.itemsize, t.row_stride);
        }
      }
    }
  }

  // n elements from this row-major index on. Their gradients are in `turned`,
  // if given. What is updated next is so many elements `ahead`, if given.
  void update(const Tensor& tensor, size_t start, size_t n, const char* turned,
              size_t ahead = 0) const {
    const auto dtype = tensor.sources[0].dtype;
    const auto& loops = cpu::loops();
    if (skip.of(tensor, false)) {
      keep(tensor, start, n);
      return;
    }
    if (is_packed(tensor, turned)) {
      const size_t blocks = n / cpu::Packed::block;
      const size_t done = blocks * cpu::Packed::block;
      update_packed(tensor, start, blocks, turned, ahead);
      start += done;
      n -= done;
      turned += turned ? done * gradient(tensor).itemsize : 0;
    }
    if (!are_direct(tensor, dtype, turned)) {
      const size_t itemsize = gradient(tensor).itemsize;
      for (size_t end = start + n; start < end; start += cpu::block_size) {
        update_block(tensor, start, std::min(cpu::block_size, end - start),
                     turned, ahead ? ahead : cpu::block_size);
        turned += turned ? cpu::block_size * itemsize : 0;
      }
    } else if (dtype == mx::Dtype::Val::float32) {
      update_direct<float>(loops.update, tensor, start, n, turned, ahead);
    } else {
      update_direct<uint16_t>(dtype == mx::Dtype::Val::float16
                                  ? loops.update_float16
                                  : loops.update_bfloat16,
                              tensor, start, n, turned, ahead);
    }
  }

  bool are_direct(const Tensor& tensor, mx::Dtype::Val dtype,
                  bool is_turned) const {
    bool direct = layout->is_plain();
    for (size_t k = 0; k < slots() && direct; ++k) {
      const auto& source = tensor.sources[k];
      direct = direct && source.dtype == dtype &&
               (source.row_contiguous() || !is_read(k) ||
                (is_turned && k + 1 == slots()));
    }
    // A program's loop has no halves: its blocks are float32 all the same.
    return direct &&
           !(layout->rule->program && dtype != mx::Dtype::Val::float32);
  }

  // Whether all arrays are as cpu::Packed has them.
  bool is_packed(const Tensor& tensor, bool is_turned) const {
    bool packed = !layout->rule->program && !layout->rule->averages() &&
                  layout->rule->slots[0].is_written && is_read(0);
    for (size_t k = 0; k < slots() && packed; ++k) {
      const auto& format = layout->formats[k];
      packed = k == 0            ? format.storage == Storage::split24
               : k + 1 < slots() ? format.storage == Storage::codes8
                                 : !is_written(k);
    }
    const size_t parts = layout->parts.size();
    for (size_t i = 0; i < parts && packed; ++i) {
      packed =
          tensor.sources[i].row_contiguous() || (is_turned && i + 1 == parts);
    }
    return packed && tensor.sources[0].dtype == mx::Dtype::Val::bfloat16 &&
           gradient(tensor).dtype == mx::Dtype::Val::bfloat16;
  }

  void update_packed(const Tensor& tensor, size_t start, size_t blocks,
                     const char* turned, size_t ahead) const {
    cpu::Packed arrays;
    arrays.ahead = ahead ? ahead : arrays.ahead;
    for (size_t part = 0; part < layout->parts.size(); ++part) {
      const auto& of = layout->parts[part];
      const auto member =
          of.is_companion ? &cpu::Pair::companions : &cpu::Pair::values;
      const size_t i = start >> item_exponent(of);
      arrays.in[of.slot].*member = tensor.sources[part].at(i);
      if (of.is_written) {
        arrays.out[of.slot].*member = tensor.targets[part].at(i);
      }
    }
    if (turned) {
      arrays.in[slots() - 1].values = const_cast<char*>(turned);
      arrays.is_turned = true;
    }
    cpu::loops().update_packed(
        layout->rule->index, numbers[tensor.entry.hyperparameters].data(),
        learning_rate.of(tensor, 0), static_cast<float>(step.of(tensor, 0)),
        coefficient.of(tensor, 0), gradient_scale.of(tensor, 1), arrays,
        blocks);
  }

  void keep(const Tensor& tensor, size_t start, size_t n) const {
    for (size_t k = 0; k < layout->parts.size(); ++k) {
      const auto& part = layout->parts[k];
      if (!part.is_read) {
        const auto& target = tensor.targets[k];
        std::memset(target.at(start), 0, n * target.itemsize);
      } else if (part.is_written &&
                 tensor.sources[k].data != tensor.targets[k].data) {
        const int items = item_exponent(part);
        const size_t first = start >> items;
        gather(tensor.sources[k], first, divided_up(n, size_t{1} << items),
               tensor.targets[k].at(first));
      }
    }
  }

  // Elements of a scale or of a pair of codes: a power of 2, and this is which.
  int item_exponent(const Part& part) const {
    const auto& format = layout->format(part);
    return !format.has_codes() ? 0
           : part.is_companion
               ? std::countr_zero(static_cast<unsigned>(format.block()))
           : format.storage == Storage::codes4 ? 1
                                               : 0;
  }

  // A block of all slots; the loop has no average, which follows it.
  template <typename T>
  void run(cpu::Update<T> loop, const Tensor& tensor, cpu::Block<T> block,
           size_t n) const {
    if (const auto* program = layout->rule->program.get()) {
      if constexpr (std::is_same_v<T, float>) {
        cpu::loops().run_program(
            {program->code.data(), program->code.size()},
            numbers[tensor.entry.hyperparameters].data(),
            learning_rate.values
                ? learning_rate.values +
                      learning_rate.stride * tensor.entry.scalar
                : nullptr,
            gradient_scale.of(tensor, 1), block, static_cast<int>(slots()), n);
      }
      return;
    }
    const float* own = numbers[tensor.entry.hyperparameters].data();
    const auto update = [&](const cpu::Block<T>& part, size_t size) {
      loop(layout->rule->index, own, learning_rate.of(tensor, 0),
           static_cast<float>(step.of(tensor, 0)), coefficient.of(tensor, 0),
           gradient_scale.of(tensor, 1), part, size);
    };
    if (!layout->rule->averages()) {
      update(block, n);
      return;
    }
    if constexpr (std::is_same_v<T, float>) {
      const float* ema = own;
      own += 3;
      const size_t last = slots() - 1;
      const float* before = std::exchange(block.in[last - 1], block.in[last]);
      float* after = std::exchange(block.out[last - 1], nullptr);
      block.in[last] = nullptr;
      // While the parameter is in the first-level cache.
      constexpr size_t size = 4 * cpu::block_size;
      for (size_t i = 0; i < n; i += size) {
        const size_t count = std::min(size, n - i);
        const auto part = block.from(i);
        update(part, count);
        cpu::loops().average(ema, part.out[0], before + i, after + i, count);
      }
    }
  }

  // Where all arrays are contiguous and of one dtype.
  template <typename T>
  void update_direct(cpu::Update<T> loop, const Tensor& tensor, size_t start,
                     size_t n, const char* turned, size_t ahead) const {
    cpu::Block<T> block;
    block.ahead = ahead ? ahead : block.ahead;
    for (size_t k = 0; k < slots(); ++k) {
      if (is_read(k)) {
        block.in[k] = reinterpret_cast<const T*>(tensor.sources[k].at(start));
      }
      if (is_written(k)) {
        block.out[k] = reinterpret_cast<T*>(tensor.targets[k].at(start));
      }
    }
    if (turned) {
      block.in[slots() - 1] = reinterpret_cast<const T*>(turned);
    }
    run(loop, tensor, block, n);
  }

  // At most block_size elements, as float32.
  void update_block(const Tensor& tensor, size_t start, size_t n,
                    const char* turned, size_t ahead) const {
    alignas(64) float buffers[max_slots][cpu::block_size];
    cpu::Block<float> block;
    for (size_t k = 0, part = 0; k < slots(); ++k) {
      const auto& format = layout->formats[k];
      const View* source = &tensor.sources[part];
      const View* target = &tensor.targets[part];
      part += format.has_companion() ? 2 : 1;
      block.in[k] = is_read(k) ? buffers[k] : nullptr;
      if (is_read(k) && source->row_contiguous()) {
        const int items = item_exponent({static_cast<int>(k), false, true});
        cpu::prefetch(source->at((start + ahead) >> items),
                      n * source->itemsize >> items);
      }
      if (!is_read(k)) {
        // Nothing to load.
      } else if (format.has_companion()) {
        alignas(64) char gathered[2][cpu::block_size * sizeof(float)];
        const auto from = pair_of(k, source, start, n, gathered);
        (format.has_codes()
             ? cpu::loops().load_codes
             : cpu::loops().load_split)(kind_of(format), from, buffers[k], n);
      } else if (turned && k + 1 == slots()) {
        const View here{const_cast<char*>(turned), nullptr, nullptr,
                        source->dtype, source->itemsize};
        block.in[k] = load(here, 0, n, buffers[k]);
      } else {
        block.in[k] = load(*source, start, n, buffers[k]);
      }
      if (is_written(k)) {
        block.out[k] = is_direct(*target) && !format.has_companion()
                           ? direct(*target, start)
                           : buffers[k];
      }
    }
    run(cpu::loops().update, tensor, block, n);
    for (size_t k = 0, part = 0; k < slots(); ++k) {
      const auto& format = layout->formats[k];
      const View* target = &tensor.targets[part];
      part += format.has_companion() ? 2 : 1;
      if (!is_written(k)) {
        continue;
      }
      if (format.has_companion()) {
        const auto to = pair_of(k, target, start, n, nullptr);
        (format.has_codes()
             ? cpu::loops().store_codes
             : cpu::loops().store_split)(kind_of(format), block.out[k], to, n);
        continue;
      }
      if (format.storage == Storage::stochastic) {
        const auto key = random_key<uint32_t>(
            seed.of(tensor, 0), static_cast<uint32_t>(step.of(tensor, 0)),
            tensor.entry.numbers.tensor);
        cpu::loops().round_stochastically(format.dtype == mx::float16, key,
                                          tensor.entry.numbers.first + start,
                                          block.out[k], n);
      }
      store(*target, start, n, block.out[k]);
    }
  }

  static cpu::CodesOrError kind_of(const Format& format) {
    const bool is_short = format.storage == Storage::codes4;
    const bool is_long = format.storage == Storage::split32;
    return {is_short  ? 4
            : is_long ? 16
                      : 8,
            format.is_never_negative, format.dtype == mx::float16};
  }

  // Where n elements of a slot and their companions are, or copies of them.
  cpu::Pair pair_of(size_t slot, const View* views, size_t start, size_t n,
                    char (*copies)[cpu::block_size * sizeof(float)]) const {
    char* found[2];
    for (const int i : {0, 1}) {
      const int items = item_exponent({static_cast<int>(slot), i == 1, true});
      found[i] = views[i].at(start >> items);
      if (!views[i].row_contiguous()) {
        gather(views[i], start >> items, divided_up(n, size_t{1} << items),
               copies[i]);
        found[i] = copies[i];
      }
    }
    return {found[0], found[1]};
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
  const auto& layout = *update_.layout;
  Placement placement(
      inputs, outputs, layout,
      [&] { return holds ? held_.graph_part(inputs) : inputs; },
      can_wait ? std::function<void()>([this] { mx::synchronize(stream()); })
               : nullptr);

  // Dispatched once: when that throws, nothing has been done.
  const auto dispatch = [&](auto task) {
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
  };
  if (layout.rule->is_factored()) {
    dispatch(factored_task(update_, inputs, outputs, placement));
    return;
  }

  // MLX allocates ahead of the work. An update with parameters waits until no
  // forward pass reads those; without, the memory of all gradients would be
  // allocated before the first of them was used.
  if (can_wait && layout.rule->slots[0].role == Role::state) {
    size_t bytes = 0;
    for (int i = 0; i < layout.tensors; ++i) {
      bytes += inputs[layout.gradient(i)].nbytes();
    }
    if (bytes >= worth_waiting) {
      mx::synchronize(stream());
    }
  }

  UpdateTask task{update_.layout};
  for (const auto& set : *update_.sets) {
    task.numbers.push_back(numbers(set));
  }
  auto& kept = task.kept;
  kept.data.reserve(outputs.size() + inputs.size());
  task.tensors.resize(layout.tensors);
  // A rule of one slot does the same to all elements, in whatever order.
  const bool any_order = layout.slots() == 1;
  const bool has_codes = layout.has_codes();
  int output = 0;
  for (int i = 0; i < layout.tensors; ++i) {
    auto& tensor = task.tensors[i];
    for (size_t k = 0; k < layout.parts.size(); ++k) {
      const auto& input = inputs[layout.input(i, k)];
      if (!layout.parts[k].is_written) {
        tensor.sources[k] = kept.held(input);
        continue;
      }
      // MLX holds an output for whoever reads it: not for an update that only
      // waits for this one.
      tensor.targets[k] = kept.held(outputs[output], any_order);
      tensor.sources[k] = placement.in_place(output)
                              ? tensor.targets[k]
                              : kept.held(input, any_order);
      ++output;
    }
    if (has_codes &&
        !turns_whole_blocks(tensor.sources[layout.parts.size() - 1])) {
      tensor.sources[layout.parts.size() - 1].transposed = nullptr;
    }
    tensor.entry = update_.entries[i];
    tensor.size = inputs[layout.gradient(i)].size();
  }
  const auto scalar = [&]<typename T>(UpdateTask::Scalar<T>& target,
                                      Scalar kind) {
    if (layout.has[kind]) {
      const auto& a = inputs[layout.input(kind)];
      target = {reinterpret_cast<const T*>(kept.held(a).data),
                update_.per_tensor && a.size() > 1 ? a.strides(0) : 0};
    }
  };
  scalar(task.learning_rate, learning_rate);
  scalar(task.step, step);
  scalar(task.gradient_scale, gradient_scale);
  scalar(task.skip, skip);
  scalar(task.coefficient, coefficient);
  scalar(task.seed, seed);

  dispatch(std::move(task));
}

void SumsOfSquares::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  for (auto& output : outputs) {
    allocate(output);
  }
  Kept kept;
  std::vector<View> views;
  std::vector<size_t> sizes, counts;
  for (size_t i = 0; i + 1 < inputs.size(); ++i) {
    views.push_back(kept.view(inputs[i], /*in_memory_order=*/true));
    sizes.push_back(inputs[i].size());
    counts.push_back(divided_up(sizes.back(), large_piece_size));
  }
  mx::cpu::get_command_encoder(stream()).dispatch(
      [kept = std::move(kept), views = std::move(views),
       sizes = std::move(sizes), counts = std::move(counts), counting = counts_,
       max_norm = inputs.back().data<float>(), sums = outputs[0].data<float>(),
       norm = outputs[1].data<float>(), factor = outputs[2].data<float>(),
       carry = outputs[3].data<float>()] {
        const auto sum_up = [](const auto& values) {
          return std::accumulate(
              values.begin(), values.end(),
              typename std::decay_t<decltype(values)>::value_type());
        };
        std::vector<double> partials(sum_up(counts));
        const auto sum_all = [&](float scale) {
          std::fill(partials.begin(), partials.end(), 0.0);
          for_each_piece(
              counts, sum_up(sizes),
              [&](size_t number, size_t tensor, size_t piece) {
                const size_t begin = piece * large_piece_size;
                const size_t end =
                    std::min(begin + large_piece_size, sizes[tensor]);
                for (size_t i = begin; i < end; i += piece_size) {
                  partials[number] += sum_of_squares(
                      views[tensor], i, std::min(piece_size, end - i), scale);
                }
              });
          return sum_up(partials);
        };
        const double total = sum_all(counting ? 0 : 1);
        auto partial = partials.begin();
        for (size_t i = 0; i < counts.size(); partial += counts[i++]) {
          sums[i] = static_cast<float>(
              std::accumulate(partial, partial + counts[i], 0.0));
        }
        // The root of a sum in double fits into float32 where the sum does not.
        const double root = std::isfinite(total)
                                ? std::sqrt(total)
                                : std::sqrt(sum_all(norm_scale)) / norm_scale;
        *norm = static_cast<float>(root);
        const bool is_above = *norm > root;
        carry[0] = is_above ? std::nextafter(*norm, 0.0f) : *norm;
        const double rest = (root - carry[0]) * (root + carry[0]);
        carry[1] =
            std::isfinite(rest) ? static_cast<float>(std::sqrt(rest)) : 0;
        *factor = std::min(*max_norm / (*norm + 1e-6f), 1.0f);
      });
}

}  // namespace mlx_fused
