#include "python/trees.h"

#include <algorithm>
#include <numeric>
#include <sstream>
#include <stdexcept>

#include "mlx/ops.h"
#include "mlx/utils.h"

namespace mlx_fused {

namespace {

bool is_dict(nb::handle h) { return PyDict_Check(h.ptr()); }
bool is_list(nb::handle h) { return PyList_Check(h.ptr()); }
bool is_tuple(nb::handle h) { return PyTuple_Check(h.ptr()); }

// A tree that holds itself raises RecursionError.
class Recursion {
 public:
  Recursion() {
    if (Py_EnterRecursiveCall(" in a tree of arrays")) {
      throw nb::python_error();
    }
  }
  ~Recursion() { Py_LeaveRecursiveCall(); }
  Recursion(const Recursion&) = delete;
  Recursion& operator=(const Recursion&) = delete;
};

// What a node has at a key: None for a tree that is not given, null for
// nothing.
nb::object child(nb::handle node, nb::handle key) {
  if (!node || node.is_none()) {
    return nb::borrow(node);
  }
  PyObject* value = PyObject_GetItem(node.ptr(), key.ptr());
  if (value) {
    return nb::steal(value);
  }
  // The last two: of nodes that have no such keys, as arrays and lists.
  if (!PyErr_ExceptionMatches(PyExc_LookupError) &&
      !PyErr_ExceptionMatches(PyExc_TypeError) &&
      !PyErr_ExceptionMatches(PyExc_ValueError)) {
    throw nb::python_error();
  }
  PyErr_Clear();
  return {};
}

bool is_array(nb::handle h) {
  static PyObject* const type = nb::type<mx::array>().inc_ref().ptr();
  return PyObject_TypeCheck(h.ptr(), reinterpret_cast<PyTypeObject*>(type));
}

const mx::array& array_of(nb::handle h) { return *nb::inst_ptr<mx::array>(h); }

// mx.compile puts placeholders in the place of what it captures, and leaves
// them there when the function that it traces raises.
void check_is_there(const mx::array& a) {
  if (a.status() == mx::array::Status::unscheduled && !a.has_primitive() &&
      !a.is_tracer()) {
    throw std::runtime_error(
        "parameters or optimizer state are placeholders of mx.compile: the "
        "function that it compiled, of which they are inputs, has raised while "
        "it was traced, or does not have them as outputs. Restore them, for "
        "example with optim.load, and go on.");
  }
}

using Value = std::variant<mx::array, nb::object>;

Value value_of(nb::handle h) {
  return is_array(h) ? Value(array_of(h)) : Value(nb::borrow(h));
}

nb::object object_of(const Value& value) {
  const auto* a = std::get_if<mx::array>(&value);
  return a ? nb::cast(*a) : std::get<nb::object>(value);
}

// The same, or what stands there now if it is that.
nb::object object_of(const Value& value, nb::handle now) {
  const auto* a = std::get_if<mx::array>(&value);
  const bool is_same =
      a && now && is_array(now) && array_of(now).id() == a->id();
  return is_same ? nb::borrow(now) : object_of(value);
}

// A dict's entry, or null.
nb::handle entry(nb::handle dict, nb::handle key) {
  if (!is_dict(dict)) {
    return {};
  }
  PyObject* value = PyDict_GetItemWithError(dict.ptr(), key.ptr());
  if (!value && PyErr_Occurred()) {
    throw nb::python_error();
  }
  return value;
}

nb::object with_leaves(nb::handle tree, const std::vector<nb::object>& leaves,
                       size_t& next) {
  const Recursion guard;
  if (is_dict(tree)) {
    nb::dict result;
    for (const auto [key, value] : nb::borrow<nb::dict>(tree)) {
      result[key] = with_leaves(value, leaves, next);
    }
    return result;
  }
  if (is_list(tree) || is_tuple(tree)) {
    nb::list children;
    for (const auto value : tree) {
      children.append(with_leaves(value, leaves, next));
    }
    if (PyList_CheckExact(tree.ptr())) {
      return children;
    }
    // A named tuple takes its fields one by one.
    const auto type = tree.type();
    return nb::hasattr(tree, "_fields") ? type(*children) : type(children);
  }
  return leaves.at(next++);
}

}  // namespace

// A place in a tree, by its keys from the innermost to the root's.
struct Leaves::Place {
  const std::string& what;
  const Place* parent = nullptr;
  nb::handle key = {};

