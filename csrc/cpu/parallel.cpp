#include "cpu/parallel.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace mlx_fused::cpu {

namespace {

// More are never useful, and might be more than the system gives.
constexpr int max_threads = 256;

// A thread that has run out of work looks for more for so long before it
// sleeps: to wake one takes as long as to update 100,000 elements, and the next
// large tensor is usually there at once.
constexpr auto patience = std::chrono::microseconds(50);

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

// Whether condition() came true within our patience.
template <typename F>
bool wait_briefly(F condition) {
  const auto end = std::chrono::steady_clock::now() + patience;
  do {
    for (int i = 0; i < 16; ++i) {
      if (condition()) {
        return true;
      }
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      asm volatile("yield");
#endif
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

// Pieces of work that any number of threads take until none is left.
struct Job {
  const std::function<void(size_t)>& work;
  const size_t count;
  std::atomic<size_t> next = 0;
  int helpers_wanted;                // under the pool's mutex
  std::atomic<int> helpers_at_work;  // raised under it

  void drain() {
    for (size_t i; (i = next.fetch_add(1)) < count;) {
      work(i);
    }
  }
};

// Threads that help with jobs, of which several streams may have one each.
class Pool {
 public:
  explicit Pool(int helpers) {
    try {
      for (int i = 0; i < helpers; ++i) {
        threads_.emplace_back([this] { help(); });
      }
    } catch (const std::system_error&) {
      // The system gives no more threads: do with those that there are.
    }
  }

  ~Pool() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
      ++offers_;
    }
    offered_.notify_all();
    for (auto& thread : threads_) {
      thread.join();
    }
  }

  void run(size_t count, const std::function<void(size_t)>& work) {
    const int helpers = static_cast<int>(std::min(threads_.size(), count - 1));
    Job job{work, count, 0, helpers, 0};
    bool are_asleep;
    {
      const std::lock_guard lock(mutex_);
      jobs_.push_back(&job);
      ++offers_;
      are_asleep = sleepers_ > 0;
    }
    if (are_asleep) {
      helpers == 1 ? offered_.notify_one() : offered_.notify_all();
    }
    job.drain();
    {
      const std::lock_guard lock(mutex_);
      jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
    }
    // Nobody joins any more. The job is on this stack, so wait for the others.
    const auto is_done = [&] { return job.helpers_at_work == 0; };
    if (!wait_briefly(is_done)) {
      std::unique_lock lock(mutex_);
      left_.wait(lock, is_done);
    }
  }

 private:
  void help() {
    std::unique_lock lock(mutex_);
    while (!stopping_) {
      if (Job* job = find_job()) {
        --job->helpers_wanted;
        ++job->helpers_at_work;
        lock.unlock();
        job->drain();
        lock.lock();
        // From here on the job may be gone.
        --job->helpers_at_work;
        left_.notify_all();
        continue;
      }
      const auto seen = offers_.load();
      lock.unlock();
      const bool is_offered = wait_briefly([&] { return offers_ != seen; });
      lock.lock();
      if (!is_offered && offers_ == seen) {
        ++sleepers_;
        offered_.wait(lock, [&] { return offers_ != seen; });
        --sleepers_;
      }
    }
  }

  Job* find_job() {
    for (Job* job : jobs_) {
      if (job->helpers_wanted > 0) {
        return job;
      }
    }
    return nullptr;
  }

  std::mutex mutex_;
  std::condition_variable offered_, left_;
  std::vector<Job*> jobs_;
  std::atomic<uint64_t> offers_ = 0;  // counts jobs; changed under the mutex
  int sleepers_ = 0;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

struct Workers {
  std::mutex mutex;
  int threads = default_threads();
  std::shared_ptr<Pool> pool;  // made at first use
  pid_t process = 0;           // that made it
};

// Never destroyed: MLX's streams may be at work when the process exits.
Workers& workers() {
  static Workers* const instance = new Workers;
  return *instance;
}

// A fork has none of its parent's threads, and joining them would never end.
void abandon(std::shared_ptr<Pool> pool) {
  new std::shared_ptr<Pool>(std::move(pool));
}

// Null if there are no helpers. Work under way keeps the pool it started with.
std::shared_ptr<Pool> current_pool() {
  auto& w = workers();
  const std::lock_guard lock(w.mutex);
  if (w.pool && w.process != getpid()) {
    abandon(std::exchange(w.pool, nullptr));
  }
  if (w.threads > 1 && !w.pool) {
    w.pool = std::make_shared<Pool>(w.threads - 1);
    w.process = getpid();
  }
  return w.pool;
}

}  // namespace

int num_threads() {
  const std::lock_guard lock(workers().mutex);
  return workers().threads;
}

void set_num_threads(int count) {
  if (count < 1 || count > max_threads) {
    throw std::invalid_argument("[set_num_threads] count is " +
                                std::to_string(count) + "; expected 1 to " +
                                std::to_string(max_threads) + ".");
  }
  auto& w = workers();
  std::shared_ptr<Pool> old;  // joined after the lock is given back
  const std::lock_guard lock(w.mutex);
  w.threads = count;
  old = std::exchange(w.pool, nullptr);
  if (old && w.process != getpid()) {
    abandon(std::move(old));
  }
}

void parallel_for(size_t count, const std::function<void(size_t)>& work) {
  const auto pool = count > 1 ? current_pool() : nullptr;
  if (pool) {
    pool->run(count, work);
  } else {
    for (size_t i = 0; i < count; ++i) {
      work(i);
    }
  }
}

}  // namespace mlx_fused::cpu
