#include "cpu/factored.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "cpu/loops.h"
#include "cpu/parallel.h"
#include "graph/factored.h"
#include "rules.h"
#include "strides.h"

namespace mlx_fused {

namespace {

// Elements that a thread takes at a time, at least, and rows of a large matrix.
// Boundaries do not depend on the number of threads, and neither do results.
constexpr int64_t piece_size = 1 << 15;
constexpr int64_t piece_rows = 64;
// Elements of a row that are converted and computed at a time.
constexpr int64_t segment = cpu::block_size;
// A transposed gradient is turned in blocks of so many rows.
constexpr int64_t turned_rows = 64;
constexpr int64_t worth_turning = 8;

struct Memory {
  char* data = nullptr;
  mx::Dtype::Val dtype = mx::Dtype::Val::float32;
  int64_t itemsize = 0;

  Memory() = default;
  explicit Memory(const mx::array& a)
      : data(const_cast<char*>(a.data<char>())),
        dtype(a.dtype().val()),
        itemsize(a.itemsize()) {}
  char* at(int64_t i) const { return data + i * itemsize; }
};

void widen(mx::Dtype::Val dtype, const char* in, int64_t n, float* out) {
  const auto* half = reinterpret_cast<const uint16_t*>(in);
  if (dtype == mx::Dtype::Val::float16) {
    cpu::loops().load_float16(half, out, n);
  } else {
    cpu::loops().load_bfloat16(half, out, n);
  }
}

// n neighbours as float32: where they are, or in buffer.
const float* load(const Memory& memory, int64_t start, int64_t n,
                  float* buffer) {
  if (memory.dtype == mx::Dtype::Val::float32) {
    return reinterpret_cast<const float*>(memory.at(start));
  }
  widen(memory.dtype, memory.at(start), n, buffer);
  return buffer;
}

// Where results are computed: in place, or in buffer until they are stored.
float* destination(const Memory& memory, int64_t start, float* buffer) {
  return memory.dtype == mx::Dtype::Val::float32
             ? reinterpret_cast<float*>(memory.at(start))
             : buffer;
}

void store(const Memory& memory, int64_t start, int64_t n,
           const float* buffer) {
  auto* half = reinterpret_cast<uint16_t*>(memory.at(start));
  if (memory.dtype == mx::Dtype::Val::float16) {
    cpu::loops().store_float16(buffer, half, n);
  } else if (memory.dtype == mx::Dtype::Val::bfloat16) {
    cpu::loops().store_bfloat16(buffer, half, n);
  }
}

template <typename T>
void copy_strided(const Walk& walk, size_t dimension, const T* in, T*& out) {
  for (int64_t i = 0; i < walk.shape[dimension]; ++i) {
    const T* element = in + i * walk.strides[dimension];
    if (dimension + 1 < walk.shape.size()) {
      copy_strided(walk, dimension + 1, element, out);
    } else {
      *out++ = *element;
    }
  }
}

// The gradient's matrices, or a vector as one of one row. They may be walked by
// columns: then rows are what its columns are.
struct Matrices {
  Memory memory;
  Walk places;  // of the matrices
  int64_t count = 1, rows = 1, columns = 1, row_stride = 0, column_stride = 1;

  explicit Matrices(const mx::array& a) : memory(a), places{{}, {}} {
    const int dimensions = static_cast<int>(a.ndim());
    if (dimensions > 0) {
      columns = a.shape(-1);
      column_stride = a.strides(-1);
    }
    if (dimensions > 1) {
      rows = a.shape(-2);
      row_stride = a.strides(-2);
    }
    for (int d = 0; d + 2 < dimensions; ++d) {
      places.shape.push_back(a.shape(d));
      places.strides.push_back(a.strides(d));
      count *= a.shape(d);
    }
  }

  bool is_transposed() const { return row_stride == 1 && column_stride != 1; }

  int64_t place(int64_t matrix) const {
    int64_t at = 0;
    for (size_t d = places.shape.size(); d-- > 0;) {
      at += matrix % places.shape[d] * places.strides[d];
      matrix /= places.shape[d];
    }
    return at;
  }

