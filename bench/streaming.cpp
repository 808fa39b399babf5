// The bandwidth that a step can reach at most, by plain loops on each of
// several threads: parameter, gradient and states are read, and all but the
// gradient written; or the gradient is read alone.
#include <cstddef>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__clang__)
#define VECTORIZE _Pragma("clang loop vectorize(assume_safety)")
#else
#define VECTORIZE _Pragma("GCC ivdep")
#endif

namespace {

template <int states>
void update(float* p, const float* g, float* m, float* v, std::size_t n) {
  VECTORIZE
  for (std::size_t i = 0; i < n; ++i) {
    float sum = p[i] + g[i];
    if constexpr (states > 0) {
      sum += m[i];
    }
    if constexpr (states > 1) {
      sum += v[i];
    }
    p[i] = 0.25f * sum;
    if constexpr (states > 0) {
      m[i] = 0.5f * sum;
    }
    if constexpr (states > 1) {
      v[i] = 0.125f * sum;
    }
  }
}

// A bit of every element, so that nothing is left out.
void read(const float* g, std::size_t n, unsigned* result) {
  unsigned bits = 0;
  for (std::size_t i = 0; i < n; ++i) {
    unsigned word;
    std::memcpy(&word, g + i, sizeof(word));
    bits ^= word;
  }
  *result = bits;
}

// Calls part(thread, start, n) on each thread.
template <typename F>
void share(std::size_t n, int threads, F part) {
  std::vector<std::thread> others;
  const auto run = [&](std::size_t i) {
    const std::size_t start = n * i / threads;
    part(i, start, n * (i + 1) / threads - start);
  };
  for (int i = 1; i < threads; ++i) {
    others.emplace_back(run, i);
  }
  run(0);
  for (auto& thread : others) {
    thread.join();
  }
}

}  // namespace

extern "C" void stream_update(float* p, const float* g, float* m, float* v,
                              std::size_t n, int threads, int states) {
  const auto loop = states == 0   ? update<0>
                    : states == 1 ? update<1>
                                  : update<2>;
  share(n, threads, [&](std::size_t, std::size_t start, std::size_t count) {
    loop(p + start, g + start, m + start, v + start, count);
  });
}

extern "C" unsigned stream_read(const float* g, std::size_t n, int threads) {
  std::vector<unsigned> results(threads);
  share(n, threads, [&](std::size_t i, std::size_t start, std::size_t count) {
    read(g + start, count, &results[i]);
  });
  unsigned bits = 0;
  for (const unsigned result : results) {
    bits ^= result;
  }
  return bits;
}
