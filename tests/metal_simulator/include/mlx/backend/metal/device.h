// Stands in for MLX's header of this name, so that host code for Metal compiles
// unchanged on Linux. The stream is one of the CPU: a dispatch becomes a task
// there, in order with MLX's own work, and an error of the kernel surfaces in
// mx.eval as errors of other tasks do.
//
// Only what host code of custom primitives needs is here, with the signatures
// of MLX 0.32.4. Launches run one after the other; where MLX would place no
// barrier between two, they must not touch the same bytes, and with a seed they
// run in another order.

#pragma once

#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "encoding.h"
#include "mlx/array.h"
#include "mlx/backend/common/metal_kernel.h"
#include "mlx/device.h"
#include "mlx/stream.h"
#include "mlx/utils.h"
#include "simulator.h"

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

class Library;

class ComputePipelineState {
 public:
  ComputePipelineState(Library* library, std::string name)
      : library_(library), name_(std::move(name)) {}
  NS::UInteger maxTotalThreadsPerThreadgroup() const;
  NS::UInteger threadExecutionWidth() const {
    return simulator::simdgroup_size;
  }

  // As it is to run now: host code may keep a pipeline while the simulator is
  // made unkind.
  const simulator::Kernel* kernel() const;

 private:
  Library* library_;
  std::string name_;
};

class Library {
 public:
  Library(std::string name, std::string source)
      : name_(std::move(name)), source_(std::move(source)) {}

  // As simulator::is_unkind() wants it, compiled when it is first needed.
  simulator::Library& kernels();
  ComputePipelineState* pipeline(const std::string& name);

 private:
  std::mutex mutex_;
  std::string name_;
  std::string source_;
  std::map<bool, std::unique_ptr<simulator::Library>> kernels_;
  std::map<std::string, std::unique_ptr<ComputePipelineState>> pipelines_;
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
  void register_output_array(const array& a);

  // Keeps the array alive until the launches of the present primitive have run.
  // Nothing else does: an encoder does not hold what is bound.
  void add_temporary(array arr);
  void add_temporaries(std::vector<array> arrays);

  // Launches while it lives are taken to be independent of each other.
  class ConcurrentContext {
   public:
    explicit ConcurrentContext(CommandEncoder& encoder) : encoder_(encoder) {
      encoder_.hazards_.start_concurrent();
    }
    ~ConcurrentContext() { encoder_.hazards_.end_concurrent(); }
    ConcurrentContext(const ConcurrentContext&) = delete;
    ConcurrentContext& operator=(const ConcurrentContext&) = delete;

   private:
    CommandEncoder& encoder_;
  };
  ConcurrentContext start_concurrent() { return ConcurrentContext(*this); }

  void dispatch_threadgroups(MTL::Size grid_dims, MTL::Size group_dims);
  void dispatch_threads(MTL::Size grid_dims, MTL::Size group_dims);
  void maybeInsertBarrier();
  void barrier();
  void end_encoding();

  // Takes all bindings away: Metal would keep them, but a kernel that relies on
  // those of another is a fault.
  void set_compute_pipeline_state(MTL::ComputePipelineState* kernel) {
    encoder_.set_kernel(kernel->kernel());
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
  friend class Evaluation;

  void bind(const array& a, int idx, int64_t offset, bool writable);
  void enqueue(simulator::Launch launch);

  Stream stream_;
  simulator::Encoder encoder_;
  simulator::Hazards hazards_;
  uint64_t epoch_ = 0;
  uint64_t encoding_ = 0;
  std::shared_ptr<simulator::Batch> batch_;  // of the present Evaluation
};

// The simulator's own, for the eval_cpu() that calls host code's eval_gpu():
// while it lives, launches of the stream are kept back, as a GPU runs them when
// all are encoded. Waiting for them there would never end.
class Evaluation {
 public:
  explicit Evaluation(Stream stream);
  ~Evaluation();
  Evaluation(const Evaluation&) = delete;
  Evaluation& operator=(const Evaluation&) = delete;

 private:
  CommandEncoder& encoder_;
};

class Device {
 public:
  // Compiles what `builder` returns, once for each name. The math mode of
  // `compile_options` changes nothing: simulator::set_unkind() does.
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