  // Some elements of a row, times `scale`.
  const float* load(int64_t matrix, int64_t row, int64_t column, int64_t n,
                    float scale, float* buffer) const {
    const int64_t at =
        place(matrix) + row * row_stride + column * column_stride;
    if (column_stride == 1) {
      return scaled(mlx_fused::load(memory, at, n, buffer), n, scale, buffer);
    }
    if (memory.itemsize == 4) {
      gather(reinterpret_cast<const float*>(memory.at(at)), n, buffer);
    } else {
      uint16_t half[segment];
      gather(reinterpret_cast<const uint16_t*>(memory.at(at)), n, half);
      widen(memory.dtype, reinterpret_cast<const char*>(half), n, buffer);
    }
    return scaled(buffer, n, scale, buffer);
  }

  static const float* scaled(const float* values, int64_t n, float scale,
                             float* buffer) {
    if (scale == 1) {
      return values;
    }
    for (int64_t i = 0; i < n; ++i) {
      buffer[i] = values[i] * scale;
    }
    return buffer;
  }

 private:
  template <typename T>
  void gather(const T* in, int64_t n, T* out) const {
    for (int64_t i = 0; i < n; ++i) {
      out[i] = in[i * column_stride];
    }
  }
};

// How matrices are cut into pieces: bands of a large one's rows, or several
// small ones.
struct Cut {
  int64_t count, rows;  // of the matrices
  int64_t band_rows, bands, matrices_each;

  explicit Cut(const Matrices& m) : count(m.count), rows(m.rows) {
    const int64_t columns = std::max<int64_t>(m.columns, 1);
    band_rows = std::min(
        rows, std::max(piece_rows, (piece_size + columns - 1) / columns));
    bands = (rows + band_rows - 1) / band_rows;
    matrices_each = std::max<int64_t>(1, piece_size / (rows * columns));
  }
  int64_t pieces() const {
    return (count + matrices_each - 1) / matrices_each * bands;
  }
  // Calls f(matrix, band, first row, end) for all of a piece.
  template <typename F>
  void each(int64_t piece, F f) const {
    const int64_t first = piece / bands * matrices_each;
    const int64_t band = piece % bands;
    for (int64_t i = first; i < std::min(first + matrices_each, count); ++i) {
      f(i, band, band * band_rows, std::min(rows, (band + 1) * band_rows));
    }
  }
};

struct Slot {
  Memory source, target;
  std::optional<Walk> walk = {};  // of a source that is not row-contiguous
};

struct Tensor {
  Tensor(const mx::array& g, bool may_swap)
      : gradient(g), walked(g), size(g.size()), write_cut(gradient) {
    if (may_swap && walked.is_transposed()) {
      std::swap(walked.rows, walked.columns);
      std::swap(walked.row_stride, walked.column_stride);
      is_swapped = true;
    }
    cut = Cut(walked);
  }

  Matrices gradient;
  Matrices walked;  // perhaps by columns
  int64_t size;
  Cut write_cut;
  Cut cut = write_cut;
  bool is_swapped = false;
  std::vector<Slot> slots = {};
  const float* numbers = nullptr;
  Adafactor<float> rule = {};
  bool is_skipped = false;
  float scale = 1;
  // Between the passes; of the matrices as they are walked.
  std::vector<float> down = {}, across = {};  // sums, then factors
  std::vector<double> band_sums = {};         // of the columns of each band
  std::vector<double> parameter_sums = {}, update_sums = {};
  float scaled_rate = 0, clipped_rate = 0;

  std::vector<float>& row_factors() { return is_swapped ? across : down; }
  std::vector<float>& column_factors() { return is_swapped ? down : across; }
};

class Task {
 public:
  // One value, or one for each tensor of the step.
  template <typename T>
  struct Scalar {
    const T* values = nullptr;
    int64_t stride = 0;
    T of(const Entry& entry, T otherwise) const {
      return values ? values[stride * entry.scalar] : otherwise;
    }
  };

