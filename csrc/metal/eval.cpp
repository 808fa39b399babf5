// eval_gpu: pipelines, buffers, launches.
#include <algorithm>
#include <array>
#include <cstdlib>
#include <limits>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "graph/fused_update.h"
#include "graph/placement.h"
#include "graph/sums_of_squares.h"
#include "metal/backend.h"
#include "metal/encode.h"
#include "metal/factored.h"
#include "metal/kernel_source.h"
#include "metal/launch.h"
#include "metal_sources.h"
#include "mlx/backend/metal/device.h"
#include "strides.h"

namespace mlx_fused {

namespace {

// Threads of the second stage of the sums, where the device allows them.
constexpr size_t sums_threads = 1024;
// Metal takes less than 4 KiB of constant bytes.
constexpr size_t max_walk_entries = 4096 / sizeof(int64_t) - 1;

}  // namespace

Pipeline build(mx::Stream stream, const std::string& name,
               const std::function<std::string()>& source) {
  try {
    auto& device = mx::metal::device(stream.device);
    auto* pipeline = device.get_kernel(
        name, device.get_library("mlx_fused_" + name, source));
    if (pipeline->maxTotalThreadsPerThreadgroup() < tile_threads) {
      throw std::runtime_error("the device allows too few threads for it.");
    }
    return pipeline;
  } catch (const std::exception& error) {
    throw KernelError("[mlx_fused_optimizers] Metal kernel " + name +
                      " cannot be built: " + error.what());
  }
}

namespace {

// A kernel of an update, found again without its name.
Pipeline pipeline(mx::Stream stream, const UpdateKernel& kernel) {
  using Held = std::vector<std::pair<mx::Dtype::Val, Storage>>;
  using Key = std::tuple<const RuleTraits*, Held, bool, bool>;
  static std::mutex mutex;
  static std::map<Key, Pipeline> built;
  const auto& layout = kernel.layout;
  Key key{layout.rule, {}, kernel.separate_states, kernel.stages_gradient};
  for (const auto& format : layout.formats) {
    std::get<1>(key).emplace_back(format.dtype.val(), format.storage);
  }
  const std::lock_guard lock(mutex);
  auto& known = built[key];
  if (!known) {
    known = build(stream, kernel.name(), [&] { return kernel.source(); });
  }
  return known;
}

Pipeline copy_pipeline(mx::Stream stream, mx::Dtype dtype) {
  const auto type = metal_type(dtype);
  return build(stream, "copy_array_" + type, [&] {
    return copy_array_source + "\ntemplate [[host_name(\"copy_array_" + type +
           "\")]] [[kernel]] decltype(copy_array<" + type + ">) copy_array<" +
           type + ">;\n";
  });
}

size_t divided_up(size_t a, size_t b) { return (a + b - 1) / b; }

// Matrices with fewer rows or columns are not worth a block.
constexpr int64_t worth_staging = 16;

// How a launch reads an array: each element by its row-major index; in blocks
// where it is transposed; or in whatever order its memory has.
enum class Reading { by_index, staged, any_order };

// The constant arguments that describe a launch's tensors.
class Launch {
 public:
  explicit Launch(BlockSize block = {64, 64}, bool has_codes = false)
      : block_(block), has_codes_(has_codes) {}

