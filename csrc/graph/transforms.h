// vjp, jvp and vmap of a primitive as those of plain MLX operations.
#pragma once

#include <utility>

#include "graph/composed.h"
#include "mlx/transforms.h"

namespace mlx_fused {

template <typename Index>
Arrays select(const Arrays& arrays, const std::vector<Index>& indices) {
  Arrays selected;
  selected.reserve(indices.size());
  for (const auto i : indices) {
    selected.push_back(arrays[i]);
  }
  return selected;
}

// The function of the selected inputs alone, the others held fixed.
inline Function restrict_to(const Function& function, const Arrays& inputs,
                            const std::vector<int>& selected) {
  return [&function, &inputs, &selected](const Arrays& values) {
    auto all = inputs;
    for (size_t i = 0; i < selected.size(); ++i) {
      all[selected[i]] = values[i];
    }
    return function(all);
  };
}

// Defines a primitive's transforms by its method Function composed() const.
#define MLX_FUSED_COMPOSED_TRANSFORMS(Primitive)                          \
  Arrays Primitive::vjp(const Arrays& primals, const Arrays& cotangents,  \
                        const std::vector<int>& argnums, const Arrays&) { \
    return mx::vjp(restrict_to(composed(), primals, argnums),             \
                   select(primals, argnums), cotangents)                  \
        .second;                                                          \
  }                                                                       \
  Arrays Primitive::jvp(const Arrays& primals, const Arrays& tangents,    \
                        const std::vector<int>& argnums) {                \
    return mx::jvp(restrict_to(composed(), primals, argnums),             \
                   select(primals, argnums), tangents)                    \
        .second;                                                          \
  }                                                                       \
  std::pair<Arrays, std::vector<int>> Primitive::vmap(                    \
      const Arrays& inputs, const std::vector<int>& axes) {               \
    auto outputs = mx::vmap(composed(), axes)(inputs);                    \
    std::vector<int> output_axes(outputs.size(), 0);                      \
    return {std::move(outputs), std::move(output_axes)};                  \
  }

}  // namespace mlx_fused
