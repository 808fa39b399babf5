// Rules over blocks that are packed (cpu/loops.h), in one pass.
#pragma once

#include <type_traits>
#include <utility>

#include "cpu/code_loops.h"
#include "cpu/update_loops.h"

namespace mlx_fused::cpu {

namespace {

// What float32 have become in their sign by adding what makes the exponents of
// those overflow that have no finite bfloat16 nearest to them.
struct Overflows {
#if defined(__AVX512F__)
  __m512i bits = _mm512_setzero_si512();
  bool any() const { return _mm512_movepi32_mask(bits) != 0; }
#else
  uint32_t bits = 0;
  bool any() const { return bits >> 31 != 0; }
#endif
};
constexpr uint32_t overflowing = 0x808000u;

// Splits a block of float32 that have finite weights, into the same bits as
// split_bfloat16 and shortened do: what is added to round lets the lower half
// count from the interval's begin.
MLX_FUSED_INLINE void split_finite(const float* in, uint16_t* weights,
                                   int8_t* errors, Overflows& overflows) {
#if defined(__AVX512F__)
  // Of each four elements: their lower halves, then their upper ones.
  const auto halves =
      _mm512_set4_epi32(0x0f0e0b0a, 0x07060302, 0x0d0c0908, 0x05040100);
  __m512i rest[2];
  for (size_t k = 0; k < 2; ++k) {
    const auto sorted = [&](const float* from) {
      const auto bits = _mm512_loadu_si512(from);
      const auto sum = _mm512_add_epi32(bits, _mm512_set1_epi32(overflowing));
      constexpr int or_of_xor = 0xf6;
      overflows.bits =
          _mm512_ternarylogic_epi32(overflows.bits, bits, sum, or_of_xor);
      return _mm512_shuffle_epi8(sum, halves);
    };
    const auto a = sorted(in + 2 * k * vector_size);
    const auto b = sorted(in + (2 * k + 1) * vector_size);
    const auto one = _mm512_set1_epi16(0x80);  // of the exponent
    _mm512_storeu_si512(weights + 2 * k * vector_size,
                        _mm512_sub_epi16(_mm512_unpackhi_epi64(a, b), one));
    const auto lower = _mm512_unpacklo_epi64(a, b);
    rest[k] =
        _mm512_srli_epi16(_mm512_adds_epu16(lower, _mm512_set1_epi16(0x80)), 8);
  }
  const auto rounded = _mm512_max_epu8(_mm512_packus_epi16(rest[0], rest[1]),
                                       _mm512_set1_epi8(1));
  _mm512_storeu_si512(errors, _mm512_xor_si512(bytes_in_order(rounded),
                                               _mm512_set1_epi8(-128)));
#else
  alignas(64) uint16_t lower[Packed::block];
  MLX_FUSED_VECTORIZE
  for (size_t i = 0; i < Packed::block; ++i) {
    const uint32_t sum = as_bits(in[i]) + 0x8000u;
    weights[i] = static_cast<uint16_t>(sum >> 16);
    lower[i] = static_cast<uint16_t>(sum);
  }
  for (size_t i = 0; i < Packed::block; ++i) {
    uint16_t rest = lower[i] < 0x80u ? 0x80u : lower[i];
    rest = rest > 0xff7fu ? 0xff7fu : rest;
    errors[i] = static_cast<int8_t>(((rest + 0x80) >> 8) - 128);
  }
  for (size_t i = 0; i < Packed::block; ++i) {
    overflows.bits |= as_bits(in[i]) ^ (as_bits(in[i]) + overflowing);
  }
#endif
}

// The loads of a block as float32, in the order of place_of.

MLX_FUSED_INLINE void load_joined(const uint16_t* weights, const int8_t* errors,
                                  float* out) {
#if defined(__AVX512F__)
  for (size_t i = 0; i < Packed::block; i += 2 * vector_size) {
    const auto error = words_of(errors + i);
    const auto borrow = _mm512_srai_epi16(error, 15);
    store_unpacked(_mm512_slli_epi16(error, 8),
                   _mm512_add_epi16(_mm512_loadu_si512(weights + i), borrow),
                   out + i);
  }
#else
  load_split_as(false, weights, errors, out, Packed::block);
#endif
}

MLX_FUSED_INLINE void load_gradient(const uint16_t* in, float scale,
                                    float* out) {
#if defined(__AVX512F__)
  for (size_t i = 0; i < Packed::block; i += 2 * vector_size) {
    store_unpacked(_mm512_setzero_si512(), _mm512_loadu_si512(in + i), out + i);
  }
#else
  BFloat16::load(in, out, Packed::block);
#endif
  for (size_t i = 0; i < Packed::block && scale != 1; ++i) {
    out[i] *= scale;
  }
}

template <bool is_positive>
MLX_FUSED_INLINE void load_codes_unpacked(const char* codes, float scale,
                                          float* out) {
  using Code = std::conditional_t<is_positive, uint8_t, int8_t>;
  const auto* in = reinterpret_cast<const Code*>(codes);
  constexpr float most = is_positive ? 255 : 127;
#if defined(__AVX512F__)
  // A code's square has 16 bits. As a float of no sign it follows 2^23, of
  // which only the product is taken off; a signed one is an upper half.
  constexpr float unit = 1 / (most * most), base = 8388608;
  const auto by = _mm512_set1_ps(scale);
  for (size_t i = 0; i < Packed::block; i += 2 * vector_size) {
    alignas(64) int32_t squares[2 * vector_size];
    const auto words = words_of(in + i);
    const auto square = _mm512_mullo_epi16(
        words, is_positive ? words : _mm512_abs_epi16(words));
    is_positive ? store_unpacked(square, _mm512_set1_epi16(0x4b00), squares)
                : store_unpacked(_mm512_setzero_si512(), square, squares);
    for (size_t k = 0; k < 2 * vector_size; k += vector_size) {
      const auto bits = _mm512_load_si512(squares + k);
      const auto value =
          is_positive
              ? _mm512_fmsub_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(unit),
                                _mm512_set1_ps(base * unit))
              : _mm512_mul_ps(_mm512_cvtepi32_ps(bits),
                              _mm512_set1_ps(unit / 65536));
      store_floats(
          _mm512_mul_ps(by, is_positive ? _mm512_mul_ps(value, value) : value),
          out + i + k);
    }
  }
#else
  load_block<is_positive>(in, scale, most, out, Packed::block);
#endif
}

template <int index, int... state>
void update_packed_with(const float* numbers, float learning_rate, float step,
                        float coefficient, float gradient_scale,
                        const Packed& arrays, size_t blocks,
                        std::integer_sequence<int, state...>) {
  using R = typename RegisteredRule<index>::template Type<float>;
  constexpr size_t block = Packed::block, most_blocks = block_size / block;
  constexpr bool is_positive[] = {is_never_negative<R>(state)..., false};
  const auto rule = prepared<R>(numbers, learning_rate, step, coefficient);
  const auto& parameters = arrays.in[0];
  const auto& gradients = arrays.in[R::states + 1];
  for (size_t first = 0; first < blocks; first += most_blocks) {
    const size_t left = blocks - first;
    const size_t count = left < most_blocks ? left : most_blocks;
    alignas(64) float p[block_size], g[block], s[R::states + 1][block_size];
    auto* weights =
        reinterpret_cast<uint16_t*>(arrays.out[0].values) + first * block;
    auto* errors =
        reinterpret_cast<int8_t*>(arrays.out[0].companions) + first * block;
    Overflows overflows;
    const auto split = [&](size_t b) {
      split_finite(p + b * block, weights + b * block, errors + b * block,
                   overflows);
    };
    for (size_t b = 0; b < count; ++b) {
      const size_t start = (first + b) * block;
      const size_t next = start + arrays.ahead;
      prefetch(parameters.values + 2 * next, 2 * block);
      prefetch(parameters.companions + next, block);
      (prefetch(arrays.in[state + 1].values + next, block), ...);
      if (!arrays.is_turned) {
        prefetch(gradients.values + 2 * next, 2 * block);
      }
      load_joined(
          reinterpret_cast<const uint16_t*>(parameters.values) + start,
          reinterpret_cast<const int8_t*>(parameters.companions) + start,
          p + b * block);
      load_gradient(reinterpret_cast<const uint16_t*>(gradients.values) + start,
                    gradient_scale, g);
      (load_codes_unpacked<is_positive[state]>(
           arrays.in[state + 1].values + start,
           reinterpret_cast<const float*>(
               arrays.in[state + 1].companions)[first + b],
           s[state] + b * block),
       ...);
      float* states[R::states + 1] = {(s[state] + b * block)...};
      update_row<block>(rule, 1, p + b * block, states, g);
      // Of the one before, while this one's divisions go on.
      if (b > 0) {
        split(b - 1);
      }
    }
    split(count - 1);
    if (overflows.any()) {
      alignas(64) float in_order[block_size];
      for (size_t i = 0; i < count * block; ++i) {
        in_order[place_of(i)] = p[i];
      }
      store_split_as(false, in_order, weights, errors, count * block);
    }
    (store_whole_codes<is_positive[state], block, !are_unpacked>(
         s[state], is_positive[state] ? 255 : 127,
         reinterpret_cast<float*>(arrays.out[state + 1].companions) + first,
         reinterpret_cast<uint8_t*>(arrays.out[state + 1].values) +
             first * block,
         count * block),
     ...);
  }
}

template <int index>
void update_packed_by(const float* numbers, float learning_rate, float step,
                      float coefficient, float gradient_scale,
                      const Packed& arrays, size_t blocks) {
  using R = typename RegisteredRule<index>::template Type<float>;
  if constexpr (R::reads_parameter && R::writes_parameter) {
    update_packed_with<index>(numbers, learning_rate, step, coefficient,
                              gradient_scale, arrays, blocks,
                              std::make_integer_sequence<int, R::states>());
  }
}

template <int... index>
void update_packed_of(int rule, const float* numbers, float learning_rate,
                      float step, float coefficient, float gradient_scale,
                      const Packed& arrays, size_t blocks,
                      std::integer_sequence<int, index...>) {
  static constexpr decltype(&update_packed_by<0>) table[] = {
      update_packed_by<index>...};
  table[rule](numbers, learning_rate, step, coefficient, gradient_scale, arrays,
              blocks);
}

void update_packed(int rule, const float* numbers, float learning_rate,
                   float step, float coefficient, float gradient_scale,
                   const Packed& arrays, size_t blocks) {
  update_packed_of(rule, numbers, learning_rate, step, coefficient,
                   gradient_scale, arrays, blocks,
                   std::make_integer_sequence<int, rule_count>());
}

}  // namespace

}  // namespace mlx_fused::cpu
