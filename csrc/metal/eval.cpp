// eval_gpu: pipelines, buffers, launches.
#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "../primitives.h"
#include "backend.h"
#include "launch.h"
#include "metal_sources.h"
#include "mlx/allocator.h"
#include "mlx/backend/metal/device.h"

namespace mlx_fused {

namespace {

// Tensors that a launch of the first stage of the norm takes.
constexpr size_t max_norm_group_size = 24;
// Threads of the second stage's only threadgroup, where the device allows them.
constexpr size_t norm_threads = 1024;
// Metal takes less than 4 KiB of constant bytes.
constexpr size_t max_walk_entries = 4096 / sizeof(int64_t) - 1;

std::string metal_type(mx::Dtype dtype) {
  return dtype == mx::float32   ? "float"
         : dtype == mx::float16 ? "half"
                                : "bfloat";
}

// The pipeline of source's kernel template for these arguments, compiled when
// first needed; without arguments, the plain kernel of that name.
MTL::ComputePipelineState* pipeline(mx::Stream stream,
                                    const std::string& source,
                                    const std::string& kernel,
                                    const std::vector<std::string>& arguments) {
  std::string name = kernel;
  std::string list;
  for (const auto& argument : arguments) {
    name += "_" + argument;
    list += (list.empty() ? "" : ", ") + argument;
  }
  const auto build = [&] {
    if (arguments.empty()) {
      return source;
    }
    const std::string instance = kernel + "<" + list + ">";
    return source + "\ntemplate [[host_name(\"" + name +
           "\")]] [[kernel]] decltype(" + instance + ") " + instance + ";\n";
  };
  try {
    auto& device = mx::metal::device(stream.device);
    auto* state =
        device.get_kernel(name, device.get_library("mlx_fused_" + name, build));
    if (state->maxTotalThreadsPerThreadgroup() < tile_threads) {
      throw std::runtime_error("the device allows too few threads for it.");
    }
    return state;
  } catch (const std::exception& error) {
    throw KernelError("[mlx_fused_optimizers] Metal kernel " + name +
                      " cannot be built: " + error.what());
  }
}

// The constant arguments that describe a launch's tensors.
class Launch {
 public:
  // False if there is no room left to describe the gradient's strides.
  bool add(const mx::array& gradient, bool vectorized) {
    LaunchTensor tensor{static_cast<int64_t>(gradient.size()), tiles_,
                        vectorized, 0, static_cast<uint32_t>(walks_.size())};
    if (!gradient.flags().row_contiguous) {
      const auto walk = collapse(gradient);
      if (walks_.size() + 2 * walk.shape.size() > max_walk_entries) {
        return false;
      }
      tensor.dimensions = walk.shape.size();
      walks_.insert(walks_.end(), walk.shape.begin(), walk.shape.end());
      walks_.insert(walks_.end(), walk.strides.begin(), walk.strides.end());
    }
    tiles_ += (gradient.size() + tile_size - 1) / tile_size;
    tensors_.push_back(tensor);
    return true;
  }

  bool empty() const { return tensors_.empty(); }
  uint32_t count() const { return tensors_.size(); }
  uint32_t tiles() const { return tiles_; }

  void bind(mx::metal::CommandEncoder& encoder, int tensors, int count,
            int walks) const {
    encoder.set_vector_bytes(tensors_, tensors);
    encoder.set_bytes(this->count(), count);
    encoder.set_vector_bytes(walks_, walks);
  }

