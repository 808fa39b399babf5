// Runs numbered pieces of work on a pool of threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <functional>
#include <vector>

namespace mlx_fused::cpu {

// Calls work(0) ... work(count - 1), each once, on this thread and the pool's.
// Returns when all are done. Which thread does which piece varies, so a piece's
// result must depend on its number alone.
void parallel_for(size_t count, const std::function<void(size_t)>& work);

// Threads that parallel_for uses, this one included. The default is that of the
// machine's cores, or MLX_FUSED_NUM_THREADS where it is set.
int num_threads();
void set_num_threads(int count);

}  // namespace mlx_fused::cpu

namespace mlx_fused {

inline size_t divided_up(size_t a, size_t b) { return (a + b - 1) / b; }

// Elements from which a second thread is worth its while.
constexpr size_t worth_sharing = 1 << 16;

// Calls piece(number, tensor, number in the tensor) for each piece of work of
// several tensors, of which counts has the pieces; on several threads where
// there are this many elements.
template <typename F>
void for_each_piece(const std::vector<size_t>& counts, size_t elements,
                    F piece) {
  std::vector<size_t> first = {0};  // the number of each tensor's first piece
  for (const size_t count : counts) {
    first.push_back(first.back() + count);
  }
  const auto run = [&](size_t i) {
    const size_t tensor =
        std::upper_bound(first.begin(), first.end(), i) - first.begin() - 1;
    piece(i, tensor, i - first[tensor]);
  };
  if (elements >= worth_sharing) {
    cpu::parallel_for(first.back(), run);
    return;
  }
  for (size_t i = 0; i < first.back(); ++i) {
    run(i);
  }
}

}  // namespace mlx_fused