  Task(const GroupUpdate& update, const Arrays& inputs, const Arrays& outputs,
       const Placement& placement)
      : means_(update.layout->rule->means),
        has_moment_(update.layout->slots() > means_ + 2),
        entries_(update.entries) {
    const auto& layout = *update.layout;
    const auto hold = [&](const mx::array& a) {
      held_.push_back(a.data_shared_ptr());
      return Memory(a);
    };
    for (const auto& set : *update.sets) {
      numbers_.push_back(numbers(set));
    }
    int output = 0;
    for (int i = 0; i < layout.tensors; ++i) {
      const auto& g = inputs[layout.gradient(i)];
      hold(g);
      auto& tensor = tensors_.emplace_back(g, means_ == 2);
      for (int k = 0; k + 1 < layout.slots(); ++k, ++output) {
        const auto& in = inputs[layout.input(i, k)];
        Slot slot{hold(outputs[output]), hold(outputs[output])};
        if (!placement.in_place(output)) {
          slot.source = hold(in);
          if (!in.flags().row_contiguous) {
            slot.walk = collapse(in);
          }
        }
        tensor.slots.push_back(std::move(slot));
      }
    }
    const auto read = [&]<typename T>(Scalar<T>& scalar,
                                      mlx_fused::Scalar kind) {
      if (layout.has[kind]) {
        const auto& a = inputs[layout.input(kind)];
        scalar = {reinterpret_cast<const T*>(hold(a).data),
                  update.per_tensor && a.size() > 1 ? a.strides(0) : 0};
      }
    };
    read(rate_, learning_rate);
    read(step_, step);
    read(scale_, gradient_scale);
    read(skip_, skip);
  }

  void operator()() {
    size_t elements = 0;
    for (size_t i = 0; i < tensors_.size(); ++i) {
      prepare(tensors_[i], entries_[i]);
      elements += tensors_[i].size;
    }
    run(elements, &Tensor::cut, &Task::sum_squares);
    run_all(elements, &Task::update_means);
    run(elements, &Tensor::cut, &Task::sum_update_squares);
    for (auto& tensor : tensors_) {
      if (!tensor.is_skipped) {
        finish_sums(tensor);
      }
    }
    run(elements, &Tensor::write_cut, &Task::write);
  }

 private:
  void prepare(Tensor& t, const Entry& entry) const {
    for (auto& slot : t.slots) {
      if (slot.walk) {
        make_contiguous(slot);
      }
    }
    t.is_skipped = skip_.of(entry, false);
    if (t.is_skipped) {
      for (size_t k = 0; k < t.slots.size(); ++k) {
        const auto& [source, target, walk] = t.slots[k];
        if (source.data != target.data) {
          std::memcpy(target.data, source.data,
                      elements_of(t, k) * source.itemsize);
        }
      }
      return;
    }
    const auto& numbers = numbers_[entry.hyperparameters];
    t.numbers = numbers.data();
    std::memcpy(static_cast<void*>(&t.rule), numbers.data(),
                numbers.size() * sizeof(float));
    t.rule.prepare(rate_.of(entry, 0), static_cast<float>(step_.of(entry, 0)));
    t.scale = scale_.of(entry, 1);
    const auto& m = t.walked;
    t.down.resize(m.count * m.rows);
    t.across.resize(m.count * m.columns);
    t.band_sums.resize(m.count * t.cut.bands * m.columns);
    t.parameter_sums.resize(t.cut.pieces());
    t.update_sums.resize(t.cut.pieces());
  }

  int64_t elements_of(const Tensor& t, int slot) const {
    const auto& m = t.gradient;
    const bool is_row = means_ == 2 && slot == 1;
    const bool is_column = means_ == 2 && slot == 2;
    return m.count * (is_column ? 1 : m.rows) * (is_row ? 1 : m.columns);
  }

  static void make_contiguous(Slot& slot) {
    const auto copy = [&](auto* out) {
      using T = std::remove_pointer_t<decltype(out)>;
      copy_strided(*slot.walk, 0, reinterpret_cast<const T*>(slot.source.data),
                   out);
    };
    if (slot.source.itemsize == 4) {
      copy(reinterpret_cast<uint32_t*>(slot.target.data));
    } else {
      copy(reinterpret_cast<uint16_t*>(slot.target.data));
    }
    slot.source = slot.target;
    slot.walk.reset();
  }

  // A pass over the pieces of all tensors.
  void run(size_t elements, Cut Tensor::* cut,
           void (Task::*pass)(Tensor&, int64_t) const) {
    std::vector<size_t> counts;
    for (const auto& tensor : tensors_) {
      counts.push_back(tensor.is_skipped ? 0 : (tensor.*cut).pieces());
    }
    for_each_piece(counts, elements, [&](size_t, size_t tensor, size_t piece) {
      (this->*pass)(tensors_[tensor], piece);
    });
  }
  void run_all(size_t elements, void (Task::*pass)(Tensor&) const) {
    std::vector<size_t> counts;
    for (const auto& tensor : tensors_) {
      counts.push_back(tensor.is_skipped ? 0 : 1);
    }
    for_each_piece(counts, elements, [&](size_t, size_t tensor, size_t) {
      (this->*pass)(tensors_[tensor]);
    });
  }

