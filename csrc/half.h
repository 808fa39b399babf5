// float16 and bfloat16 as 16 bits.
#pragma once

#include <cstdint>

namespace mlx_fused {

// Compiled once for each instruction set: see rules.h.
namespace {

template <typename To, typename From>
inline To as_type(From x) {
  return __builtin_bit_cast(To, x);
}

// IEEE binary16 by integer arithmetic that vectorises anywhere.
inline float from_float16(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  // Exponent and mantissa moved into place, then the exponent's bias mended by
  // a multiplication, which also makes subnormal numbers normal.
  const float finite =
      as_type<float>(magnitude << 13) * as_type<float>(0x77800000u);
  const uint32_t bits = magnitude >= 0x7c00u ? 0x7f800000u | (magnitude << 13)
                                             : as_type<uint32_t>(finite);
  return as_type<float>(bits | (static_cast<uint32_t>(half & 0x8000u) << 16));
}

inline uint16_t to_float16(float value) {
  const uint32_t bits = as_type<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {  // NaN, made quiet
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // rounds to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: the addition rounds
    half = as_type<uint32_t>(as_type<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    const uint32_t odd = (magnitude >> 13) & 1u;
    half = (magnitude - 0x38000000u + 0xfffu + odd) >> 13;
  }
  return static_cast<uint16_t>(sign | half);
}

inline float from_bfloat16(uint16_t half) {
  return as_type<float>(static_cast<uint32_t>(half) << 16);
}

inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = as_type<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40u : rounded);
}

}  // namespace

}  // namespace mlx_fused
