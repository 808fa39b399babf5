// The device's side: memory, threads, and the checks of each access.

#undef _FORTIFY_SOURCE  // its longjmp takes another stack for a fault

#include "simulator.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <numeric>
#include <optional>
#include <random>
#include <sstream>
#include <stdexcept>
#include <unordered_map>
#include <utility>

namespace simulator {

namespace {

std::string text(const uint32_t (&position)[3]) {
  std::ostringstream out;
  out << "(" << position[0] << ", " << position[1] << ", " << position[2]
      << ")";
  return out.str();
}

// ---- memory -----------------------------------------------------------------

// Who read and who wrote a byte of memory in this launch. A stamp is the thread
// and the interval between two barriers in which it did; 0 is nobody.
struct Cell {
  uint32_t writer;
  uint32_t reader;
  bool operator==(const Cell&) const = default;
};
constexpr int who_bits = 11;
constexpr uint32_t many_of_simdgroup = 1024;  // + index of the simdgroup
constexpr uint32_t many_of_group = 1024 + 32;
constexpr uint32_t many_of_grid = ~uint32_t{0};  // a stamp by itself
constexpr uint32_t max_intervals = (1 << (32 - who_bits)) - 1;

// An address range for the arrays of a launch that share memory, or for
// threadgroup memory.
struct Region {
  struct Part {
    int index;
    size_t begin, end;  // in the region
    bool writable;
    char* source;
  };
  uintptr_t begin = 0;
  size_t bytes = 0;
  size_t offset = 0;  // of the arrays in their own memory
  size_t mapped = 0;
  Space space = Space::device;
  bool all_writable = false;
  std::vector<Part> parts;
  std::vector<Cell> cells;

  bool writable(size_t at, size_t size) const {
    return all_writable ||
           std::any_of(parts.begin(), parts.end(), [&](const Part& part) {
             return part.writable && part.begin <= at && at + size <= part.end;
           });
  }

  std::string name() const {
    if (space == Space::threadgroup) {
      return "threadgroup memory";
    }
    std::string name = "buffer ";
    for (const auto& part : parts) {
      name += (&part == &parts[0] ? "" : "/") + std::to_string(part.index);
    }
    return name;
  }
};

// Each region has 4 GiB of addresses and lies in their middle: the region of an
// address is a shift away, and so is that of one far outside of its array.
class Arena {
 public:
  static constexpr int shift = 32;
  static constexpr size_t threadgroup = max_buffers;
  static constexpr size_t count = max_buffers + 1;

  std::array<Region, count> regions;
  uintptr_t base;

  Arena() {
    void* memory = mmap(nullptr, count << shift, PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      throw std::runtime_error(
          "metal simulator: cannot reserve 128 GiB of addresses");
    }
    base = reinterpret_cast<uintptr_t>(memory);
  }

  // Makes a region ready. `offset` sets its alignment.
  Region& open(size_t index, size_t bytes, size_t offset, Space space) {
    constexpr size_t page = 4096;
    Region& region = regions[index];
    const uintptr_t start =
        base + (index << shift) + (uintptr_t{1} << (shift - 1));
    region.begin = start + offset % page;
    region.bytes = bytes;
    region.offset = offset;
    region.space = space;
    region.parts.clear();
    const size_t needed = (offset % page + bytes + page) / page * page;
    if (needed > region.mapped) {
      if (needed >> (shift - 1) || mprotect(reinterpret_cast<void*>(start),
                                            needed, PROT_READ | PROT_WRITE)) {
        throw std::runtime_error("metal simulator: an array is too large");
      }
      region.mapped = needed;
    }
    region.cells.assign(bytes, Cell{});
    return region;
  }
};

// ---- cache lines ------------------------------------------------------------

// Counts the cache lines that a threadgroup's instructions touch. The lanes of
// a simdgroup execute an instruction together on a GPU, and one after the other
// here: the n-th time that one lane comes to an instruction is taken for the
// n-th time that any other does. So a lane that leaves early changes nothing,
// but one that leaves out a round of a loop is compared with the rounds of
// others.
class LineCounter {
 public:
  // Before the threads of a threadgroup run.
  void start(size_t threads) {
    for (auto& instruction : instructions_) {
      instruction.rounds.assign(threads, 0);
      for (auto& simdgroup : instruction.lines) {
        simdgroup.clear();
      }
      instruction.lines.resize((threads + simdgroup_size - 1) / simdgroup_size);
    }
    threads_ = threads;
  }

  // How many lines are new to the instruction that returns to `caller`. A copy
  // of a struct counts as two, one that reads and one that writes.
  uint64_t touch(const void* caller, bool write, uint32_t thread,
                 uintptr_t address, size_t bytes) {
    Instruction& instruction =
        find(reinterpret_cast<uintptr_t>(caller) << 1 | write);
    const uint32_t round = instruction.rounds[thread]++;
    auto& rounds = instruction.lines[thread / simdgroup_size];
    if (round >= rounds.size()) {
      rounds.resize(round + 1);
    }
    auto& lines = rounds[round];
    uint64_t added = 0;
    for (uintptr_t line = address / cache_line;
         line <= (address + bytes - 1) / cache_line; ++line) {
      // From the back: the neighbouring lane's is the likely one.
      if (std::find(lines.rbegin(), lines.rend(), line) == lines.rend()) {
        lines.push_back(line);
        ++added;
      }
    }
    return added;
  }

 private:
  struct Instruction {
    std::vector<uint32_t> rounds;  // of each thread
    // of each simdgroup, in each round
    std::vector<std::vector<std::vector<uintptr_t>>> lines;
  };