  std::string path() const {
    const auto name = std::string(nb::str(key).c_str());
    return parent->parent ? parent->path() + "." + name : name;
  }
  std::string of_leaf() const {
    return "the " + what + (parent ? " of '" + path() + "'" : "");
  }
};

Leaves::Leaves(nb::object gradients, nb::object parameters, nb::object state,
               const std::string& what)
    : tree_(std::move(gradients)), has_state_(!state.is_none()) {
  if (is_dict(state)) {
    for (const auto [key, value] : nb::borrow<nb::dict>(state)) {
      if (is_array(value)) {
        check_is_there(array_of(value));
      }
    }
  }
  collect(tree_, std::move(parameters), std::move(state), {what});
}

void Leaves::collect(nb::handle gradients, nb::object parameters,
                     nb::object state, const Place& place) {
  const Recursion guard;
  const auto descend = [&](nb::handle key, nb::handle gradient) {
    collect(gradient, child(parameters, key), child(state, key),
            {place.what, &place, key});
  };
  if (is_dict(gradients)) {
    for (const auto [key, value] : nb::borrow<nb::dict>(gradients)) {
      descend(key, value);
    }
    return;
  }
  if (is_list(gradients) || is_tuple(gradients)) {
    size_t i = 0;
    for (const auto value : gradients) {
      descend(nb::int_(i++), value);
    }
    return;
  }
  if (!is_array(gradients)) {
    throw nb::type_error((place.of_leaf() + " is of type " +
                          Py_TYPE(gradients.ptr())->tp_name +
                          "; expected an mx.array")
                             .c_str());
  }
  if (!parameters) {
    throw nb::key_error((place.of_leaf() + " has no parameter").c_str());
  }
  if (has_state_ && (!state || !is_dict(state))) {
    throw nb::key_error((place.of_leaf() +
                         " has no state. When a model has changed, call " +
                         "optimizer.init(model.trainable_parameters())")
                            .c_str());
  }
  if (is_array(parameters)) {
    check_is_there(array_of(parameters));
  }
  gradients_.push_back(nb::borrow(gradients));
  parameters_.push_back(std::move(parameters));
  states_.push_back(std::move(state));
}

nb::list Leaves::list_of(const std::vector<nb::object>& objects) {
  nb::list list;
  for (const auto& o : objects) {
    list.append(o);
  }
  return list;
}

nb::object Leaves::dtypes() const {
  std::vector<mx::Dtype> seen;
  nb::list result;
  for (const auto& gradient : gradients_) {
    if (!is_array(gradient)) {
      return nb::none();
    }
    const auto dtype = array_of(gradient).dtype();
    if (std::find(seen.begin(), seen.end(), dtype) == seen.end()) {
      seen.push_back(dtype);
      result.append(nb::cast(dtype));
    }
  }
  return result;
}

bool Leaves::update(Request request,
                    const std::optional<mx::Dtype>& state_dtype,
                    const std::optional<std::vector<size_t>>& indices) {
  std::vector<size_t> chosen(indices ? indices->size() : size());
  if (indices) {
    chosen = *indices;
  } else {
    std::iota(chosen.begin(), chosen.end(), 0);
  }
  const auto& rule = request.rule;
  const bool reads_parameter = rule.slots.front().role == Role::parameter;
  Tensors tensors;
  const auto collect_into = [](Arrays& arrays, nb::handle object) {
    if (object && is_array(object)) {
      arrays.push_back(array_of(object));
      return true;
    }
    return false;
  };
  tensors.gradients.reserve(chosen.size());
  tensors.parameters.reserve(chosen.size());
  for (const size_t i : chosen) {
    if (!collect_into(tensors.gradients, gradients_.at(i)) ||
        (reads_parameter &&
         !collect_into(tensors.parameters, parameters_[i]))) {
      return false;
    }
  }
  std::vector<nb::str> keys;
  for (const auto& name : rule.states) {
    keys.emplace_back(name.c_str());
    auto& state = tensors.states.emplace_back();
    state.reserve(chosen.size());
    for (const size_t i : chosen) {
      if (!collect_into(state, entry(states_[i], keys.back()))) {
        return false;
      }
      auto& array = state.back();
      check_is_there(array);
      // It would widen the parameter, or be widened. Gradients that broadcast
      // make such a state when they are the first step's.
      const int slot = static_cast<int>(tensors.states.size());
      if (reads_parameter && is_array(parameters_[i])) {
        const auto expected =
            rule.shape(slot, array_of(parameters_[i]).shape());
        if (array.shape() != expected &&
            array.shape() !=
                rule.shape(slot, array_of(gradients_[i]).shape())) {
          std::ostringstream message;
          message << "the state " << name << " has shape " << array.shape()
                  << "; expected " << expected;
          throw std::invalid_argument(message.str());
        }
      }
      // There is no half a complex number.
      if (state_dtype && array.dtype() != *state_dtype &&
          array.dtype() != mx::complex64) {
        array = mx::astype(array, *state_dtype);
      }
    }
  }
  request.keep_dtypes = state_dtype.has_value();
  fused_update(tensors, std::move(request));
  changes_.reserve(changes_.size() + chosen.size() * keys.size());
  for (size_t j = 0; j < chosen.size(); ++j) {
    const size_t i = chosen[j];
    if (reads_parameter && rule.slots.front().is_written) {
      parameters_[i] = nb::cast(std::move(tensors.parameters[j]));
    }
    if (rule.slots.back().is_written) {
      gradients_[i] = nb::cast(std::move(tensors.gradients[j]));
    }
    for (size_t k = 0; k < keys.size(); ++k) {
      changes_.push_back({i, keys[k], std::move(tensors.states[k][j])});
    }
  }
  return true;
}

void Leaves::set_gradient(size_t index, nb::object value) {
  gradients_.at(index) = std::move(value);
}

void Leaves::set_parameter(size_t index, nb::object value) {
  parameters_.at(index) = std::move(value);
}

void Leaves::set_state(size_t index, nb::object key, nb::object value) {
  changes_.push_back({index, std::move(key), value_of(value)});
}

nb::object Leaves::commit() {
  size_t next = 0;
  auto result = with_leaves(tree_, parameters_, next);
  for (auto& [index, key, value] : changes_) {
    auto* updated = std::get_if<mx::array>(&value);
    const auto old = updated ? entry(states_[index], key) : nb::handle();
    if (old && is_array(old) && Py_REFCNT(old.ptr()) == 1) {
      *nb::inst_ptr<mx::array>(old) = std::move(*updated);
    } else if (PyObject_SetItem(states_[index].ptr(), key.ptr(),
                                object_of(value).ptr()) < 0) {
      throw nb::python_error();
    }
  }
  return result;
}

nb::object Leaves::replace(const nb::list& leaves) const {
  if (leaves.size() != size()) {
    throw nb::value_error("leaves: expected as many as the tree has");
  }
  std::vector<nb::object> objects;
  for (const auto leaf : leaves) {
    objects.push_back(nb::borrow(leaf));
  }
  size_t next = 0;
  return with_leaves(tree_, objects, next);
}

Snapshot::Snapshot(nb::handle tree, nb::handle like)
    : is_whole_(like.is_none()) {
  if (is_whole_) {
    record(tree);
  } else {
    record(tree, like);
  }
}

void Snapshot::record(nb::handle tree) {
  const Recursion guard;
  const size_t begin = contents_.size();
  if (is_dict(tree)) {
    for (const auto [key, value] : nb::borrow<nb::dict>(tree)) {
      contents_.push_back({nb::borrow(key), value_of(value)});
    }
  } else if (is_list(tree)) {
    for (const auto value : nb::borrow<nb::list>(tree)) {
      contents_.push_back({{}, value_of(value)});
    }
  } else {
    if (is_tuple(tree)) {
      for (const auto value : nb::borrow<nb::tuple>(tree)) {
        record(value);
      }
    }
    return;
  }
  const size_t end = contents_.size();
  nodes_.push_back({nb::borrow(tree), begin, end});
  for (size_t i = begin; i < end; ++i) {
    if (const auto* value = std::get_if<nb::object>(&contents_[i].value)) {
      record(nb::object(*value));
    }
  }
}

void Snapshot::record(nb::handle tree, nb::handle like) {
  const Recursion guard;
  const size_t begin = contents_.size();
  std::vector<std::pair<nb::object, nb::handle>> inner;
  const auto visit = [&](nb::handle key, nb::handle like_child) {
    auto value = child(tree, key);
    if (is_dict(like_child) || is_list(like_child) || is_tuple(like_child)) {
      inner.emplace_back(std::move(value), like_child);
    } else if (value && (is_dict(tree) || is_list(tree))) {
      contents_.push_back({nb::borrow(key), value_of(value)});
    }
  };
  if (is_dict(like)) {
    for (const auto [key, value] : nb::borrow<nb::dict>(like)) {
      visit(key, value);
    }
  } else {
    size_t i = 0;
    for (const auto value : like) {
      visit(nb::int_(i++), value);
    }
  }
  nodes_.push_back({nb::borrow(tree), begin, contents_.size()});
  for (const auto& [value, like_child] : inner) {
    if (value) {
      record(value, like_child);
    }
  }
}

void Snapshot::restore() const {
  for (const auto& [node, begin, end] : nodes_) {
    nb::list before;
    for (size_t i = begin; i < end; ++i) {
      const auto& [key, value] = contents_[i];
      nb::handle now;
      if (is_dict(node)) {
        now = entry(node, key);
      } else {
        const size_t at = is_whole_ ? i - begin : nb::cast<size_t>(key);
        if (at < nb::len(node)) {
          now = PyList_GET_ITEM(node.ptr(), at);
        }
      }
      before.append(object_of(value, now));
    }
    if (is_list(node) && is_whole_) {
      if (PyList_SetSlice(node.ptr(), 0, PY_SSIZE_T_MAX, before.ptr()) < 0) {
        throw nb::python_error();
      }
      continue;
    }
    if (is_whole_) {
      PyDict_Clear(node.ptr());
    }
    for (size_t i = begin; i < end; ++i) {
      const auto& key = contents_[i].key;
      const auto set = is_dict(node) ? PyDict_SetItem : PyObject_SetItem;
      if (set(node.ptr(), key.ptr(), before[i - begin].ptr()) < 0) {
        throw nb::python_error();
      }
    }
  }
}

}  // namespace mlx_fused
