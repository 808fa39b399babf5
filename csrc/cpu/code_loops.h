// The formats of graph/layout.h over blocks of float32: codes, masters and
// stochastic rounding.
#pragma once

#include <type_traits>

#include "cpu/vectors.h"

namespace mlx_fused::cpu {

namespace {

// Whole numbers of 8 bits as such of 32.
template <typename I>
MLX_FUSED_INLINE void widen(const I* in, int32_t (&out)[row_size]) {
#if defined(__AVX512F__)
  const auto bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in));
  _mm512_storeu_si512(out, I(-1) < 0 ? _mm512_cvtepi8_epi32(bytes)
                                     : _mm512_cvtepu8_epi32(bytes));
#elif defined(__AVX2__)
  const auto bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(in));
  _mm256_storeu_si256(
      reinterpret_cast<__m256i*>(out),
      I(-1) < 0 ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
#else
  MLX_FUSED_VECTORIZE
  for (size_t i = 0; i < row_size; ++i) {
    out[i] = in[i];
  }
#endif
}

// The order in which a block's elements stand while it is updated: the one that
// unpacking leaves them in, so that packing restores it; or their own.
#if defined(__AVX512F__)
constexpr bool are_unpacked = true;

// Where the element that stands there belongs.
constexpr size_t place_of(size_t i) {
  return i / 32 * 32 + i % 16 / 4 * 8 + i % 32 / 16 * 4 + i % 4;
}

// 64 words, packed to bytes lane by lane, in order.
inline __m512i bytes_in_order(__m512i bytes) {
  return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7),
                                  bytes);
}

template <typename I>
inline __m512i words_of(const I* bytes) {
  const auto in = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
  return I(-1) < 0 ? _mm512_cvtepi8_epi16(in) : _mm512_cvtepu8_epi16(in);
}

// Double words of the lower and upper halves of 32.
inline void store_unpacked(__m512i lower, __m512i upper, void* out) {
  auto* to = static_cast<char*>(out);
  _mm512_store_si512(to, _mm512_unpacklo_epi16(lower, upper));
  _mm512_store_si512(to + 64, _mm512_unpackhi_epi16(lower, upper));
}
#else
constexpr bool are_unpacked = false;
constexpr size_t place_of(size_t i) { return i; }
#endif

// A block of codes, or the last ones.
template <bool is_positive, typename C>
MLX_FUSED_INLINE void load_block(const C* codes, float scale, float most,
                                 float* out, size_t n) {
  const auto decoded = [=](int32_t code) {
    return is_positive ? decoded_positive<float>(code, scale, most)
                       : decoded_signed<float>(code, scale, most);
  };
  size_t i = 0;
  for (; i + row_size <= n; i += row_size) {
    int32_t row[row_size];
    widen(codes + i, row);
    MLX_FUSED_VECTORIZE
    for (size_t k = 0; k < row_size; ++k) {
      out[i + k] = decoded(row[k]);
    }
  }
  for (; i < n; ++i) {
    out[i] = decoded(codes[i]);
  }
}

// The largest magnitude of n elements.
template <size_t n>
MLX_FUSED_INLINE float scale_of(const float* in) {
  int32_t largest = 0;  // of the bits: that of a NaN is the largest
  for (size_t i = 0; i < n; ++i) {
    const auto bits = static_cast<int32_t>(as_bits(in[i]) & 0x7fffffffu);
    largest = bits > largest ? bits : largest;
  }
  return as_float(static_cast<uint32_t>(largest));
}

#if defined(__AVX512F__)
// Of two registers, each of which has `width` blocks' maxima in each group of
// as many lanes: one with the maxima of them all.
template <int width, int... i>
MLX_FUSED_INLINE __m512i merged(__m512i a, __m512i b,
                                std::integer_sequence<int, i...>) {
  constexpr auto from = [](int lane, int half) {
    return lane / (2 * width) * 2 * width + lane % width + half * width +
           (lane / width % 2 ? 16 : 0);
  };
  static constexpr int32_t order[2][16] = {{from(i, 0)...}, {from(i, 1)...}};
  return _mm512_max_epu32(
      _mm512_permutex2var_epi32(a, _mm512_loadu_si512(order[0]), b),
      _mm512_permutex2var_epi32(a, _mm512_loadu_si512(order[1]), b));
}

template <int width, size_t n>
MLX_FUSED_INLINE __m512i merge(const __m512i (&registers)[n]) {
  if constexpr (n == 1) {
    return registers[0];
  } else {
    __m512i half[n / 2];
    for (size_t k = 0; k < n / 2; ++k) {
      half[k] = merged<width>(registers[2 * k], registers[2 * k + 1],
                              std::make_integer_sequence<int, 16>());
    }
    return merge<2 * width>(half);
  }
}
#endif

// The same of each of some blocks.
template <bool is_positive, size_t block, size_t blocks>
MLX_FUSED_INLINE void scales_of(const float* in, float* scales) {
#if defined(__AVX512F__)
  if constexpr (blocks >= 8) {
    __m512i largest[blocks];
    const auto sign = _mm512_set1_epi32(0x7fffffff);
    for (size_t k = 0; k < blocks; ++k) {
      largest[k] = _mm512_setzero_si512();
      for (size_t i = 0; i < block; i += vector_size) {
        const auto bits = _mm512_loadu_si512(in + k * block + i);
        // A NaN may have a sign where there is none else.
        largest[k] = _mm512_max_epu32(
            largest[k], is_positive ? bits : _mm512_and_si512(bits, sign));
      }
    }
    auto all = _mm512_and_si512(merge<1>(largest), sign);
    if constexpr (blocks == 8) {
      all = _mm512_max_epu32(all, _mm512_shuffle_i64x2(all, all, 0x4e));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(scales),
                          _mm512_castsi512_si256(all));
    } else {
      _mm512_storeu_si512(scales, all);
    }
    return;
  }