  // The squares of a piece of the gradient by rows and columns; and those of as
  // large a part of the parameter, whichever elements these are.
  void sum_squares(Tensor& t, int64_t piece) const {
    alignas(64) float buffer[segment];
    const auto& m = t.walked;
    t.cut.each(
        piece, [&](int64_t matrix, int64_t band, int64_t row, int64_t end) {
          double* columns =
              t.band_sums.data() + (matrix * t.cut.bands + band) * m.columns;
          for (; row < end; ++row) {
            double sum = 0;
            for (int64_t column = 0; column < m.columns; column += segment) {
              const int64_t n = std::min(segment, m.columns - column);
              const float* g = m.load(matrix, row, column, n, t.scale, buffer);
              sum += cpu::loops().sum_squares(g, n, columns + column);
            }
            t.down[matrix * m.rows + row] = static_cast<float>(sum);
          }
        });
    if (t.rule.scale_parameter.value == 0) {
      return;
    }
    const int64_t share = (t.size + t.cut.pieces() - 1) / t.cut.pieces();
    const int64_t end = std::min(t.size, (piece + 1) * share);
    double sum = 0;
    for (int64_t i = piece * share; i < end; i += segment) {
      const int64_t n = std::min(segment, end - i);
      const float* p = load(t.slots[0].source, i, n, buffer);
      sum += cpu::loops().sum_squares(p, n, nullptr);
    }
    t.parameter_sums[piece] = sum;
  }

  void update_means(Tensor& t) const {
    const auto& m = t.walked;
    for (int64_t matrix = 0; matrix < m.count; ++matrix) {
      double* sums = t.band_sums.data() + matrix * t.cut.bands * m.columns;
      for (int64_t i = 1; i < t.cut.bands; ++i) {
        const double* band = sums + i * m.columns;
        for (int64_t j = 0; j < m.columns; ++j) {
          sums[j] += band[j];
        }
      }
      std::copy_n(sums, m.columns, t.across.data() + matrix * m.columns);
    }
    const auto& g = t.gradient;
    update_mean(t, means_, g.columns, g.rows, t.column_factors());
    if (means_ == 1) {
      t.down[0] = 1;
      return;
    }
    auto& rows = t.row_factors();
    update_mean(t, 1, g.rows, g.columns, rows);
  }

  // A slot's running means of so many sums, each of `size` squares: they become
  // factors, for rows times the root of the mean.
  void update_mean(Tensor& t, int slot, int64_t count, int64_t size,
                   std::vector<float>& sums) const {
    alignas(64) float buffer[segment];
    const auto& [source, target, walk] = t.slots[slot];
    const bool is_row = means_ == 2 && slot == 1;
    for (int64_t matrix = 0; matrix < t.gradient.count; ++matrix) {
      double sum = 0;
      const int64_t start = matrix * count;
      for (int64_t i = 0; i < count; i += segment) {
        const int64_t n = std::min(segment, count - i);
        const float* before = load(source, start + i, n, buffer);
        float* after = destination(target, start + i, buffer);
        float* values = sums.data() + start + i;
        for (int64_t j = 0; j < n; ++j) {
          const float mean = t.rule.running_mean(
              before[j], values[j] / static_cast<float>(size));
          after[j] = mean;
          sum += mean;
          values[j] = t.rule.factor(mean);
        }
        if (target.dtype == mx::Dtype::Val::float16) {
          for (int64_t j = 0; j < n; ++j) {
            after[j] = smaller(most_of_float16, after[j]);
          }
        }
        store(target, start + i, n, after);
      }
      if (is_row) {
        const float root = square_root(static_cast<float>(sum / count));
        for (int64_t i = 0; i < count; ++i) {
          sums[start + i] *= root;
        }
      }
    }
  }

