// Faults like those that our code might have. run.py sees to it that the
// sanitizers report each of them, and say nothing about sound().
#include <nanobind/nanobind.h>

#include <atomic>
#include <limits>
#include <optional>
#include <thread>

#include "../../csrc/cpu/parallel.h"
#include "mlx/array.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/device.h"
#include "mlx/ops.h"
#include "mlx/stream.h"
#include "mlx/transforms.h"

namespace mx = mlx::core;

namespace {

constexpr int elements = 1000;

mx::array make_array() {
  auto a = mx::ones({elements}, mx::float32, mx::Device::cpu);
  mx::eval(a);
  return a;
}

// Work of a stream. ThreadSanitizer sees wait(), and not mx::synchronize, whose
// future is in code that is not compiled with it.
class OnStream {
 public:
  template <typename F>
  explicit OnStream(F work) {
    auto& encoder = mx::cpu::get_command_encoder(
        mx::default_stream(mx::Device(mx::Device::cpu)));
    encoder.dispatch([this, work] {
      work();
      is_done_ = true;
    });
  }
  void wait() const {
    while (!is_done_) {
      std::this_thread::yield();
    }
  }

 private:
  std::atomic<bool> is_done_ = false;
};

// Work of a stream that holds its array, and pieces that share nothing.
float sound() {
  float sums[8] = {};
  const OnStream work([a = make_array(), &sums] {
    mlx_fused::cpu::parallel_for(8, [&](size_t i) {
      for (int k = 0; k < elements; ++k) {
        sums[i] += a.data<float>()[k];
      }
    });
  });
  work.wait();
  return sums[0] + sums[7];
}

// An array's memory is read behind its end.
float overflow() {
  const auto a = make_array();
  const volatile float* data = a.data<float>();
  return data[elements + 8];
}

int signed_overflow() {
  volatile int largest = std::numeric_limits<int>::max();
  return largest + 1;
}

// Work of a stream does not hold the array that it reads.
float unheld() {
  std::optional<mx::array> a = make_array();
  std::atomic<bool> is_freed = false;
  float value = 0;
  const OnStream work([&is_freed, &value, data = a->data<float>()] {
    while (!is_freed.load(std::memory_order_relaxed)) {  // which orders nothing
    }
    value = *const_cast<const volatile float*>(data);
  });
  a.reset();
  is_freed.store(true, std::memory_order_relaxed);
  work.wait();
  return value;
}

// Work of a stream and its caller write the same.
int race_with_stream() {
  volatile int value = 0;
  const OnStream work([&] { value = 1; });
  value = 2;
  work.wait();
  return value;
}

// Pieces of one job write the same, on different threads.
int race_of_pieces() {
  volatile int value = 0;
  mlx_fused::cpu::set_num_threads(2);
  std::atomic<int> arrived = 0;
  mlx_fused::cpu::parallel_for(2, [&](size_t i) {
    arrived.fetch_add(1, std::memory_order_relaxed);
    while (arrived.load(std::memory_order_relaxed) < 2) {
    }
    // Often: of two accesses at the very same moment none is seen.
    for (int k = 0; k < 1000; ++k) {
      value = static_cast<int>(i);
    }
  });
  return value;
}

}  // namespace

NB_MODULE(sanitizer_faults, m) {
  m.def("sound", sound);
  m.def("overflow", overflow);
  m.def("signed_overflow", signed_overflow);
  m.def("unheld", unheld);
  m.def("race_with_stream", race_with_stream);
  m.def("race_of_pieces", race_of_pieces);
}
