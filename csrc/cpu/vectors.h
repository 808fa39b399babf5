// What the loops of an instruction set are written with. Included, like all
// that is built on it, by loops.cpp alone: once for each set.
#pragma once

#include <string.h>

#include <cstddef>
#include <cstdint>

#include "cpu/loops.h"
#include "half.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define MLX_FUSED_INLINE inline __attribute__((always_inline))

// A vector at a time: unrolled first, the loop over a tile would become scalar.
#if defined(__clang__)
#define MLX_FUSED_VECTORIZE \
  _Pragma("clang loop vectorize(assume_safety) unroll(disable)")
#else
#define MLX_FUSED_VECTORIZE _Pragma("GCC ivdep") _Pragma("GCC unroll 1")
#endif

namespace mlx_fused::cpu {

namespace {

// What the loops read and write: float32, or 16 bits of one of two kinds.
struct Float32 {
  using Type = float;
  static constexpr size_t vectors = 1;
  static void load(const float* in, float* out, size_t n) {
    for (size_t i = 0; i < n; ++i) {
      out[i] = in[i];
    }
  }
  static void store(const float* in, float* out, size_t n) {
    for (size_t i = 0; i < n; ++i) {
      out[i] = in[i];
    }
  }
};

// As many elements as a vector register has float32 of.
#if defined(__AVX512F__)
constexpr size_t vector_size = 16;
using Floats = __m512;
using Halves = __m256i;

Floats load_floats(const float* in) { return _mm512_loadu_ps(in); }
void store_floats(Floats values, float* out) { _mm512_storeu_ps(out, values); }
Halves load_halves(const uint16_t* in) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in));
}
void store_halves(Halves values, uint16_t* out) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), values);
}
#elif defined(__AVX2__)
constexpr size_t vector_size = 8;
using Floats = __m256;
using Halves = __m128i;

Floats load_floats(const float* in) { return _mm256_loadu_ps(in); }
void store_floats(Floats values, float* out) { _mm256_storeu_ps(out, values); }
Halves load_halves(const uint16_t* in) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(in));
}
void store_halves(Halves values, uint16_t* out) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), values);
}
#endif

// The loops over 16 bits of the kind whose conversions K has.
template <typename K>
struct Half {
  using Type = uint16_t;
  static constexpr size_t vectors = 1;
  static void load(const uint16_t* in, float* out, size_t n) {
    size_t i = 0;
#if defined(__AVX2__)
    for (; i + vector_size <= n; i += vector_size) {
      store_floats(K::widen(load_halves(in + i)), out + i);
    }
#endif
    for (; i < n; ++i) {
      out[i] = K::widen(in[i]);
    }
  }
  static void store(const float* in, uint16_t* out, size_t n) {
    size_t i = 0;
#if defined(__AVX2__)
    for (; i + vector_size <= n; i += vector_size) {
      store_halves(K::round(load_floats(in + i)), out + i);
    }
#endif
    for (; i < n; ++i) {
      out[i] = K::round(in[i]);
    }
  }
};

// Without care for NaNs whose lower bits are set: rounding could carry them
// into the sign. Where all that is computed with came from bfloat16, none has
// any.
struct BFloat16Alone : Half<BFloat16Alone> {
  static float widen(uint16_t half) { return from_bfloat16(half); }
  static uint16_t round(float value) {
    const uint32_t bits = as_bits(value);
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
#if defined(__AVX512F__)
  static Floats widen(Halves half) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  // In the upper halves of the words.
  static __m512i rounded(Floats value) {
    const auto bits = _mm512_castps_si512(value);
    const auto odd =
        _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const auto half = _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd);
    return _mm512_add_epi32(bits, half);
  }
  static Halves packed(__m512i words) {
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(words, 16));
  }
  static void load(const uint16_t* in, float (&out)[2][vector_size]) {
    const auto words = _mm512_loadu_si512(in);
    const auto upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    store_floats(_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)), out[0]);
    store_floats(_mm512_castsi512_ps(_mm512_and_si512(words, upper)), out[1]);
  }
  static void store(const float (&in)[2][vector_size], uint16_t* out) {
    const auto even = _mm512_srli_epi32(rounded(load_floats(in[0])), 16);
    const auto odd = rounded(load_floats(in[1]));
    _mm512_storeu_si512(out, _mm512_mask_mov_epi16(even, 0xaaaaaaaau, odd));
  }
