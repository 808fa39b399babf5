#include "ops.h"

#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>

#include "check.h"
#include "composed.h"
#include "metal/backend.h"
#include "mlx/ops.h"
#include "primitives.h"

namespace mlx_fused {

namespace {

// Elements from which a tensor is large: MLX can then free its gradient as soon
// as it is used, which is worth more than sharing a primitive.
constexpr size_t large = 1 << 18;

// Large tensors a Metal launch: enough for few launches, few enough for
// gradients to be freed soon.
constexpr size_t large_group_size = 4;

void check_length(const char* argument, size_t given, size_t expected) {
  if (given != expected) {
    std::ostringstream message;
    message << "[fused_update] " << argument << " has " << given
            << " entries; expected " << expected << ".";
    throw std::invalid_argument(message.str());
  }
}

mx::array scalar(const char* argument, const mx::array& a, mx::Dtype dtype,
                 mx::StreamOrDevice s) {
  if (a.size() != 1) {
    std::ostringstream message;
    message << "[fused_update] " << argument << " has shape " << a.shape()
            << "; expected a scalar.";
    throw std::invalid_argument(message.str());
  }
  return a.dtype() == dtype ? a : mx::astype(a, dtype, s);
}

bool broadcasts_to(const mx::Shape& from, const mx::Shape& to) {
  if (from.size() > to.size()) {
    return false;
  }
  for (size_t i = 1; i <= from.size(); ++i) {
    const auto size = from[from.size() - i];
    if (size != 1 && size != to[to.size() - i]) {
      return false;
    }
  }
  return true;
}

// One parameter, its states and its gradient, as a kernel takes them.
struct Tensor {
  size_t index;     // in the caller's lists
  Arrays in_place;  // parameter and states, in the dtypes of the result
  Arrays gradient;  // none if the rule reads none
};

// What a kernel is compiled for. Arrays of one launch share it.
using Dtypes = std::vector<mx::Dtype::Val>;

Dtypes dtypes(const Tensor& tensor) {
  Dtypes key;
  for (const auto& a : tensor.in_place) {
    key.push_back(a.dtype().val());
  }
  for (const auto& a : tensor.gradient) {
    key.push_back(a.dtype().val());
  }
  return key;
}

// Casts and broadcasts as mlx.optimizers' own arithmetic would: a wider
// gradient widens what it is added to. False if no kernel does the result.
bool prepare(Tensor& tensor, bool keep_dtypes, mx::StreamOrDevice s) {
  auto& [index, in_place, gradient] = tensor;
  const auto shape = in_place[0].shape();
  for (const auto& a : in_place) {
    if (!has_kernels(a.dtype()) || a.shape() != shape) {
      return false;
    }
  }
  if (!gradient.empty()) {
    if (!has_kernels(gradient[0].dtype()) ||
        !broadcasts_to(gradient[0].shape(), shape)) {
      return false;
    }
    if (gradient[0].shape() != shape) {
      gradient[0] = mx::broadcast_to(gradient[0], shape, s);
    }
    auto widest = gradient[0].dtype();
    for (size_t k = in_place.size(); k-- > 0 && !keep_dtypes;) {
      widest = mx::promote_types(widest, in_place[k].dtype());
      const auto result =
          k == 0 ? widest
                 : mx::promote_types(in_place[k].dtype(), gradient[0].dtype());
      if (in_place[k].dtype() != result) {
        in_place[k] = mx::astype(in_place[k], result, s);
      }
    }
  }
  return in_place.size() < 3 || in_place[1].dtype() == in_place[2].dtype();
}

}  // namespace

Rule rule_named(const std::string& name) {
  std::ostringstream known;
  for (size_t i = 0; i < std::size(rule_table); ++i) {
    if (name == rule_table[i].name) {
      return static_cast<Rule>(i);
    }
    known << (i ? ", " : "") << rule_table[i].name;
  }
  throw std::invalid_argument("[fused_update] rule is \"" + name +
                              "\"; expected one of " + known.str() + ".");
}

bool has_kernels(mx::Dtype dtype) {
  return dtype == mx::float32 || dtype == mx::float16 || dtype == mx::bfloat16;
}

std::pair<Arrays, std::vector<Arrays>> fused_update(
    const std::string& name, const std::vector<double>& hyperparameters,
    const Arrays& parameters, const Arrays& gradients,
    const std::vector<Arrays>& states, const mx::array& learning_rate,
    const mx::array& step, const std::optional<mx::array>& gradient_scale,
    bool keep_dtypes, const Arrays& after, mx::StreamOrDevice s) {
  const Rule rule = rule_named(name);
  const auto& rule_traits = traits(rule);
  const size_t count = parameters.size();
  check_length("hyperparameters", hyperparameters.size(),
               rule_traits.hyperparameters);
  check_length("gradients", gradients.size(),
               rule_traits.reads_gradient ? count : 0);
  check_length("states", states.size(), rule_traits.states);
  for (const auto& state : states) {
    check_length("a state", state.size(), count);
  }
  const auto stream = mx::to_stream(s);
  // Composed operations take the scalars as they are, kernels one dtype of
  // each.
  Arrays given_tail = {learning_rate, step};
  Arrays tail = {scalar("learning_rate", learning_rate, mx::float32, s),
                 scalar("step", step, mx::uint64, s)};
  if (gradient_scale) {
    tail.push_back(scalar("gradient_scale", *gradient_scale, mx::float32, s));
    given_tail.push_back(tail.back());
  }
  tail.insert(tail.end(), after.begin(), after.end());

  Arrays new_parameters = parameters;
  std::vector<Arrays> new_states = states;
  const auto run = [&](const std::vector<Tensor>& group, bool fused) {
    const GroupLayout layout{static_cast<int>(group.size()), rule_traits.states,
                             rule_traits.reads_gradient,
                             gradient_scale.has_value()};
    Arrays inputs;
    std::vector<mx::Shape> shapes;
    std::vector<mx::Dtype> types;
    for (const auto& tensor : group) {
      for (const auto& a : tensor.in_place) {
        inputs.push_back(a);
        shapes.push_back(a.shape());
        types.push_back(a.dtype());
      }
      inputs.insert(inputs.end(), tensor.gradient.begin(),
                    tensor.gradient.end());
    }
    const auto& scalars = fused ? tail : given_tail;
    inputs.insert(inputs.end(), scalars.begin(), scalars.end());
    auto outputs =
        fused
            ? mx::array::make_arrays(std::move(shapes), types,
                                     std::make_shared<FusedUpdate>(
                                         stream, rule, hyperparameters, layout),
                                     inputs)
            : composed_update(rule, hyperparameters, layout, stream)(inputs);
    for (size_t i = 0; i < outputs.size() && keep_dtypes; ++i) {
      if (outputs[i].dtype() != types[i]) {
        outputs[i] = mx::astype(outputs[i], types[i], s);
      }
    }
    for (size_t i = 0; i < group.size(); ++i) {
      const auto index = group[i].index;
      new_parameters[index] = outputs[layout.output(i, 0)];
      for (int k = 0; k < rule_traits.states; ++k) {
        new_states[k][index] = outputs[layout.output(i, 1 + k)];
      }
    }
  };

  // Groups are filled in the tree's order, so that their gradients become ready
  // at about the same time. A launch costs more on a GPU than a primitive does
  // on the CPU: there even large tensors share one.
  const bool metal = runs_metal(stream);
  const size_t full = metal ? large_group_size : 1;
  std::map<Dtypes, std::vector<Tensor>> small_groups, large_groups;
  for (size_t i = 0; i < count; ++i) {
    Tensor tensor{i, {parameters[i]}, {}};
    for (const auto& state : states) {
      tensor.in_place.push_back(state[i]);
    }
    if (rule_traits.reads_gradient) {
      tensor.gradient.push_back(gradients[i]);
    }
    Tensor original = tensor;
    const auto trusted = [&] {
      const auto parameter = tensor.in_place[0].dtype();
      return !metal ||
             is_trusted(rule, parameter,
                        rule_traits.reads_gradient ? tensor.gradient[0].dtype()
                                                   : parameter,
                        tensor.in_place.back().dtype(), stream);
    };
    if (!prepare(tensor, keep_dtypes, s) || !trusted()) {
      run({std::move(original)}, /*fused=*/false);
      continue;
    }
    const bool is_large = parameters[i].size() >= large;
    auto& group = (is_large ? large_groups : small_groups)[dtypes(tensor)];
    group.push_back(std::move(tensor));
    if (group.size() ==
        (is_large ? full : max_group_size(rule_traits.states))) {
      run(group, /*fused=*/true);
      group.clear();
    }
  }
  for (const auto* groups : {&small_groups, &large_groups}) {
    for (const auto& [key, group] : *groups) {
      if (!group.empty()) {
        run(group, /*fused=*/true);
      }
    }
  }
  return {std::move(new_parameters), std::move(new_states)};
}

std::pair<mx::array, mx::array> global_norm(const Arrays& arrays,
                                            const mx::array& max_norm,
                                            mx::StreamOrDevice s) {
  Arrays inputs = arrays;
  for (const auto& a : arrays) {
    if (!has_kernels(a.dtype())) {
      std::ostringstream message;
      message << "[global_norm] an array has dtype " << a.dtype()
              << "; expected float32, float16 or bfloat16.";
      throw std::invalid_argument(message.str());
    }
  }
  inputs.push_back(scalar("max_norm", max_norm, mx::float32, s));
  const auto stream = mx::to_stream(s);
  bool trusted = true;
  for (const auto& a : arrays) {
    trusted =
        trusted && (!runs_metal(stream) || is_trusted_norm(a.dtype(), stream));
  }
  const auto outputs =
      trusted
          ? mx::array::make_arrays({{}, {}}, {mx::float32, mx::float32},
                                   std::make_shared<GlobalNorm>(stream), inputs)
          : composed_norm(stream)(inputs);
  return {outputs[0], outputs[1]};
}

Arrays scale(const Arrays& arrays, const mx::array& factor,
             mx::StreamOrDevice s) {
  const mx::array unused(0.0f);
  return fused_update("scale", {}, arrays, {}, {}, unused,
                      mx::array(uint64_t{0}), factor, false, {}, s)
      .first;
}

}  // namespace mlx_fused
