// The operations of programs over blocks that stay in the first-level cache.
// Included by loops.cpp alone, once for each instruction set.
#pragma once

#include "cpu/vectors.h"

namespace mlx_fused::cpu {

namespace {

// What metal/operations.h asks of the language, in forms that vectorise.
namespace operations {

using mlx_fused::as_type;

namespace metal {
inline float abs(float x) { return __builtin_fabsf(x); }
inline float floor(float x) { return __builtin_floorf(x); }
inline float ceil(float x) { return __builtin_ceilf(x); }
inline float rint(float x) { return __builtin_rintf(x); }

namespace precise {
inline float sqrt(float x) { return __builtin_sqrtf(x); }
inline float pow(float x, float y) { return __builtin_powf(x, y); }
inline float sin(float x) { return __builtin_sinf(x); }
inline float cos(float x) { return __builtin_cosf(x); }
inline float atan(float x) { return __builtin_atanf(x); }
inline float atan2(float x, float y) { return __builtin_atan2f(x, y); }

// 2^n in two steps, so that it may overflow and underflow.
inline float power_of_2(int32_t n) { return as_type<float>((n + 127) << 23); }

// Cephes' expf: the rest of x by multiples of log 2, a polynomial.
inline float exp(float x) {
  x = x < -104.0f ? -104.0f : x > 89.0f ? 89.0f : x;
  const float n = x * 1.44269504088896341f + 12582912.0f - 12582912.0f;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  const float series =
      (((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) *
             r +
         4.1665795894e-2f) *
            r +
        1.6666665459e-1f) *
           r +
       5.0000001201e-1f) *
          (r * r) +
      r + 1;
  const auto whole = static_cast<int32_t>(n == n ? n : 0.0f);
  const int32_t half = whole / 2;
  return series * power_of_2(half) * power_of_2(whole - half);
}

// Cephes' logf.
inline float log(float x) {
  const bool is_tiny = x < 1.17549435e-38f;
  const float y = is_tiny ? x * 33554432.0f : x;  // 2^25
  const auto bits = as_type<int32_t>(y);
  int32_t exponent = (bits >> 23) - 126 - (is_tiny ? 25 : 0);
  float m = as_type<float>((bits & 0x007fffff) | 0x3f000000);
  const bool is_low = m < 0.707106781186547524f;
  exponent -= is_low ? 1 : 0;
  m = (is_low ? m + m : m) - 1;
  const auto e = static_cast<float>(exponent);
  const float z = m * m;
  float series = 7.0376836292e-2f;
  series = series * m - 1.1514610310e-1f;
  series = series * m + 1.1676998740e-1f;
  series = series * m - 1.2420140846e-1f;
  series = series * m + 1.4249322787e-1f;
  series = series * m - 1.6668057665e-1f;
  series = series * m + 2.0000714765e-1f;
  series = series * m - 2.4999993993e-1f;
  series = series * m + 3.3333331174e-1f;
  series = series * m * z + e * -2.12194440e-4f - 0.5f * z;
  const float result = m + series + e * 0.693359375f;
  return x > 3.4028234e38f || x != x ? x
         : x > 0                     ? result
         : x == 0                    ? -__builtin_inff()
                                     : __builtin_nanf("");
}
}  // namespace precise
}  // namespace metal

inline float bfloat_of(float x) { return from_bfloat16(to_bfloat16(x)); }

#define METAL_FUNC inline
#include "../metal/operations.h"
#undef METAL_FUNC

}  // namespace operations

// An operand is an array or, where it is the same for all elements, a number:
// bit k of `uniform` is for operand k.
template <typename F, int uniform>
void unary(const float* const* in, float* out, size_t n) {
  static_assert(uniform == 0);
  const float* a = in[0];
  MLX_FUSED_VECTORIZE
  for (size_t i = 0; i < n; ++i) {
    out[i] = F::of(a[i]);
  }
}

template <typename F, int uniform>
void binary(const float* const* in, float* out, size_t n) {
  const float* a = in[0];
  const float* b = in[1];
  const float a0 = a[0], b0 = b[0];
  MLX_FUSED_VECTORIZE
  for (size_t i = 0; i < n; ++i) {
    out[i] = F::of(uniform & 1 ? a0 : a[i], uniform & 2 ? b0 : b[i]);
  }
}

template <typename F, int uniform>
void ternary(const float* const* in, float* out, size_t n) {
  const float* a = in[0];
  const float* b = in[1];
  const float* c = in[2];
  const float a0 = a[0], b0 = b[0], c0 = c[0];
  MLX_FUSED_VECTORIZE
  for (size_t i = 0; i < n; ++i) {
    out[i] = F::of(uniform & 1 ? a0 : a[i], uniform & 2 ? b0 : b[i],
                   uniform & 4 ? c0 : c[i]);
  }
}

template <typename F, int uniform>
void quaternary(const float* const* in, float* out, size_t n) {
  const float* a = in[0];
  const float* b = in[1];
  const float* c = in[2];
  const float* d = in[3];
  const float a0 = a[0], b0 = b[0], c0 = c[0], d0 = d[0];
  MLX_FUSED_VECTORIZE
  for (size_t i = 0; i < n; ++i) {
    out[i] = F::of(uniform & 1 ? a0 : a[i], uniform & 2 ? b0 : b[i],
                   uniform & 4 ? c0 : c[i], uniform & 8 ? d0 : d[i]);
  }
}

using Run = void (*)(const float* const* in, float* out, size_t n);

// Rows: the variants of an operation, by which of its operands are uniform.
struct Variants {
  Run of[16] = {};
};

template <typename F, int operands>
constexpr Variants variants() {
  Variants all;
  if constexpr (operands == 1) {
    all.of[0] = unary<F, 0>;
  } else if constexpr (operands == 2) {
    all.of[0] = binary<F, 0>;
    all.of[1] = binary<F, 1>;
    all.of[2] = binary<F, 2>;
  } else if constexpr (operands == 3) {
    all.of[0] = ternary<F, 0>;
    all.of[1] = ternary<F, 1>;
    all.of[2] = ternary<F, 2>;
    all.of[3] = ternary<F, 3>;
    all.of[4] = ternary<F, 4>;
    all.of[5] = ternary<F, 5>;
    all.of[6] = ternary<F, 6>;
  }
  return all;
}

#define MLX_FUSED_FUNCTOR(name, primitive, operands, is_truth) \
  struct name##_functor {                                      \
    template <typename... T>                                   \
    static float of(T... x) {                                  \
      return operations::op_##name(x...);                      \
    }                                                          \
  };
