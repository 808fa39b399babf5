// Codes, masters and stochastic rounding by plain MLX operations; the formulas
// are those of metal/formats.h.
#pragma once

#include <utility>

#include "graph/layout.h"

namespace mlx_fused {

// A state as float32, of its codes and scales; and back. Codes of 8 bits have
// the shape of the state, codes of 4 bits lie in pairs in a vector, the first
// in the lower half of a byte. Scales are a vector.
mx::array decode(const Format& format, const mx::array& codes,
                 const mx::array& scales, const mx::Shape& shape);
std::pair<mx::array, mx::array> encode(const Format& format,
                                       const mx::array& values);

// A float32 of a weight of half precision and its error, an int8 or int16; and
// back.
mx::array join(const mx::array& weight, const mx::array& error);
std::pair<mx::array, mx::array> split(const Format& format,
                                      const mx::array& values);

// float32 rounded to half precision at random, by the tensor's numbers.
mx::array round_stochastically(const mx::array& values, mx::Dtype dtype,
                               const mx::array& seed, const mx::array& step,
                               const Numbers& numbers);

}  // namespace mlx_fused
