// The bandwidth that a step can reach at most: four arrays are read and three
// written, as by Adam, by a plain loop on each of several threads.
#include <cstddef>
#include <thread>
#include <vector>

namespace {

void stream(float* p, const float* g, float* m, float* v, std::size_t n) {
#if defined(__clang__)
#pragma clang loop vectorize(assume_safety)
#else
#pragma GCC ivdep
#endif
  for (std::size_t i = 0; i < n; ++i) {
    const float sum = p[i] + g[i] + m[i] + v[i];
    p[i] = 0.25f * sum;
    m[i] = 0.5f * sum;
    v[i] = 0.125f * sum;
  }
}

}  // namespace

extern "C" void stream_all(float* p, const float* g, float* m, float* v,
                           std::size_t n, int threads) {
  std::vector<std::thread> others;
  const auto part = [&](std::size_t i) {
    const std::size_t start = n * i / threads;
    stream(p + start, g + start, m + start, v + start,
           n * (i + 1) / threads - start);
  };
  for (int i = 1; i < threads; ++i) {
    others.emplace_back(part, i);
  }
  part(0);
  for (auto& thread : others) {
    thread.join();
  }
}
