#include "graph/layout.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <utility>

namespace mlx_fused {

mx::Dtype promoted(const RuleTraits& rule, const std::vector<mx::Dtype>& slots,
                   int slot) {
  const auto role = rule.slots[slot].role;
  if (!rule.slots[slot].is_written || rule.slots[slot].is_average) {
    return slots[slot];
  }
  // A state takes in the gradient; everything else, the states too. Adafactor's
  // take in the parameter's scale.
  if (role == Role::state && !rule.is_factored() &&
      !rule.slots.back().is_written) {
    return mx::promote_types(slots[slot], slots.back());
  }
  auto widest = slots[slot];
  for (size_t k = 0; k < slots.size(); ++k) {
    if (!rule.slots[k].is_average) {
      widest = mx::promote_types(widest, slots[k]);
    }
  }
  return widest;
}

namespace {

const char* const storage_names[] = {"plain", "int8",  "int4",
                                     "24bit", "32bit", "stochastic"};

}  // namespace

const char* name_of(Storage storage) {
  return storage_names[static_cast<size_t>(storage)];
}

Storage storage_named(const std::string& name) {
  const auto found =
      std::find(std::begin(storage_names), std::end(storage_names), name);
  if (found == std::end(storage_names)) {
    throw std::invalid_argument("\"" + name + "\" is no way to hold a slot.");
  }
  return static_cast<Storage>(found - std::begin(storage_names));
}

GroupLayout::GroupLayout(const RuleTraits& rule, int tensors,
                         std::array<bool, scalar_count> has, Formats formats)
    : rule(&rule), tensors(tensors), has(has), formats(std::move(formats)) {
  for (int slot = 0; slot < slots(); ++slot) {
    for (const bool is_companion : {false, true}) {
      if (is_companion && !this->formats[slot].has_companion()) {
        continue;
      }
      if (rule.slots[slot].is_written) {
        written.push_back(static_cast<int>(parts.size()));
      }
      parts.push_back({slot, is_companion, rule.slots[slot].is_written,
                       rule.slots[slot].is_read});
    }
  }
}

bool can_hold(const RuleTraits& rule, const Formats& formats) {
  const Format* first = nullptr;
  for (const auto& format : formats) {
    if (format.has_codes()) {
      first = first ? first : &format;
      if (format.block() != first->block()) {
        return false;
      }
    }
  }
  size_t buffers = 8;  // of the launch
  for (size_t slot = 0; slot < formats.size(); ++slot) {
    const bool is_separate =
        rule.slots[slot].is_written && rule.slots[slot].is_read;
    buffers += (is_separate ? 2 : 1) * (formats[slot].has_companion() ? 2 : 1);
  }
  return buffers <= 31;
}

size_t max_group_size(const RuleTraits& rule, const Formats& formats) {
  constexpr size_t most = 6;
  if (rule.is_factored()) {
    return most;  // its launches have groups of their own
  }
  size_t buffers = 0, shared = 7 + 2 * rule.reads_coefficient;
  for (size_t slot = 0; slot < rule.slots.size(); ++slot) {
    const auto& format = formats[slot];
    const bool is_separate =
        rule.slots[slot].role != Role::state && rule.slots[slot].is_written;
    buffers += (is_separate ? 2 : 1) + format.has_companion();
    shared += format.storage == Storage::stochastic;  // the seed
  }
  return std::clamp<size_t>((31 - shared) / buffers, 1, most);
}

}  // namespace mlx_fused