#elif defined(__AVX2__)
  static Floats widen(Halves half) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static __m256i rounded(Floats value) {
    const auto bits = _mm256_castps_si256(value);
    const auto odd =
        _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const auto half = _mm256_add_epi32(_mm256_set1_epi32(0x7fff), odd);
    return _mm256_add_epi32(bits, half);
  }
  static Halves packed(__m256i words) {
    const auto halves = _mm256_srli_epi32(words, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(halves),
                            _mm256_extracti128_si256(halves, 1));
  }
  static void load(const uint16_t* in, float (&out)[2][vector_size]) {
    const auto words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in));
    const auto upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    store_floats(_mm256_castsi256_ps(_mm256_slli_epi32(words, 16)), out[0]);
    store_floats(_mm256_castsi256_ps(_mm256_and_si256(words, upper)), out[1]);
  }
  static void store(const float (&in)[2][vector_size], uint16_t* out) {
    const auto even = _mm256_srli_epi32(rounded(load_floats(in[0])), 16);
    const auto odd = rounded(load_floats(in[1]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                        _mm256_blend_epi16(even, odd, 0xaa));
  }
#endif
#if defined(__AVX2__)
  // A tile is the elements with even numbers and those with odd ones: the two
  // halves of a word need no moving between lanes.
  static constexpr size_t vectors = 2;
  using Half<BFloat16Alone>::load;
  using Half<BFloat16Alone>::store;

  static Halves round(Floats value) { return packed(rounded(value)); }
#endif
};

struct BFloat16 : Half<BFloat16> {
  using Alone = BFloat16Alone;
  static float widen(uint16_t half) { return from_bfloat16(half); }
  static uint16_t round(float value) { return to_bfloat16(value); }
#if defined(__AVX2__)
  static Floats widen(Halves half) { return Alone::widen(half); }
#endif
#if defined(__AVX512F__)
  static Halves round(Floats value) {
    const auto quiet = _mm512_or_si512(_mm512_castps_si512(value),
                                       _mm512_set1_epi32(0x400000));
    const auto is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return Alone::packed(
        _mm512_mask_mov_epi32(Alone::rounded(value), is_nan, quiet));
  }
#elif defined(__AVX2__)
  static Halves round(Floats value) {
    const auto quiet = _mm256_or_si256(_mm256_castps_si256(value),
                                       _mm256_set1_epi32(0x400000));
    const auto is_nan =
        _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    return Alone::packed(
        _mm256_blendv_epi8(Alone::rounded(value), quiet, is_nan));
  }
#endif
};

struct Float16 : Half<Float16> {
  static float widen(uint16_t half) { return from_float16(half); }
  static uint16_t round(float value) { return to_float16(value); }
#if defined(__AVX512F__)
  static Floats widen(Halves half) { return _mm512_cvtph_ps(half); }
  static Halves round(Floats value) {
    return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
  }
#elif defined(__AVX2__)  // a set that has F16C, too: see dispatch.cpp
  static Floats widen(Halves half) { return _mm256_cvtph_ps(half); }
  static Halves round(Floats value) {
    return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
  }
#endif
};

// Elements of a row of a tile: one vector, so that they stay in registers; or
// more, for the compiler to make vectors of.
#if defined(__AVX2__)
constexpr size_t row_size = vector_size;
#else
constexpr size_t row_size = 64;
#endif

template <typename F>
void load(const typename F::Type* in, float (&out)[F::vectors][row_size]) {
  if constexpr (F::vectors == 1) {
    F::load(in, out[0], row_size);
  } else {
    F::load(in, out);
  }
}

template <typename F>
void store(const float (&in)[F::vectors][row_size], typename F::Type* out) {
  if constexpr (F::vectors == 1) {
    F::store(in[0], out, row_size);
  } else {
    F::store(in, out);
  }
}

}  // namespace

}  // namespace mlx_fused::cpu
