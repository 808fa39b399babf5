// Compiled once for each instruction set, under the name MLX_FUSED_LOOPS, with
// that set's compiler flags. It must not use inline functions of the standard
// library: the linker keeps one copy of each, perhaps one that this machine
// cannot run.
#include "cpu/loops.h"

#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// A vector at a time: unrolled first, the loop over a tile would become scalar.
#if defined(__clang__)
#define MLX_FUSED_VECTORIZE \
  _Pragma("clang loop vectorize(assume_safety) unroll(disable)")
#else
#define MLX_FUSED_VECTORIZE _Pragma("GCC ivdep") _Pragma("GCC unroll 1")
#endif

#include "cpu/factored_loops.h"
#include "cpu/program_loops.h"

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

template <typename R>
inline __attribute__((always_inline)) void update_row(const R& rule,
                                                      float gradient_scale,
                                                      float* p, float** s,
                                                      float* g) {
  MLX_FUSED_VECTORIZE
  for (size_t i = 0; i < row_size; ++i) {
    float states[R::states + 1];
    for (int k = 0; k < R::states; ++k) {
      states[k] = s[k][i];
    }
    float gradient = g[i] * gradient_scale;
    float parameter = p[i];
    rule.update(gradient, parameter, states);
    p[i] = parameter;
    g[i] = gradient;
    for (int k = 0; k < R::states; ++k) {
      s[k][i] = states[k];
    }
  }
}

// Loads, updates and stores a tile's elements.
template <typename R, typename F>
inline __attribute__((always_inline)) void update_tile(
    const R& rule, float gradient_scale, const Block<typename F::Type>& block,
    size_t start) {
  constexpr int first_state = R::reads_parameter;
  constexpr int gradient_slot = first_state + R::states;
  using Tile = float[F::vectors][row_size];
  Tile p = {}, s[R::states + 1], g;
  if constexpr (R::reads_parameter) {
    load<F>(block.in[0] + start, p);
  }
  for (int k = 0; k < R::states; ++k) {
    load<F>(block.in[first_state + k] + start, s[k]);
  }
  load<F>(block.in[gradient_slot] + start, g);
  for (size_t row = 0; row < F::vectors; ++row) {
    float* states[R::states + 1];
    for (int k = 0; k < R::states; ++k) {
      states[k] = s[k][row];
    }
    update_row(rule, gradient_scale, p[row], states, g[row]);
  }
  if constexpr (R::writes_parameter) {
    store<F>(p, block.out[0] + start);
  }
  for (int k = 0; k < R::states; ++k) {
    store<F>(s[k], block.out[first_state + k] + start);
  }
  if constexpr (R::writes_gradient) {
    store<F>(g, block.out[gradient_slot] + start);
  }
}

template <int index, typename F>
void update_with(const float* numbers, float learning_rate, float step,
                 float coefficient, float gradient_scale,
                 const Block<typename F::Type>& block, size_t n) {
  using R = typename RegisteredRule<index>::template Type<float>;
  using Type = typename F::Type;
  constexpr size_t tile_size = F::vectors * row_size;
  R rule;
  // A rule begins with its numbers.
  memcpy(static_cast<void*>(&rule), numbers,
         R::numbers * sizeof(Number<float>));
  prepare(rule, learning_rate, step, coefficient);
  size_t i = 0;
  for (; i + tile_size <= n; i += tile_size) {
    for (int k = 0; k < R::reads_parameter + R::states + 1; ++k) {
      prefetch(block.in[k] + i + block.ahead, tile_size * sizeof(Type));
    }
    update_tile<R, F>(rule, gradient_scale, block, i);
  }
  if (i == n) {
    return;
  }
  // The rest, as a tile of its own.
  const size_t bytes = (n - i) * sizeof(Type);
  Type rest[max_slots][tile_size] = {};
  Block<Type> rest_block;
  for (int k = 0; k < max_slots; ++k) {
    if (block.in[k]) {
      memcpy(rest[k], block.in[k] + i, bytes);
    }
    rest_block.in[k] = rest_block.out[k] = rest[k];
  }
  update_tile<R, F>(rule, gradient_scale, rest_block, 0);
  for (int k = 0; k < max_slots; ++k) {
    if (block.out[k]) {
      memcpy(block.out[k] + i, rest[k], bytes);
    }
  }
}

