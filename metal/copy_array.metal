// An array of any strides into a row-contiguous one: for a parameter or state
// that something else still holds, and so cannot be updated in place.

// a * b + c in two roundings, as on the CPU; memory is what a step waits for.
#pragma METAL fp contract(off)

#include <metal_stdlib>

using namespace metal;

#include "launch.h"
#include "storage.h"
#include "gradients.h"

template <typename T>
[[kernel]] void copy_array(
    const device T* in [[buffer(0)]],
    device T* out [[buffer(1)]],
    constant LaunchTensor& tensor [[buffer(2)]],
    constant int64_t* walk [[buffer(3)]],
    uint tile [[threadgroup_position_in_grid]],
    uint thread_index [[thread_position_in_threadgroup]]) {
  for (int vector = 0; vector < vectors_each; ++vector) {
    const int64_t start = vector_start(tile, 0, thread_index, vector);
    for (int64_t i = start; i < start + vector_size && i < tensor.size; ++i) {
      out[i] = in[locate<int64_t>(i, walk, tensor.dimensions)];
    }
  }
}
