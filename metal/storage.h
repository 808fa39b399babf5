// Elements between device memory and float registers. The only place that knows
// dtypes: arithmetic is in float32, and each result is rounded once, here.
// Loops over a thread's four elements have constant bounds, so that the
// registers are not spilled to memory; past the end zeros are computed with,
// and nothing is stored.

#define FOR_EACH_OF_VECTOR \
  _Pragma("clang loop unroll(full)") for (int i = 0; i < vector_size; ++i)

// A thread's four elements: neighbours, or further apart. Indices are those of
// a row-contiguous array.
struct Elements {
  int64_t start;
  int64_t stride;
  int count;        // that are there
  bool vectorized;  // all four, neighbours, and aligned
};

METAL_FUNC Elements
neighbours(int64_t start, int64_t size, bool may_vectorize) {
  const int64_t rest = size - start;
  const int count = rest < 0 ? 0 : rest < vector_size ? int(rest) : vector_size;
  return {start, 1, count, may_vectorize && count == vector_size};
}

// To and from registers V: floats, or integers for the errors of weights.
template <typename T, typename V>
METAL_FUNC void
load_vector(const device T* in, const thread Elements& at, thread V* out) {
  if (at.vectorized) {
    const vec<T, 4> values =
        *reinterpret_cast<const device vec<T, 4>*>(in + at.start);
    FOR_EACH_OF_VECTOR { out[i] = static_cast<V>(values[i]); }
  } else {
    FOR_EACH_OF_VECTOR {
      out[i] = i < at.count ? static_cast<V>(in[at.start + i * at.stride])
                            : static_cast<V>(0);
    }
  }
}

template <typename T, typename V>
METAL_FUNC void
store_vector(const thread V* values, const thread Elements& at, device T* out) {
  if (at.vectorized) {
    vec<T, 4> rounded;
    FOR_EACH_OF_VECTOR { rounded[i] = static_cast<T>(values[i]); }
    *reinterpret_cast<device vec<T, 4>*>(out + at.start) = rounded;
  } else {
    FOR_EACH_OF_VECTOR {
      if (i < at.count) {
        out[at.start + i * at.stride] = static_cast<T>(values[i]);
      }
    }
  }
}

// The number, in the launch, of the tensor that a tile belongs to.
METAL_FUNC uint tensor_of_tile(uint tile, constant LaunchTensor* tensors) {
  uint tensor = 0;
  while (tile >= tensors[tensor + 1].first_tile) {
    ++tensor;
  }
  return tensor;
}
