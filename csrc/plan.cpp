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
#include "rules.h"

namespace mlx_fused {

namespace {

// Elements with which a group is full, however few its tensors: to update them,
// and so to free their gradients, as soon as they are ready is then worth more
// than sharing a primitive with others. A launch costs more on a GPU than a
// primitive does on the CPU.
constexpr uint64_t full_on_cpu = 1 << 16;
constexpr uint64_t full_on_metal = 1 << 22;

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

// The rows of a program's scalars that some tensors have, as one array.
mx::array stacked(const std::vector<Arrays>& rows,
                  const std::vector<uint32_t>& chosen, mx::StreamOrDevice s) {
  Arrays entries;
  for (const auto row : chosen) {
    for (const auto& a : rows[row]) {
      entries.push_back(
          mx::reshape(mx::astype(a, mx::float32, s), mx::Shape{1}, s));
    }
  }
  return mx::reshape(mx::concatenate(entries, 0, s),
                     {static_cast<int>(chosen.size()), -1}, s);
}

// All that the plan has to know of a tensor, in bits, so that a step's plan is
// found by comparing numbers.
struct Signature {
  uint64_t slots;  // and in the lowest bit whether it fits
  uint64_t size;
  auto operator<=>(const Signature&) const = default;

  static constexpr int storage_bits = 3;
  static constexpr int slot_bits = storage_bits + 2;  // and a kernel's dtype
  static constexpr uint64_t max_size = 1 << 24;       // more is as good

  static_assert(max_slots * slot_bits + 1 <= 64);