  Instruction& find(uintptr_t which) {
    const auto [place, is_new] = places_.try_emplace(which, places_.size());
    if (is_new) {
      instructions_.emplace_back();
      instructions_.back().rounds.assign(threads_, 0);
      instructions_.back().lines.resize((threads_ + simdgroup_size - 1) /
                                        simdgroup_size);
    }
    return instructions_[place->second];
  }

  size_t threads_ = 0;
  std::unordered_map<uintptr_t, size_t> places_;
  std::vector<Instruction> instructions_;
};

// ---- threads ----------------------------------------------------------------

struct Fiber;

struct Thread {
  uint32_t index;
  uint32_t interval;  // the present one
  // Accesses of the group's (simdgroup's) threads in intervals before these are
  // ordered before ours; one for each of device and threadgroup memory.
  uint32_t group_sync[2];
  uint32_t simd_sync[2];
  bool finished = false;
  const void* waits_at = nullptr;  // return address of the call
  const char* waits_for = nullptr;
  // simd operations: what this thread brings, and where it wants all values
  const void* mine = nullptr;
  char* of_all = nullptr;
  uint32_t* mask = nullptr;
  Arguments arguments;
};

// AddressSanitizer has to know on which stack the program runs, or it takes the
// frames that an exception unwinds for those of another.
class StackSwitch {
 public:
#if defined(__SANITIZE_ADDRESS__)
  // Before a switch to that stack, and after the one back.
  void leave(const void* to, size_t bytes) {
    __sanitizer_start_switch_fiber(&fake_stack_, to, bytes);
  }
  void arrive() {
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
  }

  // On a new fiber: the stack it was entered from. And for the last time on it.
  static void enter(const void** from, size_t* bytes) {
    __sanitizer_finish_switch_fiber(nullptr, from, bytes);
  }
  static void end(const void* to, size_t bytes) {
    __sanitizer_start_switch_fiber(nullptr, to, bytes);
  }

 private:
  void* fake_stack_ = nullptr;
#else
  void leave(const void*, size_t) {}
  void arrive() {}
  static void enter(const void**, size_t*) {}
  static void end(const void*, size_t) {}
#endif
};

// Where the program goes on. swapcontext, which the sanitizers know, asks the
// system for the signal mask each time, which takes most of a simd operation.
class Place {
 public:
  // Makes it the start of a function on a stack.
  void begin(char* stack, size_t bytes, void (*function)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, function, 0);
    is_start_ = true;
  }

  // Makes it this place, and goes on at the other; returns when one comes back.
  void leave_for(Place& other) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    swapcontext(&context_, &other.context_);
#else
    if (_setjmp(jump_) == 0) {
      other.enter();
    }
#endif
  }

  [[noreturn]] void enter() {
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    if (!std::exchange(is_start_, false)) {
      _longjmp(jump_, 1);
    }
#endif
    setcontext(&context_);
    std::abort();
  }

 private:
  ucontext_t context_;
  jmp_buf jump_;
  bool is_start_ = false;
};

// A stack on which threads run, one after the other: a kernel without barriers
// needs but one.
struct Fiber {
  Place place;
  char* stack;
  Thread* thread;
};
constexpr size_t stack_bytes = 256 * 1024;

// While it lives, and if it is to, this thread of the CPU takes subnormal
// numbers for zero. A fiber starts and goes on with what holds then.
class SubnormalsFlushed {
 public:
#if defined(__x86_64__)
  explicit SubnormalsFlushed(bool flushed) : before_(_mm_getcsr()) {
    constexpr unsigned results = 1 << 15;
    constexpr unsigned operands = 1 << 6;
    _mm_setcsr(flushed ? before_ | results | operands : before_);
  }
  ~SubnormalsFlushed() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  explicit SubnormalsFlushed(bool flushed) {
    constexpr uint64_t flush = 1 << 24;
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    set(flushed ? before_ | flush : before_);
  }
  ~SubnormalsFlushed() { set(before_); }

 private:
  static void set(uint64_t mode) { asm volatile("msr fpcr, %0" ::"r"(mode)); }
  uint64_t before_;
#else
#error "how are subnormal numbers flushed on this processor?"
#endif
};

// Where threads wait for each other.
struct Rendezvous {
  std::vector<Fiber*> waiting;
};

// The running launch. Launches run one at a time.
class Execution {
 public:
  explicit Execution(const Launch& launch);
  void run();

  // Called by the kernel.
  void access(uintptr_t address, size_t bytes, bool write, const void* caller,
              bool atomic = false);
  void barrier(uint32_t flags, bool simdgroup_only, const void* caller);
  uint32_t exchange(const void* mine, uint32_t bytes, void* of_all,
                    uint32_t* mask, const void* caller);
  uint64_t threadgroup_variable(uint32_t site, uint64_t bytes,
                                uint64_t alignment, const void* caller);
  void misaligned(uintptr_t address, size_t alignment, const char* type,
                  const void* caller);
  [[noreturn]] void fail(const std::string& what, const void* caller);

  Record record;

 private:
  void place_arrays();
  void check_arrays() const;
  void check_other_launches();
  void run_group(const Size& group);
  void resume(Fiber* fiber);
  void wait();
  static void fiber_main();
  void outside(uintptr_t address, size_t bytes, bool write, const void* caller);
  void race(const Region& region, size_t at, uint32_t stamp, bool write,
            bool wrote, const void* caller);
  bool ordered(uint32_t stamp, int memory) const;
  uint32_t merged_readers(uint32_t stamp, uint32_t mine, int memory) const;
  bool arrive(Rendezvous& meeting, size_t expected, const char* what,
              const void* caller);
  void report_stuck();
  std::string thread_of(uint32_t stamp) const;
  size_t simdgroup_threads(uint32_t simdgroup) const {
    return std::min<size_t>(simdgroup_size,
                            threads_.size() - simdgroup * simdgroup_size);
  }