  // False if there is no room left to describe the gradient's strides. Columns
  // of a gradient that may be staged are read as vectors with those of the
  // other arrays, or none are.
  bool add(const mx::array& gradient, LaunchTensor tensor, Reading reading) {
    const size_t walk_start = walks_.size();
    const auto append = [&](const std::vector<int64_t>& entries) {
      walks_.insert(walks_.end(), entries.begin(), entries.end());
    };
    tensor.size = static_cast<int64_t>(gradient.size());
    tensor.first_tile = tiles_;
    tensor.walk = walk_start;
    size_t tiles = divided_up(gradient.size(), tile_size);
    if (!gradient.flags().row_contiguous &&
        !(reading == Reading::any_order && is_dense(gradient))) {
      const auto walk = collapse(gradient);
      const auto t = reading == Reading::staged
                         ? as_transposed(walk, worth_staging)
                         : std::nullopt;
      uint32_t staged_vectorized = tensor.vectorized;
      if (t) {
        append({t->rows, t->columns, t->row_stride, t->column_stride});
        append(t->matrices.shape);
        append(t->matrices.strides);
        append(t->matrix_strides);
        for (size_t i = walk_start; i < walks_.size(); ++i) {
          // Sizes count rows and columns, not elements, but where they are no
          // multiple of a vector, neither are the strides that count.
          const size_t sizes = walk_start + 4;
          const bool is_size =
              i == walk_start ||
              (i >= sizes && i < sizes + t->matrices.shape.size());
          staged_vectorized &= is_size || walks_[i] % vector_size == 0;
        }
      }
      // A row must begin with a block of codes, and its threads stand together.
      constexpr int64_t codes_block = 64;
      if (t && (!has_codes_ ||
                (staged_vectorized && t->columns % codes_block == 0))) {
        tensor.is_transposed = 1;
        tensor.dimensions = t->matrices.shape.size();
        tensor.vectorized = staged_vectorized;
        tiles = t->count() * divided_up(t->rows, block_.rows) *
                divided_up(t->columns, block_.columns);
      } else {
        walks_.resize(walk_start);
        tensor.dimensions = walk.shape.size();
        append(walk.shape);
        append(walk.strides);
        int64_t reach = 0;
        for (size_t d = 0; d < walk.shape.size(); ++d) {
          reach += (walk.shape[d] - 1) * std::abs(walk.strides[d]);
        }
        constexpr int64_t most = std::numeric_limits<int32_t>::max() - 4;
        tensor.is_narrow = reach < most && tensor.size < most;
      }
      if (walks_.size() > max_walk_entries) {
        walks_.resize(walk_start);
        return false;
      }
    }
    tiles_ += tiles;
    stages_gradient_ |= tensor.is_transposed;
    tensors_.push_back(tensor);
    return true;
  }

  bool stages_gradient() const { return stages_gradient_; }

  void dispatch(mx::metal::CommandEncoder& encoder, int tensors, int walks) {
    LaunchTensor end{};
    end.first_tile = tiles_;
    tensors_.push_back(end);
    encoder.set_vector_bytes(tensors_, tensors);
    encoder.set_vector_bytes(walks_, walks);
    encoder.dispatch_threadgroups(MTL::Size(tiles_, 1, 1),
                                  MTL::Size(tile_threads, 1, 1));
  }

