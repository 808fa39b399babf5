// Stands in for MLX's header of this name, so that host code for Metal compiles
// unchanged on Linux. The stream is one of the CPU: a dispatch becomes a task
// there, in order with MLX's own work, and an error of the kernel surfaces in
// mx.eval as errors of other tasks do.
//
// Only what host code of custom primitives needs is here, with the signatures
// of MLX 0.32.4. Its barriers need nothing: launches run one after the other.

#pragma once

#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "mlx/array.h"
#include "mlx/device.h"
#include "mlx/stream.h"
#include "mlx/utils.h"
#include "simulator.h"

#if __has_include("mlx/backend/common/metal_kernel.h")
#include "mlx/backend/common/metal_kernel.h"
#else  // MLX 0.31.2
namespace mlx::core {
struct CompileOptions {};
}  // namespace mlx::core
#endif

namespace NS {
using UInteger = unsigned long;
}

namespace MTL {

struct Size {
  NS::UInteger width;
  NS::UInteger height;
  NS::UInteger depth;

  Size() = default;
  Size(NS::UInteger width, NS::UInteger height, NS::UInteger depth)
      : width(width), height(height), depth(depth) {}
  static Size Make(NS::UInteger width, NS::UInteger height,
                   NS::UInteger depth) {
    return Size(width, height, depth);
  }
};

class ComputePipelineState {
 public:
  explicit ComputePipelineState(const simulator::Kernel* kernel)
      : kernel(kernel) {}
  NS::UInteger maxTotalThreadsPerThreadgroup() const {
    return simulator::max_threads_per_threadgroup;
  }
  NS::UInteger threadExecutionWidth() const {
    return simulator::simdgroup_size;
  }

  const simulator::Kernel* kernel;
};

struct Library {
  std::unique_ptr<simulator::Library> kernels;
  std::map<std::string, std::unique_ptr<ComputePipelineState>> pipelines;
};

}  // namespace MTL

namespace mlx::core::metal {

class CommandEncoder {
 public:
  explicit CommandEncoder(Stream stream) : stream_(stream) {}
  CommandEncoder(const CommandEncoder&) = delete;
  CommandEncoder& operator=(const CommandEncoder&) = delete;

  // Binds an array at an index. A kernel may write those bound as outputs only,
  // and touch no byte outside of the array, whatever its buffer's size.
  void set_input_array(const array& a, int idx, int64_t offset = 0);
  void set_output_array(array& a, int idx, int64_t offset = 0);
  void register_output_array(const array&) {}

  // Keeps the array alive until the launches so far have run.
  void add_temporary(array arr);
  void add_temporaries(std::vector<array> arrays);

  void dispatch_threadgroups(MTL::Size grid_dims, MTL::Size group_dims);
  void dispatch_threads(MTL::Size grid_dims, MTL::Size group_dims);
  void maybeInsertBarrier() {}
  void barrier() {}

  // Takes all bindings away: Metal would keep them, but a kernel that relies on
  // those of another is a fault.
  void set_compute_pipeline_state(MTL::ComputePipelineState* kernel) {
    encoder_.set_kernel(kernel->kernel);
  }

  template <typename Vec, typename = std::enable_if_t<is_vector_v<Vec>>>
  void set_vector_bytes(const Vec& vec, size_t nelems, int idx) {
    using T = typename Vec::value_type;
    if (nelems > 0) {
      encoder_.set_bytes(vec.data(), nelems * sizeof(T), idx);
    } else {
      T val{};
      encoder_.set_bytes(&val, sizeof(T), idx);
    }
  }
  template <typename Vec, typename = std::enable_if_t<is_vector_v<Vec>>>
  void set_vector_bytes(const Vec& vec, int idx) {
    return set_vector_bytes(vec, vec.size(), idx);
  }

  template <typename T>
  void set_bytes(const T* v, int n, int idx) {
    encoder_.set_bytes(v, n * sizeof(T), idx);
  }
  template <typename T>
  void set_bytes(const T& v, int idx) {
    encoder_.set_bytes(&v, sizeof(T), idx);
  }

  void set_threadgroup_memory_length(size_t length, int idx) {
    encoder_.set_threadgroup_memory(length, idx);
  }

 private:
  void bind(const array& a, int idx, int64_t offset, bool writable);
  void enqueue(simulator::Launch launch);

  Stream stream_;
  simulator::Encoder encoder_;
};

class Device {
 public:
  // Compiles what `builder` returns, once for each name. The math mode of
  // `compile_options` changes nothing: all arithmetic is the safe one.
  MTL::Library* get_library(const std::string& name,
                            const CompileOptions& compile_options,
                            const std::function<std::string(void)>& builder);
  MTL::Library* get_library(const std::string& name,
                            const std::function<std::string(void)>& builder) {
    return get_library(name, {}, builder);
  }
  void clear_library(const std::string& name);

  MTL::ComputePipelineState* get_kernel(const std::string& base_name,
                                        MTL::Library* mtl_lib);

 private:
  std::mutex mutex_;
  std::map<std::string, std::unique_ptr<MTL::Library>> libraries_;
  std::vector<std::unique_ptr<MTL::Library>> cleared_;  // launches may wait
};

Device& device(mlx::core::Device);
CommandEncoder& get_command_encoder(Stream s);

}  // namespace mlx::core::metal
