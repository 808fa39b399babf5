// One optimizer step, in place, for up to six tensors a launch.
//
// A kernel takes six tensors' arrays, then the arguments that they share. A
// launch of fewer tensors binds its first tensor in the places left over, which
// no thread reads. csrc/metal/eval.cpp instantiates a kernel for a rule and the
// dtypes of parameter (P), gradient (G) and state (S) when it is first needed.

#include <metal_stdlib>

using namespace metal;

#include "launch.h"
#include "storage.h"
#include "update_rules.h"

template <typename T>
METAL_FUNC device T* one_of_six(
    uint i,
    device T* a0,
    device T* a1,
    device T* a2,
    device T* a3,
    device T* a4,
    device T* a5) {
  return i == 0 ? a0 : i == 1 ? a1 : i == 2 ? a2 : i == 3 ? a3 : i == 4 ? a4 : a5;
}

template <typename Rule, typename P, typename G, typename S>
METAL_FUNC void update_tile(
    device P* p,
    const device G* g,
    device S* s0,
    device S* s1,
    constant LaunchTensor& tensor,
    constant int64_t* walks,
    const Rule rule,
    float gradient_scale,
    uint tile,
    uint thread_index) {
  const bool vectorized = tensor.vectorized != 0;
  for (int vector = 0; vector < vectors_each; ++vector) {
    const int64_t start =
        vector_start(tile, tensor.first_tile, thread_index, vector);
    if (start >= tensor.size) {
      return;
    }
    const int64_t rest = tensor.size - start;
    const int count = rest < vector_size ? int(rest) : vector_size;
    float parameters[vector_size];
    float gradients[vector_size];
    float states[2][vector_size];
    load_vector(p, start, count, vectorized, parameters);
    if constexpr (Rule::reads_gradient) {
      load_gradient(g, tensor, walks, start, count, gradients);
    }
    if constexpr (Rule::states > 0) {
      load_vector(s0, start, count, vectorized, states[0]);
    }
    if constexpr (Rule::states > 1) {
      load_vector(s1, start, count, vectorized, states[1]);
    }
    for (int i = 0; i < count; ++i) {
      float state[2] = {0, 0};
      if constexpr (Rule::states > 0) {
        state[0] = states[0][i];
      }
      if constexpr (Rule::states > 1) {
        state[1] = states[1][i];
      }
      if constexpr (Rule::reads_gradient) {
        rule.update(gradients[i] * gradient_scale, parameters[i], state);
      } else {
        rule.update(gradient_scale, parameters[i], state);
      }
      if constexpr (Rule::states > 0) {
        states[0][i] = state[0];
      }
      if constexpr (Rule::states > 1) {
        states[1][i] = state[1];
      }
    }
    store_vector(parameters, start, count, vectorized, p);
    if constexpr (Rule::states > 0) {
      store_vector(states[0], start, count, vectorized, s0);
    }
    if constexpr (Rule::states > 1) {
      store_vector(states[1], start, count, vectorized, s1);
    }
  }
}

// Rules that read no gradient.
template <typename Rule, typename P>
[[kernel]] void fused_update_no_gradient(
    device P* p0 [[buffer(0)]],
    device P* p1 [[buffer(1)]],
    device P* p2 [[buffer(2)]],
    device P* p3 [[buffer(3)]],
    device P* p4 [[buffer(4)]],
    device P* p5 [[buffer(5)]],
    constant float& learning_rate [[buffer(24)]],
    constant uint64_t& step [[buffer(25)]],
    constant float& gradient_scale [[buffer(26)]],
    constant float* hyperparameters [[buffer(27)]],
    constant LaunchTensor* tensors [[buffer(28)]],
    constant uint& count [[buffer(29)]],
    constant int64_t* walks [[buffer(30)]],
    uint tile [[threadgroup_position_in_grid]],
    uint thread_index [[thread_position_in_threadgroup]]) {
  const uint i = tensor_of_tile(tile, tensors, count);
  device P* p = one_of_six(i, p0, p1, p2, p3, p4, p5);
  update_tile<Rule, P, P, P>(
      p,
      p,
      p,
      p,
      tensors[i],
      walks,
      Rule::prepare(
          hyperparameters, learning_rate, static_cast<float>(step)),
      gradient_scale,
      tile,
      thread_index);
}

// Rules without state.
template <typename Rule, typename P, typename G>
[[kernel]] void fused_update_0(
    device P* p0 [[buffer(0)]],
    const device G* g0 [[buffer(1)]],
    device P* p1 [[buffer(2)]],
    const device G* g1 [[buffer(3)]],
    device P* p2 [[buffer(4)]],
    const device G* g2 [[buffer(5)]],
    device P* p3 [[buffer(6)]],
    const device G* g3 [[buffer(7)]],
    device P* p4 [[buffer(8)]],
    const device G* g4 [[buffer(9)]],
    device P* p5 [[buffer(10)]],
    const device G* g5 [[buffer(11)]],
    constant float& learning_rate [[buffer(24)]],
    constant uint64_t& step [[buffer(25)]],
    constant float& gradient_scale [[buffer(26)]],
    constant float* hyperparameters [[buffer(27)]],
    constant LaunchTensor* tensors [[buffer(28)]],
    constant uint& count [[buffer(29)]],
    constant int64_t* walks [[buffer(30)]],
    uint tile [[threadgroup_position_in_grid]],
    uint thread_index [[thread_position_in_threadgroup]]) {
  const uint i = tensor_of_tile(tile, tensors, count);
  device P* p = one_of_six(i, p0, p1, p2, p3, p4, p5);
  const device G* g = one_of_six(i, g0, g1, g2, g3, g4, g5);
  update_tile<Rule, P, G, P>(
      p,
      g,
      p,
      p,
      tensors[i],
      walks,
      Rule::prepare(
          hyperparameters, learning_rate, static_cast<float>(step)),
      gradient_scale,
      tile,
      thread_index);
}