 private:
  BlockSize block_;
  bool has_codes_;
  std::vector<LaunchTensor> tensors_;
  std::vector<int64_t> walks_;
  uint32_t tiles_ = 0;
  bool stages_gradient_ = false;
};

// Buffers start at a multiple of 16 bytes; views of them may not.
bool is_vectorizable(const mx::array& a) {
  return a.offset() % (vector_size * static_cast<int64_t>(a.itemsize())) == 0;
}

}  // namespace

void copy_array(const mx::array& in, mx::array& out, mx::Stream stream) {
  if (in.size() == 0) {
    return;  // Metal refuses a grid of no threads
  }
  const auto walk = collapse(in);
  LaunchTensor tensor{};
  tensor.size = static_cast<int64_t>(in.size());
  tensor.dimensions = walk.shape.size();
  auto entries = walk.shape;
  entries.insert(entries.end(), walk.strides.begin(), walk.strides.end());
  auto& encoder = mx::metal::get_command_encoder(stream);
  encoder.set_compute_pipeline_state(copy_pipeline(stream, in.dtype()));
  encoder.set_input_array(in, 0);
  encoder.set_output_array(out, 1);
  encoder.set_bytes(tensor, 2);
  encoder.set_vector_bytes(entries, 3);
  encoder.dispatch_threadgroups(
      MTL::Size((in.size() + tile_size - 1) / tile_size, 1, 1),
      MTL::Size(tile_threads, 1, 1));
}

namespace {

// The gradient itself, or a contiguous copy if its strides do not fit.
mx::array add_gradient(Launch& launch, const mx::array& gradient,
                       const LaunchTensor& tensor, Reading reading,
                       mx::Stream stream) {
  if (launch.add(gradient, tensor, reading)) {
    return gradient;
  }
  mx::array copied(gradient.shape(), gradient.dtype(), nullptr, {});
  allocate(copied);
  copy_array(gradient, copied, stream);
  mx::metal::get_command_encoder(stream).add_temporary(copied);
  launch.add(copied, tensor, reading);
  return copied;
}

}  // namespace

void FusedUpdate::eval_gpu(const Arrays& inputs, Arrays& outputs) {
  if (is_placed(outputs)) {
    return;
  }
  const auto& layout = *update_.layout;
  const auto& rule = *layout.rule;
  if (rule.is_factored()) {
    eval_factored(update_, inputs, outputs, stream());
    return;
  }
  UpdateKernel kernel{layout};
  pipeline(stream(), kernel);
  for (int i = 0; i < layout.input(layout.tensors, 0); ++i) {
    if (!inputs[i].flags().row_contiguous) {
      copy_pipeline(stream(), inputs[i].dtype());
    }
  }
  // MLX throws an earlier error of the stream here, not in later calls.
  auto& encoder = mx::metal::get_command_encoder(stream());
  Placement placement(inputs, outputs, layout, [&] { return inputs; });

  // Where each slot is read and written, by the numbers of the inputs.
  Arrays sources, targets;
  std::vector<int> tensors;  // that are not empty
  int output = 0;
  for (int tensor = 0; tensor < layout.tensors; ++tensor) {
    if (inputs[layout.gradient(tensor)].size() > 0) {
      tensors.push_back(tensor);
    }
    for (size_t i = 0; i < layout.parts.size(); ++i) {
      const auto& part = layout.parts[i];
      const auto& in = inputs[layout.input(tensor, static_cast<int>(i))];
      const auto role = rule.slots[part.slot].role;
      targets.push_back(part.is_written ? outputs[output] : in);
      if (!part.is_written && role != Role::gradient &&
          !in.flags().row_contiguous) {
        mx::array copied(in.shape(), in.dtype(), nullptr, {});
        allocate(copied);
        copy_array(in, copied, stream());
        encoder.add_temporary(copied);
        targets.back() = copied;
      }
      sources.push_back(targets.back());
      if (!part.is_written || placement.in_place(output++) || in.size() == 0 ||
          !part.is_read) {
        continue;
      }
      if (role == Role::gradient || in.flags().row_contiguous) {
        sources.back() = in;
        kernel.separate_states |= role == Role::state || part.is_companion;
      } else {
        copy_array(in, targets.back(), stream());
      }
    }
  }

  std::vector<float> all_numbers = {0};  // Metal binds no empty argument
  std::vector<uint32_t> first_number;
  for (const auto& set : *update_.sets) {
    const auto of_set = numbers(set);
    first_number.push_back(all_numbers.size());
    all_numbers.insert(all_numbers.end(), of_set.begin(), of_set.end());
  }
  std::array<uint32_t, scalar_count> strides{};
  for (int kind = 0; kind < scalar_count; ++kind) {
    const int input = layout.input(static_cast<Scalar>(kind));
    if (input >= 0 && update_.per_tensor && inputs[input].size() > 1) {
      strides[kind] = inputs[input].strides(0);
    }
  }
  const size_t places = kernel.tensors_per_launch();
  for (size_t first = 0; first < tensors.size(); first += places) {
    const size_t count = std::min(places, tensors.size() - first);
    Launch launch(kernel.block_size(), kernel.layout.has_codes());
    Arrays gradients;
    for (size_t i = first; i < first + count; ++i) {
      const int tensor = tensors[i];
      const auto& entry = update_.entries[tensor];
      LaunchTensor description{};
      description.vectorized = 1;
      for (int i = layout.input(tensor, 0); i < layout.input(tensor + 1, 0);
           ++i) {
        description.vectorized &=
            is_vectorizable(sources[i]) && is_vectorizable(targets[i]);
      }
      description.number = entry.numbers.tensor;
      description.first = static_cast<int64_t>(entry.numbers.first);
      description.numbers = first_number[entry.hyperparameters];
      for (int kind = 0; kind < seed; ++kind) {
        description.scalars[kind] = strides[kind] * entry.scalar;
      }
      gradients.push_back(add_gradient(
          launch, sources[layout.gradient(tensor)], description,
          layout.slots() == 1 ? Reading::any_order : Reading::staged,
          stream()));
    }
    kernel.stages_gradient = launch.stages_gradient();
    encoder.set_compute_pipeline_state(pipeline(stream(), kernel));
    for (size_t place = 0, index = 0; place < places; ++place) {
      // Places left over are bound to the first tensor and never read.
      const size_t i = place < count ? place : 0;
      const int tensor = tensors[first + i];
      for (int input = layout.input(tensor, 0);
           input < layout.input(tensor + 1, 0); ++input) {
        const auto& part = layout.parts[input - layout.input(tensor, 0)];
        if (!part.is_written || kernel.is_separate(part)) {
          encoder.set_input_array(
              input == layout.gradient(tensor) ? gradients[i] : sources[input],
              index++);
        }
        if (part.is_written) {
          encoder.set_output_array(targets[input], index++);
        }
      }
    }
    for (int kind = 0; kind < scalar_count; ++kind) {
      const auto scalar = static_cast<Scalar>(kind);
      if (layout.has[kind]) {
        encoder.set_input_array(inputs[layout.input(scalar)],
                                buffer_of_scalar(scalar));
      } else if (scalar == gradient_scale) {
        encoder.set_bytes(1.0f, buffer_of_scalar(scalar));
      } else if (scalar == skip) {
        encoder.set_bytes(false, buffer_of_scalar(scalar));
      }
    }
    encoder.set_vector_bytes(all_numbers, numbers_buffer);
    launch.dispatch(encoder, tensors_buffer, walks_buffer);
  }
  placement.commit();
}

void SumsOfSquares::eval_gpu(const Arrays& inputs, Arrays& outputs) {
  const auto& s = stream();
  auto* last_kernel = build(s, "sums_and_norm", [] { return sums_source; });
  // A launch takes arrays of one dtype.
  std::map<mx::Dtype::Val, std::vector<size_t>> by_dtype;
  const size_t count = inputs.size() - 1;
  std::vector<uint32_t> first = {0};  // partial sum of each array
  for (size_t i = 0; i < count; ++i) {
    if (inputs[i].size() > 0) {
      by_dtype[inputs[i].dtype().val()].push_back(i);
    }
    first.push_back(first.back() +
                    (inputs[i].size() + tile_size - 1) / tile_size);
  }
  for (auto& output : outputs) {
    allocate(output);
  }
  // At least one, so that there is a buffer to bind when all arrays are empty.
  mx::array partials({2 * static_cast<int>(std::max(first.back(), 1u))},
                     mx::float32, nullptr, {});
  allocate(partials);
  mx::array firsts({static_cast<int>(count) + 1}, mx::uint32, nullptr, {});
  allocate(firsts);
  std::copy(first.begin(), first.end(), firsts.data<uint32_t>());
  auto& encoder = mx::metal::get_command_encoder(s);
  encoder.add_temporary(partials);
  encoder.add_temporary(firsts);

  // The launches of the first stage write to different places: no barrier
  // between them. Copies come before all of them.
  struct FirstStage {
    Pipeline kernel;
    Launch launch;
    Arrays group;
  };
  std::vector<FirstStage> stage;
  for (const auto& [val, indices] : by_dtype) {
    const auto dtype = inputs[indices[0]].dtype();
    auto* kernel = build(s, sums_kernel_name(dtype, counts_),
                         [&] { return sums_kernel_source(dtype, counts_); });
    for (size_t start = 0; start < indices.size(); start += max_sums_group) {
      auto& [_, launch, group] = stage.emplace_back();
      stage.back().kernel = kernel;
      const size_t end = std::min(indices.size(), start + max_sums_group);
      for (size_t i = start; i < end; ++i) {
        const auto& in = inputs[indices[i]];
        LaunchTensor description{};
        description.vectorized = is_vectorizable(in);
        description.first_partial = first[indices[i]];
        group.push_back(
            add_gradient(launch, in, description, Reading::any_order, s));
      }
    }
  }
  {
    const auto concurrent = encoder.start_concurrent();
    for (auto& [kernel, launch, group] : stage) {
      encoder.set_compute_pipeline_state(kernel);
      for (size_t place = 0; place < max_sums_group; ++place) {
        encoder.set_input_array(group[place < group.size() ? place : 0], place);
      }
      encoder.set_output_array(partials, partials_buffer);
      launch.dispatch(encoder, sums_tensors, sums_walks);
    }
  }

  const size_t threads = std::min<size_t>(
      sums_threads, last_kernel->maxTotalThreadsPerThreadgroup());
  encoder.set_compute_pipeline_state(last_kernel);
  encoder.set_input_array(partials, 0);
  encoder.set_input_array(firsts, 1);
  encoder.set_bytes(static_cast<uint32_t>(count), 2);
  encoder.set_input_array(inputs.back(), 3);
  for (int i = 0; i < 4; ++i) {
    encoder.set_output_array(outputs[i], 4 + i);
  }
  encoder.dispatch_threadgroups(MTL::Size(1, 1, 1), MTL::Size(threads, 1, 1));
}

}  // namespace mlx_fused
