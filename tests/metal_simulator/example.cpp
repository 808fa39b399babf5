// An MLX extension with one Metal primitive, as host code for a Mac is written:
// shift(x, by) adds a number to the first `count` elements. Too large a count
// makes the kernel leave its array.

#include <nanobind/nanobind.h>

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

class Shift : public mx::Primitive {
 public:
  Shift(mx::Stream stream, float by, int count)
      : Primitive(stream), by_(by), count_(count) {}

  void eval_cpu(const std::vector<mx::array>& inputs,
                std::vector<mx::array>& outputs) override {
    auto& x = inputs[0];
    auto& y = outputs[0];
    y.set_data(mx::allocator::malloc(y.nbytes()));
    auto& device = mx::metal::device(stream().device);
    auto* library =
        device.get_library("example", [] { return std::string(source); });
    auto* kernel = device.get_kernel("shift_float", library);
    auto& encoder = mx::metal::get_command_encoder(stream());
    encoder.set_compute_pipeline_state(kernel);
    encoder.set_input_array(x, 0);
    encoder.set_output_array(y, 1);
    encoder.set_bytes(by_, 2);
    encoder.dispatch_threads(MTL::Size(count_, 1, 1), MTL::Size(32, 1, 1));
  }
  void eval_gpu(const std::vector<mx::array>& inputs,
                std::vector<mx::array>& outputs) override {
    eval_cpu(inputs, outputs);
  }
  const char* name() const override { return "Shift"; }

 private:
  float by_;
  int count_;
};

}  // namespace

NB_MODULE(metal_simulator_example, m) {
  m.def("shift", [](const mx::array& x, float by, int count) {
    auto stream = mx::default_stream(mx::Device::cpu);
    return mx::array(x.shape(), x.dtype(),
                     std::make_shared<Shift>(stream, by, count), {x});
  });
}
