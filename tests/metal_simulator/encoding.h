// What MLX's command encoder decides: between which launches there is a
// barrier, and which may therefore run in any order.

#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include "simulator.h"

namespace simulator {

// The rule by which MLX places barriers. It knows whole buffers, not bytes, and
// only those that are announced: a launch waits if it touches what an earlier
// one writes, or writes what an earlier one touches. Launches in a concurrent
// part are taken not to disturb each other, and nobody checks it; nor whether
// they write what a launch before that part still reads.
class Hazards {
 public:
  void touch(const Memory& buffer);  // any array that is bound
  void write(const Memory& buffer);  // an output, as well as touch()
  // Whether a barrier has to stand before the launch of what is bound now.
  bool launch();

  void start_concurrent() { concurrent_ = true; }
  void end_concurrent();
  void end_encoding() { *this = Hazards(); }

 private:
  // Buffers by identity: a new one may lie where another was.
  class Set {
   public:
    bool contains(const Memory& buffer) const { return set_.count(buffer) > 0; }
    void insert(const Memory& buffer);
    void take(Set& others);
    void clear() { set_.clear(); }

   private:
    std::set<Memory, std::owner_less<Memory>> set_;
    size_t pruned_at_ = 64;
  };

  bool needed_ = false;
  bool concurrent_ = false;
  Set touched_, written_;          // since the last barrier
  Set touched_now_, written_now_;  // by the launch that is being encoded
  Set written_concurrently_;       // since the concurrent part began
};

// The launches of one primitive, which run when all of them are encoded: with a
// seed, those with no barrier between in a random order.
class Batch {
 public:
  Batch();

  size_t add(Launch launch);  // its number
  void remove_last();
  void close();
  // Runs the n-th launch in the order that close() decides, and waits for that.
  void run(size_t n);

 private:
  std::mutex mutex_;
  std::condition_variable closed_;
  bool is_closed_ = false;
  uint64_t id_;
  std::vector<Launch> launches_;
};

}  // namespace simulator
