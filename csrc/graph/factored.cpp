#include "graph/factored.h"

#include "graph/node.h"

namespace mlx_fused {

void apply_factored(const Hyperparameters& hyperparameters, const Node& rate,
                    const Node& step, const Node& /*coefficient*/,
                    const RuleTraits& traits, std::vector<Node>& slots) {
  Adafactor<Node> rule;
  set_numbers(rule, hyperparameters);
  rule.prepare(rate, step);
  const auto mean_of_squares = [](const Node& x) {
    return mx::mean(mx::square(x.array()));
  };
  const auto g = slots.back().array();
  const auto squares = mx::square(g);
  Node row = 1, column;
  if (traits.means == 2) {
    slots[1] = rule.running_mean(slots[1], mx::mean(squares, -1));
    slots[2] = rule.running_mean(slots[2], mx::mean(squares, -2));
    const auto mean = mx::mean(slots[1].array(), -1, /*keepdims=*/true);
    row = mx::expand_dims((rule.factor(slots[1]) * square_root(mean)).array(),
                          -1);
    column = mx::expand_dims(rule.factor(slots[2]).array(), -2);
  } else {
    slots[1] = rule.running_mean(slots[1], squares);
    column = rule.factor(slots[1]);
  }
  Node u = direction<Node>(row, column, g);
  const Node scaled_rate = rule.scaled_rate(mean_of_squares(slots[0]));
  u = u * rule.clipped(scaled_rate, mean_of_squares(u));
  if (slots.size() > static_cast<size_t>(traits.means) + 2) {
    rule.average(u, slots[traits.means + 1]);
  }
  rule.write(u, scaled_rate, slots[0]);
}

}  // namespace mlx_fused
