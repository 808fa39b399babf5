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
  Node operator-() const { return mx::negative(array()); }
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

inline Node where_positive(const Node& x, const Node& a, const Node& b) {
  const auto condition =
      mx::greater(x.array(), mx::array(0, x.array().dtype()));
  return mx::where(condition, a.beside(b), b.beside(a));
}

inline Node one_minus_power(const Number<Node>& beta, const Node& step) {
  return mx::negative(mx::expm1((step * beta.logarithm).array()));
}

// Of metal/formats.h the unsigned integer, and what a comparison gives.
class Bits {
 public:
  Bits(uint32_t number) : array_(number, mx::uint32) {}
  Bits(mx::array array) : array_(std::move(array)) {}

  const mx::array& array() const { return array_; }

  friend Bits operator+(const Bits& a, const Bits& b) {
    return a.array_ + b.array_;
  }
  friend Bits operator-(const Bits& a, const Bits& b) {
    return a.array_ - b.array_;
  }
  friend Bits operator*(const Bits& a, const Bits& b) {
    return a.array_ * b.array_;
  }
  friend Bits operator&(const Bits& a, const Bits& b) {
    return mx::bitwise_and(a.array_, b.array_);
  }
  friend Bits operator|(const Bits& a, const Bits& b) {
    return mx::bitwise_or(a.array_, b.array_);
  }
  friend Bits operator^(const Bits& a, const Bits& b) {
    return mx::bitwise_xor(a.array_, b.array_);
  }
  friend Bits operator>>(const Bits& a, uint32_t places) {
    return mx::right_shift(a.array_, mx::array(places, mx::uint32));
  }
  friend Bits operator<<(const Bits& a, uint32_t places) {
    return mx::left_shift(a.array_, mx::array(places, mx::uint32));
  }

 private:
  mx::array array_;
};

inline Bits as_bits(const Node& x) { return mx::view(x.array(), mx::uint32); }

inline Node as_float(const Bits& x) { return mx::view(x.array(), mx::float32); }

inline Bits is_nan(const Node& x) { return mx::isnan(x.array()); }

inline Bits is_finite(const Node& x) { return mx::isfinite(x.array()); }

inline Node choose(const Bits& condition, const Node& a, const Node& b) {
  return mx::where(condition.array(), a.beside(b), b.beside(a));
}

inline Bits choose(const Bits& condition, const Bits& a, const Bits& b) {
  return mx::where(condition.array(), a.array(), b.array());
}

inline Bits clamped(const Bits& x, const Bits& least, const Bits& most) {
  return mx::minimum(mx::maximum(x.array(), least.array()), most.array());
}

inline Node at_least(const Node& x, const Node& least) {
  return choose(mx::greater(x.array(), least.array()), x, least);
}

inline Node round_down(const Node& x) { return mx::floor(x.array()); }

inline Node nearest(const Node& x) {
  return mx::where(mx::isnan(x.array()), mx::array(0.0f), mx::round(x.array()));
}

inline Bits is_positive(const Node& x) {
  return mx::greater(x.array(), mx::array(0.0f));
}

template <typename U>
Bits to_integer(const Node& x) {
  return mx::view(mx::astype(x.array(), mx::int32), mx::uint32);
}

template <typename T>
Node to_float(const Bits& x) {
  return mx::astype(mx::view(x.array(), mx::int32), mx::float32);
}

inline Node half_of(const Node& x) {
  return mx::astype(mx::astype(x.array(), mx::float16), mx::float32);
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