// Rules with one state.
template <typename Rule, typename P, typename G, typename S>
[[kernel]] void fused_update_1(
    device P* p0 [[buffer(0)]],
    device S* s0 [[buffer(1)]],
    const device G* g0 [[buffer(2)]],
    device P* p1 [[buffer(3)]],
    device S* s1 [[buffer(4)]],
    const device G* g1 [[buffer(5)]],
    device P* p2 [[buffer(6)]],
    device S* s2 [[buffer(7)]],
    const device G* g2 [[buffer(8)]],
    device P* p3 [[buffer(9)]],
    device S* s3 [[buffer(10)]],
    const device G* g3 [[buffer(11)]],
    device P* p4 [[buffer(12)]],
    device S* s4 [[buffer(13)]],
    const device G* g4 [[buffer(14)]],
    device P* p5 [[buffer(15)]],
    device S* s5 [[buffer(16)]],
    const device G* g5 [[buffer(17)]],
    constant float& learning_rate [[buffer(24)]],
    constant uint64_t& step [[buffer(25)]],
    constant float& gradient_scale [[buffer(26)]],
    constant float* hyperparameters [[buffer(27)]],
    constant LaunchTensor* tensors [[buffer(28)]],
    constant uint& count [[buffer(29)]],
    constant int64_t* walks [[buffer(30)]],
    uint tile [[threadgroup_position_in_grid]],
    uint thread_index [[thread_position_in_threadgroup]]) {
  const uint i = tensor_of_tile(tile, tensors, count);
  device P* p = one_of_six(i, p0, p1, p2, p3, p4, p5);
  device S* s = one_of_six(i, s0, s1, s2, s3, s4, s5);
  const device G* g = one_of_six(i, g0, g1, g2, g3, g4, g5);
  update_tile<Rule, P, G, S>(
      p,
      g,
      s,
      s,
      tensors[i],
      walks,
      Rule::prepare(
          hyperparameters, learning_rate, static_cast<float>(step)),
      gradient_scale,
      tile,
      thread_index);
}

// Rules with two states.
template <typename Rule, typename P, typename G, typename S>
[[kernel]] void fused_update_2(
    device P* p0 [[buffer(0)]],
    device S* s0 [[buffer(1)]],
    device S* t0 [[buffer(2)]],
    const device G* g0 [[buffer(3)]],
    device P* p1 [[buffer(4)]],
    device S* s1 [[buffer(5)]],
    device S* t1 [[buffer(6)]],
    const device G* g1 [[buffer(7)]],
    device P* p2 [[buffer(8)]],
    device S* s2 [[buffer(9)]],
    device S* t2 [[buffer(10)]],
    const device G* g2 [[buffer(11)]],
    device P* p3 [[buffer(12)]],
    device S* s3 [[buffer(13)]],
    device S* t3 [[buffer(14)]],
    const device G* g3 [[buffer(15)]],
    device P* p4 [[buffer(16)]],
    device S* s4 [[buffer(17)]],
    device S* t4 [[buffer(18)]],
    const device G* g4 [[buffer(19)]],
    device P* p5 [[buffer(20)]],
    device S* s5 [[buffer(21)]],
    device S* t5 [[buffer(22)]],
    const device G* g5 [[buffer(23)]],
    constant float& learning_rate [[buffer(24)]],
    constant uint64_t& step [[buffer(25)]],
    constant float& gradient_scale [[buffer(26)]],
    constant float* hyperparameters [[buffer(27)]],
    constant LaunchTensor* tensors [[buffer(28)]],
    constant uint& count [[buffer(29)]],
    constant int64_t* walks [[buffer(30)]],
    uint tile [[threadgroup_position_in_grid]],
    uint thread_index [[thread_position_in_threadgroup]]) {
  const uint i = tensor_of_tile(tile, tensors, count);
  device P* p = one_of_six(i, p0, p1, p2, p3, p4, p5);
  device S* s = one_of_six(i, s0, s1, s2, s3, s4, s5);
  device S* t = one_of_six(i, t0, t1, t2, t3, t4, t5);
  const device G* g = one_of_six(i, g0, g1, g2, g3, g4, g5);
  update_tile<Rule, P, G, S>(
      p,
      g,
      s,
      t,
      tensors[i],
      walks,
      Rule::prepare(
          hyperparameters, learning_rate, static_cast<float>(step)),
      gradient_scale,
      tile,
      thread_index);
}
