// The operations of programs (csrc/program.h) on one element, in the language
// of update_rules.h. Numbers are float32, a truth value is 1 or 0. Each does
// what MLX's primitive does.

METAL_FUNC float op_add(float a, float b) { return a + b; }
METAL_FUNC float op_subtract(float a, float b) { return a - b; }
METAL_FUNC float op_multiply(float a, float b) { return a * b; }
METAL_FUNC float op_divide(float a, float b) { return a / b; }

// Not a number if either is none.
METAL_FUNC float op_maximum(float a, float b) {
  return a > b || a != a ? a : b;
}
METAL_FUNC float op_minimum(float a, float b) {
  return a < b || a != a ? a : b;
}

METAL_FUNC float op_power(float a, float b) {
  return metal::precise::pow(a, b);
}
METAL_FUNC float op_arctan2(float a, float b) {
  return metal::precise::atan2(a, b);
}

METAL_FUNC float op_negative(float x) { return -x; }
METAL_FUNC float op_absolute(float x) { return metal::abs(x); }
METAL_FUNC float op_sign(float x) { return float(x > 0) - float(x < 0); }
METAL_FUNC float op_square(float x) { return x * x; }
METAL_FUNC float op_square_root(float x) { return metal::precise::sqrt(x); }
METAL_FUNC float op_reciprocal_root(float x) {
  return 1 / metal::precise::sqrt(x);
}

METAL_FUNC float op_exponential(float x) { return metal::precise::exp(x); }
METAL_FUNC float op_logarithm(float x) { return metal::precise::log(x); }

// Near zero the rounding of 1 + x is divided out again. Kahan, see Goldberg,
// "What every computer scientist should know about floating-point arithmetic",
// 1991, theorem 4; and Higham, "Accuracy and stability of numerical
// algorithms", 2002, section 1.14.1.
METAL_FUNC float op_logarithm_of_1_plus(float x) {
  const float u = 1 + x;
  const float y = metal::precise::log(u);
  return u == 1 ? x : u - 1 == u ? y : y * (x / (u - 1));
}
METAL_FUNC float op_exponential_minus_1(float x) {
  const float u = metal::precise::exp(x);
  const float less = u - 1;
  const float y = less * (x / metal::precise::log(u));
  return u == 1 ? x : less == -1 || less == u ? less : y;
}

// Minimax polynomial and exponential, as in Cephes' tanhf.
METAL_FUNC float op_hyperbolic_tangent(float x) {
  const float size = metal::abs(x);
  const float z = x * x;
  const float near =
      ((((-5.70498872745e-3f * z + 2.06390887954e-2f) * z - 5.37397155531e-2f) *
            z +
        1.33314422036e-1f) *
           z -
       3.33332819422e-1f) *
          z * x +
      x;
  const float far = 1 - 2 / (metal::precise::exp(2 * size) + 1);
  return size < 0.625f ? near : x < 0 ? -far : x > 0 ? far : x;
}
METAL_FUNC float op_sigmoid(float x) {
  const float small = metal::precise::exp(-metal::abs(x));
  return (x < 0 ? small : 1.0f) / (1 + small);
}

METAL_FUNC float op_sine(float x) { return metal::precise::sin(x); }
METAL_FUNC float op_cosine(float x) { return metal::precise::cos(x); }
METAL_FUNC float op_arctan(float x) { return metal::precise::atan(x); }
METAL_FUNC float op_floor(float x) { return metal::floor(x); }
METAL_FUNC float op_ceiling(float x) { return metal::ceil(x); }
METAL_FUNC float op_rounded(float x) { return metal::rint(x); }
METAL_FUNC float op_to_float16(float x) { return half_of(x); }
METAL_FUNC float op_to_bfloat16(float x) { return bfloat_of(x); }

METAL_FUNC float op_to_bool(float x) { return float(x != 0); }
METAL_FUNC float op_equal(float a, float b) { return float(a == b); }
METAL_FUNC float op_not_equal(float a, float b) { return float(a != b); }
METAL_FUNC float op_greater(float a, float b) { return float(a > b); }
METAL_FUNC float op_greater_equal(float a, float b) { return float(a >= b); }
METAL_FUNC float op_less(float a, float b) { return float(a < b); }
METAL_FUNC float op_less_equal(float a, float b) { return float(a <= b); }
METAL_FUNC float op_logical_and(float a, float b) {
  return float(a != 0 && b != 0);
}
METAL_FUNC float op_logical_or(float a, float b) {
  return float(a != 0 || b != 0);
}
METAL_FUNC float op_logical_not(float x) { return float(x == 0); }
METAL_FUNC float op_select(float condition, float a, float b) {
  return condition != 0 ? a : b;
}
