#include "graph/composed.h"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "graph/factored.h"
#include "graph/formats.h"
#include "mlx/ops.h"
#include "mlx/utils.h"
#include "program.h"
#include "rules.h"
// Rules find the functions of nodes by their namespace, which lies around that
// of the rules.
#include "graph/node.h"
#include "graph/sums_of_squares.h"

namespace mlx_fused {

namespace {

// Changes the slots of one tensor, nodes of the graph, by a rule.
using Apply = void (*)(const Hyperparameters&, const Node& rate,
                       const Node& step, const Node& coefficient,
                       const RuleTraits& traits, std::vector<Node>& slots);

template <int index>
void apply(const Hyperparameters& hyperparameters, const Node& rate,
           const Node& step, const Node& coefficient, const RuleTraits& traits,
           std::vector<Node>& slots) {
  using Rule = typename RegisteredRule<index>::template Type<Node>;
  Rule rule;
  set_numbers(rule, hyperparameters);
  prepare(rule, rate, step, coefficient);
  Node none;
  Node& parameter = Rule::reads_parameter ? slots.front() : none;
  rule.update(slots.back(), parameter, slots.data() + Rule::reads_parameter);
}

const auto apply_table =
    []<int... index>(std::integer_sequence<int, index...>) {
      return std::array<Apply, rule_count>{apply<index>...};
    }(std::make_integer_sequence<int, rule_count>());

// An operation of a program on nodes of float32; a truth value is 1 or 0.
mx::array apply_operation(Operation operation, const Arrays& x) {
  const auto truth = [](const mx::array& a) {
    return mx::not_equal(a, mx::array(0.0f));
  };
  const auto number = [](const mx::array& a) {
    return mx::astype(a, mx::float32);
  };
  switch (operation) {
    case Operation::add:
      return x[0] + x[1];
    case Operation::subtract:
      return x[0] - x[1];
    case Operation::multiply:
      return x[0] * x[1];
    case Operation::divide:
      return x[0] / x[1];
    case Operation::maximum:
      return mx::maximum(x[0], x[1]);
    case Operation::minimum:
      return mx::minimum(x[0], x[1]);
    case Operation::power:
      return mx::power(x[0], x[1]);
    case Operation::arctan2:
      return mx::arctan2(x[0], x[1]);
    case Operation::negative:
      return mx::negative(x[0]);
    case Operation::absolute:
      return mx::abs(x[0]);
    case Operation::sign:
      return mx::sign(x[0]);
    case Operation::square:
      return mx::square(x[0]);
    case Operation::square_root:
      return mx::sqrt(x[0]);
    case Operation::reciprocal_root:
      return mx::rsqrt(x[0]);
    case Operation::exponential:
      return mx::exp(x[0]);
    case Operation::exponential_minus_1:
      return mx::expm1(x[0]);
    case Operation::logarithm:
      return mx::log(x[0]);
    case Operation::logarithm_of_1_plus:
      return mx::log1p(x[0]);
    case Operation::hyperbolic_tangent:
      return mx::tanh(x[0]);
    case Operation::sigmoid:
      return mx::sigmoid(x[0]);
    case Operation::sine:
      return mx::sin(x[0]);
    case Operation::cosine:
      return mx::cos(x[0]);
    case Operation::arctan:
      return mx::arctan(x[0]);
    case Operation::floor:
      return mx::floor(x[0]);
    case Operation::ceiling:
      return mx::ceil(x[0]);
    case Operation::rounded:
      return mx::round(x[0]);
    case Operation::to_float16:
      return number(mx::astype(x[0], mx::float16));
    case Operation::to_bfloat16:
      return number(mx::astype(x[0], mx::bfloat16));
    case Operation::to_bool:
      return number(truth(x[0]));
    case Operation::equal:
      return number(mx::equal(x[0], x[1]));
    case Operation::not_equal:
      return number(mx::not_equal(x[0], x[1]));
    case Operation::greater:
      return number(mx::greater(x[0], x[1]));
    case Operation::greater_equal:
      return number(mx::greater_equal(x[0], x[1]));
    case Operation::less:
      return number(mx::less(x[0], x[1]));
    case Operation::less_equal:
      return number(mx::less_equal(x[0], x[1]));
    case Operation::logical_and:
      return number(mx::logical_and(truth(x[0]), truth(x[1])));
    case Operation::logical_or:
      return number(mx::logical_or(truth(x[0]), truth(x[1])));
    case Operation::logical_not:
      return number(mx::logical_not(truth(x[0])));
    case Operation::select:
      return mx::where(truth(x[0]), x[1], x[2]);
  }
  throw std::invalid_argument("no such operation");
}

// Changes the slots of one tensor by a program; rate is all of its scalars.
void apply_program(const Hyperparameters& hyperparameters, const Node& rate,
                   const Node&, const Node&, const RuleTraits& traits,
                   std::vector<Node>& slots) {
  const auto& program = *traits.program;
  Arrays numbers, scalars, values;
  for (const auto& value : hyperparameters) {
    const auto* given = std::get_if<double>(&value);
    numbers.push_back(given ? mx::array(static_cast<float>(*given))
                            : std::get<mx::array>(value));
  }
  for (int i = 0; i < program.scalars; ++i) {
    scalars.push_back(mx::take(mx::reshape(rate.array(), {-1}), i, 0));
  }
  const auto value_of = [&](const Operand& operand) {
    const auto i = operand.index;
    return operand.kind == Operand::slot     ? slots[i].array()
           : operand.kind == Operand::result ? values[i]
           : operand.kind == Operand::number ? numbers[i]
                                             : scalars[i];
  };
  for (const auto& [operation, operands] : program.instructions) {
    Arrays given;
    for (int k = 0; k < mlx_fused::traits_of(operation).operands; ++k) {
      given.push_back(value_of(operands[k]));
    }
    values.push_back(apply_operation(operation, given));
  }
  std::vector<Node> updated = slots;
  for (size_t k = 0; k < slots.size(); ++k) {
    if (const auto& result = program.results[k]) {
      updated[k] = value_of(*result);
    }
  }
  slots = std::move(updated);
}

// A tensor's entry of a scalar.
mx::array entry_of(const mx::array& scalar, uint32_t entry, bool per_tensor) {
  return per_tensor && scalar.size() > 1
             ? mx::take(scalar, static_cast<int>(entry), 0)
             : scalar;
}

// A complex number is two real ones, as in torch: squares and quotients of
// complex arithmetic are no second moments. Lion's sign and Adamax' magnitude
// are those of complex numbers, as in mlx.optimizers.
bool takes_pairs(const RuleTraits& rule, const std::vector<mx::Dtype>& dtypes) {
  return rule.type() != "Lion" && rule.type() != "Adamax" &&
         std::find(dtypes.begin(), dtypes.end(), mx::complex64) != dtypes.end();
}

// With a last axis of 2, real and imaginary.
mx::array to_pairs(const mx::array& a) {
  const auto numbers = mx::expand_dims(mx::astype(a, mx::complex64), -1);
  return mx::concatenate({mx::real(numbers), mx::imag(numbers)}, -1);
}

mx::array from_pairs(const mx::array& a) {
  return mx::squeeze(mx::view(a, mx::complex64), -1);
}

}  // namespace

Function composed_update(GroupUpdate update, bool keep_dtypes,
                         mx::Stream stream) {
  return [=](const Arrays& inputs) {
    const mx::StreamContext context(stream);
    const auto& layout = *update.layout;
    const auto& rule = *layout.rule;
    Arrays outputs;
    for (int tensor = 0; tensor < layout.tensors; ++tensor) {
      const auto& entry = update.entries[tensor];
      const auto scalar = [&](Scalar kind) {
        return entry_of(inputs[layout.input(kind)], entry.scalar,
                        update.per_tensor);
      };
      // The values of the slots, and the dtypes that they count as.
      Arrays given;
      std::vector<mx::Dtype> dtypes;
      bool is_plain = true;
      for (int k = 0, part = 0; k < layout.slots(); ++k) {
        const auto& format = layout.formats[k];
        const auto& a = inputs[layout.input(tensor, part++)];
        is_plain = is_plain && format.storage == Storage::plain;
        dtypes.push_back(format.has_codes() ? mx::float32 : a.dtype());
        given.push_back(a);
        if (format.has_companion()) {
          const auto& companion = inputs[layout.input(tensor, part++)];
          given.back() = format.is_split()
                             ? join(a, companion)
                             : decode(format, a, companion, given[0].shape());
        }
      }
      const bool keeps = keep_dtypes || !is_plain;
      const bool has_pairs = takes_pairs(rule, dtypes);
      const bool is_usual =
          has_pairs || std::all_of(dtypes.begin(), dtypes.end(), has_kernels);
      std::vector<Node> slots;
      for (const auto& a : given) {
        slots.emplace_back(has_pairs  ? to_pairs(a)
                           : is_usual ? mx::astype(a, mx::float32)
                                      : a);
      }
      const auto dtype = slots.back().array().dtype();
      if (layout.has[gradient_scale]) {
        slots.back() =
            mx::astype(slots.back().array() * scalar(gradient_scale), dtype);
      }
      // Adafactor multiplies its scalars with the parameter's root mean square.
      const auto like = rule.is_factored() ? slots[0].array().dtype() : dtype;
      const bool is_whole =
          rule.is_factored() && !mx::issubdtype(like, mx::inexact);
      const auto scalar_dtype = is_whole ? mx::float32 : like;
      Node rate, count, own;
      if (layout.has[learning_rate]) {
        auto given_rate = scalar(learning_rate);
        if (has_pairs && given_rate.ndim() > 0) {
          given_rate = mx::expand_dims(given_rate, -1);
        }
        rate = mx::astype(given_rate, scalar_dtype);
      }
      if (layout.has[step]) {
        count = !is_usual && mx::issubdtype(scalar_dtype, mx::floating)
                    ? mx::astype(scalar(step), scalar_dtype)
                    : scalar(step);
      }
      if (layout.has[coefficient]) {
        own = mx::astype(scalar(coefficient), scalar_dtype);
      }
      const Apply apply = rule.is_factored() ? apply_factored
                          : rule.program     ? apply_program
                                             : apply_table[rule.index];
      auto values = (*update.sets)[entry.hyperparameters];
      if (rule.averages()) {
        const auto ema = std::visit([](const auto& x) { return number_of(x); },
                                    values.front());
        values.erase(values.begin());
        const auto place = slots.end() - 2;
        const auto average = *place;
        slots.erase(place);
        apply(values, rate, count, own, rule, slots);
        slots.insert(slots.end() - 1,
                     moving_average(ema, average, slots.front()));
      } else {
        apply(values, rate, count, own, rule, slots);
      }
      const auto put = [&](mx::array result) {
        const int part = layout.written[outputs.size() % layout.written.size()];
        const auto& before = inputs[layout.input(tensor, part)];
        const auto kept =
            layout.parts[part].is_read ? before : mx::zeros_like(before);
        outputs.push_back(layout.has[skip]
                              ? mx::where(scalar(skip), kept, result)
                              : std::move(result));
      };
      for (int k = 0; k < layout.slots(); ++k) {
        if (!rule.slots[k].is_written) {
          continue;
        }
        auto result =
            has_pairs ? from_pairs(slots[k].array()) : slots[k].array();
        // A state that is set to a gradient that broadcasts keeps its shape.
        if (const auto& shape = given[k].shape(); result.shape() != shape) {
          result = mx::broadcast_to(
              result, mx::broadcast_shapes(result.shape(), shape));
        }
        auto format = layout.formats[k];
        format.dtype = dtypes[k];
        if (format.has_codes()) {
          const auto [codes, scales] = encode(format, result);
          put(codes);
          put(scales);
        } else if (format.is_split()) {
          const auto [weight, error] = split(format, result);
          put(weight);
          put(error);
        } else if (format.storage == Storage::stochastic) {
          put(round_stochastically(result, format.dtype, scalar(seed),
                                   scalar(step), entry.numbers));
        } else {
          const auto target = keeps      ? dtypes[k]
                              : is_usual ? promoted(rule, dtypes, k)
                                         : result.dtype();
          if (target == mx::float16 && rule.is_mean(k)) {
            result = mx::minimum(result, mx::array(most_of_float16));
          }
          put(has_pairs ? result : mx::astype(result, target));
        }
      }
    }
    return outputs;
  };
}

Function composed_sums(bool counts, mx::Stream stream) {
  return [=](const Arrays& inputs) {
    const mx::StreamContext context(stream);
    const auto sums_of = [&](const mx::array& scale) {
      Arrays sums;
      for (size_t i = 0; i + 1 < inputs.size(); ++i) {
        // MLX may not return from the sum of an array without elements.
        if (inputs[i].size() == 0) {
          sums.push_back(mx::array(0.0f));
          continue;
        }
        auto x = mx::astype(inputs[i], mx::float32);
        if (counts) {
          x = mx::astype(mx::not_equal(x, mx::array(0.0f)), mx::float32);
        }
        sums.push_back(mx::sum(mx::square(x * scale)));
      }
      return sums.empty() ? mx::zeros({0}) : mx::stack(sums);
    };
    const auto all = sums_of(mx::array(1.0f));
    const auto scale = mx::stop_gradient(mx::where(
        mx::isfinite(mx::sum(all)), mx::array(1.0f), mx::array(norm_scale)));
    const auto norm = mx::sqrt(mx::sum(sums_of(scale))) / scale;
    const auto factor =
        mx::minimum(inputs.back() / (norm + mx::array(1e-6f)), mx::array(1.0f));
    return Arrays{all, norm, factor, mx::stack({norm, mx::zeros({})})};
  };
}

}  // namespace mlx_fused
