#include "graph/formats.h"

#include "mlx/ops.h"
#include "mlx/utils.h"
#include "rules.h"
// Below the rules, which find the functions of nodes by their namespace.
#include "graph/node.h"

namespace mlx_fused {

namespace {

mx::array flat(const mx::array& a) {
  return mx::reshape(a, {static_cast<int>(a.size())});
}

// As rows of blocks, filled up with zeros.
mx::array in_blocks(const mx::array& a, int block) {
  const int size = static_cast<int>(a.size());
  const int rest = (block - size % block) % block;
  const auto filled = rest == 0 ? flat(a) : mx::pad(flat(a), {0, rest});
  return mx::reshape(filled, {(size + rest) / block, block});
}

mx::array first_elements(const mx::array& a, const mx::Shape& shape) {
  int size = 1;
  for (const int n : shape) {
    size *= n;
  }
  return mx::reshape(mx::slice(flat(a), {0}, {size}), shape);
}

// What has no gradient to pass on.
mx::array fixed(const mx::array& values) {
  return mx::stop_gradient(mx::astype(values, mx::float32));
}

// What was made of a value's bits, with the value's gradient, as if it were the
// value. A difference of nothing is taken away, for -0 + 0 would be 0.
mx::array with_gradient_of(const mx::array& result, const mx::array& value) {
  const auto wide = mx::astype(value, mx::float32);
  const auto nothing = mx::where(
      mx::isfinite(wide), mx::stop_gradient(wide) - wide, mx::array(0.0f));
  return mx::astype(mx::astype(result, mx::float32) - nothing, result.dtype());
}

double most_of(const Format& format) {
  const int bits = format.storage == Storage::codes8 ? 8 : 4;
  return (1 << (format.is_never_negative ? bits : bits - 1)) - 1;
}

uint32_t exponents_of(mx::Dtype error) { return error == mx::int8 ? 18 : 26; }

double most_of(mx::Dtype error) { return error == mx::int8 ? 127 : 32767; }

}  // namespace

mx::array decode(const Format& format, const mx::array& codes,
                 const mx::array& scales, const mx::Shape& shape) {
  auto whole = codes;
  if (format.storage == Storage::codes4) {
    const auto bytes = mx::expand_dims(codes, -1);
    const auto fifteen = mx::array(15, mx::uint8);
    whole = mx::concatenate({mx::bitwise_and(bytes, fifteen),
                             mx::right_shift(bytes, mx::array(4, mx::uint8))},
                            -1);
    if (!format.is_never_negative) {  // the sign of 4 bits
      const auto eight = mx::array(8, mx::uint8);
      whole = mx::astype(mx::bitwise_xor(whole, eight), mx::int8) -
              mx::array(8, mx::int8);
    }
    whole = first_elements(whole, shape);
  }
  const auto code = in_blocks(mx::astype(whole, mx::float32), format.block());
  const Node scale = mx::expand_dims(scales, -1);
  const Node most = most_of(format);
  const auto values = format.is_never_negative
                          ? decoded_positive<Node>(code, scale, most)
                          : decoded_signed<Node>(code, scale, most);
  return first_elements(values.array(), shape);
}

std::pair<mx::array, mx::array> encode(const Format& format,
                                       const mx::array& values) {
  const auto x = in_blocks(fixed(values), format.block());
  // As the largest of the bits: that of a NaN is the largest.
  const auto bits = mx::view(mx::abs(x), mx::uint32);
  const auto scales =
      mx::view(x.shape(0) == 0 ? mx::zeros({0}, mx::uint32) : mx::max(bits, -1),
               mx::float32);
  const Node scale = mx::expand_dims(scales, -1);
  const Node most = most_of(format);
  const Node stretch = format.is_never_negative
                           ? stretch_positive<Node, Bits>(scale, most)
                           : stretch_signed<Node, Bits>(scale, most);
  const auto codes =
      format.storage == Storage::codes8
          ? format.is_never_negative ? encoded_positive<Node, Bits>(x, stretch)
                                     : encoded_signed<Node, Bits>(x, stretch)
      : format.is_never_negative ? encoded_positive_in_4_bits<Node>(x, stretch)
                                 : encoded_signed_in_4_bits<Node>(x, stretch);
  auto whole = first_elements(codes.array(), values.shape());
  if (format.storage == Storage::codes8) {
    return {mx::astype(whole, format.is_never_negative ? mx::uint8 : mx::int8),
            scales};
  }
  whole = in_blocks(mx::astype(mx::astype(whole, mx::int8), mx::uint8), 2);
  const auto halves = mx::split(whole, 2, -1);
  const auto fifteen = mx::array(15, mx::uint8);
  const auto bytes =
      mx::bitwise_or(mx::bitwise_and(halves[0], fifteen),
                     mx::left_shift(halves[1], mx::array(4, mx::uint8)));
  return {flat(bytes), scales};
}

mx::array join(const mx::array& weight, const mx::array& error) {
  const Node wide = fixed(weight);
  const Bits rest = mx::view(mx::astype(error, mx::int32), mx::uint32);
  if (weight.dtype() == mx::float16) {
    return with_gradient_of(
        joined_float16<Node, Bits>(wide, rest, exponents_of(error.dtype()))
            .array(),
        weight);
  }
  return with_gradient_of(
      joined_bfloat16<Node, Bits>(
          wide, error.dtype() == mx::int8 ? rest * 256u : rest)
          .array(),
      weight);
}

std::pair<mx::array, mx::array> split(const Format& format,
                                      const mx::array& values) {
  const auto x = fixed(values);
  const auto error = format.storage == Storage::split24 ? mx::int8 : mx::int16;
  Node weight;
  Bits rest(0u);
  if (format.dtype == mx::float16) {
    split_float16<Node, Bits>(x, exponents_of(error), Node(most_of(error)),
                              weight, rest);
  } else {
    split_bfloat16<Node, Bits>(x, weight, rest);
    if (error == mx::int8) {
      rest = shortened<Node, Bits>(rest, weight);
    }
  }
  return {with_gradient_of(mx::astype(weight.array(), format.dtype), values),
          mx::astype(mx::view(rest.array(), mx::int32), error)};
}

mx::array round_stochastically(const mx::array& values, mx::Dtype dtype,
                               const mx::array& seed, const mx::array& step,
                               const Numbers& numbers) {
  const auto x = fixed(values);
  const auto first = static_cast<double>(numbers.first);
  const auto elements = mx::reshape(
      mx::arange(first, first + static_cast<double>(x.size()), mx::uint64),
      x.shape());
  const Bits low = mx::astype(elements, mx::uint32);
  const Bits high = mx::astype(
      mx::right_shift(elements, mx::array(32, mx::uint64)), mx::uint32);
  const Bits key =
      random_key<Bits>(mx::astype(seed, mx::uint32),
                       mx::astype(step, mx::uint32), numbers.tensor);
  const auto random = random_bits<Bits>(key, high, low);
  const auto rounded = dtype == mx::float16
                           ? stochastic_float16<Node, Bits>(x, random)
                           : stochastic_bfloat16<Node, Bits>(x, random);
  return with_gradient_of(mx::astype(rounded.array(), dtype), values);
}

}  // namespace mlx_fused
