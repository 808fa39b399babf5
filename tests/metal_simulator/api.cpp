// The simulator for Python's ctypes: tests/metal_simulator/__init__.py.

#include <exception>
#include <string>

#include "simulator.h"

namespace {

thread_local std::string error;

// Runs f; its exception becomes the text of metal_simulator_error().
template <typename F>
bool guarded(F f) {
  try {
    f();
    return true;
  } catch (const std::exception& e) {
    error = e.what();
    return false;
  }
}

thread_local simulator::Encoder encoder;

}  // namespace

extern "C" {

const char* metal_simulator_error() { return error.c_str(); }

void* metal_simulator_library(const char* path) {
  simulator::Library* library = nullptr;
  guarded([&] { library = new simulator::Library(path); });
  return library;  // stays loaded, as all libraries do
}

bool metal_simulator_set_kernel(simulator::Library* library, const char* name) {
  return guarded([&] { encoder.set_kernel(library->kernel(name)); });
}

bool metal_simulator_bind(int index, char* data, size_t bytes, size_t offset,
                          bool writable) {
  return guarded([&] {
    encoder.bind(index,
                 {nullptr, std::nullopt, data, 0, bytes, offset, writable});
  });
}

bool metal_simulator_set_bytes(const void* data, size_t bytes, int index) {
  return guarded([&] { encoder.set_bytes(data, bytes, index); });
}

bool metal_simulator_set_threadgroup_memory(size_t bytes, int index) {
  return guarded([&] { encoder.set_threadgroup_memory(bytes, index); });
}

// Grid and group are width, height, depth; the grid is counted in threads.
bool metal_simulator_dispatch(const uint64_t* grid, const uint64_t* group,
                              uint64_t seed) {
  return guarded([&] {
    auto launch = encoder.dispatch({grid[0], grid[1], grid[2]},
                                   {group[0], group[1], group[2]});
    launch.seed = seed;
    launch.run();
  });
}

size_t metal_simulator_max_threads() { return simulator::max_threads(); }

bool metal_simulator_set_max_threads(size_t threads) {
  return guarded([&] { simulator::set_max_threads(threads); });
}

bool metal_simulator_is_unkind() { return simulator::is_unkind(); }

void metal_simulator_set_unkind(bool unkind) { simulator::set_unkind(unkind); }

void metal_simulator_set_seed(uint64_t seed) { simulator::set_seed(seed); }

// Copies the numbers of launch n to `numbers`, in the order of Record, and
// returns its kernel's name, or nullptr where there is no launch n.
const char* metal_simulator_record(size_t n, uint64_t* numbers) {
  static thread_local std::string name;
  const auto records = simulator::records();
  if (n >= records.size()) {
    return nullptr;
  }
  const auto& r = records[n];
  const uint64_t all[] = {
      r.bytes_read,           r.bytes_written,       r.unique_bytes_read,
      r.unique_bytes_written, r.constant_bytes_read, r.accesses,
      r.line_bytes_read,      r.line_bytes_written,  r.barriers};
  std::copy(std::begin(all), std::end(all), numbers);
  name = r.kernel;
  return name.c_str();
}

// The errors of launches in streams, a line each, which are then forgotten.
const char* metal_simulator_take_errors() {
  static thread_local std::string lines;
  lines.clear();
  for (const auto& message : simulator::take_errors()) {
    lines += message + "\n";
  }
  return lines.c_str();
}

uint64_t metal_simulator_barriers() { return simulator::barriers(); }

void metal_simulator_clear_records() { simulator::clear_records(); }

}  // extern "C"