void average(const float* numbers, const float* x, const float* in, float* out,
             size_t n) {
  const Number<float> ema{numbers[0], numbers[1], numbers[2]};
  MLX_FUSED_VECTORIZE
  for (size_t i = 0; i < n; ++i) {
    out[i] = moving_average(ema, in[i], x[i]);
  }
}

template <typename F, int... index>
void update_by_index(int rule, const float* numbers, float learning_rate,
                     float step, float coefficient, float gradient_scale,
                     const Block<typename F::Type>& block, size_t n,
                     std::integer_sequence<int, index...>) {
  static constexpr decltype(&update_with<0, F>) table[] = {
      update_with<index, F>...};
  table[rule](numbers, learning_rate, step, coefficient, gradient_scale, block,
              n);
}

template <typename F>
void update(int rule, const float* numbers, float learning_rate, float step,
            float coefficient, float gradient_scale,
            const Block<typename F::Type>& block, size_t n) {
  update_by_index<F>(rule, numbers, learning_rate, step, coefficient,
                     gradient_scale, block, n,
                     std::make_integer_sequence<int, rule_count>());
}

// The whole numbers nearest to these, as bytes; of what is no number, 0.
template <size_t n>
inline __attribute__((always_inline)) void store_nearest(const float (&in)[n],
                                                         uint8_t* out) {
#if defined(__AVX512F__)
  static_assert(n == vector_size);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                   _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(load_floats(in))));
#else
  MLX_FUSED_VECTORIZE
  for (size_t i = 0; i < n; ++i) {
    out[i] = static_cast<uint8_t>(to_integer<uint32_t>(nearest(in[i])));
  }
#endif
}

// A block of codes, or the last ones.
template <bool is_positive, typename C>
inline __attribute__((always_inline)) void load_block(const C* codes,
                                                      float scale, float most,
                                                      float* out, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    const auto code = static_cast<float>(codes[i]);
    out[i] = is_positive ? decoded_positive<float>(code, scale, most)
                         : decoded_signed<float>(code, scale, most);
  }
}

// The largest magnitude of n elements.
template <size_t n>
inline __attribute__((always_inline)) float scale_of(const float* in) {
  int32_t largest = 0;  // of the bits: that of a NaN is the largest
  for (size_t i = 0; i < n; ++i) {
    const auto bits = static_cast<int32_t>(as_bits(in[i]) & 0x7fffffffu);
    largest = bits > largest ? bits : largest;
  }
  return as_float(static_cast<uint32_t>(largest));
}

template <bool is_positive, size_t n>
inline __attribute__((always_inline)) void store_block(const float* in,
                                                       float stretch,
                                                       uint8_t* codes) {
  constexpr size_t row = row_size < n ? row_size : n;
  for (size_t i = 0; i < n; i += row) {
    float roots[row];
    MLX_FUSED_VECTORIZE
    for (size_t k = 0; k < row; ++k) {
      roots[k] = is_positive
                     ? root_positive<float, uint32_t>(in[i + k], stretch)
                     : root_signed<float, uint32_t>(in[i + k], stretch);
    }
    store_nearest(roots, codes + i);
  }
}

template <bool is_positive, size_t block, typename C>
void load_whole_codes(const C* codes, const float* scales, float most,
                      float* out, size_t n) {
  for (; n >= block; n -= block, codes += block, out += block) {
    load_block<is_positive>(codes, *scales++, most, out, block);
  }
  if (n > 0) {
    load_block<is_positive>(codes, *scales, most, out, n);
  }
}

template <bool is_positive, size_t block>
void store_whole_codes(const float* in, float most, float* scales,
                       uint8_t* codes, size_t n) {
  // A block's scale and stretch depend on all of it: those of many blocks first
  // leave the processor something to do meanwhile.
  constexpr size_t most_blocks = block_size / block;
  const size_t blocks = n / block, left = n % block;
  float rest[block] = {};
  memcpy(rest, in + blocks * block, left * sizeof(float));
  for (size_t i = 0; i < blocks; ++i) {
    scales[i] = scale_of<block>(in + i * block);
  }
  if (left > 0) {
    scales[blocks] = scale_of<block>(rest);
  }
  float stretches[most_blocks];
  for (size_t i = 0; i < blocks + (left > 0); ++i) {
    stretches[i] = is_positive
                       ? stretch_positive<float, uint32_t>(scales[i], most)
                       : stretch_signed<float, uint32_t>(scales[i], most);
  }
  for (size_t i = 0; i < blocks; ++i) {
    store_block<is_positive, block>(in + i * block, stretches[i],
                                    codes + i * block);
  }
  if (left > 0) {
    uint8_t rest_codes[block];
    store_block<is_positive, block>(rest, stretches[blocks], rest_codes);
    memcpy(codes + blocks * block, rest_codes, left);
  }
}