#endif
  for (size_t k = 0; k < blocks; ++k) {
    scales[k] = scale_of<block>(in + k * block);
  }
}

// The codes of a block. If it is known to be finite, that saves some work.
template <bool is_positive, bool in_order, bool is_finite, size_t n>
MLX_FUSED_INLINE void store_block(const float* in, float stretch,
                                  uint8_t* codes) {
#if defined(__AVX512F__)
  if (n == 4 * vector_size && is_finite) {
    const auto nearest_of = [=](size_t k) {
      const float* x = in + k * vector_size;
      float roots[vector_size];
      MLX_FUSED_VECTORIZE
      for (size_t i = 0; i < vector_size; ++i) {
        roots[i] = is_positive ? root_above_0<float, uint32_t>(x[i], stretch)
                               : root_signed<float, uint32_t>(x[i], stretch);
      }
      return _mm512_cvtps_epi32(load_floats(roots));
    };
    const auto first = _mm512_packs_epi32(nearest_of(0), nearest_of(1));
    const auto second = _mm512_packs_epi32(nearest_of(2), nearest_of(3));
    auto bytes = is_positive ? _mm512_packus_epi16(first, second)
                             : _mm512_packs_epi16(first, second);
    if (is_positive) {
      // Saturation leaves of what is above 0 something that is, too.
      const auto bits_of = [=](size_t k) {
        return _mm512_loadu_si512(in + k * vector_size);
      };
      const auto above =
          _mm512_packus_epi16(_mm512_packs_epi32(bits_of(0), bits_of(1)),
                              _mm512_packs_epi32(bits_of(2), bits_of(3)));
      const auto least = _mm512_min_epu8(above, _mm512_set1_epi8(1));
      bytes = _mm512_max_epu8(bytes, least);
    }
    if (in_order) {
      const auto order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10,
                                           14, 3, 7, 11, 15);
      bytes = _mm512_permutexvar_epi32(order, bytes);
    } else {
      bytes = bytes_in_order(bytes);
    }
    _mm512_storeu_si512(codes, bytes);
    return;
  }
#endif
  MLX_FUSED_VECTORIZE
  for (size_t i = 0; i < n; ++i) {
    const float code =
        n == 64       ? is_positive
                            ? encoded_positive<float, uint32_t>(in[i], stretch)
                            : encoded_signed<float, uint32_t>(in[i], stretch)
        : is_positive ? encoded_positive_in_4_bits<float>(in[i], stretch)
                      : encoded_signed_in_4_bits<float>(in[i], stretch);
    codes[in_order ? i : place_of(i)] =
        static_cast<uint8_t>(to_integer<uint32_t>(code));
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

// The scales and the codes of some blocks.
template <bool is_positive, size_t block, size_t blocks, bool in_order>
MLX_FUSED_INLINE void store_blocks(const float* in, float most, float* scales,
                                   uint8_t* codes) {
  // A block's scale and stretch depend on all of it: those of many blocks first
  // leave the processor something to do meanwhile.
  scales_of<is_positive, block, blocks>(in, scales);
  float stretches[blocks];
  for (size_t i = 0; i < blocks; ++i) {
    stretches[i] = is_positive
                       ? stretch_positive<float, uint32_t>(scales[i], most)
                       : stretch_signed<float, uint32_t>(scales[i], most);
  }
  uint32_t largest = 0;
  for (size_t i = 0; i < blocks; ++i) {
    const uint32_t bits = as_bits(scales[i]);
    largest = bits > largest ? bits : largest;
  }
  const auto store = [&]<bool are_finite>(std::bool_constant<are_finite>) {
    for (size_t i = 0; i < blocks; ++i) {
      store_block<is_positive, in_order, are_finite, block>(
          in + i * block, stretches[i], codes + i * block);
    }
  };
  // Only the loops of 8 bits over wide registers have use for that.
  if (are_unpacked && block == 64 && largest < 0x7f800000u) {
    store(std::true_type());
  } else {
    store(std::false_type());
  }
}

template <bool is_positive, size_t block, bool in_order = true>
void store_whole_codes(const float* in, float most, float* scales,
                       uint8_t* codes, size_t n) {
  if (n == block_size) {
    store_blocks<is_positive, block, block_size / block, in_order>(
        in, most, scales, codes);
    return;
  }
  for (; n >= block; n -= block, in += block, codes += block) {
    store_blocks<is_positive, block, 1, in_order>(in, most, scales++, codes);
  }
  if (n > 0) {
    float rest[block] = {};
    uint8_t rest_codes[block];
    memcpy(rest, in, n * sizeof(float));
    store_blocks<is_positive, block, 1, true>(rest, most, scales, rest_codes);
    memcpy(codes, rest_codes, n);
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

}  // namespace

}  // namespace mlx_fused::cpu
