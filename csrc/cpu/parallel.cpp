#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <future>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "mlx/threadpool.h"

namespace mlx_fused::cpu {

namespace {

int default_threads() {
  const char* text = std::getenv("MLX_FUSED_NUM_THREADS");
  const int wanted = text ? std::atoi(text) : 0;
  const int cores = static_cast<int>(std::thread::hardware_concurrency());
  return std::max(wanted > 0 ? wanted : cores, 1);
}

std::mutex pool_mutex;
int threads = default_threads();
std::shared_ptr<ThreadPool> pool;

// The pool and the number of its threads, made at first use. Work under way
// keeps the pool it started with.
std::pair<std::shared_ptr<ThreadPool>, int> current_pool() {
  const std::lock_guard lock(pool_mutex);
  if (threads > 1 && !pool) {
    pool = std::make_shared<ThreadPool>(threads - 1);
  }
  return {pool, threads};
}

}  // namespace

int num_threads() {
  const std::lock_guard lock(pool_mutex);
  return threads;
}

void set_num_threads(int count) {
  if (count < 1) {
    throw std::invalid_argument("[set_num_threads] count is " +
                                std::to_string(count) +
                                "; expected at least 1.");
  }
  const std::lock_guard lock(pool_mutex);
  threads = count;
  pool = nullptr;
}

void parallel_for(size_t count, const std::function<void(size_t)>& work) {
  std::atomic<size_t> next = 0;
  const auto drain = [&] {
    for (size_t i; (i = next.fetch_add(1)) < count;) {
      work(i);
    }
  };
  std::vector<std::future<void>> helpers;
  std::shared_ptr<ThreadPool> helpers_pool;
  if (count > 1) {
    const auto [shared, size] = current_pool();
    helpers_pool = shared;
    const size_t wanted = std::min<size_t>(size, count) - 1;
    for (size_t i = 0; i < wanted; ++i) {
      helpers.push_back(helpers_pool->enqueue(drain));
    }
  }
  drain();
  for (auto& helper : helpers) {
    helper.get();
  }
}

}  // namespace mlx_fused::cpu
