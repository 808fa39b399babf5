// Python trees of arrays: dicts, lists and tuples are nodes, as in
// mlx.utils.tree_map, and everything else is a leaf.
#pragma once

#include <nanobind/nanobind.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "graph/trace.h"
#include "mlx/array.h"
#include "plan.h"

// The extension's name. The simulated one may be loaded beside it, and nanobind
// tells types apart by their names.
#ifndef MLX_FUSED_MODULE
#define MLX_FUSED_MODULE _ext
#endif

namespace mlx_fused {

namespace nb = nanobind;
namespace mx = mlx::core;

inline namespace MLX_FUSED_MODULE {

// A trace under this extension's name.
struct Recorded : Trace {
  using Trace::Trace;
};

// The leaves of a step's trees, collected in one walk, and what the step makes
// of them. Several updates may follow one another on the same leaves.
class Leaves {
 public:
  // Parameters and state are trees of the gradients' structure or supersets of
  // it; either can be None. Where the gradients have a leaf, which must be an
  // array, the state has a dict. Raises KeyError with the leaf's path for what
  // they lack, TypeError for a leaf that is no array, and RuntimeError for
  // parameters and state that a failed trace has left behind. `what` is what
  // the errors call a leaf of the first tree.
  Leaves(nb::object gradients, nb::object parameters, nb::object state,
         const std::string& what);

  size_t size() const { return gradients_.size(); }
  nb::object tree() const { return tree_; }
  nb::list gradients() const { return list_of(gradients_); }
  nb::list parameters() const { return list_of(parameters_); }
  nb::list states() const { return list_of(states_); }

  // The distinct dtypes of the gradients, or None if something is no array.
  nb::object dtypes() const;

  // Updates the leaves of these indices, or all: replaces what the rule writes.
  // States are the entries of the leaves' dicts that have the rule's names; in
  // state_dtype, if given. False, and nothing is done, if something is no
  // array.
  bool update(Request request, const std::optional<mx::Dtype>& state_dtype,
              const std::optional<std::vector<size_t>>& indices) {
    return update(std::move(request), state_dtype, indices, nullptr);
  }

  // Updates the leaves of these indices by what was recorded: trace_of is of
  // each. The numbers, if given, are of all leaves.
  void run(const std::vector<std::shared_ptr<Recorded>>& traces,
           const std::vector<size_t>& indices,
           const std::vector<uint32_t>& trace_of, const Scalars& scalars,
           const std::vector<Numbers>& numbers,
           const std::optional<mx::Dtype>& state_dtype, const Arrays& after);

  // What other ways of computing it made of a leaf.
  void set_gradient(size_t index, nb::object value);
  void set_parameter(size_t index, nb::object value);
  void set_state(size_t index, nb::object key, nb::object value);

  // Writes all changes into the states' dicts: into the very array objects that
  // nobody but the dict refers to, as for `a += b`. Returns the updated
  // parameters in a tree of the gradients' structure.
  nb::object commit();

  // The gradients' tree with these leaves in place of its own.
  nb::object replace(const nb::list& leaves) const;

  // The decay of an average of the weights, that the rules which write the
  // parameters keep in the state weight_average.
  std::optional<double> ema;
  // Whether parameters and states keep their dtypes beside wider gradients.
  bool keep_dtypes = false;

 private:
  struct Place;
  // A program's arrays that are no entries of states.
  struct Extras {
    std::vector<Arrays> given;  // of "#0", "#1", ... the leaves'
    bool has_gradient;          // otherwise the last slot is the last of them
    std::vector<Arrays> slots = {};  // after the update
  };
  bool update(Request request, const std::optional<mx::Dtype>& state_dtype,
              const std::optional<std::vector<size_t>>& indices,
              Extras* extras);
  void run_some(const std::vector<std::shared_ptr<Recorded>>& traces,
                const std::vector<size_t>& members,
                const std::vector<size_t>& indices,
                const std::vector<uint32_t>& trace_of, const Scalars& scalars,
                const std::vector<Numbers>& numbers,
                const std::optional<mx::Dtype>& state_dtype, Arrays& previous);
  // What MLX's graph has of a leaf: its arrays without codes and errors.
  void set_leaf(Values& values, const Trace& trace, size_t index,
                const std::optional<mx::array>& scale) const;
  void collect(nb::handle gradients, nb::object parameters, nb::object state,
               const Place& place);
  static nb::list list_of(const std::vector<nb::object>& objects);

  nb::object tree_;
  bool has_state_;
  std::vector<nb::object> gradients_, parameters_, states_;
  struct Change {
    size_t index;
    nb::object key;
    std::variant<mx::array, nb::object> value;
  };
  std::vector<Change> changes_;  // of the states
};

// What a tree's dicts and lists hold now, to be given back to the same objects.
// Arrays are kept as what they are now, not as the objects, which may change.
class Snapshot {
 public:
  // Of all that the tree's containers hold or, with `like`, of those of its
  // leaves alone that `like`, a tree of the same structure or less, has.
  explicit Snapshot(nb::handle tree, nb::handle like = nb::none());
  // Undoes every change since.
  void restore() const;

 private:
  void record(nb::handle tree);
  void record(nb::handle tree, nb::handle like);

  struct Node {
    nb::object node;
    size_t begin, end;
  };
  struct Item {
    nb::object key;  // in a dict or, with `like`, in a list
    std::variant<mx::array, nb::object> value;
  };
  bool is_whole_;
  std::vector<Node> nodes_;
  std::vector<Item> contents_;
};

}  // namespace MLX_FUSED_MODULE

}  // namespace mlx_fused
