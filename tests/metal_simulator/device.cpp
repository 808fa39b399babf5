#include "mlx/backend/metal/device.h"

#include "../../csrc/mlx_compat.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/scheduler.h"

namespace MTL {

simulator::Library& Library::kernels() {
  std::lock_guard lock(mutex_);
  const bool unkind = simulator::is_unkind();
  auto& kernels = kernels_[unkind];
  if (!kernels) {
    kernels = simulator::Library::compile(source_, name_, unkind);
  }
  return *kernels;
}

ComputePipelineState* Library::pipeline(const std::string& name) {
  kernels().kernel(name);  // throws if there is none
  std::lock_guard lock(mutex_);
  auto& pipeline = pipelines_[name];
  if (!pipeline) {
    pipeline = std::make_unique<ComputePipelineState>(this, name);
  }
  return pipeline.get();
}

NS::UInteger ComputePipelineState::maxTotalThreadsPerThreadgroup() const {
  return simulator::max_threads();
}

const simulator::Kernel* ComputePipelineState::kernel() const {
  return library_->kernels().kernel(name_);
}

}  // namespace MTL

namespace mlx::core::metal {

void CommandEncoder::bind(const array& a, int idx, int64_t offset,
                          bool writable) {
  // The elements that the view reaches, backwards and forwards of its first.
  int64_t first = 0;
  int64_t end = a.size() == 0 ? 0 : 1;
  for (int d = 0; a.size() != 0 && d < static_cast<int>(a.ndim()); ++d) {
    const int64_t reach = (a.shape(d) - 1) * a.strides(d);
    (reach < 0 ? first : end) += reach;
  }
  const int64_t item = a.itemsize();
  auto* data = const_cast<char*>(a.data<char>()) + offset;
  encoder_.bind(idx, {.copy = nullptr,
                      .array = a.data_shared_ptr(),
                      .data = data,
                      .before = static_cast<size_t>(-first * item),
                      .bytes = static_cast<size_t>(end * item - offset),
                      .offset = static_cast<size_t>(a.offset() + offset),
                      .writable = writable});
}

void CommandEncoder::set_input_array(const array& a, int idx, int64_t offset) {
  bind(a, idx, offset, false);
  hazards_.touch(a.data_shared_ptr());
}

void CommandEncoder::set_output_array(array& a, int idx, int64_t offset) {
  bind(a, idx, offset, true);
  hazards_.touch(a.data_shared_ptr());
  register_output_array(a);
}

void CommandEncoder::register_output_array(const array& a) {
  hazards_.write(a.data_shared_ptr());
}

// MLX lets go of these in a task after those of the primitive.
void CommandEncoder::add_temporary(array arr) {
  cpu::get_command_encoder(stream_).add_temporary(std::move(arr));
}

void CommandEncoder::add_temporaries(std::vector<array> arrays) {
  cpu::get_command_encoder(stream_).add_temporaries(std::move(arrays));
}

void CommandEncoder::maybeInsertBarrier() {
  if (hazards_.launch()) {
    barrier();
  }
}

void CommandEncoder::barrier() {
  ++epoch_;
  simulator::count_barrier();
}

void CommandEncoder::end_encoding() {
  ++epoch_;
  hazards_.end_encoding();
}

void CommandEncoder::dispatch_threadgroups(MTL::Size grid_dims,
                                           MTL::Size group_dims) {
  maybeInsertBarrier();
  enqueue(encoder_.dispatch_threadgroups(
      {grid_dims.width, grid_dims.height, grid_dims.depth},
      {group_dims.width, group_dims.height, group_dims.depth}));
}

void CommandEncoder::dispatch_threads(MTL::Size grid_dims,
                                      MTL::Size group_dims) {
  maybeInsertBarrier();
  enqueue(encoder_.dispatch(
      {grid_dims.width, grid_dims.height, grid_dims.depth},
      {group_dims.width, group_dims.height, group_dims.depth}));
}

void CommandEncoder::enqueue(simulator::Launch launch) {
  launch.epoch = {this, epoch_};
  launch.barriers = simulator::barriers();
  const auto batch = batch_ ? batch_ : std::make_shared<simulator::Batch>();
  const size_t n = batch->add(std::move(launch));
  try {
    cpu::get_command_encoder(stream_).dispatch([batch, n] {
      try {
        batch->run(n);
      } catch (const std::exception& error) {
        simulator::keep_error(error.what());
        throw;
      }
    });
  } catch (...) {
    batch->remove_last();
    throw;
  }
  if (!batch_) {
    batch->close();
  }
}

Evaluation::Evaluation(Stream stream) : encoder_(get_command_encoder(stream)) {
  // As MLX does where a primitive begins to encode.
  mlx_fused::check_error(scheduler::scheduler(), stream);
  if (const auto encoding = simulator::encoding();
      std::exchange(encoder_.encoding_, encoding) != encoding) {
    encoder_.end_encoding();
  }
  encoder_.batch_ = std::make_shared<simulator::Batch>();
}

Evaluation::~Evaluation() { std::exchange(encoder_.batch_, nullptr)->close(); }

MTL::Library* Device::get_library(
    const std::string& name, const CompileOptions&,
    const std::function<std::string(void)>& builder) {
  std::lock_guard lock(mutex_);
  auto& library = libraries_[name];
  if (!library) {
    auto compiled = std::make_unique<MTL::Library>(name, builder());
    compiled->kernels();  // throws if it does not compile
    library = std::move(compiled);
  }
  return library.get();
}

void Device::clear_library(const std::string& name) {
  std::lock_guard lock(mutex_);
  if (auto node = libraries_.extract(name)) {
    cleared_.push_back(std::move(node.mapped()));
  }
}

MTL::ComputePipelineState* Device::get_kernel(const std::string& base_name,
                                              MTL::Library* mtl_lib) {
  return mtl_lib->pipeline(base_name);
}

Device& device(mlx::core::Device) {
  static Device device;
  return device;
}

CommandEncoder& get_command_encoder(Stream s) {
  static std::mutex mutex;
  static std::map<int, CommandEncoder> encoders;
  std::lock_guard lock(mutex);
  return encoders.try_emplace(s.index, s).first->second;
}

}  // namespace mlx::core::metal
