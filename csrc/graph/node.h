// A value of a rule as a node of MLX's graph: an array, or a number that takes
// the dtype of the array it meets, as a Python number does.
#pragma once

#include <cmath>
#include <optional>
#include <tuple>
#include <variant>

#include "mlx/ops.h"
#include "mlx/utils.h"
#include "rule_traits.h"
#include "rules.h"

namespace mlx_fused {

namespace mx = mlx::core;

class Node {
 public:
  Node(double number = 0) : number_(number) {}
  Node(mx::array array) : array_(std::move(array)) {}

  // As an array beside another, whose dtype a number takes unless that is an
  // integer's.
  mx::array beside(const Node& other) const {
    return array_ ? *array_ : mx::array(number_, dtype_beside(other));
  }
  mx::array array() const { return beside(*this); }

  friend Node operator+(const Node& a, const Node& b) {
    return a.beside(b) + b.beside(a);
  }
  friend Node operator-(const Node& a, const Node& b) {
    return a.beside(b) - b.beside(a);
  }
  friend Node operator*(const Node& a, const Node& b) {
    return a.beside(b) * b.beside(a);
  }
  friend Node operator/(const Node& a, const Node& b) {
    return a.beside(b) / b.beside(a);
  }
  // Of an array nothing is known while the graph is built: it may differ.
  friend bool operator!=(const Node& a, double number) {
    return a.array_ || a.number_ != number;
  }

 private:
  static mx::Dtype dtype_beside(const Node& other) {
    return other.array_ && mx::issubdtype(other.array_->dtype(), mx::inexact)
               ? other.array_->dtype()
               : mx::float32;
  }

  std::optional<mx::array> array_;
  double number_ = 0;
};

inline Node square_root(const Node& x) { return mx::sqrt(x.array()); }

inline Node magnitude(const Node& x) { return mx::abs(x.array()); }

inline Node sign_of(const Node& x) { return mx::sign(x.array()); }

inline Node larger(const Node& a, const Node& b) {
  return mx::maximum(a.beside(b), b.beside(a));
}

inline Node smaller(const Node& a, const Node& b) {
  return mx::minimum(a.beside(b), b.beside(a));
}

inline Node power(const Node& a, const Node& b) {
  return mx::power(a.beside(b), b.beside(a));
}

inline Node one_minus_power(const Number<Node>& beta, const Node& step) {
  return mx::negative(mx::expm1((step * beta.logarithm).array()));
}

inline Number<Node> number_of(const Node& x) {
  return {x, 1 - x, mx::log(x.array())};
}

inline Number<Node> number_of(double x) { return {x, 1 - x, std::log(x)}; }

// Gives a rule its hyper-parameters.
template <typename Rule>
void set_numbers(Rule& rule, const Hyperparameters& hyperparameters) {
  if constexpr (Rule::numbers > 0) {
    auto value = hyperparameters.begin();
    const auto next = [&] {
      return std::visit([](const auto& x) { return number_of(x); }, *value++);
    };
    std::apply([&](auto&... number) { ((number = next()), ...); },
               rule.all_numbers());
  }
}

}  // namespace mlx_fused