  // slot(k) is the tensor's array in that slot, storage(k) how it is held.
  template <typename F, typename G>
  static Signature of(F slot, G storage, const RuleTraits& rule) {
    const auto& shape = slot(0).shape();
    bool fits = !rule.is_factored() || (rule.means == 2) == (shape.size() > 1);
    uint64_t bits = 0;
    for (size_t k = 0; k < rule.slots.size(); ++k) {
      const auto& a = slot(k);
      const Format held{storage(k)};
      const bool may_broadcast = rule.slots[k].role == Role::gradient &&
                                 !rule.slots[k].is_written &&
                                 !rule.is_factored();
      // The shapes of codes are checked where they are taken.
      fits = fits && (!rule.is_factored() || held.storage == Storage::plain) &&
             (held.has_codes() || has_kernels(a.dtype())) &&
             (held.has_codes() ? true
              : rule.is_mean(k)
                  ? a.shape() == rule.shape(k, shape)
                  : a.shape() == shape ||
                        (may_broadcast && broadcasts_to(a.shape(), shape)));
      bits = bits << slot_bits | static_cast<uint64_t>(held.storage) << 2 |
             (a.dtype() == mx::float16    ? 1
              : a.dtype() == mx::bfloat16 ? 2
                                          : 0);
    }
    return {bits << 1 | uint64_t{fits},
            std::min<uint64_t>(slot(0).size(), max_size)};
  }
  bool fits() const { return slots & 1; }
  Format format(size_t slot, const RuleTraits& rule) const {
    const auto of_slot =
        slots >> (1 + slot_bits * (rule.slots.size() - 1 - slot));
    const auto dtype = of_slot & 3;
    return {static_cast<Storage>(of_slot >> 2 & 7),
            dtype == 1   ? mx::float16
            : dtype == 2 ? mx::bfloat16
                         : mx::float32,
            rule.slots[slot].is_never_negative};
  }
};

// The tensors of a step, grouped.
struct Plan {
  struct Group {
    bool is_fused;
    Formats formats;
    std::vector<size_t> indices;
    std::shared_ptr<const GroupLayout> layout = nullptr;
  };
  std::vector<Group> groups;
};

struct PlanKey {
  const RuleTraits* rule;
  bool keep_dtypes;
  bool may_fuse;
  mx::Device::DeviceType device;
  bool is_metal;
  std::array<bool, scalar_count> has;  // of the request
  std::vector<Signature> tensors;
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
    const auto& tensor = key.tensors[i];
    std::vector<mx::Dtype> given;
    Formats formats;
    bool is_plain = true;
    for (size_t k = 0; k < slots; ++k) {
      formats.push_back(tensor.format(k, rule));
      given.push_back(formats.back().dtype);
      is_plain = is_plain && formats.back().storage == Storage::plain;
    }
    const bool widens = is_plain && !key.keep_dtypes;
    for (size_t k = 0; k < slots && widens; ++k) {
      formats[k].dtype = promoted(rule, given, k);
    }
    if (!key.may_fuse || !tensor.fits() ||
        (key.is_metal &&
         !(can_hold(rule, formats) && is_trusted(rule, formats, stream)))) {
      plan.groups.push_back({false, std::move(formats), {i}});
      continue;
    }
    auto found = std::find_if(open.begin(), open.end(), [&](const Open& o) {
      return o.group.formats == formats;
    });
    if (found == open.end()) {
      found = open.insert(found, {{true, formats, {}}, 0});
    }
    auto& [group, elements] = *found;
    group.indices.push_back(i);
    elements += tensor.size;
    if (elements >= full ||
        group.indices.size() == max_group_size(rule, group.formats)) {
      plan.groups.push_back(std::move(group));
      open.erase(found);
    }
  }
  for (auto& [group, elements] : open) {
    plan.groups.push_back(std::move(group));
  }
  for (auto& group : plan.groups) {
    auto has = key.has;
    has[seed] = group.formats[0].storage == Storage::stochastic;
    // Random bits depend on the step.
    has[step] = has[step] || has[seed];
    group.layout = std::make_shared<const GroupLayout>(
        rule, static_cast<int>(group.indices.size()), has, group.formats);
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
  const size_t slots = rule.slots.size();
  const size_t count = tensors.slots.back().size();
  for (const auto& slot : tensors.slots) {
    check_length("a slot", slot.size(), count);
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
  std::array<std::optional<mx::array>, scalar_count> values, plain_values;
  for (int kind = 0; kind < scalar_count; ++kind) {
    const auto& value = scalars.values[kind];
    has[kind] = kind == learning_rate ? rule.reads_learning_rate
                : kind == step        ? rule.reads_step
                : kind == coefficient ? rule.reads_coefficient
                                      : value.has_value();
    if (!has[kind] && !(kind == step && scalars.values[seed])) {
      continue;
    }
    if (kind == learning_rate && rule.program) {
      continue;  // its scalars are stacked for each group
    }
    const bool is_broadcast = kind == learning_rate && value &&
                              value->ndim() > 0 && !scalars.per_tensor;
    may_fuse = may_fuse && !is_broadcast;
    values[kind] = is_broadcast ? *value
                                : scalar(scalar_kinds[kind], value,
                                         scalars.per_tensor ? count : 1, s);
    plain_values[kind] = kind == learning_rate ? *value : *values[kind];
  }

  const auto storage = [&](size_t i, size_t k) {
    return tensors.storage.empty() ? Storage::plain
                                   : tensors.storage[i * slots + k];
  };
  const auto stream = mx::to_stream(s);
  PlanKey key{&rule,
              request.keep_dtypes,
              may_fuse,
              stream.device.type,
              runs_metal(stream),
              has,
              {}};
  key.tensors.reserve(count);
  // MLX computes what is deepest in the graph first, and would compute all
  // gradients before the first update. So each group waits for the one before.
  bool is_chained = false;
  for (size_t i = 0; i < count; ++i) {
    key.tensors.push_back(Signature::of(
        [&](size_t k) -> const mx::array& { return tensors.slots[k][i]; },
        [&](size_t k) { return storage(i, k); }, rule));
    is_chained = is_chained || !tensors.slots.back()[i].is_available();
  }
  const auto plan = plan_for(std::move(key), stream);

  const auto sets = std::make_shared<const Sets>(std::move(request.sets));
  Arrays previous = request.after;
  std::map<std::vector<uint32_t>, mx::array> stacks;
  for (const auto& group : plan->groups) {
    const auto& layout = *group.layout;
    GroupUpdate update{group.layout, sets, {}, scalars.per_tensor};
    std::vector<uint32_t> chosen;  // rows of a program's scalars
    const auto array_of = [&](size_t i, const Part& part) -> mx::array& {
      auto& from = part.is_companion ? tensors.companions : tensors.slots;
      return from[part.slot][i];
    };
    Arrays inputs;
    inputs.reserve(group.indices.size() * layout.parts.size() + scalar_count);
    for (const size_t i : group.indices) {
      auto place = static_cast<uint32_t>(i);
      const auto number =
          request.numbers.empty() ? Numbers{place} : request.numbers[i];
      if (!request.rows.empty()) {
        const auto row = request.row_of[i];
        const auto found = std::find(chosen.begin(), chosen.end(), row);
        place = static_cast<uint32_t>(found - chosen.begin());
        if (found == chosen.end()) {
          chosen.push_back(row);
        }
      }
      update.entries.push_back({request.set_of[i], place, number});
      for (const auto& part : layout.parts) {
        inputs.push_back(array_of(i, part));
        auto& input = inputs.back();
        const auto& format = layout.format(part);
        if (!group.is_fused || part.is_companion || format.has_codes()) {
          continue;
        }
        const auto& shape = tensors.slots[0][i].shape();
        if (!rule.is_mean(part.slot) && input.shape() != shape) {
          input = mx::broadcast_to(input, shape, s);
        }
        if (input.dtype() != format.dtype) {
          input = mx::astype(input, format.dtype, s);
        }
      }
    }
    for (int kind = 0; kind < scalar_count; ++kind) {
      if (layout.has[kind] && kind == learning_rate && rule.program) {
        auto found = stacks.find(chosen);
        if (found == stacks.end()) {
          found =
              stacks.emplace(chosen, stacked(request.rows, chosen, s)).first;
        }
        inputs.push_back(found->second);
      } else if (layout.has[kind]) {
        inputs.push_back(*(group.is_fused ? values[kind] : plain_values[kind]));
      }
    }
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
      for (const int part : layout.written) {
        array_of(i, layout.parts[part]) = std::move(*output++);
      }
    }
  }
}

Norm sums_of_squares(const Arrays& arrays, const mx::array& max_norm,
                     bool counts, mx::StreamOrDevice s) {
  const auto stream = mx::to_stream(s);
  bool trusted = !arrays.empty();
  for (const auto& a : arrays) {
    if (!has_kernels(a.dtype())) {
      std::ostringstream message;
      message << "[sums_of_squares] an array has dtype " << a.dtype()
              << "; expected float32, float16 or bfloat16.";
      throw std::invalid_argument(message.str());
    }
    trusted = trusted && (!runs_metal(stream) ||
                          is_trusted_sum(a.dtype(), counts, stream));
  }
  const auto limit = scalar({"max_norm", mx::float32, "float"}, max_norm, 1, s);
  auto inputs = arrays;
  inputs.push_back(limit);
  const auto outputs =
      trusted ? SumsOfSquares::make_outputs(arrays, limit, counts, stream)
              : composed_sums(counts, stream)(inputs);
  return {outputs[0], outputs[1], outputs[2], outputs[3]};
}

Arrays scale(Arrays arrays, const mx::array& factor, mx::StreamOrDevice s) {
  Request request{rule_named("Scale"), {{}}};
  Tensors tensors(request.rule);
  tensors.slots[0] = std::move(arrays);
  request.scalars.values[gradient_scale] = factor;
  fused_update(tensors, std::move(request), s);
  return std::move(tensors.slots[0]);
}

void reset_plans() {
  const std::lock_guard lock(plans_mutex);
  plans.clear();
}

}  // namespace mlx_fused
