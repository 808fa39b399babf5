// A group: tensors that share a primitive, and on Metal a launch.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "mlx/array.h"
#include "rule_traits.h"

namespace mlx_fused {

namespace mx = mlx::core;

using Arrays = std::vector<mx::array>;

// True for the dtypes that kernels load and store.
inline bool has_kernels(mx::Dtype dtype) {
  return dtype == mx::float32 || dtype == mx::float16 || dtype == mx::bfloat16;
}

// How a slot's values are held.
enum class Storage : uint8_t {
  plain,       // one array of its dtype
  codes8,      // a state: codes, and the scales of blocks (metal/formats.h)
  codes4,      // the same, two codes a byte
  split24,     // a parameter: a weight, and an error of 8 bits
  split32,     // the same, of 16 bits
  stochastic,  // a parameter: one array, rounded at random
};

// "plain", and as the options of optimizers have it.
const char* name_of(Storage storage);
// Throws std::invalid_argument for an unknown name.
Storage storage_named(const std::string& name);

// What kernels have to know of a slot.
struct Format {
  Storage storage = Storage::plain;
  mx::Dtype dtype = mx::float32;  // of values or weights
  bool is_never_negative = false;

  bool has_codes() const {
    return storage == Storage::codes8 || storage == Storage::codes4;
  }
  bool is_split() const {
    return storage == Storage::split24 || storage == Storage::split32;
  }
  // Whether a second array belongs to it: scales, or a weight's error.
  bool has_companion() const { return has_codes() || is_split(); }
  // Elements that share a scale.
  int block() const { return storage == Storage::codes8 ? 64 : 32; }
  bool operator==(const Format& other) const {
    return storage == other.storage && dtype == other.dtype;
  }
};
using Formats = std::vector<Format>;  // by slots

// The dtype of a slot after an update, for tensors of these dtypes, by the
// arithmetic of mlx.optimizers: a wider gradient widens what it is added to.
mx::Dtype promoted(const RuleTraits& rule, const std::vector<mx::Dtype>& slots,
                   int slot);

// Tensors that a primitive and a Metal launch serve at most. Metal has 31
// buffers; the launch's own arguments take seven or more, and a slot takes one,
// or two where old and new value may lie apart (metal/fused_update.metal). And
// the cost of MLX's lists of siblings is quadratic in the outputs.
size_t max_group_size(const RuleTraits& rule, const Formats& formats);

// Whether a Metal kernel can hold all that is in codes, in blocks of one size,
// and has buffers for all arrays, old and new.
bool can_hold(const RuleTraits& rule, const Formats& formats);

// What a step has beside its tensors: arrays, so that they can change under
// mx.compile. Each is a scalar, or has one entry per tensor.
enum Scalar {
  learning_rate,
  step,
  gradient_scale,
  skip,
  coefficient,
  seed,
  scalar_count
};

struct ScalarKind {
  const char* name;
  mx::Dtype dtype;  // as kernels read it
  const char* type;
};
inline const ScalarKind scalar_kinds[scalar_count] = {
    {"learning_rate", mx::float32, "float"},
    {"step", mx::uint64, "uint64_t"},
    {"gradient_scale", mx::float32, "float"},
    {"skip", mx::bool_, "bool"},            // nothing changes
    {"coefficient", mx::float32, "float"},  // a rule's own number
    {"seed", mx::uint32, "uint32_t"},       // of stochastic rounding
};

// An array of a tensor.
struct Part {
  int slot;
  bool is_companion;
  bool is_written;
  bool is_read = true;  // otherwise there is no input but its shape and dtype
};

// How the arrays of a group are ordered. Inputs: for each tensor its parts, by
// slots, a slot's companion behind it; then the scalars that there are.
// Outputs: for each tensor the parts that its rule writes.
struct GroupLayout {
  const RuleTraits* rule;
  int tensors;
  std::array<bool, scalar_count> has;
  Formats formats;
  std::vector<Part> parts = {};
  std::vector<int> written = {};  // parts

  GroupLayout(const RuleTraits& rule, int tensors,
              std::array<bool, scalar_count> has, Formats formats);

  int slots() const { return static_cast<int>(rule->slots.size()); }
  int input(int tensor, int part) const {
    return tensor * static_cast<int>(parts.size()) + part;
  }
  int gradient(int tensor) const { return input(tensor + 1, 0) - 1; }
  // -1 for a scalar that is not there.
  int input(Scalar scalar) const {
    return has[scalar] ? input(tensors, 0) +
                             std::count(has.begin(), has.begin() + scalar, true)
                       : -1;
  }
  const Format& format(const Part& part) const { return formats[part.slot]; }
  bool has_codes() const {
    return std::any_of(formats.begin(), formats.end(),
                       [](const Format& format) { return format.has_codes(); });
  }
  bool is_plain() const { return parts.size() == formats.size() && !has[seed]; }
};

// What random bits depend on: a tensor's number among the step's leaves, and of
// a piece of a tensor its first element.
struct Numbers {
  uint32_t tensor = 0;
  uint64_t first = 0;
};

// A tensor's own scalars.
struct Entry {
  uint32_t hyperparameters;  // which of the step's sets
  uint32_t scalar;           // its place where a scalar has several entries
  Numbers numbers;
};

using Sets = std::vector<Hyperparameters>;

// Everything of a group's update but its arrays.
struct GroupUpdate {
  std::shared_ptr<const GroupLayout> layout;
  std::shared_ptr<const Sets> sets;
  std::vector<Entry> entries;  // one per tensor
  bool per_tensor = false;     // whether scalars may have several entries
};

}  // namespace mlx_fused
