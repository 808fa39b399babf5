// An MLX extension with Metal primitives, as host code for a Mac is written.
//
// shift(x, by, count) adds a number to the first `count` elements. Too large a
// count makes the kernel leave its array.
//
// program(x, steps, kept) is what host code does with several launches, in
// words:
//   x>t      a launch that writes x + 1 to the array t
//   x>t/0    the same for the first half of both, x>t/1 for the second
//   ( )      a concurrent part
//   |        a barrier that MLX would not place by itself
// x is the input and y the output. Other arrays are temporary: those in `kept`
// are given to add_temporary().

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <map>
#include <optional>
#include <sstream>
#include <string>
#include <utility>

#include "mlx/allocator.h"
#include "mlx/backend/metal/device.h"
#include "mlx/primitives.h"

namespace mx = mlx::core;
namespace nb = nanobind;

namespace {

const char* source = R"(#include <metal_stdlib>
template <typename T>
[[kernel]] void shift(const device T* x [[buffer(0)]],
                      device T* y [[buffer(1)]],
                      constant float& by [[buffer(2)]],
                      uint i [[thread_position_in_grid]]) {
  y[i] = T(x[i] + by);
}
template [[host_name("shift_float")]] [[kernel]] decltype(shift<float>) shift<float>;
)";

// 64 threads, if the device allows as many.
int group_size(const MTL::ComputePipelineState* kernel) {
  return std::min<int>(64, kernel->maxTotalThreadsPerThreadgroup());
}

void launch_shift(mx::Stream stream, const mx::array& x, mx::array& y, float by,
                  int first, int count) {
  auto& device = mx::metal::device(stream.device);
  auto* library =
      device.get_library("example", [] { return std::string(source); });
  auto* kernel = device.get_kernel("shift_float", library);
  auto& encoder = mx::metal::get_command_encoder(stream);
  encoder.set_compute_pipeline_state(kernel);
  encoder.set_input_array(x, 0, first * sizeof(float));
  encoder.set_output_array(y, 1, first * sizeof(float));
  encoder.set_bytes(by, 2);
  encoder.dispatch_threads(MTL::Size(count, 1, 1),
                           MTL::Size(group_size(kernel), 1, 1));
}

class Shift : public mx::Primitive {
 public:
  Shift(mx::Stream stream, float by, int count)
      : Primitive(stream), by_(by), count_(count) {}

  void eval_cpu(const std::vector<mx::array>& inputs,
                std::vector<mx::array>& outputs) override {
    eval_gpu(inputs, outputs);
  }
  void eval_gpu(const std::vector<mx::array>& inputs,
                std::vector<mx::array>& outputs) override {
    auto& y = outputs[0];
    y.set_data(mx::allocator::malloc(y.nbytes()));
    launch_shift(stream(), inputs[0], y, by_, 0, count_);
  }
  const char* name() const override { return "Shift"; }

 private:
  float by_;
  int count_;
};

class Program : public mx::Primitive {
 public:
  Program(mx::Stream stream, std::string steps, std::string kept)
      : Primitive(stream), steps_(std::move(steps)), kept_(std::move(kept)) {}

  void eval_cpu(const std::vector<mx::array>& inputs,
                std::vector<mx::array>& outputs) override {
    const mx::metal::Evaluation evaluation(stream());
    eval_gpu(inputs, outputs);
  }
  void eval_gpu(const std::vector<mx::array>& inputs,
                std::vector<mx::array>& outputs) override {
    auto& encoder = mx::metal::get_command_encoder(stream());
    std::map<char, mx::array> arrays = {{'x', inputs[0]}, {'y', outputs[0]}};
    const auto allocate = [](mx::array& a) {
      a.set_data(mx::allocator::malloc(a.nbytes()));
    };
    allocate(arrays.at('y'));
    std::optional<mx::metal::CommandEncoder::ConcurrentContext> concurrent;
    std::istringstream steps(steps_);
    for (std::string step; steps >> step;) {
      if (step == "(") {
        concurrent.emplace(encoder);
      } else if (step == ")") {
        concurrent.reset();
      } else if (step == "|") {
        encoder.barrier();
      } else {
        const auto [place, is_new] =
            arrays.try_emplace(step[2], outputs[0].shape(), outputs[0].dtype(),
                               nullptr, std::vector<mx::array>{});
        if (is_new) {
          allocate(place->second);
          if (kept_.find(step[2]) != std::string::npos) {
            encoder.add_temporary(place->second);
          }
        }
        const int half = outputs[0].size() / 2;
        const bool is_half = step.size() > 3;
        launch_shift(stream(), arrays.at(step[0]), place->second, 1,
                     step.back() == '1' ? half : 0, is_half ? half : 2 * half);
      }
    }
  }
  const char* name() const override { return "Program"; }

 private:
  std::string steps_;
  std::string kept_;
};

}  // namespace

NB_MODULE(metal_simulator_example, m) {
  m.def("shift", [](const mx::array& x, float by, int count) {
    auto stream = mx::default_stream(mx::Device::cpu);
    return mx::array(x.shape(), x.dtype(),
                     std::make_shared<Shift>(stream, by, count), {x});
  });
  m.def("program", [](const mx::array& x, const std::string& steps,
                      const std::string& kept) {
    auto stream = mx::default_stream(mx::Device::cpu);
    return mx::array(x.shape(), x.dtype(),
                     std::make_shared<Program>(stream, steps, kept), {x});
  });
}
