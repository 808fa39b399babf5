// The global L2 norm of any number of tensors, in two deterministic stages.
//
// Stage one: a threadgroup sums the squares of one tile in float32 and writes a
// partial sum. Stage two: one threadgroup adds the partial sums, always in the
// same order, and writes the norm and the clip factor. There are no atomics, so
// the same gradients give the same bits on every run.

#include <metal_stdlib>

using namespace metal;

#include "launch.h"
#include "storage.h"

static constexpr constant int simd_size = 32;

// The sum over all threads of the threadgroup, in every thread of its first
// simdgroup.
METAL_FUNC float threadgroup_sum(
    float value,
    threadgroup float* sums,
    uint simdgroups,
    uint simdgroup,
    uint lane) {
  value = simd_sum(value);
  if (lane == 0) {
    sums[simdgroup] = value;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return simd_sum(lane < simdgroups ? sums[lane] : 0);
}

METAL_FUNC void add_squares(const thread float* values, thread float& sum) {
  FOR_EACH_OF_VECTOR {
    sum += values[i] * values[i];
  }
}

template <typename G>
[[kernel]] void sum_of_squares(
    const device G* g0 [[buffer(0)]],
    const device G* g1 [[buffer(1)]],
    const device G* g2 [[buffer(2)]],
    const device G* g3 [[buffer(3)]],
    const device G* g4 [[buffer(4)]],
    const device G* g5 [[buffer(5)]],
    const device G* g6 [[buffer(6)]],
    const device G* g7 [[buffer(7)]],
    const device G* g8 [[buffer(8)]],
    const device G* g9 [[buffer(9)]],
    const device G* g10 [[buffer(10)]],
    const device G* g11 [[buffer(11)]],
    const device G* g12 [[buffer(12)]],
    const device G* g13 [[buffer(13)]],
    const device G* g14 [[buffer(14)]],
    const device G* g15 [[buffer(15)]],
    const device G* g16 [[buffer(16)]],
    const device G* g17 [[buffer(17)]],
    const device G* g18 [[buffer(18)]],
    const device G* g19 [[buffer(19)]],
    const device G* g20 [[buffer(20)]],
    const device G* g21 [[buffer(21)]],
    const device G* g22 [[buffer(22)]],
    const device G* g23 [[buffer(23)]],
    device float* partials [[buffer(24)]],
    constant uint& first_partial [[buffer(25)]],
    constant LaunchTensor* tensors [[buffer(26)]],
    constant uint& count [[buffer(27)]],
    constant int64_t* walks [[buffer(28)]],
    uint tile [[threadgroup_position_in_grid]],
    uint thread_index [[thread_position_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float sums[simd_size];
  const uint i = tensor_of_tile(tile, tensors, count);
  const device G* gradient = one_of_six<const G>(i, g0, g1, g2, g3, g4, g5);
  if (i >= 18) {
    gradient = one_of_six<const G>(i - 18, g18, g19, g20, g21, g22, g23);
  } else if (i >= 12) {
    gradient = one_of_six<const G>(i - 12, g12, g13, g14, g15, g16, g17);
  } else if (i >= 6) {
    gradient = one_of_six<const G>(i - 6, g6, g7, g8, g9, g10, g11);
  }
  float sum = 0;
  for (int vector = 0; vector < vectors_each; ++vector) {
    const int64_t start =
        vector_start(tile, tensors[i].first_tile, thread_index, vector);
    const int64_t rest = tensors[i].size - start;
    const int elements =
        rest < 0 ? 0 : rest < vector_size ? int(rest) : vector_size;
    float values[vector_size];
    load_gradient(gradient, tensors[i], walks, start, elements, values);
    add_squares(values, sum);
  }
  sum = threadgroup_sum(sum, sums, simdgroups, simdgroup, lane);
  if (thread_index == 0) {
    partials[first_partial + tile] = sum;
  }
}

[[kernel]] void norm_and_factor(
    const device float* partials [[buffer(0)]],
    constant uint& count [[buffer(1)]],
    constant float& max_norm [[buffer(2)]],
    device float* norm [[buffer(3)]],
    device float* factor [[buffer(4)]],
    uint thread_index [[thread_position_in_threadgroup]],
    uint threads [[threads_per_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float sums[simd_size];
  float sum = 0;
  for (uint i = thread_index; i < count; i += threads) {
    sum += partials[i];
  }
  sum = threadgroup_sum(sum, sums, simdgroups, simdgroup, lane);
  if (thread_index == 0) {
    const float root = metal::precise::sqrt(sum);
    const float ratio = max_norm / (root + 1e-6f);
    norm[0] = root;
    // A norm that is not a number makes every gradient so, as in MLX.
    factor[0] = ratio > 1 ? 1 : ratio;
  }
}
