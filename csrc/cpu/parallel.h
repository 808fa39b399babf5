// Runs numbered pieces of work on a pool of threads.
#pragma once

#include <cstddef>
#include <functional>

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
