#include "plan.h"

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "check.h"
#include "graph/composed.h"
#include "graph/fused_update.h"
#include "graph/sums_of_squares.h"
#include "metal/backend.h"
#include "mlx/ops.h"

namespace mlx_fused {

namespace {

// Elements with which a group is full, however few its tensors: to update them,
// and so to free their gradients, as soon as they are ready is then worth more
// than sharing a primitive with others. A launch costs more on a GPU than a
// primitive does on the CPU.
constexpr uint64_t full_on_cpu = 1 << 16;
constexpr uint64_t full_on_metal = 1 << 20;

void check_length(const char* argument, size_t given, size_t expected) {
  if (given != expected) {
    std::ostringstream message;
    message << "[fused_update] " << argument << " has " << given
            << " entries; expected " << expected << ".";
    throw std::invalid_argument(message.str());
  }
}

// A scalar of the dtype that kernels read, or one such entry per tensor.
mx::array scalar(const ScalarKind& kind, const std::optional<mx::array>& a,
                 size_t entries, mx::StreamOrDevice s) {
  if (!a) {
    throw std::invalid_argument(std::string("[fused_update] ") + kind.name +
                                " is missing; the rule reads it.");
  }
  if (a->size() != 1 && (a->ndim() != 1 || a->size() != entries)) {
    std::ostringstream message;
    message << "[fused_update] " << kind.name << " has shape " << a->shape()
            << "; expected a scalar";
    if (entries != 1) {
      message << " or (" << entries << ")";
    }
    message << ".";
    throw std::invalid_argument(message.str());
  }
  return a->dtype() == kind.dtype ? *a : mx::astype(*a, kind.dtype, s);
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

// All that the plan has to know of a tensor, in bits, so that a step's plan is
// found by comparing numbers.
struct Signature {
  static constexpr int dtype_bits = 4;
  static constexpr int size_bits = 24;  // more is as good as the largest
  static constexpr uint64_t max_size = (1 << size_bits) - 1;

  // slot(k) is the tensor's array in that slot.
  template <typename F>
  static uint64_t of(F slot, const RuleTraits& rule) {
    const auto& shape = slot(0).shape();
    bool fits = !rule.is_factored() || (rule.means == 2) == (shape.size() > 1);
    uint64_t bits = 0;
    for (size_t k = 0; k < rule.slots.size(); ++k) {
      const auto& a = slot(k);
      const auto& [role, is_written] = rule.slots[k];
      const bool may_broadcast =
          role == Role::gradient && !is_written && !rule.is_factored();
      fits = fits && has_kernels(a.dtype()) &&
             (rule.is_mean(k)
                  ? a.shape() == rule.shape(k, shape)
                  : a.shape() == shape ||
                        (may_broadcast && broadcasts_to(a.shape(), shape)));
      bits = bits << dtype_bits | static_cast<uint64_t>(a.dtype().val());
    }
    return (bits << 1 | uint64_t{fits}) << size_bits |
           std::min<uint64_t>(slot(0).size(), max_size);
  }
  static uint64_t size(uint64_t bits) { return bits & max_size; }
  static bool fits(uint64_t bits) { return bits >> size_bits & 1; }
  // Of a tensor that fits.
  static mx::Dtype dtype(uint64_t bits, size_t slot, size_t slots) {
    const auto val = static_cast<mx::Dtype::Val>(
        bits >> (size_bits + 1 + dtype_bits * (slots - 1 - slot)) & 15);
    return val == mx::float32.val()   ? mx::float32
           : val == mx::float16.val() ? mx::float16
                                      : mx::bfloat16;
  }
};

// The tensors of a step, grouped.
struct Plan {
  struct Group {
    bool is_fused;
    std::vector<mx::Dtype> dtypes;  // of the slots, if fused
    std::vector<size_t> indices;
  };
  std::vector<Group> groups;
};

struct PlanKey {
  const RuleTraits* rule;
  bool keep_dtypes;
  bool may_fuse;
  mx::Device::DeviceType device;
  bool is_metal;
  std::vector<uint64_t> tensors;
  auto operator<=>(const PlanKey&) const = default;
};

std::mutex plans_mutex;
std::map<PlanKey, std::shared_ptr<const Plan>> plans;
// A program has few models; more plans than this are of shapes that change.
constexpr size_t max_plans = 64;

Plan make_plan(const PlanKey& key, mx::Stream stream) {
  const auto& rule = *key.rule;
  const size_t slots = rule.slots.size();
  // Adafactor has several launches a group.
  const auto full = (key.is_metal ? full_on_metal : full_on_cpu)
                    << (rule.is_factored() ? 2 : 0);
  Plan plan;
  // Kept apart until they are full. From the tree's end, as gradients become
  // ready.
  struct Open {
    Plan::Group group;
    uint64_t elements;
  };
  std::vector<Open> open;
  for (size_t i = key.tensors.size(); i-- > 0;) {
    const auto bits = key.tensors[i];
    std::vector<mx::Dtype> given, dtypes;
    for (size_t k = 0; k < slots; ++k) {
      given.push_back(Signature::dtype(bits, k, slots));
    }
    for (size_t k = 0; k < slots; ++k) {
      dtypes.push_back(key.keep_dtypes ? given[k] : promoted(rule, given, k));
    }
    if (!key.may_fuse || !Signature::fits(bits) ||
        (key.is_metal && !is_trusted(rule, dtypes, stream))) {
      plan.groups.push_back({false, {}, {i}});
      continue;
    }
    auto found = std::find_if(open.begin(), open.end(), [&](const Open& o) {
      return o.group.dtypes == dtypes;
    });
    if (found == open.end()) {
      found = open.insert(found, {{true, dtypes, {}}, 0});
    }
    auto& [group, elements] = *found;
    group.indices.push_back(i);
    elements += Signature::size(bits);
    if (elements >= full || group.indices.size() == max_group_size(rule)) {
      plan.groups.push_back(std::move(group));
      open.erase(found);
    }
  }
  for (auto& [group, elements] : open) {
    plan.groups.push_back(std::move(group));
  }
  return plan;
}

std::shared_ptr<const Plan> plan_for(PlanKey key, mx::Stream stream) {
  {
    const std::lock_guard lock(plans_mutex);
    if (const auto found = plans.find(key); found != plans.end()) {
      return found->second;
    }
  }
  // The check of kernels evaluates arrays: without the lock.
  auto plan = std::make_shared<const Plan>(make_plan(key, stream));
  const std::lock_guard lock(plans_mutex);
  if (plans.size() >= max_plans) {
    plans.clear();
  }
  plans.emplace(std::move(key), plan);
  return plan;
}

}  // namespace

void fused_update(Tensors& tensors, Request request, mx::StreamOrDevice s) {
  const auto& rule = request.rule;
  const auto& scalars = request.scalars;
  const size_t count = tensors.gradients.size();
  const bool reads_parameter = rule.slots.front().role == Role::parameter;
  check_length("parameters", tensors.parameters.size(),
               reads_parameter ? count : 0);
  check_length("states", tensors.states.size(), rule.states.size());
  for (const auto& state : tensors.states) {
    check_length("a state", state.size(), count);
  }
  if (request.set_of.empty()) {
    request.set_of.resize(count, 0);
  }
  check_length("the list of hyper-parameter sets", request.set_of.size(),
               count);
  for (const auto& set : request.sets) {
    check_length("hyperparameters", set.size(), rule.hyperparameters.size());
  }
  for (const auto set : request.set_of) {
    if (set >= request.sets.size()) {
      throw std::invalid_argument(
          "[fused_update] a tensor has hyper-parameter set " +
          std::to_string(static_cast<size_t>(set)) + "; there are " +
          std::to_string(request.sets.size()) + ".");
    }
  }

  // Plain operations take a learning rate of any shape, and hyper-parameters
  // that are arrays.
  bool may_fuse = true;
  for (const auto& set : request.sets) {
    for (const auto& value : set) {
      may_fuse = may_fuse && std::holds_alternative<double>(value);
    }
  }
  // Scalars as kernels take them, and as plain operations do.
  std::array<bool, scalar_count> has{};
  Arrays tail, plain_tail;
  for (int kind = 0; kind < scalar_count; ++kind) {
    const auto& value = scalars.values[kind];
    has[kind] = kind == learning_rate ? rule.reads_learning_rate
                : kind == step        ? rule.reads_step
                                      : value.has_value();
    if (!has[kind]) {
      continue;
    }
    const bool is_broadcast = kind == learning_rate && value &&
                              value->ndim() > 0 && !scalars.per_tensor;
    may_fuse = may_fuse && !is_broadcast;
    tail.push_back(is_broadcast ? *value
                                : scalar(scalar_kinds[kind], value,
                                         scalars.per_tensor ? count : 1, s));
    plain_tail.push_back(kind == learning_rate ? *value : tail.back());
  }

  const auto slot = [&](size_t i, size_t k) -> mx::array& {
    switch (rule.slots[k].role) {
      case Role::parameter:
        return tensors.parameters[i];
      case Role::state:
        return tensors.states[k - reads_parameter][i];
      default:
        return tensors.gradients[i];
    }
  };
  const auto stream = mx::to_stream(s);
  PlanKey key{&rule,
              request.keep_dtypes,
              may_fuse,
              stream.device.type,
              runs_metal(stream),
              {}};
  key.tensors.reserve(count);
  // MLX computes what is deepest in the graph first, and would compute all
  // gradients before the first update. So each group waits for the one before.
  bool is_chained = false;
  for (size_t i = 0; i < count; ++i) {
    const auto slot_of = [&](size_t k) -> const mx::array& {
      return slot(i, k);
    };
    key.tensors.push_back(Signature::of(slot_of, rule));
    is_chained = is_chained || !tensors.gradients[i].is_available();
  }
  const auto plan = plan_for(std::move(key), stream);

  const auto sets = std::make_shared<const Sets>(std::move(request.sets));
  const auto written = rule.written();
  Arrays previous = request.after;
  for (const auto& group : plan->groups) {
    GroupUpdate update{{&rule, static_cast<int>(group.indices.size()), has},
                       sets,
                       {},
                       scalars.per_tensor};
    Arrays inputs;
    inputs.reserve(group.indices.size() * rule.slots.size() + tail.size());
    for (const size_t i : group.indices) {
      update.entries.push_back({request.set_of[i], static_cast<uint32_t>(i)});
      for (size_t k = 0; k < rule.slots.size(); ++k) {
        inputs.push_back(slot(i, k));
        auto& input = inputs.back();
        if (!group.is_fused) {
          continue;
        }
        const auto& shape = slot(i, 0).shape();
        if (!rule.is_mean(k) && input.shape() != shape) {
          input = mx::broadcast_to(input, shape, s);
        }
        if (input.dtype() != group.dtypes[k]) {
          input = mx::astype(input, group.dtypes[k], s);
        }
      }
    }
    const auto& scalar_inputs = group.is_fused ? tail : plain_tail;
    inputs.insert(inputs.end(), scalar_inputs.begin(), scalar_inputs.end());
    auto outputs =
        group.is_fused
            ? FusedUpdate::make_outputs(
                  std::make_shared<FusedUpdate>(stream, std::move(update)),
                  std::move(inputs), previous)
            : composed_update(std::move(update), request.keep_dtypes,
                              stream)(inputs);
    if (group.is_fused && is_chained) {
      previous = {outputs[0]};
    }
    auto output = outputs.begin();
    for (const size_t i : group.indices) {
      for (const int k : written) {
        slot(i, k) = std::move(*output++);
      }
    }
  }
}

Norm sums_of_squares(const Arrays& arrays, const mx::array& max_norm,
                     mx::StreamOrDevice s) {
  const auto stream = mx::to_stream(s);
  bool trusted = !arrays.empty();
  for (const auto& a : arrays) {
    if (!has_kernels(a.dtype())) {
      std::ostringstream message;
      message << "[sums_of_squares] an array has dtype " << a.dtype()
              << "; expected float32, float16 or bfloat16.";
      throw std::invalid_argument(message.str());
    }
    trusted =
        trusted && (!runs_metal(stream) || is_trusted_sum(a.dtype(), stream));
  }
  const auto limit = scalar({"max_norm", mx::float32, "float"}, max_norm, 1, s);
  auto inputs = arrays;
  inputs.push_back(limit);
  const auto outputs = trusted
                           ? SumsOfSquares::make_outputs(arrays, limit, stream)
                           : composed_sums(stream)(inputs);
  return {outputs[0], outputs[1], outputs[2]};
}

Arrays scale(Arrays arrays, const mx::array& factor, mx::StreamOrDevice s) {
  Tensors tensors;
  tensors.gradients = std::move(arrays);
  Request request{rule_named("Scale"), {{}}};
  request.scalars.values[gradient_scale] = factor;
  fused_update(tensors, std::move(request), s);
  return std::move(tensors.gradients);
}

void reset_plans() {
  const std::lock_guard lock(plans_mutex);
  plans.clear();
}

}  // namespace mlx_fused
