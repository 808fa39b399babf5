#include "encoding.h"

#include <algorithm>
#include <atomic>
#include <random>
#include <utility>

namespace simulator {

void Hazards::Set::insert(const Memory& buffer) {
  set_.insert(buffer);
  if (set_.size() > pruned_at_) {
    std::erase_if(set_, [](const Memory& other) { return other.expired(); });
    pruned_at_ = 64 + 2 * set_.size();
  }
}

void Hazards::Set::take(Set& others) {
  for (const auto& buffer : others.set_) {
    insert(buffer);
  }
  others.clear();
}

void Hazards::touch(const Memory& buffer) {
  touched_now_.insert(buffer);
  needed_ |= written_.contains(buffer);
}

void Hazards::write(const Memory& buffer) {
  if (concurrent_) {
    written_concurrently_.insert(buffer);
  } else {
    written_now_.insert(buffer);
    needed_ |= touched_.contains(buffer);
  }
}

bool Hazards::launch() {
  const bool barrier = std::exchange(needed_, false);
  if (barrier) {
    touched_.clear();
    written_.clear();
  }
  touched_.take(touched_now_);
  written_.take(written_now_);
  return barrier;
}

void Hazards::end_concurrent() {
  concurrent_ = false;
  written_.take(written_concurrently_);
}

Batch::Batch() {
  static std::atomic<uint64_t> batches = 0;
  id_ = ++batches;
}

size_t Batch::add(Launch launch) {
  std::lock_guard lock(mutex_);
  launch.batch = id_;
  launches_.push_back(std::move(launch));
  return launches_.size() - 1;
}

void Batch::remove_last() {
  std::lock_guard lock(mutex_);
  launches_.pop_back();
}

void Batch::close() {
  std::lock_guard lock(mutex_);
  if (const auto seed = next_order(); seed && launches_.size() > 1) {
    std::mt19937_64 random(*seed);
    for (auto first = launches_.begin(); first != launches_.end();) {
      const auto last = std::find_if(first, launches_.end(), [&](auto& launch) {
        return launch.epoch != first->epoch;
      });
      std::shuffle(first, last, random);
      first = last;
    }
  }
  is_closed_ = true;
  closed_.notify_all();
}

void Batch::run(size_t n) {
  std::unique_lock lock(mutex_);
  closed_.wait(lock, [this] { return is_closed_; });
  const Launch launch = std::move(launches_[n]);
  lock.unlock();
  launch.run();
}

}  // namespace simulator
