#include "parallel.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <future>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "mlx/threadpool.h"

namespace mlx_fused::cpu {

namespace {

// More are never useful, and might be more than the system gives.
constexpr int max_threads = 256;

int default_threads() {
  const int cores = static_cast<int>(std::thread::hardware_concurrency());
  int wanted = 0;
  if (const char* text = std::getenv("MLX_FUSED_NUM_THREADS")) {
    const auto [end, error] =
        std::from_chars(text, text + std::strlen(text), wanted);
    if (error != std::errc() || *end != 0 || wanted < 1) {
      throw std::invalid_argument(std::string("MLX_FUSED_NUM_THREADS is \"") +
                                  text +
                                  "\"; expected a number of at least 1.");
    }
  }
  return std::clamp(wanted > 0 ? wanted : cores, 1, max_threads);
}

struct Pool {
  std::mutex mutex;
  int threads = default_threads();
  std::shared_ptr<ThreadPool> workers;  // made at first use
  pid_t process = 0;                    // that made them
};

// Never destroyed: MLX's streams may be at work when the process exits.
Pool& pool() {
  static Pool* const instance = new Pool;
  return *instance;
}

// The workers and the number of threads with them. Work under way keeps the
// workers it started with.
std::pair<std::shared_ptr<ThreadPool>, int> current_workers() {
  auto& p = pool();
  const std::lock_guard lock(p.mutex);
  if (p.workers && p.process != getpid()) {
    // A fork: the threads are the parent's, and joining them would never end.
    new std::shared_ptr<ThreadPool>(std::exchange(p.workers, nullptr));
  }
  if (p.threads > 1 && !p.workers) {
    p.workers = std::make_shared<ThreadPool>(p.threads - 1);
    p.process = getpid();
  }
  return {p.workers, p.threads};
}

}  // namespace

int num_threads() {
  const std::lock_guard lock(pool().mutex);
  return pool().threads;
}

void set_num_threads(int count) {
  if (count < 1 || count > max_threads) {
    throw std::invalid_argument("[set_num_threads] count is " +
                                std::to_string(count) + "; expected 1 to " +
                                std::to_string(max_threads) + ".");
  }
  auto& p = pool();
  std::shared_ptr<ThreadPool> old;  // joined after the lock is given back
  const std::lock_guard lock(p.mutex);
  p.threads = count;
  old = std::exchange(p.workers, nullptr);
  if (old && p.process != getpid()) {
    new std::shared_ptr<ThreadPool>(std::move(old));
  }
}

void parallel_for(size_t count, const std::function<void(size_t)>& work) {
  std::atomic<size_t> next = 0;
  const auto drain = [&] {
    for (size_t i; (i = next.fetch_add(1)) < count;) {
      work(i);
    }
  };
  // Helpers use what is on this stack: they are joined whatever happens.
  struct Helpers {
    std::vector<std::future<void>> futures;
    ~Helpers() {
      for (auto& future : futures) {
        future.wait();
      }
    }
  } helpers;
  std::shared_ptr<ThreadPool> workers;
  if (count > 1) {
    const auto [shared, size] = current_workers();
    workers = shared;
    const size_t wanted = std::min<size_t>(size, count) - 1;
    helpers.futures.reserve(wanted);
    for (size_t i = 0; i < wanted; ++i) {
      helpers.futures.push_back(workers->enqueue(drain));
    }
  }
  drain();
}

}  // namespace mlx_fused::cpu