float most_of(CodesOrError kind) {
  const int bits = kind.is_never_negative ? kind.bits : kind.bits - 1;
  return static_cast<float>((1 << bits) - 1);
}

void load_codes(CodesOrError kind, Pair from, float* out, size_t n) {
  const auto* scales = reinterpret_cast<const float*>(from.companions);
  const auto* bytes = reinterpret_cast<const uint8_t*>(from.values);
  const float most = most_of(kind);
  if (kind.bits == 8) {
    if (kind.is_never_negative) {
      load_whole_codes<true, 64>(bytes, scales, most, out, n);
    } else {
      load_whole_codes<false, 64>(reinterpret_cast<const int8_t*>(bytes),
                                  scales, most, out, n);
    }
    return;
  }
  alignas(64) uint16_t pairs[block_size / 2];
  for (size_t i = 0; i < (n + 1) / 2; ++i) {
    pairs[i] = static_cast<uint16_t>((bytes[i] & 15) | (bytes[i] & 240) << 4);
  }
  auto* codes = reinterpret_cast<int8_t*>(pairs);
  // The sign of 4 bits by way of an offset.
  const int8_t sign = kind.is_never_negative ? 0 : 8;
  for (size_t i = 0; i < n; ++i) {
    codes[i] = static_cast<int8_t>((codes[i] ^ sign) - sign);
  }
  (kind.is_never_negative
       ? load_whole_codes<true, 32, int8_t>
       : load_whole_codes<false, 32, int8_t>)(codes, scales, most, out, n);
}

void store_codes(CodesOrError kind, const float* in, Pair to, size_t n) {
  auto* scales = reinterpret_cast<float*>(to.companions);
  auto* bytes = reinterpret_cast<uint8_t*>(to.values);
  const float most = most_of(kind);
  if (kind.bits == 8) {
    (kind.is_never_negative
         ? store_whole_codes<true, 64>
         : store_whole_codes<false, 64>)(in, most, scales, bytes, n);
    return;
  }
  alignas(64) uint8_t codes[block_size];
  codes[n - 1 + n % 2] = 0;
  (kind.is_never_negative
       ? store_whole_codes<true, 32>
       : store_whole_codes<false, 32>)(in, most, scales, codes, n);
  for (size_t i = 0; i < (n + 1) / 2; ++i) {
    uint16_t pair;
    memcpy(&pair, codes + 2 * i, sizeof(pair));
    bytes[i] = static_cast<uint8_t>((pair & 15) | (pair >> 4 & 0xf0));
  }
}

template <typename E>
void load_split_as(bool is_float16, const uint16_t* weights, const E* errors,
                   float* out, size_t n) {
  constexpr uint32_t exponents = sizeof(E) == 1 ? 18 : 26;
  constexpr uint32_t unit = sizeof(E) == 1 ? 256 : 1;
  (is_float16 ? Float16::load : BFloat16::load)(weights, out, n);
  if (is_float16) {
    for (size_t i = 0; i < n; ++i) {
      out[i] = joined_float16<float, uint32_t>(
          out[i], static_cast<uint32_t>(int32_t{errors[i]}), exponents);
    }
  } else {
    for (size_t i = 0; i < n; ++i) {
      out[i] = joined_bfloat16<float, uint32_t>(
          out[i], static_cast<uint32_t>(int32_t{errors[i]}) * unit);
    }
  }
}

void load_split(CodesOrError kind, Pair from, float* out, size_t n) {
  const auto* weights = reinterpret_cast<const uint16_t*>(from.values);
  if (kind.bits == 8) {
    load_split_as(kind.is_float16, weights,
                  reinterpret_cast<const int8_t*>(from.companions), out, n);
  } else {
    load_split_as(kind.is_float16, weights,
                  reinterpret_cast<const int16_t*>(from.companions), out, n);
  }
}

