// How a slot is held in fewer bits than float32 has: a state as codes, a weight
// with the rest that rounding took from it, or rounded at random.
//
// The formulas' only place, in the language of update_rules.h and with the same
// readers. T is a float and U an unsigned integer of 32 bits, which holds
// negative numbers as two's complement: registers, or nodes of the graph.

METAL_FUNC uint32_t as_bits(float x) { return as_type<uint32_t>(x); }

METAL_FUNC float as_float(uint32_t bits) { return as_type<float>(bits); }

METAL_FUNC bool is_nan(float x) { return (as_bits(x) << 1u) > 0xff000000u; }

METAL_FUNC bool is_finite(float x) { return (as_bits(x) << 1u) < 0xff000000u; }

template <typename T>
METAL_FUNC T choose(bool condition, T a, T b) {
  return condition ? a : b;
}

METAL_FUNC uint32_t clamped(uint32_t x, uint32_t least, uint32_t most) {
  return x < least ? least : x > most ? most : x;
}

METAL_FUNC float round_down(float x) { return metal::floor(x); }

// The nearest whole number, of numbers below 2^22; of what is none, 0.
METAL_FUNC float nearest(float x) { return x == x ? metal::rint(x) : 0.0f; }

METAL_FUNC bool is_positive(float x) { return x > 0; }

METAL_FUNC float at_least(float x, float least) {
  return x > least ? x : least;
}

template <typename U>
METAL_FUNC U to_integer(float x) {
  return U(int32_t(x));
}

template <typename T>
METAL_FUNC T to_float(uint32_t x) {
  return T(int32_t(x));
}

// Codes. A state's are whole numbers up to `most`. The elements of a block,
// which are consecutive in the flattened tensor, share a scale: the largest of
// their magnitudes. A signed state's value is scale * sign(q) * (q / most)^2,
// of one that is never negative scale * (q / most)^4. It is roots that are
// rounded, so small values keep digits; and what is not 0 does not become 0 in
// a state that divides. What is not finite makes its block so.

// 1 / sqrt(x) to 2e-5 and x^(-1/4) to 5e-5: a first guess by the exponent's
// bits, mended by a polynomial of what is left, with the smallest error. Codes
// need no more, and get the same on every processor. Of 0, a finite number.
template <typename T, typename U>
METAL_FUNC T inverse_square_root(T x) {
  const T y = as_float(U(0x5f3159dfu) - (as_bits(x) >> 1u));
  const T left = x * y * y;
  return y * ((0.43251994f * left - 1.3627735f) * left + 1.930259f);
}

template <typename T, typename U>
METAL_FUNC T inverse_fourth_root(T x) {
  const T y = as_float(U(0x4f524800u) - (as_bits(x) >> 2u));
  const T square = y * y;
  const T left = x * square * square;
  return y * ((0.20476955f * left - 0.6551124f) * left + 1.4504113f);
}

// What a block's roots are multiplied with, and the first coefficient of the
// polynomial in them; 0 if its scale is not finite, so that no code is computed
// of what is none.
template <typename T, typename U>
METAL_FUNC T stretch_signed(T scale, T most) {
  const T stretch = 0.70395194f * most * inverse_square_root<T, U>(scale);
  return choose(is_finite(scale), stretch, T(0));
}

template <typename T, typename U>
METAL_FUNC T stretch_positive(T scale, T most) {
  const T stretch = 1.0377675f * most * inverse_fourth_root<T, U>(scale);
  return choose(is_finite(scale), stretch, T(0));
}

// What is rounded to a code: a root, in the same way but with fewer operations,
// to 7e-4 of a signed and 2.5e-4 of another state, times what it is to be
// multiplied with.
template <typename T, typename U>
METAL_FUNC T root_signed(T x, T stretch) {
  const T size = magnitude(x);
  const T y = as_float(U(0x5f200000u) - (as_bits(size) >> 1u));
  return x * y * stretch * (2.3892454f - size * y * y);
}

template <typename T, typename U>
METAL_FUNC T root_above_0(T x, T stretch) {
  const T y = as_float(U(0x4f500000u) - (as_bits(x) >> 2u));
  const T near = x * y * (y * y);
  const T left = near * y;
  return near * stretch * ((left - 2.6684750f) * left + 2.6342129f);
}

template <typename T, typename U>
METAL_FUNC T root_positive(T x, T stretch) {
  const T root = at_least(root_above_0<T, U>(x, stretch), T(1));
  return choose(is_positive(x), root, T(0));
}

template <typename T, typename U>
METAL_FUNC T encoded_signed(T x, T stretch) {
  return nearest(root_signed<T, U>(x, stretch));
}

template <typename T, typename U>
METAL_FUNC T encoded_positive(T x, T stretch) {
  return nearest(root_positive<T, U>(x, stretch));
}

// With 4 bits codes lie so far apart that halves of them do harm: a moment of a
// root of 0.5 would become 4 times as large, and of 1.5 a second moment 5 times
// as small, both of which enlarge updates. So the squares of the roots are
// lowered or raised first, by as much as keeps updates small and losses low.
// Their constants take the first coefficient out of the stretch, squared.
template <typename T>
METAL_FUNC T encoded_signed_in_4_bits(T x, T stretch) {
  const T square = magnitude(x) * stretch * (2.0179666f * stretch);
  const T code = nearest(square_root(larger(square - 0.3f, T(0))));
  return sign_of(x) * code;
}