  const Launch& launch_;
  Arena& arena_;
  std::mt19937_64 random_;
  bool shuffled_;
  Arguments arguments_{};
  Size groups_{};
  LineCounter lines_;
  std::map<uint32_t, uint64_t> variables_;  // site -> address
  size_t threadgroup_bytes_ = 0;

  uint32_t interval_ = 0;
  uint32_t group_first_ = 0;  // the first interval of the present threadgroup
  // The first interval and the position of each threadgroup so far.
  std::vector<std::pair<uint32_t, Size>> history_;

  std::vector<Thread> threads_;
  std::vector<uint32_t> order_;
  size_t started_ = 0;
  Rendezvous group_meeting_;
  std::array<Rendezvous, max_threads_per_threadgroup / simdgroup_size>
      simd_meetings_;
  std::deque<Fiber*> ready_;
  Fiber* fiber_ = nullptr;
  Thread* thread_ = nullptr;
  Place scheduler_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
  std::string error_;
};

// Bytes of memory, as ranges of addresses that neither touch nor overlap.
using Ranges = std::vector<std::pair<uintptr_t, uintptr_t>>;

// The first address that is in both.
std::optional<uintptr_t> common(const Ranges& a, const Ranges& b) {
  for (auto i = a.begin(), j = b.begin(); i != a.end() && j != b.end();) {
    const uintptr_t first = std::max(i->first, j->first);
    if (first < std::min(i->second, j->second)) {
      return first;
    }
    i->second < j->second ? ++i : ++j;
  }
  return std::nullopt;
}

// What a launch did to an array's memory.
struct Traffic {
  Memory memory;
  std::string kernel;
  uint64_t batch;
  Ranges read;
  Ranges written;
};
struct Epoch {
  uint64_t number = 0;
  std::vector<Traffic> traffic;
};

struct State {
  std::mutex mutex;  // of all that follows
  Arena arena;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> idle;
  std::vector<Record> records;
  std::vector<std::string> errors;
  uint64_t seed = 0;
  uint64_t launches = 0;
  uint64_t orders = 0;
  // What the launches of each encoder did since its last barrier.
  std::map<const void*, Epoch> epochs;

  State() {
    if (const char* text = std::getenv("MLX_FUSED_SIMULATOR_SEED")) {
      seed = std::strtoull(text, nullptr, 10);
    }
  }
};
// Not of State: they are read where a launch is encoded while another runs.
std::atomic<uint64_t> barrier_count = 0;
std::atomic<uint64_t> encoding_count = 0;
std::atomic<size_t> thread_limit = max_threads_per_threadgroup;

State& state() {
  static State state;
  return state;
}
std::atomic<bool>& unkind() {
  static std::atomic<bool> unkind = [] {
    const char* text = std::getenv("MLX_FUSED_SIMULATOR_UNKIND");
    return text && *text && std::string(text) != "0";
  }();
  return unkind;
}
// Not through state(): this is read at each access.
Execution* running = nullptr;

Execution::Execution(const Launch& launch)
    : launch_(launch), arena_(state().arena) {
  record.kernel = launch.kernel->name;
  record.barriers = launch.barriers;
  const uint64_t seed = launch.seed.value_or(state().seed);
  shuffled_ = seed != 0;
  random_.seed(seed + state().launches++);
}

void Execution::check_arrays() const {
  for (const auto& [index, binding] : launch_.bindings) {
    if (binding.array && binding.array->expired()) {
      throw std::runtime_error(
          "metal simulator: kernel " + launch_.kernel->name +
          ": the array of buffer " + std::to_string(index) +
          " is gone when the launch runs: MLX's command buffers keep no array "
          "alive, add_temporary does");
    }
  }
}

// Launches with no barrier between may run at the same time. What an earlier
// primitive has read is left out: it still holds that memory on a GPU, so that
// MLX would not give it to a later one to be written.
void Execution::check_other_launches() {
  if (!launch_.epoch.first) {
    return;  // one that has no encoder
  }
  Epoch& epoch = state().epochs[launch_.epoch.first];
  if (epoch.number != launch_.epoch.second) {
    epoch = {launch_.epoch.second, {}};
  }
  std::erase_if(epoch.traffic, [](const Traffic& traffic) {
    return traffic.memory.expired();
  });
  const size_t others = epoch.traffic.size();
  for (size_t number = 0; number < max_buffers; ++number) {
    const Region& region = arena_.regions[number];
    if (region.bytes == 0 || region.parts.empty()) {
      continue;
    }
    const auto& part = region.parts[0];
    const auto& array = launch_.bindings.at(part.index).array;
    if (!array) {
      continue;
    }
    const auto begin = reinterpret_cast<uintptr_t>(part.source) - part.begin;
    const auto ranges = [&](uint32_t Cell::* stamp) {
      Ranges result;
      for (size_t at = 0; at < region.bytes; ++at) {
        if (region.cells[at].*stamp == 0) {
          continue;
        }
        if (result.empty() || result.back().second != begin + at) {
          result.emplace_back(begin + at, begin + at);
        }
        result.back().second = begin + at + 1;
      }
      return result;
    };
    Traffic ours{*array, launch_.kernel->name, launch_.batch,
                 ranges(&Cell::reader), ranges(&Cell::writer)};
    for (size_t i = 0; i < others; ++i) {
      const Traffic& theirs = epoch.traffic[i];
      if (ours.memory.owner_before(theirs.memory) ||
          theirs.memory.owner_before(ours.memory)) {
        continue;
      }
      const auto refuse = [&](const char* we, const char* they, uintptr_t at) {
        throw std::runtime_error(
            "metal simulator: kernel " + launch_.kernel->name + ": " +
            region.name() + " is " + we + " at byte " +
            std::to_string(at - begin) + ", which a launch of " +
            theirs.kernel + " has " + they +
            ", with no barrier between the launches");
      };
      if (const auto at = common(ours.read, theirs.written)) {
        refuse("read", "written", *at);
      }
      if (const auto at = common(ours.written, theirs.written)) {
        refuse("written", "written", *at);
      }
      const auto at = common(ours.written, theirs.read);
      if (at && launch_.batch == theirs.batch) {
        refuse("written", "read", *at);
      }
    }
    epoch.traffic.push_back(std::move(ours));
  }
}