template <typename E>
void store_split_as(bool is_float16, const float* in, uint16_t* weights,
                    E* errors, size_t n) {
  alignas(64) float rounded[block_size];
  uint32_t rest;
  if (is_float16) {
    constexpr uint32_t exponents = sizeof(E) == 1 ? 18 : 26;
    constexpr float most = sizeof(E) == 1 ? 127 : 32767;
    Float16::store(in, weights, n);
    Float16::load(weights, rounded, n);
    for (size_t i = 0; i < n; ++i) {
      errors[i] = static_cast<E>(error_of_float16<float, uint32_t>(
          in[i], rounded[i], exponents, most));
    }
    return;
  }
  for (size_t i = 0; i < n; ++i) {
    split_bfloat16<float, uint32_t>(in[i], rounded[i], rest);
    if (sizeof(E) == 1) {
      rest = shortened<float, uint32_t>(rest, rounded[i]);
    }
    weights[i] = static_cast<uint16_t>(as_bits(rounded[i]) >> 16);
    errors[i] = static_cast<E>(rest);
  }
}

void store_split(CodesOrError kind, const float* in, Pair to, size_t n) {
  auto* weights = reinterpret_cast<uint16_t*>(to.values);
  if (kind.bits == 8) {
    store_split_as(kind.is_float16, in, weights,
                   reinterpret_cast<int8_t*>(to.companions), n);
  } else {
    store_split_as(kind.is_float16, in, weights,
                   reinterpret_cast<int16_t*>(to.companions), n);
  }
}

template <bool is_float16>
void round_each_stochastically(uint32_t key, uint64_t first, float* values,
                               size_t n) {
  const auto high = static_cast<uint32_t>(first >> 32);
  const auto low = static_cast<uint32_t>(first);
  for (size_t i = 0; i < n; ++i) {
    const uint32_t random =
        random_bits<uint32_t>(key, high, low + static_cast<uint32_t>(i));
    values[i] = is_float16
                    ? stochastic_float16<float, uint32_t>(values[i], random)
                    : stochastic_bfloat16<float, uint32_t>(values[i], random);
  }
}

void round_stochastically(bool is_float16, uint32_t key, uint64_t first,
                          float* values, size_t n) {
  const auto round = is_float16 ? round_each_stochastically<true>
                                : round_each_stochastically<false>;
  // Up to a multiple of 2^32, where the upper half of elements' numbers
  // changes.
  const uint64_t left = (uint64_t{1} << 32) - static_cast<uint32_t>(first);
  const size_t before = n < left ? n : left;
  round(key, first, values, before);
  round(key, first + before, values + before, n - before);
}

template <typename F>
inline __attribute__((always_inline)) void add_each(const float* x, size_t n,
                                                    double* lanes, F term) {
  double sums[sum_lanes];
  memcpy(sums, lanes, sizeof(sums));
  size_t i = 0;
  for (; i + sum_lanes <= n; i += sum_lanes) {
    for (size_t lane = 0; lane < sum_lanes; ++lane) {
      sums[lane] += term(x[i + lane]);
    }
  }
  for (size_t lane = 0; i < n; ++i, ++lane) {
    sums[lane] += term(x[i]);
  }
  memcpy(lanes, sums, sizeof(sums));
}

void add_squares(const float* x, size_t n, float scale, double* lanes) {
  add_each(x, n, lanes, [scale](float value) {
    const double scaled = value * scale;
    return scaled * scaled;
  });
}

void add_nonzero(const float* x, size_t n, double* lanes) {
  add_each(x, n, lanes, [](float value) { return value != 0 ? 1.0 : 0.0; });
}

// A square of this many elements is turned in registers.
constexpr size_t square = 16;

template <typename T>
using Lanes __attribute__((vector_size(square * sizeof(T)))) = T;

// Of lane i of two registers whose off-diagonal blocks of `distance` lanes are
// exchanged: where it comes from, counted through both.
constexpr int lane_of_first(int distance, int i) {
  return i & distance ? static_cast<int>(square) + i - distance : i;
}
constexpr int lane_of_second(int distance, int i) {
  return i & distance ? static_cast<int>(square) + i : i + distance;
}

