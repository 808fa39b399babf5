// Codes and errors between device memory and registers; the formulas are those
// of formats.h.

// Four codes, of 8 bits in a word and of 4 bits in half of one, the first
// lowest. `at` is of neighbours, the first of which is a multiple of four.
template <int bits>
struct Word {
  using type = uint;
};
template <>
struct Word<4> {
  using type = ushort;
};

template <int bits, bool is_positive>
METAL_FUNC void
load_codes(const device uint8_t* in, const thread Elements& at, thread int* q) {
  const device uint8_t* from = in + at.start * bits / 8;
  uint word = 0;
  if (at.vectorized) {
    word = *reinterpret_cast<const device typename Word<bits>::type*>(from);
  } else {
    for (int i = 0; i * 8 < at.count * bits; ++i) {
      word |= uint(from[i]) << uint(8 * i);
    }
  }
  FOR_EACH_OF_VECTOR {
    constexpr int sign = is_positive ? 0 : 1 << (bits - 1);
    const int code = int(word >> uint(bits * i)) & ((1 << bits) - 1);
    q[i] = (code ^ sign) - sign;
  }
}

template <int bits>
METAL_FUNC void store_codes(
    const thread int* q,
    const thread Elements& at,
    device uint8_t* out) {
  device uint8_t* to = out + at.start * bits / 8;
  uint word = 0;
  FOR_EACH_OF_VECTOR {
    word |= (uint(q[i]) & ((1u << uint(bits)) - 1u)) << uint(bits * i);
  }
  if (at.vectorized) {
    using Type = typename Word<bits>::type;
    *reinterpret_cast<device Type*>(to) = Type(word);
  } else {
    for (int i = 0; i * 8 < at.count * bits; ++i) {
      to[i] = uint8_t(word >> uint(8 * i));
    }
  }
}

template <int bits, bool is_positive>
METAL_FUNC float most_of() {
  return float((1 << (is_positive ? bits : bits - 1)) - 1);
}

template <int bits, bool is_positive>
METAL_FUNC void
decode_vector(const thread int* q, float scale, thread float* values) {
  const float most = most_of<bits, is_positive>();
  FOR_EACH_OF_VECTOR {
    values[i] = is_positive ? decoded_positive(float(q[i]), scale, most)
                            : decoded_signed(float(q[i]), scale, most);
  }
}

// The codes of four values, and their block's new scale, in all threads that
// share the block: 16 neighbours for 64 elements, 8 for 32. Every thread of the
// simdgroup must come here; what is past the end has no say.
template <int bits, bool is_positive>
METAL_FUNC float
encode_vector(const thread float* values, int count, thread int* q) {
  uint largest = 0;  // of the bits: that of a NaN is the largest
  FOR_EACH_OF_VECTOR {
    const uint size = i < count ? as_bits(values[i]) & 0x7fffffffu : 0u;
    largest = size > largest ? size : largest;
  }
  for (ushort lanes = bits == 8 ? 8 : 4; lanes > 0; lanes /= 2) {
    const uint other = simd_shuffle_xor(largest, lanes);
    largest = other > largest ? other : largest;
  }
  const float scale = as_float(largest);
  const float most = most_of<bits, is_positive>();
  const float stretch = is_positive ? stretch_positive<float, uint>(scale, most)
                                    : stretch_signed<float, uint>(scale, most);
  FOR_EACH_OF_VECTOR {
    const float x = values[i];
    if (bits == 8) {
      q[i] =
          int(is_positive ? encoded_positive<float, uint>(x, stretch)
                          : encoded_signed<float, uint>(x, stretch));
    } else {
      q[i] =
          int(is_positive ? encoded_positive_in_4_bits(x, stretch)
                          : encoded_signed_in_4_bits(x, stretch));
    }
  }
  return scale;
}

// Of weights T and their errors E.
template <typename T, typename E>
struct Master {
  static constexpr constant bool is_short = sizeof(E) == 1;
  static constexpr constant uint exponents = is_short ? 18 : 26;

  static float joined(float weight, int error) {
    return is_same<T, half>::value
               ? joined_float16<float, uint>(weight, uint(error), exponents)
               : joined_bfloat16<float, uint>(
                     weight, uint(error) * (is_short ? 256u : 1u));
  }

  static void split(float x, thread float& weight, thread int& error) {
    uint rest;
    if (is_same<T, half>::value) {
      split_float16<float, uint>(
          x, exponents, is_short ? 127.0f : 32767.0f, weight, rest);
    } else {
      split_bfloat16<float, uint>(x, weight, rest);
      if (is_short) {
        rest = shortened<float, uint>(rest, weight);
      }
    }
    error = int(rest);
  }
};

// A vector's elements rounded at random; the first is where the piece begins in
// its tensor.
template <typename T>
METAL_FUNC void round_vector(
    uint key,
    int64_t first,
    const thread Elements& at,
    thread float* values) {
  FOR_EACH_OF_VECTOR {
    const int64_t element = first + at.start + i * at.stride;
    const uint random =
        random_bits<uint>(key, uint(element >> 32), uint(element));
    values[i] = is_same<T, half>::value
                    ? stochastic_float16<float, uint>(values[i], random)
                    : stochastic_bfloat16<float, uint>(values[i], random);
  }
}

// Where the j-th scale of a tile stands among the tensor's, or -1.
template <int block_size>
METAL_FUNC int64_t scale_of_tile(int j, int64_t start, int64_t size) {
  const int64_t scale = start / block_size + j;
  return scale * block_size < size ? scale : -1;
}

template <int block_size, int columns>
METAL_FUNC int64_t scale_of_block(int j, const thread Block& at) {
  const int row = j / (columns / block_size);
  const int column = j % (columns / block_size) * block_size;
  return row < at.rows && column < at.columns
             ? (at.in_row_major + row * at.row_stride + column) / block_size
             : -1;
}