void Execution::place_arrays() {
  // Arrays that overlap share a region, so that a kernel that updates in place
  // sees one memory.
  std::vector<std::pair<int, const Binding*>> sorted;
  for (const auto& [index, binding] : launch_.bindings) {
    sorted.emplace_back(index, &binding);
  }
  std::stable_sort(sorted.begin(), sorted.end(), [](auto& a, auto& b) {
    return a.second->begin() < b.second->begin();
  });
  size_t used = 0;
  for (size_t i = 0; i < sorted.size();) {
    const Binding& first = *sorted[i].second;
    char* begin = first.begin();
    char* end = first.end();
    size_t last = i + 1;
    while (last < sorted.size() && sorted[last].second->begin() < end) {
      end = std::max(end, sorted[last].second->end());
      ++last;
    }
    Region& region = arena_.open(used++, end - begin,
                                 first.offset - first.before, Space::constant);
    std::memcpy(reinterpret_cast<void*>(region.begin), begin, end - begin);
    region.all_writable = true;
    for (; i < last; ++i) {
      const auto& [index, binding] = sorted[i];
      const Region::Part part = {index, size_t(binding->begin() - begin),
                                 size_t(binding->end() - begin),
                                 binding->writable, binding->begin()};
      region.parts.push_back(part);
      region.all_writable &=
          part.writable && part.begin == 0 && part.end == region.bytes;
      arguments_.buffers[index] = region.begin + (binding->data - begin);
      for (const auto& parameter : launch_.kernel->parameters) {
        if (parameter.index == index && parameter.space == Space::device) {
          region.space = Space::device;
        }
      }
    }
  }
  for (; used < max_buffers; ++used) {
    arena_.regions[used].bytes = 0;
    arena_.regions[used].parts.clear();
  }
  Region& shared = arena_.open(Arena::threadgroup, max_threadgroup_bytes, 0,
                               Space::threadgroup);
  shared.all_writable = true;
  for (const auto& [index, bytes] : launch_.threadgroup_memory) {
    arguments_.threadgroups[index] = shared.begin + threadgroup_bytes_;
    threadgroup_bytes_ += (bytes + 15) / 16 * 16;
  }
}

void Execution::run() {
  check_arrays();
  place_arrays();
  const auto& size = launch_.threads_per_group;
  for (int d = 0; d < 3; ++d) {
    groups_[d] = (launch_.threads[d] + size[d] - 1) / size[d];
    arguments_.attributes[threadgroups_per_grid][d] = groups_[d];
    arguments_.attributes[threads_per_grid][d] = launch_.threads[d];
  }
  std::vector<uint64_t> order(volume(groups_));
  std::iota(order.begin(), order.end(), 0);
  if (shuffled_) {
    std::shuffle(order.begin(), order.end(), random_);
  }
  const SubnormalsFlushed mode(launch_.kernel->library->unkind());
  for (uint64_t n : order) {
    run_group({n % groups_[0], n / groups_[0] % groups_[1],
               n / groups_[0] / groups_[1]});
  }
  check_arrays();
  check_other_launches();
  for (const auto& region : arena_.regions) {
    for (const auto& part : region.parts) {
      if (part.writable) {
        std::memcpy(part.source,
                    reinterpret_cast<char*>(region.begin) + part.begin,
                    part.end - part.begin);
      }
    }
  }
}