 private:
  std::vector<LaunchTensor> tensors_;
  std::vector<int64_t> walks_;
  uint32_t tiles_ = 0;
};

// Buffers start at a multiple of 16 bytes; views of them may not.
bool is_vectorizable(const mx::array& a) {
  return a.offset() % (vector_size * static_cast<int64_t>(a.itemsize())) == 0;
}

void copy_array(const mx::array& in, mx::array& out, mx::Stream stream) {
  auto* kernel = pipeline(stream, copy_array_source, "copy_array",
                          {metal_type(in.dtype())});
  const auto walk = collapse(in);
  LaunchTensor tensor{static_cast<int64_t>(in.size()), 0, 0,
                      static_cast<uint32_t>(walk.shape.size()), 0};
  auto entries = walk.shape;
  entries.insert(entries.end(), walk.strides.begin(), walk.strides.end());
  auto& encoder = mx::metal::get_command_encoder(stream);
  encoder.set_compute_pipeline_state(kernel);
  encoder.set_input_array(in, 0);
  encoder.set_output_array(out, 1);
  encoder.set_bytes(tensor, 2);
  encoder.set_vector_bytes(entries, 3);
  encoder.dispatch_threadgroups(
      MTL::Size((in.size() + tile_size - 1) / tile_size, 1, 1),
      MTL::Size(tile_threads, 1, 1));
}

// The gradient itself, or a contiguous copy if its strides do not fit.
mx::array add_gradient(Launch& launch, const mx::array& gradient,
                       bool vectorized, mx::Stream stream) {
  if (launch.add(gradient, vectorized)) {
    return gradient;
  }
  mx::array copied(gradient.shape(), gradient.dtype(), nullptr, {});
  allocate(copied);
  copy_array(gradient, copied, stream);
  mx::metal::get_command_encoder(stream).add_temporary(copied);
  launch.add(copied, vectorized);
  return copied;
}

}  // namespace

void FusedUpdate::eval_gpu(const std::vector<mx::array>& inputs,
                           std::vector<mx::array>& outputs) {
  if (is_placed(outputs)) {
    return;
  }
  const auto& rule = traits(rule_);
  std::vector<std::string> arguments = {rule.type};
  arguments.push_back(metal_type(outputs[0].dtype()));
  if (layout_.reads_gradient) {
    arguments.push_back(metal_type(inputs[layout_.gradient(0)].dtype()));
  }
  if (layout_.states > 0) {
    arguments.push_back(metal_type(outputs[1].dtype()));
  }
  const std::string name =
      layout_.reads_gradient ? "fused_update_" + std::to_string(layout_.states)
                             : "fused_update_no_gradient";
  auto* kernel = pipeline(stream(), fused_update_source, name, arguments);
  for (size_t i = 1; i < arguments.size(); ++i) {
    pipeline(stream(), copy_array_source, "copy_array", {arguments[i]});
  }
  // MLX throws an earlier error of the stream here, not in later calls.
  auto& encoder = mx::metal::get_command_encoder(stream());
  encoder.set_compute_pipeline_state(kernel);
  Placement placement(inputs, outputs, layout_);
  // What each tensor's parameter is read from.
  std::vector<mx::array> old;
  for (int tensor = 0; tensor < layout_.tensors; ++tensor) {
    old.push_back(placement.target(tensor, 0));
    for (int k = 0; k < layout_.outputs_each(); ++k) {
      const auto& in = inputs[layout_.input(tensor, k)];
      if (placement.in_place(tensor, k) || in.size() == 0) {
        continue;
      }
      if (k == 0 && in.flags().row_contiguous) {
        old.back() = in;
      } else {
        copy_array(in, placement.target(tensor, k), stream());
      }
    }
  }

  Launch launch;
  std::vector<int> tensors;  // those that are not empty
  std::vector<mx::array> gradients;
  for (int tensor = 0; tensor < layout_.tensors; ++tensor) {
    if (old[tensor].size() == 0) {
      continue;
    }
    bool vectorized = is_vectorizable(old[tensor]);
    for (int k = 0; k < layout_.outputs_each(); ++k) {
      vectorized = vectorized && is_vectorizable(placement.target(tensor, k));
    }
    const auto& gradient = layout_.reads_gradient
                               ? inputs[layout_.gradient(tensor)]
                               : placement.target(tensor, 0);
    vectorized = vectorized && is_vectorizable(gradient);
    gradients.push_back(add_gradient(launch, gradient, vectorized, stream()));
    tensors.push_back(tensor);
  }
  if (launch.empty()) {
    placement.commit();
    return;
  }

  encoder.set_compute_pipeline_state(kernel);
  const int places = max_group_size(layout_.states);
  for (int place = 0, index = 0; place < places; ++place) {
    // Places left over are bound to the first tensor and never read.
    const size_t i = place < static_cast<int>(tensors.size()) ? place : 0;
    encoder.set_input_array(old[tensors[i]], index++);
    for (int k = 0; k < layout_.outputs_each(); ++k) {
      encoder.set_output_array(placement.target(tensors[i], k), index++);
    }
    if (layout_.reads_gradient) {
      encoder.set_input_array(gradients[i], index++);
    }
  }
  encoder.set_input_array(inputs[layout_.learning_rate()], 24);
  encoder.set_input_array(inputs[layout_.step()], 25);
  if (layout_.scaled) {
    encoder.set_input_array(inputs[layout_.gradient_scale()], 26);
  } else {
    encoder.set_bytes(1.0f, 26);
  }
  encoder.set_vector_bytes(float_hyperparameters(), 27);
  launch.bind(encoder, 28, 29, 30);
  encoder.dispatch_threadgroups(MTL::Size(launch.tiles(), 1, 1),
                                MTL::Size(tile_threads, 1, 1));
  placement.commit();
}

void GlobalNorm::eval_gpu(const std::vector<mx::array>& inputs,
                          std::vector<mx::array>& outputs) {
  auto* final_kernel =
      pipeline(stream(), global_norm_source, "norm_and_factor", {});
  // A launch takes gradients of one dtype.
  std::map<mx::Dtype::Val, std::vector<mx::array>> by_dtype;
  size_t partial_count = 0;
  for (size_t i = 0; i + 1 < inputs.size(); ++i) {
    if (inputs[i].size() > 0) {
      by_dtype[inputs[i].dtype().val()].push_back(inputs[i]);
      partial_count += (inputs[i].size() + tile_size - 1) / tile_size;
    }
  }
  for (auto& output : outputs) {
    allocate(output);
  }
  // At least one, so that there is a buffer to bind when all arrays are empty.
  mx::array partials({static_cast<int>(std::max<size_t>(partial_count, 1))},
                     mx::float32, nullptr, {});
  allocate(partials);
  auto& encoder = mx::metal::get_command_encoder(stream());
  encoder.add_temporary(partials);

  uint32_t first_partial = 0;
  for (const auto& [dtype, arrays] : by_dtype) {
    auto* kernel = pipeline(stream(), global_norm_source, "sum_of_squares",
                            {metal_type(arrays[0].dtype())});
    for (size_t first = 0; first < arrays.size();
         first += max_norm_group_size) {
      const size_t count = std::min(max_norm_group_size, arrays.size() - first);
      Launch launch;
      std::vector<mx::array> group;
      for (size_t i = first; i < first + count; ++i) {
        group.push_back(add_gradient(launch, arrays[i],
                                     is_vectorizable(arrays[i]), stream()));
      }
      encoder.set_compute_pipeline_state(kernel);
      for (size_t place = 0; place < max_norm_group_size; ++place) {
        encoder.set_input_array(group[place < count ? place : 0], place);
      }
      encoder.set_output_array(partials, 24);
      encoder.set_bytes(first_partial, 25);
      launch.bind(encoder, 26, 27, 28);
      encoder.dispatch_threadgroups(MTL::Size(launch.tiles(), 1, 1),
                                    MTL::Size(tile_threads, 1, 1));
      first_partial += launch.tiles();
    }
  }

  const size_t threads = std::min<size_t>(
      norm_threads, final_kernel->maxTotalThreadsPerThreadgroup());
  encoder.set_compute_pipeline_state(final_kernel);
  encoder.set_input_array(partials, 0);
  encoder.set_bytes(first_partial, 1);
  encoder.set_input_array(inputs.back(), 2);
  encoder.set_output_array(outputs[0], 3);
  encoder.set_output_array(outputs[1], 4);
  encoder.dispatch_threadgroups(MTL::Size(1, 1, 1), MTL::Size(threads, 1, 1));
}

}  // namespace mlx_fused
