// Adafactor's loops, which loops.cpp alone includes: once for each instruction
// set.
#pragma once

#include "cpu/vectors.h"

namespace mlx_fused::cpu {

namespace {

// The sum of f(i)^2, in double precision, so that it is the same, but for once
// in some millions, in whatever order a matrix is walked. Calls done(i, f(i)^2)
// for each.
template <typename F, typename Done>
inline double sum_squares_of(size_t n, F f, Done done) {
  double lanes[sum_lanes] = {};
  size_t i = 0;
  for (; i + sum_lanes <= n; i += sum_lanes) {
    for (size_t lane = 0; lane < sum_lanes; ++lane) {
      const float x = f(i + lane);
      lanes[lane] += x * x;
      done(i + lane, x * x);
    }
  }
  for (size_t lane = 0; i < n; ++i, ++lane) {
    const float x = f(i);
    lanes[lane] += x * x;
    done(i, x * x);
  }
  double sum = 0;
  const size_t used = n < sum_lanes ? n : sum_lanes;
  for (size_t lane = 0; lane < used; ++lane) {
    sum += lanes[lane];
  }
  return sum;
}

double sum_squares(const float* x, size_t n, double* __restrict columns) {
  const auto value = [=](size_t i) { return x[i]; };
  return columns ? sum_squares_of(
                       n, value,
                       [=](size_t i, float square) { columns[i] += square; })
                 : sum_squares_of(n, value, [](size_t, float) {});
}

double sum_direction(float row, const float* columns, const float* g,
                     size_t n) {
  return sum_squares_of(
      n, [=](size_t i) { return direction(row, columns[i], g[i]); },
      [](size_t, float) {});
}

template <bool has_moment>
void write_factored(const FactoredRow& row, size_t n) {
  Adafactor<float> rule;
  // It begins with its numbers.
  memcpy(static_cast<void*>(&rule), row.numbers,
         rule.numbers * sizeof(Number<float>));
  MLX_FUSED_VECTORIZE
  for (size_t i = 0; i < n; ++i) {
    float u = direction(row.factor, row.columns[i], row.gradient[i]) * row.size;
    if constexpr (has_moment) {
      float exp_avg = row.moment[i];
      rule.average(u, exp_avg);
      row.new_moment[i] = exp_avg;
    }
    float p = row.parameter[i];
    rule.write(u, row.scaled_rate, p);
    row.new_parameter[i] = p;
  }
}

void write_factored_row(const FactoredRow& given, size_t n) {
  const auto row = given;  // which no store can change
  row.moment ? write_factored<true>(row, n) : write_factored<false>(row, n);
}

}  // namespace

}  // namespace mlx_fused::cpu
