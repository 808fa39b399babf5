// Runs Metal kernels that compile_kernels.py has compiled, on one thread of the
// CPU, and reports what Metal would not forgive.
//
// Every array that a launch is given is copied to an address range of its own
// and back, so an access outside of it is seen even where another array lies,
// and its alignment is that of its offset, as in a Metal buffer. The compiled
// kernel calls the simulator with each address that it reads or writes.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace simulator {

// Metal's limits.
constexpr int max_buffers = 31;
constexpr size_t max_threads_per_threadgroup = 1024;
constexpr size_t max_threadgroup_bytes = 32 * 1024;
constexpr size_t max_set_bytes = 4096;
constexpr unsigned simdgroup_size = 32;

// What a GPU moves at least between memory and its caches.
constexpr size_t cache_line = 128;

using Size = std::array<uint64_t, 3>;  // width, height, depth
inline uint64_t volume(const Size& size) { return size[0] * size[1] * size[2]; }

// What a kernel is told; the order is that of ATTRIBUTES in compile_kernels.py.
enum Attribute {
  thread_position_in_grid,
  threadgroup_position_in_grid,
  thread_position_in_threadgroup,
  thread_index_in_threadgroup,
  threads_per_threadgroup,
  threadgroups_per_grid,
  threads_per_grid,
  simdgroup_index_in_threadgroup,
  thread_index_in_simdgroup,
  threads_per_simdgroup,
  simdgroups_per_threadgroup,
  attribute_count,
};

// As in msl/launch.
struct Arguments {
  uint64_t buffers[max_buffers];
  uint64_t threadgroups[max_buffers];
  uint32_t attributes[attribute_count][3];
};
enum class Space { device, constant, threadgroup };

class Library;

struct Kernel {
  struct Parameter {
    int index;
    Space space;
  };
  std::string name;
  std::vector<Parameter> parameters;
  void (*entry)(const Arguments*);
  const Library* library;
};

// The kernels of one shared library that compile_kernels.py has made. A library
// stays loaded: a launch may still be waiting in a stream.
class Library {
 public:
  // Compiles MSL text; `name` names its lines in messages, `unkind` is as for
  // set_unkind(). Throws std::runtime_error with the compiler's message.
  static std::unique_ptr<Library> compile(const std::string& source,
                                          const std::string& name, bool unkind);

  explicit Library(const std::string& path);

  Kernel* kernel(const std::string& name);  // throws std::invalid_argument
  bool contains(uintptr_t address) const;
  bool unkind() const { return unkind_; }
  // "file.metal:12", or the address where no addr2line is installed.
  std::string line(const void* return_address) const;

 private:
  std::string path_;
  uintptr_t begin_ = 0;
  uintptr_t end_ = 0;
  bool unkind_ = false;
  std::map<std::string, Kernel> kernels_;
};

// An array's memory. As MLX's command buffers, a launch does not keep it alive.
using Memory = std::weak_ptr<const void>;

// Memory bound to an index.
struct Binding {
  char* begin() const { return data - before; }
  char* end() const { return data + bytes; }

  std::shared_ptr<const void> copy;  // by set_bytes: keeps `data` alive
  std::optional<Memory> array;  // or what must be alive when the launch runs
  char* data;                   // what the kernel is given
  size_t before;  // bytes of the array before data: a view may run backwards
  size_t bytes;   // and from data on
  size_t offset;  // of data in its buffer: what its alignment is judged by
  bool writable;
};

// One dispatch, with all that it needs.
struct Launch {
  const Kernel* kernel = nullptr;
  std::map<int, Binding> bindings;
  std::map<int, size_t> threadgroup_memory;
  Size threads{};            // of the whole grid
  Size threads_per_group{};  // groups at the upper edges may have fewer
  std::optional<uint64_t> seed;
  // Launches of an encoder with no barrier between have the same epoch, those
  // of one primitive the same batch.
  std::pair<const void*, uint64_t> epoch{};
  uint64_t batch = 0;
  uint64_t barriers = 0;  // encoded before it since the last clear_records()

  void run() const;  // throws std::runtime_error; then nothing is written back
};

// What Metal's compute command encoder checks before a launch.
class Encoder {
 public:
  void set_kernel(const Kernel* kernel);
  void bind(int index, Binding binding);
  void set_bytes(const void* data, size_t bytes, int index);
  void set_threadgroup_memory(size_t bytes, int index);
  // `threads` counts threads, not threadgroups. Bindings stay, for more
  // launches.
  Launch dispatch(Size threads, Size threads_per_group);
  Launch dispatch_threadgroups(Size groups, Size threads_per_group);

 private:
  [[noreturn]] void refuse(const std::string& why) const;

  Launch launch_;
  std::map<int, bool> fresh_;  // bound since the last dispatch
};

// What a launch did. Bytes count each access, unique bytes each address once.
// Line bytes count whole cache lines, and each line once for every instruction
// of a simdgroup that touches it: in a launch whose simdgroups read whole lines
// they are the bytes, where each thread reads from a line of its own 32 times
// that and more.
struct Record {
  std::string kernel;
  uint64_t bytes_read = 0;  // through `device` pointers
  uint64_t bytes_written = 0;
  uint64_t unique_bytes_read = 0;
  uint64_t unique_bytes_written = 0;
  uint64_t constant_bytes_read = 0;
  uint64_t accesses = 0;         // all of the above and of threadgroup memory
  uint64_t line_bytes_read = 0;  // through `device` pointers
  uint64_t line_bytes_written = 0;
  uint64_t barriers = 0;  // before it, as in Launch
};
std::vector<Record> records();

// Errors of launches in streams, which reach the caller of mx.eval, but not of
// everything that evaluates: np.array(x) drops them. take_errors forgets them.
void keep_error(const std::string& message);
std::vector<std::string> take_errors();

// Also ends what encoders have under way, as each mx.eval does in MLX: what is
// encoded next has no launch before it.
void clear_records();
uint64_t encoding();  // how often that was

// Barriers that were encoded since clear_records().
uint64_t barriers();
void count_barrier();

// The order of threads and threadgroups: 0 is the natural one.
void set_seed(uint64_t seed);
// A seed for the order of launches, another each time; nothing for the natural.
std::optional<uint64_t> next_order();

// How many threads a threadgroup may have, at most 1,024: on a GPU fewer where
// a kernel needs many registers.
size_t max_threads();
void set_max_threads(size_t threads);  // throws std::invalid_argument

// Whether launches from now on do the arithmetic that a GPU may do: products
// and sums contracted to fused multiply-adds, fast forms of functions off by
// 2^-22, subnormal numbers flushed to zero. Otherwise it is that of the CPU.
bool is_unkind();
void set_unkind(bool unkind);

}  // namespace simulator