void Execution::run_group(const Size& group) {
  Size size;  // of this threadgroup
  for (int d = 0; d < 3; ++d) {
    const uint64_t before = group[d] * launch_.threads_per_group[d];
    size[d] =
        std::min(launch_.threads_per_group[d], launch_.threads[d] - before);
  }
  group_first_ = ++interval_;
  history_.emplace_back(group_first_, group);
  const uint32_t count = volume(size);
  threads_.resize(count);
  for (uint32_t i = 0; i < count; ++i) {
    Thread& thread = threads_[i];
    thread = Thread{.index = i,
                    .interval = interval_,
                    .group_sync = {interval_, interval_},
                    .simd_sync = {interval_, interval_},
                    .arguments = arguments_};
    auto& attributes = thread.arguments.attributes;
    const uint64_t position[3] = {i % size[0], i / size[0] % size[1],
                                  i / size[0] / size[1]};
    for (int d = 0; d < 3; ++d) {
      attributes[thread_position_in_threadgroup][d] = position[d];
      attributes[threadgroup_position_in_grid][d] = group[d];
      attributes[thread_position_in_grid][d] =
          group[d] * launch_.threads_per_group[d] + position[d];
      attributes[threads_per_threadgroup][d] = size[d];
    }
    attributes[thread_index_in_threadgroup][0] = i;
    attributes[simdgroup_index_in_threadgroup][0] = i / simdgroup_size;
    attributes[thread_index_in_simdgroup][0] = i % simdgroup_size;
    attributes[threads_per_simdgroup][0] = simdgroup_size;
    attributes[simdgroups_per_threadgroup][0] =
        (count + simdgroup_size - 1) / simdgroup_size;
  }
  // What a threadgroup finds in its memory is what another left there: NaN
  // here.
  Region& shared = arena_.regions[Arena::threadgroup];
  std::memset(reinterpret_cast<void*>(shared.begin), 0xFF,
              max_threadgroup_bytes);
  std::fill(shared.cells.begin(), shared.cells.end(), Cell{});

  order_.resize(count);
  std::iota(order_.begin(), order_.end(), 0);
  if (shuffled_) {
    std::shuffle(order_.begin(), order_.end(), random_);
  }
  lines_.start(count);
  started_ = 0;
  while (started_ < count || !ready_.empty()) {
    const bool start =
        ready_.empty() || (shuffled_ && started_ < count && random_() % 2 == 0);
    if (start) {
      auto& idle = state().idle;
      if (idle.empty()) {
        auto fiber = std::make_unique<Fiber>();
        fiber->stack = static_cast<char*>(
            mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        idle.push_back(fiber.get());
        state().fibers.push_back(std::move(fiber));
      }
      Fiber* fiber = idle.back();
      idle.pop_back();
      fiber->place.begin(fiber->stack, stack_bytes, &Execution::fiber_main);
      resume(fiber);
    } else {
      const size_t pick = shuffled_ ? random_() % ready_.size() : 0;
      Fiber* fiber = ready_[pick];
      ready_.erase(ready_.begin() + pick);
      resume(fiber);
    }
  }
  for (const auto& thread : threads_) {
    if (!thread.finished) {
      report_stuck();
    }
  }
}

void Execution::resume(Fiber* fiber) {
  fiber_ = fiber;
  thread_ = fiber->thread;
  StackSwitch stack;
  stack.leave(fiber->stack, stack_bytes);
  scheduler_.leave_for(fiber->place);
  stack.arrive();
  if (!error_.empty()) {
    throw std::runtime_error(error_);
  }
}

void Execution::wait() {
  Fiber* self = fiber_;
  self->thread = thread_;
  StackSwitch stack;
  stack.leave(scheduler_stack_, scheduler_stack_bytes_);
  self->place.leave_for(scheduler_);
  stack.arrive();
}

void Execution::fiber_main() {
  Execution& self = *running;
  StackSwitch::enter(&self.scheduler_stack_, &self.scheduler_stack_bytes_);
  try {
    while (self.started_ < self.threads_.size()) {
      Thread& thread = self.threads_[self.order_[self.started_++]];
      self.thread_ = &thread;
      self.launch_.kernel->entry(&thread.arguments);
      thread.finished = true;
    }
    state().idle.push_back(self.fiber_);
  } catch (const std::exception& error) {
    self.error_ = error.what();  // resume() throws it on the launch's stack
  }
  StackSwitch::end(self.scheduler_stack_, self.scheduler_stack_bytes_);
  self.scheduler_.enter();
}

// ---- what the kernel calls --------------------------------------------------

void Execution::fail(const std::string& what, const void* caller) {
  throw std::runtime_error(
      "metal simulator: kernel " + launch_.kernel->name + ": " + what +
      "; thread " +
      text(thread_->arguments.attributes[thread_position_in_grid]) + " at " +
      launch_.kernel->library->line(caller));
}

bool Execution::ordered(uint32_t stamp, int memory) const {
  const uint32_t interval = stamp >> who_bits;
  const uint32_t who = stamp & ((1 << who_bits) - 1);
  if (stamp == many_of_grid || interval < group_first_) {
    return false;  // another threadgroup: nothing orders them in a launch
  }
  if (who == thread_->index || interval < thread_->group_sync[memory]) {
    return true;
  }
  const uint32_t simdgroup = thread_->index / simdgroup_size;
  const bool ours = who < many_of_simdgroup
                        ? who / simdgroup_size == simdgroup
                        : who == many_of_simdgroup + simdgroup;
  return ours && interval < thread_->simd_sync[memory];
}

// Two unordered reads are no race, but both count against a later write.
uint32_t Execution::merged_readers(uint32_t stamp, uint32_t mine,
                                   int memory) const {
  if (stamp == 0 || ordered(stamp, memory)) {
    return mine;
  }
  if (stamp == many_of_grid || stamp >> who_bits < group_first_) {
    return many_of_grid;
  }
  const uint32_t who = stamp & ((1 << who_bits) - 1);
  const uint32_t simdgroup = thread_->index / simdgroup_size;
  const bool ours = who < many_of_simdgroup
                        ? who / simdgroup_size == simdgroup
                        : who == many_of_simdgroup + simdgroup;
  const uint32_t interval = std::max(stamp >> who_bits, mine >> who_bits);
  return interval << who_bits |
         (ours ? many_of_simdgroup + simdgroup : many_of_group);
}

void Execution::access(uintptr_t address, size_t bytes, bool write,
                       const void* caller, bool atomic) {
  const size_t number = (address - arena_.base) >> Arena::shift;
  if (number >= Arena::count) {
    return outside(address, bytes, write, caller);
  }
  Region& region = arena_.regions[number];
  const size_t at = address - region.begin;
  if (at >= region.bytes || bytes > region.bytes - at) {
    return outside(address, bytes, write, caller);
  }
  const bool threadgroup = region.space == Space::threadgroup;
  if (write && !region.writable(at, bytes)) {
    fail(region.name() +
             " was announced as an input only and is written at byte " +
             std::to_string(at),
         caller);
  }
  ++record.accesses;
  uint64_t* unique = nullptr;
  if (region.space == Space::device) {
    (write ? record.bytes_written : record.bytes_read) += bytes;
    unique = write ? &record.unique_bytes_written : &record.unique_bytes_read;
    // Arrays begin at pages here, as in Metal.
    (write ? record.line_bytes_written : record.line_bytes_read) +=
        cache_line *
        lines_.touch(caller, write, thread_->index, address, bytes);
  } else if (region.space == Space::constant) {
    record.constant_bytes_read += bytes;
  }
  if (atomic) {
    return;
  }
  const uint32_t mine = thread_->interval << who_bits | thread_->index;
  Cell* cells = &region.cells[at];
  // Neighbouring bytes have mostly the same past.
  Cell before = cells[0];
  Cell after = before;
  for (size_t i = 0; i < bytes; ++i) {
    if (i == 0 || cells[i] != before) {
      before = after = cells[i];
      if (before.writer && before.writer != mine &&
          !ordered(before.writer, threadgroup)) {
        race(region, at + i, before.writer, write, true, caller);
      }
      if (write) {
        if (before.reader && before.reader != mine &&
            !ordered(before.reader, threadgroup)) {
          race(region, at + i, before.reader, true, false, caller);
        }
        after.writer = mine;
      } else if (before.reader != mine) {
        after.reader = merged_readers(before.reader, mine, threadgroup);
      }
    }
    if (unique && (write ? before.writer : before.reader) == 0) {
      ++*unique;
    }
    cells[i] = after;
  }
}

void Execution::outside(uintptr_t address, size_t bytes, bool write,
                        const void* caller) {
  // The kernel's own variables, and the constants of its program.
  if (address - reinterpret_cast<uintptr_t>(fiber_->stack) < stack_bytes ||
      launch_.kernel->library->contains(address)) {
    return;
  }
  std::ostringstream out;
  out << (write ? "write" : "read") << " of " << bytes << " bytes ";
  const size_t number = (address - arena_.base) >> Arena::shift;
  if (number < Arena::count && arena_.regions[number].bytes) {
    const Region& region = arena_.regions[number];
    if (address < region.begin) {
      out << region.begin - address << " bytes before the start of ";
    } else {
      out << "that ends " << address + bytes - region.begin - region.bytes
          << " bytes after the end of ";
    }
    out << region.name() << " (" << region.bytes << " bytes)";
  } else {
    out << "at an address in no buffer that was announced to the encoder";
  }
  fail(out.str(), caller);
}

void Execution::misaligned(uintptr_t address, size_t alignment,
                           const char* type, const void* caller) {
  const size_t number = (address - arena_.base) >> Arena::shift;
  const Region* region =
      number < Arena::count ? &arena_.regions[number] : nullptr;
  fail("access to " + std::string(type) + " at " +
           (region && region->bytes
                ? "byte " + std::to_string(int64_t(address - region->begin)) +
                      " of " + region->name() + ", byte " +
                      std::to_string(
                          int64_t(address - region->begin + region->offset)) +
                      " of its memory"
                : "an address") +
           ", which is not a multiple of " + std::to_string(alignment),
       caller);
}

void Execution::race(const Region& region, size_t at, uint32_t stamp,
                     bool write, bool wrote, const void* caller) {
  fail(region.name() + " is " + (write ? "written" : "read") + " at byte " +
           std::to_string(at) + ", which " + thread_of(stamp) + " has " +
           (wrote ? "written" : "read") +
           (region.space == Space::threadgroup ? " with no barrier between"
                                               : " in the same launch"),
       caller);
}

std::string Execution::thread_of(uint32_t stamp) const {
  const uint32_t who = stamp & ((1 << who_bits) - 1);
  if (who >= many_of_simdgroup) {
    return "another thread";
  }
  auto group =
      std::upper_bound(history_.begin(), history_.end(), stamp >> who_bits,
                       [](uint32_t interval, const auto& entry) {
                         return interval < entry.first;
                       });
  const Size& at = std::prev(group)->second;
  const Size& size = launch_.threads_per_group;
  // Groups at the upper edge may be smaller, in x and y too.
  uint64_t wide = std::min(size[0], launch_.threads[0] - at[0] * size[0]);
  uint64_t high = std::min(size[1], launch_.threads[1] - at[1] * size[1]);
  const uint32_t position[3] = {uint32_t(at[0] * size[0] + who % wide),
                                uint32_t(at[1] * size[1] + who / wide % high),
                                uint32_t(at[2] * size[2] + who / wide / high)};
  return "thread " + text(position);
}

// Whether all threads of the meeting are there now.
bool Execution::arrive(Rendezvous& meeting, size_t expected, const char* what,
                       const void* caller) {
  thread_->waits_at = caller;
  thread_->waits_for = what;
  if (!meeting.waiting.empty()) {
    const Thread& other = *meeting.waiting[0]->thread;
    if (other.waits_at != caller) {
      fail(std::string(what) + " reached while thread " +
               text(other.arguments.attributes[thread_position_in_grid]) +
               " waits at another one, at " +
               launch_.kernel->library->line(other.waits_at),
           caller);
    }
  }
  fiber_->thread = thread_;
  meeting.waiting.push_back(fiber_);
  return meeting.waiting.size() == expected;
}

void Execution::barrier(uint32_t flags, bool simdgroup_only,
                        const void* caller) {
  const uint32_t simdgroup = thread_->index / simdgroup_size;
  Rendezvous& meeting =
      simdgroup_only ? simd_meetings_[simdgroup] : group_meeting_;
  const size_t expected =
      simdgroup_only ? simdgroup_threads(simdgroup) : threads_.size();
  if (arrive(meeting, expected,
             simdgroup_only ? "simdgroup_barrier" : "threadgroup_barrier",
             caller)) {
    if (++interval_ > max_intervals) {
      fail("too many threadgroups and barriers for the simulator", caller);
    }
    for (Fiber* fiber : meeting.waiting) {
      Thread& thread = *fiber->thread;
      thread.waits_for = nullptr;
      thread.interval = interval_;
      for (int memory : {0, 1}) {  // mem_device is 1, mem_threadgroup 2
        if (flags >> memory & 1) {
          (simdgroup_only ? thread.simd_sync : thread.group_sync)[memory] =
              interval_;
        }
      }
      ready_.push_back(fiber);
    }
    meeting.waiting.clear();
  }
  wait();
}

uint32_t Execution::exchange(const void* mine, uint32_t bytes, void* of_all,
                             uint32_t* mask, const void* caller) {
  const uint32_t simdgroup = thread_->index / simdgroup_size;
  const uint32_t lane = thread_->index % simdgroup_size;
  Rendezvous& meeting = simd_meetings_[simdgroup];
  const size_t expected = simdgroup_threads(simdgroup);
  thread_->mine = mine;
  thread_->of_all = static_cast<char*>(of_all);
  thread_->mask = mask;
  if (arrive(meeting, expected, "simd operation", caller)) {
    for (Fiber* to : meeting.waiting) {
      for (Fiber* from : meeting.waiting) {
        std::memcpy(
            to->thread->of_all + from->thread->index % simdgroup_size * bytes,
            from->thread->mine, bytes);
      }
      *to->thread->mask = ~uint32_t{0} >> (simdgroup_size - expected);
      to->thread->waits_for = nullptr;
      ready_.push_back(to);
    }
    meeting.waiting.clear();
  }
  wait();
  return lane;
}

uint64_t Execution::threadgroup_variable(uint32_t site, uint64_t bytes,
                                         uint64_t alignment,
                                         const void* caller) {
  const auto [variable, is_new] = variables_.try_emplace(site, 0);
  if (is_new) {
    threadgroup_bytes_ =
        (threadgroup_bytes_ + alignment - 1) / alignment * alignment;
    variable->second =
        arena_.regions[Arena::threadgroup].begin + threadgroup_bytes_;
    threadgroup_bytes_ += bytes;
    if (threadgroup_bytes_ > max_threadgroup_bytes) {
      fail(std::to_string(threadgroup_bytes_) +
               " bytes of threadgroup memory; Metal has " +
               std::to_string(max_threadgroup_bytes),
           caller);
    }
  }
  return variable->second;
}

// No thread can go on: some wait for others that will not come.
void Execution::report_stuck() {
  const Thread* waiting = nullptr;
  for (const auto& thread : threads_) {
    if (!thread.finished && !waiting) {
      waiting = &thread;
    }
  }
  const bool simd = waiting->waits_for != std::string("threadgroup_barrier");
  const uint32_t simdgroup = waiting->index / simdgroup_size;
  const Thread* missing = nullptr;
  size_t reached = 0;
  size_t expected = 0;
  for (const auto& thread : threads_) {
    if (simd && thread.index / simdgroup_size != simdgroup) {
      continue;
    }
    ++expected;
    if (!thread.finished && thread.waits_at == waiting->waits_at) {
      ++reached;
    } else if (!missing) {
      missing = &thread;
    }
  }
  const auto& lines = *launch_.kernel->library;
  std::ostringstream out;
  out << "metal simulator: kernel " << launch_.kernel->name << ": "
      << waiting->waits_for << " at " << lines.line(waiting->waits_at)
      << " is reached by " << reached << " of " << expected
      << " threads of the " << (simd ? "simdgroup" : "threadgroup")
      << ": thread "
      << text(waiting->arguments.attributes[thread_position_in_grid])
      << " waits there, thread "
      << text(missing->arguments.attributes[thread_position_in_grid]);
  if (missing->finished) {
    out << " has returned";
  } else {
    out << " waits for a " << missing->waits_for << " at "
        << lines.line(missing->waits_at);
  }
  throw std::runtime_error(out.str());
}

}  // namespace