template <int distance, typename T, int... i>
inline __attribute__((always_inline)) void exchange(
    Lanes<T> (&registers)[square], std::integer_sequence<int, i...>) {
  for (size_t k = 0; k < square; ++k) {
    if ((k & distance) == 0) {
      const auto a = registers[k];
      const auto b = registers[k + distance];
      registers[k] =
          __builtin_shufflevector(a, b, lane_of_first(distance, i)...);
      registers[k + distance] =
          __builtin_shufflevector(a, b, lane_of_second(distance, i)...);
    }
  }
}

template <typename T>
inline __attribute__((always_inline)) void turn_square(const T* in,
                                                       int64_t in_stride,
                                                       T* out,
                                                       size_t out_stride) {
  constexpr std::make_integer_sequence<int, square> lanes;
  Lanes<T> registers[square];
  for (size_t k = 0; k < square; ++k) {
    memcpy(&registers[k], in + static_cast<int64_t>(k) * in_stride,
           sizeof(registers[k]));
  }
  exchange<8, T>(registers, lanes);
  exchange<4, T>(registers, lanes);
  exchange<2, T>(registers, lanes);
  exchange<1, T>(registers, lanes);
  for (size_t k = 0; k < square; ++k) {
    memcpy(out + k * out_stride, &registers[k], sizeof(registers[k]));
  }
}

template <typename T>
void turn_squares(const T* in, const T* next, int64_t column_stride,
                  size_t rows, size_t columns, T* out) {
  // As many columns as a line of the cache has elements, at a time.
  constexpr size_t line = 64, width = line / sizeof(T);
  // Few enough for what is fetched to be there still when its turn comes.
  constexpr size_t ahead = 64;
  const size_t square_rows = rows / square * square;
  const size_t square_columns = columns / square * square;
  const auto place = [column_stride](size_t row, size_t column) {
    return row + static_cast<int64_t>(column) * column_stride;
  };
  for (size_t column = 0; column < square_columns; column += width) {
    const size_t left = square_columns - column;
    const size_t count = left < width ? left : width;
    const T* fetched = column + ahead < square_columns
                           ? in + place(0, column + ahead)
                       : next ? next + place(0, column + ahead - square_columns)
                              : nullptr;
    for (size_t i = 0; i < count && fetched; ++i) {
      for (size_t row = 0; row < rows; row += width) {
        __builtin_prefetch(fetched + place(row, i));
      }
    }
    for (size_t row = 0; row < square_rows; row += square) {
      for (size_t i = 0; i < count; i += square) {
        turn_square(in + place(row, column + i), column_stride,
                    out + row * columns + column + i, columns);
      }
    }
  }
  for (size_t row = 0; row < rows; ++row) {
    for (size_t column = row < square_rows ? square_columns : 0;
         column < columns; ++column) {
      out[row * columns + column] =
          in[row + static_cast<int64_t>(column) * column_stride];
    }
  }
}

template <typename T>
void turn_typed(const char* in, const char* next, int64_t column_stride,
                size_t rows, size_t columns, char* out) {
  turn_squares(reinterpret_cast<const T*>(in), reinterpret_cast<const T*>(next),
               column_stride, rows, columns, reinterpret_cast<T*>(out));
}

void turn(size_t itemsize, const char* in, const char* next,
          int64_t column_stride, size_t rows, size_t columns, char* out) {
  (itemsize == 4
       ? turn_typed<uint32_t>
       : turn_typed<uint16_t>)(in, next, column_stride, rows, columns, out);
}

}  // namespace

extern const Loops MLX_FUSED_LOOPS;
const Loops MLX_FUSED_LOOPS = {MLX_FUSED_INSTRUCTION_SET,
                               update<Float32>,
                               update<Float16>,
                               update<BFloat16Alone>,
                               average,
                               run_program,
                               add_squares,
                               add_nonzero,
                               sum_squares,
                               sum_direction,
                               write_factored_row,
                               turn,
                               load_codes,
                               store_codes,
                               load_split,
                               store_split,
                               round_stochastically,
                               Float16::load,
                               Float16::store,
                               BFloat16::load,
                               BFloat16::store};

}  // namespace mlx_fused::cpu