template <typename T>
METAL_FUNC T encoded_positive_in_4_bits(T x, T stretch) {
  const T square = square_root(x) * stretch * (0.9285384f * stretch);
  return choose(is_positive(x), nearest(square_root(square + 0.5f)), T(0));
}

template <typename T>
METAL_FUNC T decoded_signed(T code, T scale, T most) {
  return scale * (code * magnitude(code) * (1 / (most * most)));
}

template <typename T>
METAL_FUNC T decoded_positive(T code, T scale, T most) {
  const T square = code * code * (1 / (most * most));
  return scale * (square * square);
}

// Masters. A float32 is a weight of half precision, which is its nearest, and
// an error: the signed rest in units of 2^-16 or 2^-8 of the interval between
// weights.
//
// With bfloat16 the bits of the weight and the rest add up to those of the
// float32: 16 bits of rest are exact. The middle between two weights rounds
// away from zero, for with half of them the other way there would be more
// values of one weight than a rest has. A NaN keeps its upper half alone.
template <typename T, typename U>
METAL_FUNC void split_bfloat16(T x, thread T& weight, thread U& rest) {
  const U bits = as_bits(x);
  const U upper = (bits + 0x8000u) & 0xffff0000u;
  const U quiet = (bits & 0xffff0000u) | 0x400000u;
  weight = as_float(choose(is_nan(x), quiet, upper));
  rest = choose(is_nan(x), U(0u), bits - upper);
}

// The rest in 8 bits, from -127 to 127. That of a finite value whose weight is
// infinite is rounded down, or it could become 0, and the master infinite.
template <typename T, typename U>
METAL_FUNC U shortened(U rest, T weight) {
  const U middle = choose(is_finite(weight), U(0x8080u), U(0x8000u));
  return clamped((rest + middle) >> 8u, U(1u), U(255u)) - 128u;
}

template <typename T, typename U>
METAL_FUNC T joined_bfloat16(T weight, U rest) {
  return as_float(as_bits(weight) + rest);
}

// With float16 the rest is a difference of floats in the unit 2^-exponents of
// the weight's binade: exact in 16 bits for all that has a normal float16, and
// in a fixed interval below. Beyond float16's range the master is infinite too.
template <typename T, typename U>
METAL_FUNC T unit_of_float16(T weight, U exponents) {
  const U binade =
      clamped(as_bits(weight) & 0x7f800000u, U(0x38800000u), U(0x47000000u));
  return as_float(binade - (exponents << 23u));
}

template <typename T, typename U>
METAL_FUNC U error_of_float16(T x, T weight, U exponents, T most) {
  const T rest = (x - weight) / unit_of_float16(weight, exponents);
  return to_integer<U>(smaller(larger(nearest(rest), -most), most));
}

template <typename T, typename U>
METAL_FUNC void
split_float16(T x, U exponents, T most, thread T& weight, thread U& error) {
  weight = half_of(x);
  error = error_of_float16(x, weight, exponents, most);
}

template <typename T, typename U>
METAL_FUNC T joined_float16(T weight, U error, U exponents) {
  return weight + to_float<T>(error) * unit_of_float16(weight, exponents);
}

// Stochastic rounding: up or down with the probabilities that keep the mean.
// The random bits are a hash of the seed, the step, the tensor's number and the
// element's, so they do not depend on who computes them.

// The finisher of MurmurHash3.
template <typename U>
METAL_FUNC U mixed(U x) {
  x = (x ^ (x >> 16u)) * 0x85ebca6bu;
  x = (x ^ (x >> 13u)) * 0xc2b2ae35u;
  return x ^ (x >> 16u);
}

template <typename U>
METAL_FUNC U random_key(U seed, U step, U tensor) {
  return mixed(mixed(mixed(seed) ^ step) + tensor);
}

// An element has a number of 64 bits.
template <typename U>
METAL_FUNC U random_bits(U key, U high, U low) {
  return mixed(mixed((low ^ key) + mixed(high)) + key);
}

// As float32: a value of bfloat16, for a value and random bits.
template <typename T, typename U>
METAL_FUNC T stochastic_bfloat16(T x, U random) {
  const U bits = as_bits(x);
  return choose(
      is_finite(x), as_float((bits + (random >> 16u)) & 0xffff0000u), x);
}

// The same of float16, whose values near zero lie in a fixed interval.
template <typename T, typename U>
METAL_FUNC T stochastic_float16(T x, U random) {
  const T usual = as_float((as_bits(x) + (random >> 19u)) & 0xffffe000u);
  const T size = magnitude(x) * 16777216.0f;
  const T low = round_down(size);
  const T is_up = sign_of(
      larger(size - low - to_float<T>(random >> 8u) * 5.9604645e-8f, T(0.0f)));
  const T small = sign_of(x) * ((low + is_up) * 5.9604645e-8f);
  return choose(
      is_finite(x), choose(is_positive(1024.0f - size), small, usual), x);
}