// ---- launches ---------------------------------------------------------------

void Launch::run() const {
  std::lock_guard lock(state().mutex);
  Execution execution(*this);
  running = &execution;
  // Fibers that an error left behind are free again, too.
  state().idle.clear();
  for (auto& fiber : state().fibers) {
    state().idle.push_back(fiber.get());
  }
  execution.run();
  state().records.push_back(execution.record);
}

std::vector<Record> records() {
  std::lock_guard lock(state().mutex);
  return state().records;
}

void keep_error(const std::string& message) {
  std::lock_guard lock(state().mutex);
  state().errors.push_back(message);
}

std::vector<std::string> take_errors() {
  std::lock_guard lock(state().mutex);
  return std::exchange(state().errors, {});
}

void clear_records() {
  std::lock_guard lock(state().mutex);
  state().records.clear();
  barrier_count = 0;
  ++encoding_count;
}

uint64_t encoding() { return encoding_count; }
uint64_t barriers() { return barrier_count; }
void count_barrier() { ++barrier_count; }

void set_seed(uint64_t seed) {
  std::lock_guard lock(state().mutex);
  state().seed = seed;
  state().launches = 0;
  state().orders = 0;
}

std::optional<uint64_t> next_order() {
  std::lock_guard lock(state().mutex);
  if (state().seed == 0) {
    return std::nullopt;
  }
  return state().seed + state().orders++;
}