  void sum_update_squares(Tensor& t, int64_t piece) const {
    alignas(64) float buffer[segment];
    const auto& m = t.walked;
    double sum = 0;
    t.cut.each(piece, [&](int64_t matrix, int64_t, int64_t row, int64_t end) {
      for (; row < end; ++row) {
        const float down = t.down[matrix * m.rows + row];
        for (int64_t column = 0; column < m.columns; column += segment) {
          const int64_t n = std::min(segment, m.columns - column);
          const float* g = m.load(matrix, row, column, n, t.scale, buffer);
          const float* across = t.across.data() + matrix * m.columns + column;
          sum += cpu::loops().sum_direction(down, across, g, n);
        }
      }
    });
    t.update_sums[piece] = sum;
  }

  static float mean_of(const std::vector<double>& sums, int64_t size) {
    double sum = 0;
    for (const double x : sums) {
      sum += x;
    }
    return static_cast<float>(sum / static_cast<double>(size));
  }

  static void finish_sums(Tensor& t) {
    t.scaled_rate = t.rule.scaled_rate(mean_of(t.parameter_sums, t.size));
    t.clipped_rate =
        t.rule.clipped(t.scaled_rate, mean_of(t.update_sums, t.size));
  }

  void write(Tensor& t, int64_t piece) const {
    const auto& m = t.gradient;
    const bool is_turned = m.is_transposed() && m.rows >= worth_turning &&
                           m.columns >= worth_turning;
    alignas(64) char block[turned_rows * segment * sizeof(float)];
    alignas(64) float buffer[segment];
    t.write_cut.each(piece, [&](int64_t matrix, int64_t, int64_t first,
                                int64_t end) {
      for (int64_t top = first; top < end; top += turned_rows) {
        const int64_t rows = std::min(turned_rows, end - top);
        for (int64_t column = 0; column < m.columns; column += segment) {
          const int64_t n = std::min(segment, m.columns - column);
          if (is_turned) {
            const int64_t at = m.place(matrix) + top + column * m.column_stride;
            cpu::loops().turn(m.memory.itemsize, m.memory.at(at),
                              /*next=*/nullptr, m.column_stride, rows, n,
                              block);
          }
          Memory turned = m.memory;
          turned.data = block;
          for (int64_t i = 0; i < rows; ++i) {
            const float* g =
                is_turned ? Matrices::scaled(load(turned, i * n, n, buffer), n,
                                             t.scale, buffer)
                          : m.load(matrix, top + i, column, n, t.scale, buffer);
            write_row(t, matrix, top + i, column, n, g);
          }
        }
      }
    });
  }

  void write_row(Tensor& t, int64_t matrix, int64_t row, int64_t column,
                 int64_t n, const float* g) const {
    alignas(64) float p[segment], exp_avg[segment];
    const auto& m = t.gradient;
    const int64_t start = (matrix * m.rows + row) * m.columns + column;
    const float row_factor = t.row_factors()[matrix * m.rows + row];
    const float* factors =
        t.column_factors().data() + matrix * m.columns + column;
    const auto& parameter = t.slots[0];
    cpu::FactoredRow arrays{t.numbers,
                            row_factor,
                            factors,
                            g,
                            t.clipped_rate,
                            t.scaled_rate,
                            load(parameter.source, start, n, p),
                            destination(parameter.target, start, p),
                            nullptr,
                            nullptr};
    if (has_moment_) {
      const auto& moment = t.slots[means_ + 1];
      arrays.moment = load(moment.source, start, n, exp_avg);
      arrays.new_moment = destination(moment.target, start, exp_avg);
      cpu::loops().write_factored(arrays, n);
      store(moment.target, start, n, arrays.new_moment);
    } else {
      cpu::loops().write_factored(arrays, n);
    }
    store(parameter.target, start, n, arrays.new_parameter);
  }

  int means_;
  bool has_moment_;
  std::vector<Entry> entries_;
  std::vector<std::vector<float>> numbers_;  // of each set
  Scalar<float> rate_ = {}, scale_ = {};
  Scalar<uint64_t> step_ = {};
  Scalar<bool> skip_ = {};
  std::vector<Tensor> tensors_;
  std::vector<std::shared_ptr<mx::array::Data>> held_;
};

}  // namespace

std::function<void()> factored_task(const GroupUpdate& update,
                                    const Arrays& inputs, const Arrays& outputs,
                                    const Placement& placement) {
  return [task = std::make_shared<Task>(update, inputs, outputs, placement)] {
    (*task)();
  };
}

}  // namespace mlx_fused
