// The sum of squares of each of any number of arrays, and their global L2 norm,
// in two deterministic stages; or the same of ones where values are not zero.
//
// Stage one: a threadgroup sums the squares of one tile in float32 and writes a
// partial sum. csrc/metal/kernel_source.cpp adds its kernel, which binds the
// arrays of a launch and calls sum_tile. Stage two: one threadgroup adds the
// partial sums, always in the same order. There are no atomics, so the same
// arrays give the same bits on every run.

// a * b + c in two roundings, as on the CPU; memory is what a step waits for.
#pragma METAL fp contract(off)

#include <metal_stdlib>

using namespace metal;

#include "launch.h"
#include "storage.h"
#include "gradients.h"

static constexpr constant int simd_size = 32;

// As norm_scale in csrc/graph/sums_of_squares.h: squares of scaled numbers are
// summed as well, for where the others overflow.
static constexpr constant float norm_scale = 0x1p-80f;

// The sums over the threadgroup of two values per simdgroup, in every thread of
// the first simdgroup.
METAL_FUNC float2 threadgroup_sum(
    float2 value,
    threadgroup float* sums,
    uint simdgroups,
    uint simdgroup,
    uint lane) {
  if (lane == 0) {
    sums[simdgroup] = value.x;
    sums[simd_size + simdgroup] = value.y;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const bool is_there = lane < simdgroups;
  return float2(
      simd_sum(is_there ? sums[lane] : 0),
      simd_sum(is_there ? sums[simd_size + lane] : 0));
}

template <bool counts, typename T>
METAL_FUNC void sum_tile(
    const device T* in,
    constant LaunchTensor& tensor,
    constant int64_t* walks,
    device float2* partials,
    threadgroup float* sums,
    uint tile,
    uint thread_index,
    uint simdgroups,
    uint simdgroup,
    uint lane) {
  float sum = 0;
  float scaled = 0;
  for (int vector = 0; vector < vectors_each; ++vector) {
    const Elements at = neighbours(
        vector_start(tile, tensor.first_tile, thread_index, vector),
        tensor.size,
        tensor.vectorized != 0);
    float values[vector_size];
    load_gradient(in, tensor, walks, at, values);
    FOR_EACH_OF_VECTOR {
      if (counts) {
        values[i] = float(values[i] != 0);
      }
      const float small = values[i] * norm_scale;
      sum += values[i] * values[i];
      scaled += small * small;
    }
  }
  const float2 both = threadgroup_sum(
      float2(simd_sum(sum), simd_sum(scaled)),
      sums,
      simdgroups,
      simdgroup,
      lane);
  if (thread_index == 0) {
    partials[tensor.first_partial + tile - tensor.first_tile] = both;
  }
}

// A simdgroup for each array: its partial sums stand from first[i] to
// first[i + 1].
[[kernel]] void sums_and_norm(
    const device float2* partials [[buffer(0)]],
    constant uint* first [[buffer(1)]],
    constant uint& count [[buffer(2)]],
    constant float& max_norm [[buffer(3)]],
    device float* sums [[buffer(4)]],
    device float* norm [[buffer(5)]],
    device float* factor [[buffer(6)]],
    device float* carry [[buffer(7)]],
    uint thread_index [[thread_position_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float totals[2 * simd_size];
  float2 total = float2(0, 0);
  for (uint i = simdgroup; i < count; i += simdgroups) {
    float2 sum = float2(0, 0);
    const uint end = first[i + 1];
    for (uint partial = first[i] + lane; partial < end; partial += simd_size) {
      sum += partials[partial];
    }
    sum = float2(simd_sum(sum.x), simd_sum(sum.y));
    if (lane == 0) {
      sums[i] = sum.x;
    }
    total += sum;
  }
  total = threadgroup_sum(total, totals, simdgroups, simdgroup, lane);
  if (thread_index == 0) {
    const float usual = metal::precise::sqrt(total.x);
    const float root =
        usual - usual == 0 ? usual : metal::precise::sqrt(total.y) / norm_scale;
    const float ratio = max_norm / (root + 1e-6f);
    norm[0] = root;
    carry[0] = root;
    carry[1] = 0;
    // A norm that is not a number makes every gradient so, as in MLX.
    factor[0] = ratio > 1 ? 1 : ratio;
  }
}