size_t max_threads() { return thread_limit; }
void set_max_threads(size_t threads) {
  if (threads < simdgroup_size || threads > max_threads_per_threadgroup) {
    throw std::invalid_argument(
        "metal simulator: max_threads is " + std::to_string(threads) +
        "; Metal has 32 to 1024 threads in a threadgroup");
  }
  thread_limit = threads;
}

bool is_unkind() { return unkind(); }
void set_unkind(bool value) { unkind() = value; }

}  // namespace simulator

// ---- called by compiled kernels ---------------------------------------------

using simulator::running;

extern "C" {

#define METAL_SIMULATOR_ACCESS(bytes)                                    \
  void simulator_load##bytes##_noabort(uintptr_t address) {              \
    running->access(address, bytes, false, __builtin_return_address(0)); \
  }                                                                      \
  void simulator_store##bytes##_noabort(uintptr_t address) {             \
    running->access(address, bytes, true, __builtin_return_address(0));  \
  }
METAL_SIMULATOR_ACCESS(1)
METAL_SIMULATOR_ACCESS(2)
METAL_SIMULATOR_ACCESS(4)
METAL_SIMULATOR_ACCESS(8)
METAL_SIMULATOR_ACCESS(16)

void simulator_loadN_noabort(uintptr_t address, size_t bytes) {
  running->access(address, bytes, false, __builtin_return_address(0));
}
void simulator_storeN_noabort(uintptr_t address, size_t bytes) {
  running->access(address, bytes, true, __builtin_return_address(0));
}

