#include "ops.h"

#include <algorithm>
#include <array>
#include <iterator>
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

// Elements from which a tensor is large: to update it, and so to free its
// gradient, as soon as it is ready is then worth more than sharing a primitive.
// A launch costs more on a GPU than a primitive does on the CPU: there fewer
// are large, and even those share one.
struct Large {
  size_t elements;
  size_t group_size;
};
constexpr Large large_on_cpu = {1 << 14, 1};
constexpr Large large_on_metal = {1 << 18, 4};

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

// What a kernel is compiled for, and what arrays of one launch share: the
// dtypes of parameter, states and gradient.
struct Dtypes {
  std::array<mx::Dtype::Val, 4> values{};
  bool operator==(const Dtypes&) const = default;
};

// Tensors that share a primitive, as a kernel takes them.
struct Group {
  Dtypes dtypes;
  bool is_large;
  std::vector<size_t> indices;  // in the caller's lists
  Arrays inputs;
};

// Casts and broadcasts a parameter, its states and its gradient (arrays, in
// this order) as mlx.optimizers' own arithmetic would: a wider gradient widens
// what it is added to. False if no kernel does the result.
bool prepare(mx::array* arrays, int states, bool reads_gradient,
             bool keep_dtypes, mx::StreamOrDevice s) {
  const auto& shape = arrays[0].shape();
  for (int k = 0; k <= states; ++k) {
    if (!has_kernels(arrays[k].dtype()) || arrays[k].shape() != shape) {
      return false;
    }
  }
  if (reads_gradient) {
    auto& gradient = arrays[states + 1];
    if (!has_kernels(gradient.dtype())) {
      return false;
    }
    if (gradient.shape() != shape) {
      if (!broadcasts_to(gradient.shape(), shape)) {
        return false;
      }
      gradient = mx::broadcast_to(gradient, shape, s);
    }
    auto widest = gradient.dtype();
    for (int k = states; k >= 0 && !keep_dtypes; --k) {
      widest = mx::promote_types(widest, arrays[k].dtype());
      const auto result =
          k == 0 ? widest
                 : mx::promote_types(arrays[k].dtype(), gradient.dtype());
      if (arrays[k].dtype() != result) {
        arrays[k] = mx::astype(arrays[k], result, s);
      }
    }
  }
  return states < 2 || arrays[1].dtype() == arrays[2].dtype();
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

  // MLX computes what is deepest in the graph first, and would compute all
  // gradients before the first update. So each group waits for the one before
  // it. They are filled from the tree's end, as gradients become ready.
  const bool is_chained =
      std::any_of(gradients.begin(), gradients.end(),
                  [](const mx::array& g) { return !g.is_available(); });
  const int each = 1 + rule_traits.states;
  Arrays previous = after;
  Arrays new_parameters = parameters;
  std::vector<Arrays> new_states = states;
  const auto run = [&](Group& group, bool fused) {
    const GroupLayout layout{static_cast<int>(group.indices.size()),
                             rule_traits.states, rule_traits.reads_gradient,
                             gradient_scale.has_value()};
    const auto& scalars = fused ? tail : given_tail;
    group.inputs.insert(group.inputs.end(), scalars.begin(), scalars.end());
    std::vector<mx::Dtype> kept;
    for (int i = 0; i < layout.tensors && keep_dtypes; ++i) {
      for (int k = 0; k < each; ++k) {
        kept.push_back(group.inputs[layout.input(i, k)].dtype());
      }
    }
    auto outputs = fused ? FusedUpdate::make_outputs(
                               std::make_shared<FusedUpdate>(
                                   stream, rule, hyperparameters, layout),
                               std::move(group.inputs), previous)
                         : composed_update(rule, hyperparameters, layout,
                                           stream)(group.inputs);
    for (size_t i = 0; i < kept.size(); ++i) {
      outputs[i] = mx::astype(outputs[i], kept[i], s);
    }
    for (int i = 0; i < layout.tensors; ++i) {
      const auto index = group.indices[i];
      new_parameters[index] = std::move(outputs[layout.output(i, 0)]);
      for (int k = 0; k < rule_traits.states; ++k) {
        new_states[k][index] = std::move(outputs[layout.output(i, 1 + k)]);
      }
    }
    if (fused && is_chained) {
      previous = {new_parameters[group.indices[0]]};
    }
    group.indices.clear();
    group.inputs.clear();
  };

  const bool metal = runs_metal(stream);
  const auto large = metal ? large_on_metal : large_on_cpu;
  const auto group_size = [&](bool is_large) -> size_t {
    return is_large ? large.group_size : max_group_size(rule_traits.states);
  };
  std::vector<Group> groups;
  Arrays arrays;  // of one tensor
  for (size_t i = count; i-- > 0;) {
    const auto collect = [&] {
      arrays.clear();
      arrays.push_back(parameters[i]);
      for (const auto& state : states) {
        arrays.push_back(state[i]);
      }
      if (rule_traits.reads_gradient) {
        arrays.push_back(gradients[i]);
      }
    };
    collect();
    const bool fits =
        prepare(arrays.data(), rule_traits.states, rule_traits.reads_gradient,
                keep_dtypes, s) &&
        (!metal ||
         is_trusted(rule, arrays[0].dtype(),
                    arrays[rule_traits.reads_gradient ? each : 0].dtype(),
                    arrays[rule_traits.states].dtype(), stream));
    if (!fits) {
      collect();
      Group alone{{}, false, {i}, arrays};
      run(alone, /*fused=*/false);
      continue;
    }
    Dtypes dtypes;
    for (size_t k = 0; k < arrays.size(); ++k) {
      dtypes.values[k] = arrays[k].dtype().val();
    }
    const bool is_large = parameters[i].size() >= large.elements;
    auto group =
        std::find_if(groups.begin(), groups.end(), [&](const Group& g) {
          return g.is_large == is_large && g.dtypes == dtypes;
        });
    if (group == groups.end()) {
      group = groups.insert(group, {dtypes, is_large, {}, {}});
    }
    if (group->indices.empty()) {
      group->inputs.reserve(group_size(is_large) * arrays.size() + tail.size());
    }
    group->indices.push_back(i);
    std::move(arrays.begin(), arrays.end(), std::back_inserter(group->inputs));
    if (group->indices.size() == group_size(is_large)) {
      run(*group, /*fused=*/true);
    }
  }
  for (auto& group : groups) {
    if (!group.indices.empty()) {
      run(group, /*fused=*/true);
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
