// Adafactor's update of one tensor from plain MLX operations.
#pragma once

#include <vector>

#include "rule_traits.h"

namespace mlx_fused {

class Node;

// What a float16 mean of squares can be: no step is to meet infinity.
constexpr float most_of_float16 = 65504;

// Changes the slots of one tensor, nodes of the graph.
void apply_factored(const Hyperparameters& hyperparameters, const Node& rate,
                    const Node& step, const Node& coefficient,
                    const RuleTraits& traits, std::vector<Node>& slots);

}  // namespace mlx_fused