// Copies of structs.
void* simulator_memcpy(void* to, const void* from, size_t bytes) {
  const void* caller = __builtin_return_address(0);
  running->access(reinterpret_cast<uintptr_t>(from), bytes, false, caller);
  running->access(reinterpret_cast<uintptr_t>(to), bytes, true, caller);
  return std::memcpy(to, from, bytes);
}
void* simulator_memmove(void* to, const void* from, size_t bytes) {
  const void* caller = __builtin_return_address(0);
  running->access(reinterpret_cast<uintptr_t>(from), bytes, false, caller);
  running->access(reinterpret_cast<uintptr_t>(to), bytes, true, caller);
  return std::memmove(to, from, bytes);
}
void* simulator_memset(void* to, int value, size_t bytes) {
  running->access(reinterpret_cast<uintptr_t>(to), bytes, true,
                  __builtin_return_address(0));
  return std::memset(to, value, bytes);
}

// What clang's -fsanitize=alignment and bounds say.
struct TypeDescriptor {
  uint16_t kind;
  uint16_t info;
  char name[1];
};
struct TypeMismatch {
  const char* file;
  uint32_t line, column;
  const TypeDescriptor* type;
  uint8_t log_alignment;
  uint8_t kind;
};
struct OutOfBounds {
  const char* file;
  uint32_t line, column;
  const TypeDescriptor* array;
  const TypeDescriptor* index;
};
void __ubsan_handle_type_mismatch_v1(TypeMismatch* data, uintptr_t address) {
  running->misaligned(address, size_t{1} << data->log_alignment,
                      data->type->name, __builtin_return_address(0));
}
void simulator_copy_aligned(uintptr_t address, uint64_t alignment) {
  if (address % alignment) {
    running->misaligned(address, alignment, "a struct",
                        __builtin_return_address(0));
  }
}
void __ubsan_handle_out_of_bounds(OutOfBounds* data, uintptr_t index) {
  running->fail("index " + std::to_string(int64_t(index)) +
                    " is out of bounds of an array " + data->array->name,
                __builtin_return_address(0));
}

void simulator_barrier(uint32_t flags, bool simdgroup_only) {
  running->barrier(flags, simdgroup_only, __builtin_return_address(0));
}
uint32_t simulator_exchange(const void* mine, uint32_t bytes, void* of_all,
                            uint32_t* mask) {
  return running->exchange(mine, bytes, of_all, mask,
                           __builtin_return_address(0));
}
uint64_t simulator_threadgroup_variable(uint32_t site, uint64_t bytes,
                                        uint64_t alignment) {
  return running->threadgroup_variable(site, bytes, alignment,
                                       __builtin_return_address(0));
}
void simulator_atomic_load(uintptr_t address, void* value, uint32_t bytes) {
  running->access(address, bytes, false, __builtin_return_address(0), true);
  std::memcpy(value, reinterpret_cast<void*>(address), bytes);
}
void simulator_atomic_store(uintptr_t address, const void* value,
                            uint32_t bytes) {
  running->access(address, bytes, true, __builtin_return_address(0), true);
  std::memcpy(reinterpret_cast<void*>(address), value, bytes);
}
void simulator_inactive_lane(uint32_t lane) {
  running->fail("a simd operation reads lane " + std::to_string(lane) +
                    ", which the simdgroup does not have",
                __builtin_return_address(0));
}

}  // extern "C"
