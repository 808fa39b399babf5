// Four neighbouring elements between device memory and float registers. The
// only place that knows dtypes: arithmetic is in float32, and each result is
// rounded once, here. Loops over the four have constant bounds, so that the
// registers are not spilled to memory; past the end zeros are computed with,
// and nothing is stored.

#define FOR_EACH_OF_VECTOR \
  _Pragma("clang loop unroll(full)") for (int i = 0; i < vector_size; ++i)

template <typename T>
METAL_FUNC void load_vector(const device T* in, int64_t start, int count,
                            bool vectorized, thread float* out) {
  if (vectorized && count == vector_size) {
    const float4 values =
        float4(*reinterpret_cast<const device vec<T, 4>*>(in + start));
    FOR_EACH_OF_VECTOR { out[i] = values[i]; }
  } else {
    FOR_EACH_OF_VECTOR {
      out[i] = i < count ? static_cast<float>(in[start + i]) : 0.0f;
    }
  }
}

template <typename T>
METAL_FUNC void store_vector(const thread float* values, int64_t start,
                             int count, bool vectorized, device T* out) {
  if (vectorized && count == vector_size) {
    vec<T, 4> rounded;
    FOR_EACH_OF_VECTOR { rounded[i] = static_cast<T>(values[i]); }
    *reinterpret_cast<device vec<T, 4>*>(out + start) = rounded;
  } else {
    FOR_EACH_OF_VECTOR {
      if (i < count) {
        out[start + i] = static_cast<T>(values[i]);
      }
    }
  }
}

// A gradient, which may have any strides.
template <typename T>
METAL_FUNC void load_gradient(const device T* in, constant LaunchTensor& tensor,
                              constant int64_t* walks, int64_t start, int count,
                              thread float* out) {
  if (tensor.dimensions == 0) {
    load_vector(in, start, count, tensor.vectorized != 0, out);
  } else {
    FOR_EACH_OF_VECTOR {
      out[i] = 0;
      if (i < count) {
        out[i] = static_cast<float>(
            in[locate(start + i, walks + tensor.walk, tensor.dimensions)]);
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
