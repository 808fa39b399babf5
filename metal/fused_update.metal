// One optimizer step, in place, for several tensors a launch.
//
// A kernel takes its tensors' arrays, then the arguments that they share. Each
// tensor has a parameter to read (old) and one to write (p): the same memory,
// unless work under way still holds the old one. A launch of fewer tensors
// binds its first tensor in the places left over, which no thread reads.
// csrc/metal/eval.cpp instantiates a kernel for a rule and the dtypes of
// parameter (P), gradient (G) and state (S) when it is first needed.

#include <metal_stdlib>

using namespace metal;

#include "launch.h"
#include "storage.h"
#include "update_rules.h"

template <typename Rule, typename P, typename G, typename S>
METAL_FUNC void update_tile(
    const device P* old,
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
  // A negative scale says that nothing is to change.
  const bool skip = gradient_scale < 0;
  for (int vector = 0; vector < vectors_each; ++vector) {
    const int64_t start =
        vector_start(tile, tensor.first_tile, thread_index, vector);
    if (start >= tensor.size) {
      return;
    }
    const int64_t rest = tensor.size - start;
    const int count = rest < vector_size ? int(rest) : vector_size;
    float parameters[vector_size];
    float gradients[vector_size] = {0, 0, 0, 0};
    float states[2][vector_size] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
    load_vector(old, start, count, vectorized, parameters);
    if (skip) {
      store_vector(parameters, start, count, vectorized, p);
      continue;
    }
    if constexpr (Rule::reads_gradient) {
      load_gradient(g, tensor, walks, start, count, gradients);
    }
    if constexpr (Rule::states > 0) {
      load_vector(s0, start, count, vectorized, states[0]);
    }
    if constexpr (Rule::states > 1) {
      load_vector(s1, start, count, vectorized, states[1]);
    }
    FOR_EACH_OF_VECTOR {
      if constexpr (Rule::gradient_in_place) {
        parameters[i] = parameters[i] * gradient_scale;
      } else {
        gradients[i] = gradients[i] * gradient_scale;
      }
      float state[2] = {states[0][i], states[1][i]};
      rule.update(gradients[i], parameters[i], state);
      states[0][i] = state[0];
      states[1][i] = state[1];
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

// Rules that read no gradient, six tensors.
template <typename Rule, typename P>
[[kernel]] void fused_update_no_gradient(
    const device P* old0 [[buffer(0)]],
    device P* p0 [[buffer(1)]],
    const device P* old1 [[buffer(2)]],
    device P* p1 [[buffer(3)]],
    const device P* old2 [[buffer(4)]],
    device P* p2 [[buffer(5)]],
    const device P* old3 [[buffer(6)]],
    device P* p3 [[buffer(7)]],
    const device P* old4 [[buffer(8)]],
    device P* p4 [[buffer(9)]],
    const device P* old5 [[buffer(10)]],
    device P* p5 [[buffer(11)]],
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
  const device P* old =
      one_of_six<const P>(i, old0, old1, old2, old3, old4, old5);
  device P* p = one_of_six<P>(i, p0, p1, p2, p3, p4, p5);
  update_tile<Rule, P, P, P>(
      old,
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

// Rules without state, six tensors.
template <typename Rule, typename P, typename G>
[[kernel]] void fused_update_0(
    const device P* old0 [[buffer(0)]],
    device P* p0 [[buffer(1)]],
    const device G* g0 [[buffer(2)]],
    const device P* old1 [[buffer(3)]],
    device P* p1 [[buffer(4)]],
    const device G* g1 [[buffer(5)]],
    const device P* old2 [[buffer(6)]],
    device P* p2 [[buffer(7)]],
    const device G* g2 [[buffer(8)]],
    const device P* old3 [[buffer(9)]],
    device P* p3 [[buffer(10)]],
    const device G* g3 [[buffer(11)]],
    const device P* old4 [[buffer(12)]],
    device P* p4 [[buffer(13)]],
    const device G* g4 [[buffer(14)]],
    const device P* old5 [[buffer(15)]],
    device P* p5 [[buffer(16)]],
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
  const device P* old =
      one_of_six<const P>(i, old0, old1, old2, old3, old4, old5);
  device P* p = one_of_six<P>(i, p0, p1, p2, p3, p4, p5);
  const device G* g = one_of_six<const G>(i, g0, g1, g2, g3, g4, g5);
  update_tile<Rule, P, G, P>(
      old,
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

// Rules with one state, six tensors.
template <typename Rule, typename P, typename G, typename S>
[[kernel]] void fused_update_1(
    const device P* old0 [[buffer(0)]],
    device P* p0 [[buffer(1)]],
    device S* s0 [[buffer(2)]],
    const device G* g0 [[buffer(3)]],
    const device P* old1 [[buffer(4)]],
    device P* p1 [[buffer(5)]],
    device S* s1 [[buffer(6)]],
    const device G* g1 [[buffer(7)]],
    const device P* old2 [[buffer(8)]],
    device P* p2 [[buffer(9)]],
    device S* s2 [[buffer(10)]],
    const device G* g2 [[buffer(11)]],
    const device P* old3 [[buffer(12)]],
    device P* p3 [[buffer(13)]],
    device S* s3 [[buffer(14)]],
    const device G* g3 [[buffer(15)]],
    const device P* old4 [[buffer(16)]],
    device P* p4 [[buffer(17)]],
    device S* s4 [[buffer(18)]],
    const device G* g4 [[buffer(19)]],
    const device P* old5 [[buffer(20)]],
    device P* p5 [[buffer(21)]],
    device S* s5 [[buffer(22)]],
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
  const device P* old =
      one_of_six<const P>(i, old0, old1, old2, old3, old4, old5);
  device P* p = one_of_six<P>(i, p0, p1, p2, p3, p4, p5);
  device S* s = one_of_six<S>(i, s0, s1, s2, s3, s4, s5);
  const device G* g = one_of_six<const G>(i, g0, g1, g2, g3, g4, g5);
  update_tile<Rule, P, G, S>(
      old,
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

// Rules with two states, four tensors.
template <typename Rule, typename P, typename G, typename S>
[[kernel]] void fused_update_2(
    const device P* old0 [[buffer(0)]],
    device P* p0 [[buffer(1)]],
    device S* s0 [[buffer(2)]],
    device S* t0 [[buffer(3)]],
    const device G* g0 [[buffer(4)]],
    const device P* old1 [[buffer(5)]],
    device P* p1 [[buffer(6)]],
    device S* s1 [[buffer(7)]],
    device S* t1 [[buffer(8)]],
    const device G* g1 [[buffer(9)]],
    const device P* old2 [[buffer(10)]],
    device P* p2 [[buffer(11)]],
    device S* s2 [[buffer(12)]],
    device S* t2 [[buffer(13)]],
    const device G* g2 [[buffer(14)]],
    const device P* old3 [[buffer(15)]],
    device P* p3 [[buffer(16)]],
    device S* s3 [[buffer(17)]],
    device S* t3 [[buffer(18)]],
    const device G* g3 [[buffer(19)]],
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
  const device P* old =
      one_of_six<const P>(i, old0, old1, old2, old3, old3, old3);
  device P* p = one_of_six<P>(i, p0, p1, p2, p3, p3, p3);
  device S* s = one_of_six<S>(i, s0, s1, s2, s3, s3, s3);
  device S* t = one_of_six<S>(i, t0, t1, t2, t3, t3, t3);
  const device G* g = one_of_six<const G>(i, g0, g1, g2, g3, g3, g3);
  update_tile<Rule, P, G, S>(
      old,
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
