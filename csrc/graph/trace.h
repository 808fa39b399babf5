// From the graph of somebody's apply_single to programs, and what MLX computes
// between them.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "graph/layout.h"
#include "program.h"

namespace mlx_fused {

// An array without values, which a function is called with to record what it
// does. Where MLX is tracing it is a tracer.
mx::array stand_in(const mx::Shape& shape, mx::Dtype dtype);

// For a slot that is written alone: it has no memory of its own.
mx::array unread(const mx::Shape& shape, mx::Dtype dtype);

// What apply_single did with stand-ins.
struct Recording {
  mx::array parameter;
  mx::array gradient;
  std::vector<std::pair<std::string, mx::array>> states;
  mx::array new_parameter;
  std::vector<std::pair<std::string, mx::array>> new_states;
  // Scalars that are not known to the host for good, such as the learning rate.
  Arrays device_scalars;
  // The keys, and "" for the parameter, whose dtype stays, so that the old
  // array's memory can have the new values.
  std::unordered_set<std::string> kept;
  // The states of which codes are without a sign.
  std::unordered_set<std::string> non_negative;
};

// The recording in stages. A stage is a program, that one kernel carries out,
// after MLX has computed what is no function of elements: norms, products,
// sorts.
class Trace {
 public:
  // Throws std::invalid_argument with what cannot be fused.
  explicit Trace(Recording recording);

  struct Stage {
    int number;  // some may have no program
    const RuleTraits* rule;
    Hyperparameters numbers;
    Arrays scalars;                   // nodes of the recording, as these:
    Arrays extras;                    // of the slots "#0", "#1", ...
    std::vector<bool> is_extra_read;  // otherwise it is written alone
    // What each slot holds after the update, where it is written.
    std::vector<std::optional<mx::array>> nodes;
    bool has_gradient = false;       // is the last slot
    bool are_scalars_shared = true;  // by all tensors of this recording
  };
  const std::vector<Stage>& stages() const { return stages_; }

  // Where what apply_single gave is found: nothing where a slot has it or it
  // did not change; otherwise a node.
  const std::optional<mx::array>& parameter_node() const { return parameter_; }
  const std::vector<std::pair<std::string, mx::array>>& state_nodes() const {
    return state_nodes_;
  }
  const Recording& recording() const { return recording_; }

  // A sum of the squares of all elements: no function of elements, but the
  // package has a kernel for it.
  struct Sum {
    mx::array node;
    mx::array of;  // the squared
    int stage;     // after which it can be computed, or -1
  };
  const std::vector<Sum>& sums() const { return sums_; }

  // The states that never are negative if they are not so at first.
  std::vector<std::string> find_non_negative() const;

  bool is_dependent(const mx::array& node) const;
  // Whether something is computed from more than slots.
  bool needs_values() const {
    return stages_.size() > 1 || !left_.empty() || parameter_ ||
           !state_nodes_.empty();
  }
  // Names of the primitives that MLX computes for each tensor, for people.
  const std::vector<std::string>& left_to_mlx() const { return left_; }

 private:
  friend class TraceBuilder;
  Recording recording_;
  std::vector<Stage> stages_;
  std::optional<mx::array> parameter_;
  std::vector<std::pair<std::string, mx::array>> state_nodes_;
  std::vector<std::string> left_;
  std::vector<Sum> sums_;
  std::unordered_set<std::uintptr_t> dependent_;
};

// The values of a recording's nodes for one tensor.
class Values {
 public:
  explicit Values(const Trace& trace) : trace_(trace) {}

  void set(const mx::array& node, mx::array value) {
    known_.insert_or_assign(node.id(), std::move(value));
  }
  bool has(const mx::array& node) const { return known_.contains(node.id()); }
  // Builds the graph of what is not known. Stand-ins have to be.
  mx::array of(const mx::array& node);

 private:
  const Trace& trace_;
  std::unordered_map<std::uintptr_t, mx::array> known_;
};

}  // namespace mlx_fused
