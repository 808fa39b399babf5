// Compiled once for each instruction set, under the name MLX_FUSED_LOOPS, with
// that set's compiler flags. It must not use inline functions of the standard
// library: the linker keeps one copy of each, perhaps one that this machine
// cannot run.
#include "loops.h"

#include <string.h>

#if defined(__F16C__)
#include <immintrin.h>
#endif

// No two arrays of an update overlap, unless they are the same one.
#if defined(__clang__)
#define MLX_FUSED_VECTORIZE _Pragma("clang loop vectorize(assume_safety)")
#else
#define MLX_FUSED_VECTORIZE _Pragma("GCC ivdep")
#endif

namespace mlx_fused::cpu {

namespace {

template <typename R>
void update_with(const float* h, float learning_rate, float step,
                 float gradient_scale, const float* g, const float* const in[3],
                 float* const out[3], size_t n) {
  const R rule = R::prepare(h, learning_rate, step);
  const float *p_in = in[0], *s0_in = in[1], *s1_in = in[2];
  float *p_out = out[0], *s0_out = out[1], *s1_out = out[2];
  MLX_FUSED_VECTORIZE
  for (size_t i = 0; i < n; ++i) {
    float s[2] = {};
    if constexpr (R::states > 0) {
      s[0] = s0_in[i];
    }
    if constexpr (R::states > 1) {
      s[1] = s1_in[i];
    }
    float parameter = p_in[i];
    float gradient = 0;
    if constexpr (R::reads_gradient) {
      gradient = g[i];
    }
    if constexpr (R::gradient_in_place) {
      parameter *= gradient_scale;
    } else {
      gradient *= gradient_scale;
    }
    rule.update(gradient, parameter, s);
    p_out[i] = parameter;
    if constexpr (R::states > 0) {
      s0_out[i] = s[0];
    }
    if constexpr (R::states > 1) {
      s1_out[i] = s[1];
    }
  }
}

void update(Rule rule, const float* h, float learning_rate, float step,
            float gradient_scale, const float* g, const float* const in[3],
            float* const out[3], size_t n) {
  switch (rule) {
#define MLX_FUSED_RULE(type, name)                                            \
  case Rule::type:                                                            \
    update_with<type>(h, learning_rate, step, gradient_scale, g, in, out, n); \
    break;
    MLX_FUSED_FOR_EACH_RULE(MLX_FUSED_RULE)
#undef MLX_FUSED_RULE
  }
}

void add_squares(const float* x, size_t n, float* lanes) {
  float sums[sum_lanes];
  memcpy(sums, lanes, sizeof(sums));
  size_t i = 0;
  for (; i + sum_lanes <= n; i += sum_lanes) {
    for (size_t lane = 0; lane < sum_lanes; ++lane) {
      sums[lane] += x[i + lane] * x[i + lane];
    }
  }
  for (size_t lane = 0; i < n; ++i, ++lane) {
    sums[lane] += x[i] * x[i];
  }
  memcpy(lanes, sums, sizeof(sums));
}

float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// IEEE binary16 by integer arithmetic that vectorises anywhere.
float from_float16(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  // Exponent and mantissa moved into place, then the exponent's bias mended by
  // a multiplication, which also makes subnormal numbers normal.
  const float finite = as_float(magnitude << 13) * as_float(0x77800000u);
  const uint32_t bits =
      magnitude >= 0x7c00u ? 0x7f800000u | (magnitude << 13) : as_bits(finite);
  return as_float(bits | (static_cast<uint32_t>(half & 0x8000u) << 16));
}

uint16_t to_float16(float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {  // NaN, made quiet
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // rounds to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: the addition rounds
    half = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    const uint32_t odd = (magnitude >> 13) & 1u;
    half = (magnitude - 0x38000000u + 0xfffu + odd) >> 13;
  }
  return static_cast<uint16_t>(sign | half);
}

void load_float16(const uint16_t* in, float* out, size_t n) {
  size_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) {
    const auto half =
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i));
    _mm512_storeu_ps(out + i, _mm512_cvtph_ps(half));
  }
#elif defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const auto half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(half));
  }
#endif
  for (; i < n; ++i) {
    out[i] = from_float16(in[i]);
  }
}

void store_float16(const float* in, uint16_t* out, size_t n) {
  size_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) {
    const auto half =
        _mm512_cvtps_ph(_mm512_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), half);
  }
#elif defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const auto half =
        _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), half);
  }
#endif
  for (; i < n; ++i) {
    out[i] = to_float16(in[i]);
  }
}

void load_bfloat16(const uint16_t* in, float* out, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    out[i] = as_float(static_cast<uint32_t>(in[i]) << 16);
  }
}

void store_bfloat16(const float* in, uint16_t* out, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    const uint32_t bits = as_bits(in[i]);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    out[i] = static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40u : rounded);
  }
}

}  // namespace

extern const Loops MLX_FUSED_LOOPS;
const Loops MLX_FUSED_LOOPS = {MLX_FUSED_INSTRUCTION_SET,
                               update,
                               add_squares,
                               load_float16,
                               store_float16,
                               load_bfloat16,
                               store_bfloat16};

}  // namespace mlx_fused::cpu