MLX_FUSED_OPERATIONS(MLX_FUSED_FUNCTOR)
#undef MLX_FUSED_FUNCTOR

struct copy_functor {
  static float of(float a) { return a; }
};
struct product_sum_functor {  // a * b + c * d
  static float of(float a, float b, float c, float d) { return a * b + c * d; }
};
struct multiply_add_functor {  // a * b + c
  static float of(float a, float b, float c) { return a * b + c; }
};
struct subtract_product_functor {  // c - a * b
  static float of(float a, float b, float c) { return c - a * b; }
};
struct divide_by_root_functor {  // a / (sqrt(b) + c)
  static float of(float a, float b, float c) {
    return a / (__builtin_sqrtf(b) + c);
  }
};

struct one_functor {
  static float of(float) { return 1; }
};
struct reciprocal_functor {
  static float of(float a) { return 1 / a; }
};
struct cube_functor {
  static float of(float a) { return a * a * a; }
};

// Whole powers and roots need no logarithm.
void power_by_number(const float* const* in, float* out, size_t n) {
  const float exponent = in[1][0];
  const Run run = exponent == 2       ? unary<square_functor, 0>
                  : exponent == 0.5f  ? unary<square_root_functor, 0>
                  : exponent == 1     ? unary<copy_functor, 0>
                  : exponent == -1    ? unary<reciprocal_functor, 0>
                  : exponent == 3     ? unary<cube_functor, 0>
                  : exponent == -0.5f ? unary<reciprocal_root_functor, 0>
                  : exponent == 0     ? unary<one_functor, 0>
                                      : binary<power_functor, 2>;
  run(in, out, n);
}

constexpr auto variants_of_code = [] {
  struct {
    Variants of[static_cast<size_t>(Code::count)];
  } all;
#define MLX_FUSED_VARIANTS(name, primitive, operands, is_truth) \
  all.of[static_cast<size_t>(Operation::name)] =                \
      variants<name##_functor, operands>();
  MLX_FUSED_OPERATIONS(MLX_FUSED_VARIANTS)
#undef MLX_FUSED_VARIANTS
  all.of[static_cast<size_t>(Operation::power)].of[2] = power_by_number;
  all.of[static_cast<size_t>(Code::copy)] = variants<copy_functor, 1>();
  auto& sum = all.of[static_cast<size_t>(Code::product_sum)];
  sum.of[0] = quaternary<product_sum_functor, 0>;
  sum.of[1] = quaternary<product_sum_functor, 1>;
  sum.of[4] = quaternary<product_sum_functor, 4>;
  sum.of[5] = quaternary<product_sum_functor, 5>;
  all.of[static_cast<size_t>(Code::multiply_add)] =
      variants<multiply_add_functor, 3>();
  all.of[static_cast<size_t>(Code::subtract_product)] =
      variants<subtract_product_functor, 3>();
  all.of[static_cast<size_t>(Code::divide_by_root)] =
      variants<divide_by_root_functor, 3>();
  return all;
}();

void run_program(const ProgramCode& code, const float* numbers,
                 const float* scalars, float gradient_scale,
                 const Block<float>& block, int slots, size_t n) {
  alignas(64) float registers[max_registers][block_size];
  float scaled_gradient[block_size];
  for (size_t start = 0; start < n; start += block_size) {
    const size_t size = n - start < block_size ? n - start : block_size;
    const float* in[max_slots];
    for (int k = 0; k < slots; ++k) {
      in[k] = block.in[k] ? block.in[k] + start : nullptr;
    }
    if (gradient_scale != 1 && in[slots - 1]) {
      const float* both[] = {in[slots - 1], &gradient_scale};
      binary<multiply_functor, 2>(both, scaled_gradient, size);
      in[slots - 1] = scaled_gradient;
    }
    for (size_t i = 0; i < code.steps; ++i) {
      const auto& step = code.first[i];
      const float* operands[4];
      for (int k = 0; k < step.operands; ++k) {
        const auto& operand = step.in[k];
        const auto index = operand.index;
        // A number is three: itself, 1 - itself and its logarithm.
        operands[k] =
            operand.kind == CodeOperand::slot          ? in[index]
            : operand.kind == CodeOperand::in_register ? registers[index]
            : operand.kind == CodeOperand::written ? block.out[index] + start
            : operand.kind == CodeOperand::number  ? numbers + 3 * index
                                                   : scalars + index;
      }
      float* out = step.slot >= 0 ? block.out[step.slot] + start
                                  : registers[step.result];
      variants_of_code.of[step.code].of[step.uniform](operands, out, size);
    }
  }
}

}  // namespace

}  // namespace mlx_fused::cpu
