#include "python/trees.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "graph/formats.h"
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

namespace {

bool is_extra(const std::string& state) { return state[0] == '#'; }

}  // namespace

bool Leaves::update(Request request,
                    const std::optional<mx::Dtype>& state_dtype,
                    const std::optional<std::vector<size_t>>& indices,
                    Extras* extras) {
  std::vector<size_t> chosen(indices ? indices->size() : size());
  if (indices) {
    chosen = *indices;
  } else {
    std::iota(chosen.begin(), chosen.end(), 0);
  }
  const auto& rule = request.rule;
  const bool reads_parameter = rule.slots.front().role == Role::parameter;
  const size_t slots = rule.slots.size();
  Tensors tensors(rule);
  const auto collect_into = [](Arrays& arrays, nb::handle object) {
    if (object && is_array(object)) {
      arrays.push_back(array_of(object));
      return true;
    }
    return false;
  };
  for (auto& slot : tensors.slots) {
    slot.reserve(chosen.size());
  }
  // A slot of the j-th chosen leaf is held so, with this companion.
  const auto hold = [&](size_t j, size_t slot, Storage storage,
                        nb::handle companion) {
    tensors.storage.resize(chosen.size() * slots);
    tensors.storage[j * slots + slot] = storage;
    auto& companions = tensors.companions[slot];
    if (companion && is_array(companion)) {
      companions.resize(j, tensors.slots.back()[0]);
      companions.push_back(array_of(companion));
    }
  };
  auto& gradients = tensors.slots.back();
  for (const size_t i : chosen) {
    if (!collect_into(gradients, gradients_.at(i))) {
      return false;
    }
  }
  if (reads_parameter) {
    const nb::str error("error");
    for (size_t j = 0; j < chosen.size(); ++j) {
      const size_t i = chosen[j];
      if (!collect_into(tensors.slots[0], parameters_[i])) {
        return false;
      }
      const auto& parameter = tensors.slots[0].back();
      const bool is_half =
          parameter.dtype() == mx::float16 || parameter.dtype() == mx::bfloat16;
      if (const auto rest = entry(states_[i], error); rest && is_array(rest)) {
        const auto& a = array_of(rest);
        // Others are a user's own.
        if (is_half && (a.dtype() == mx::int8 || a.dtype() == mx::int16)) {
          if (a.shape() != parameter.shape()) {
            std::ostringstream message;
            message << "the state error has shape " << a.shape()
                    << "; expected " << parameter.shape();
            throw std::invalid_argument(message.str());
          }
          hold(j, 0,
               a.dtype() == mx::int8 ? Storage::split24 : Storage::split32,
               rest);
        }
      } else if (is_half && request.scalars.values[seed] &&
                 rule.slots[0].is_written) {
        hold(j, 0, Storage::stochastic, {});
      }
    }
  }
  // The keys under which the parts of each state stand.
  std::vector<nb::str> keys, codes8, codes4, scales;
  for (size_t k = 0; k < rule.states.size(); ++k) {
    const auto& name = rule.states[k];
    keys.emplace_back(name.c_str());
    codes8.emplace_back((name + "_int8").c_str());
    codes4.emplace_back((name + "_int4").c_str());
    scales.emplace_back((name + "_scales").c_str());
    const size_t slot = k + reads_parameter;
    auto& state = tensors.slots[slot];
    if (extras && is_extra(name)) {
      state = extras->given[number_of_extra(name)];
      continue;
    }
    for (size_t j = 0; j < chosen.size(); ++j) {
      const size_t i = chosen[j];
      const auto shapes_fit = [&](const mx::Shape& found) {
        if (!reads_parameter || !is_array(parameters_[i])) {
          return true;
        }
        // Gradients that broadcast make a state of their shape when they are
        // the first step's.
        const int number = static_cast<int>(k) + 1;
        return found == rule.shape(number, array_of(parameters_[i]).shape()) ||
               found == rule.shape(number, array_of(gradients_[i]).shape());
      };
      const auto refuse = [&](const std::string& key, const mx::Shape& found,
                              const mx::Shape& expected) {
        std::ostringstream message;
        message << "the state " << key << " has shape " << found
                << "; expected " << expected;
        throw std::invalid_argument(message.str());
      };
      if (collect_into(state, entry(states_[i], keys.back()))) {
        auto& array = state.back();
        check_is_there(array);
        // It would widen the parameter, or be widened.
        if (!shapes_fit(array.shape())) {
          refuse(name, array.shape(),
                 rule.shape(static_cast<int>(k) + 1,
                            array_of(parameters_[i]).shape()));
        }
        // There is no half a complex number.
        if (state_dtype && array.dtype() != *state_dtype &&
            array.dtype() != mx::complex64 && !rule.slots[slot].is_average) {
          array = mx::astype(array, *state_dtype);
        }
        continue;
      }
      const auto& like = reads_parameter ? tensors.slots[0][j] : gradients[j];
      const int size = static_cast<int>(like.size());
      const bool is_short = !entry(states_[i], codes8.back());
      const auto companion = entry(states_[i], scales.back());
      if (!companion || !is_array(companion) ||
          !collect_into(state, entry(states_[i], is_short ? codes4.back()
                                                          : codes8.back()))) {
        return false;
      }
      check_is_there(state.back());
      check_is_there(array_of(companion));
      const Format format{is_short ? Storage::codes4 : Storage::codes8};
      const auto expected = is_short ? mx::Shape{(size + 1) / 2} : like.shape();
      if (state.back().shape() != expected) {
        refuse(name + (is_short ? "_int4" : "_int8"), state.back().shape(),
               expected);
      }
      const mx::Shape blocks = {(size + format.block() - 1) / format.block()};
      if (array_of(companion).shape() != blocks) {
        refuse(name + "_scales", array_of(companion).shape(), blocks);
      }
      hold(j, slot, format.storage, companion);
    }
  }
  for (auto& companions : tensors.companions) {
    if (!companions.empty()) {
      companions.resize(chosen.size(), gradients[0]);
    }
  }
  if (extras && !extras->has_gradient) {
    gradients = extras->given.back();
  }
  request.keep_dtypes = keep_dtypes || state_dtype.has_value() || extras;
  const auto numbers = std::exchange(request.numbers, {});
  if (!numbers.empty() && numbers.size() != gradients_.size()) {
    throw std::invalid_argument("numbers: expected a pair for each leaf");
  }
  if (indices || !numbers.empty()) {
    for (const size_t i : chosen) {
      request.numbers.push_back(
          numbers.empty() ? Numbers{static_cast<uint32_t>(i)} : numbers[i]);
    }
  }
  fused_update(tensors, std::move(request));
  if (extras) {
    extras->slots = tensors.slots;
  }
  changes_.reserve(changes_.size() + chosen.size() * keys.size());
  const auto storage = [&](size_t j, size_t slot) {
    return tensors.storage.empty() ? Storage::plain
                                   : tensors.storage[j * slots + slot];
  };
  for (size_t j = 0; j < chosen.size(); ++j) {
    const size_t i = chosen[j];
    if (reads_parameter && rule.slots.front().is_written) {
      parameters_[i] = nb::cast(std::move(tensors.slots[0][j]));
      if (Format{storage(j, 0)}.is_split()) {
        changes_.push_back(
            {i, nb::str("error"), std::move(tensors.companions[0][j])});
      }
    }
    if (rule.slots.back().is_written && !extras) {
      gradients_[i] = nb::cast(std::move(gradients[j]));
    }
    for (size_t k = 0; k < keys.size(); ++k) {
      const size_t slot = k + reads_parameter;
      if (!rule.slots[slot].is_written ||
          (extras && is_extra(rule.states[k]))) {
        continue;
      }
      const Format format{storage(j, slot)};
      const auto& key = format.storage == Storage::codes8   ? codes8[k]
                        : format.storage == Storage::codes4 ? codes4[k]
                                                            : keys[k];
      changes_.push_back({i, key, std::move(tensors.slots[slot][j])});
      if (format.has_codes()) {
        changes_.push_back(
            {i, scales[k], std::move(tensors.companions[slot][j])});
      }
    }
  }
  return true;
}

void Leaves::set_leaf(Values& values, const Trace& trace, size_t index,
                      const std::optional<mx::array>& scale) const {
  const auto& recording = trace.recording();
  const auto& state = states_[index];
  auto parameter = array_of(parameters_[index]);
  auto gradient = array_of(gradients_[index]);
  if (scale) {
    gradient = mx::astype(gradient * *scale, gradient.dtype());
  }
  if (const auto error = entry(state, nb::str("error"));
      error && is_array(error) &&
      (array_of(error).dtype() == mx::int8 ||
       array_of(error).dtype() == mx::int16)) {
    parameter = join(parameter, array_of(error));
  }
  const auto set = [&](const mx::array& node, const mx::array& value) {
    values.set(node, value.dtype() == node.dtype()
                         ? value
                         : mx::astype(value, node.dtype()));
  };
  for (const auto& [name, node] : recording.states) {
    if (const auto plain = entry(state, nb::str(name.c_str())); plain) {
      set(node, array_of(plain));
      continue;
    }
    for (const auto storage : {Storage::codes8, Storage::codes4}) {
      const auto key = name + "_" + name_of(storage);
      const auto codes = entry(state, nb::str(key.c_str()));
      if (codes) {
        const auto scales = entry(state, nb::str((name + "_scales").c_str()));
        const Format format{storage, mx::float32,
                            recording.non_negative.contains(name)};
        set(node,
            decode(format, array_of(codes), array_of(scales), node.shape()));
      }
    }
  }
  set(recording.parameter, parameter);
  set(recording.gradient, gradient);
}

void Leaves::run(const std::vector<std::shared_ptr<Recorded>>& traces,
                 const std::vector<size_t>& indices,
                 const std::vector<uint32_t>& trace_of, const Scalars& scalars,
                 const std::vector<Numbers>& numbers,
                 const std::optional<mx::Dtype>& state_dtype,
                 const Arrays& after) {
  if (indices.size() != trace_of.size()) {
    throw std::invalid_argument("[run] expected a trace for each leaf");
  }
  // Leaves whose stages have the same programs go together.
  std::map<std::vector<const RuleTraits*>, std::vector<size_t>> groups;
  for (size_t j = 0; j < indices.size(); ++j) {
    std::vector<const RuleTraits*> rules;
    for (const auto& stage : traces.at(trace_of[j])->stages()) {
      rules.push_back(stage.rule);
    }
    groups[rules].push_back(j);
  }
  Arrays previous = after;
  for (const auto& [rules, members] : groups) {
    // Between stages there are arrays of a parameter's size: not of all at a
    // time.
    const bool is_simple = rules.size() == 1;
    constexpr size_t full = 1 << 20, most = 24;
    for (size_t begin = 0; begin < members.size();) {
      size_t end = begin, elements = 0;
      while (end < members.size() &&
             (is_simple || (elements < full && end - begin < most))) {
        elements += array_of(parameters_[indices[members[end++]]]).size();
      }
      run_some(traces, {members.begin() + begin, members.begin() + end},
               indices, trace_of, scalars, numbers, state_dtype, previous);
      begin = end;
    }
  }
}

void Leaves::run_some(const std::vector<std::shared_ptr<Recorded>>& traces,
                      const std::vector<size_t>& members,
                      const std::vector<size_t>& indices,
                      const std::vector<uint32_t>& trace_of,
                      const Scalars& scalars,
                      const std::vector<Numbers>& numbers,
                      const std::optional<mx::Dtype>& state_dtype,
                      Arrays& previous) {
  const auto trace = [&](size_t j) -> const Trace& {
    return *traces[trace_of[j]];
  };
  std::vector<size_t> chosen;
  std::vector<Values> values;
  values.reserve(members.size());
  for (const size_t j : members) {
    chosen.push_back(indices[j]);
    values.emplace_back(trace(j));
    if (trace(j).needs_values()) {
      set_leaf(values.back(), trace(j), indices[j],
               scalars.values[gradient_scale]);
    }
  }
  // The sums of squares that a stage's vectors, or before all stages what the
  // leaves have, are asked for.
  const auto set_sums = [&](int stage) {
    Arrays squared;
    for (size_t j = 0; j < members.size(); ++j) {
      for (const auto& sum : trace(members[j]).sums()) {
        if (sum.stage == stage) {
          squared.push_back(values[j].of(sum.of));
        }
      }
    }
    if (squared.empty()) {
      return;
    }
    const auto sums = mx::split(sums_of_squares(squared, mx::array(1.0f)).sums,
                                static_cast<int>(squared.size()));
    size_t next = 0;
    for (size_t j = 0; j < members.size(); ++j) {
      for (const auto& sum : trace(members[j]).sums()) {
        if (sum.stage == stage) {
          values[j].set(sum.node, mx::reshape(sums[next++], sum.node.shape()));
        }
      }
    }
  };
  set_sums(-1);
  const size_t stages = trace(members[0]).stages().size();
  for (size_t number = 0; number < stages; ++number) {
    const auto stage_of = [&](size_t j) -> const Trace::Stage& {
      return trace(members[j]).stages()[number];
    };
    const auto& first = stage_of(0);
    Request request{*first.rule, {}};
    request.scalars = scalars;
    request.scalars.per_tensor = true;  // a program's have rows
    if (!first.has_gradient) {
      request.scalars.values[gradient_scale] = std::nullopt;
    }
    request.after = previous;
    request.numbers = numbers;
    std::map<uint32_t, uint32_t> set_of, row_of;
    for (size_t j = 0; j < members.size(); ++j) {
      const auto& stage = stage_of(j);
      const auto number_of_trace = trace_of[members[j]];
      const auto [set, is_new] = set_of.emplace(
          number_of_trace, static_cast<uint32_t>(request.sets.size()));
      if (is_new) {
        request.sets.push_back(stage.numbers);
      }
      request.set_of.push_back(set->second);
      if (stage.scalars.empty()) {
        continue;
      }
      auto row = row_of.find(number_of_trace);
      if (row == row_of.end() || !stage.are_scalars_shared) {
        Arrays entries;
        for (const auto& node : stage.scalars) {
          entries.push_back(values[j].of(node));
        }
        row = row_of
                  .insert_or_assign(number_of_trace,
                                    static_cast<uint32_t>(request.rows.size()))
                  .first;
        request.rows.push_back(std::move(entries));
      }
      request.row_of.push_back(row->second);
    }
    Extras extras{{}, first.has_gradient};
    for (size_t e = 0; e < first.extras.size(); ++e) {
      auto& given = extras.given.emplace_back();
      for (size_t j = 0; j < members.size(); ++j) {
        const auto& stage = stage_of(j);
        const auto& node = stage.extras[e];
        const auto dtype =
            has_kernels(node.dtype()) ? node.dtype() : mx::float32;
        given.push_back(stage.is_extra_read[e]
                            ? mx::astype(values[j].of(node), dtype)
                            : unread(node.shape(), dtype));
      }
    }
    if (!update(std::move(request), state_dtype, chosen, &extras)) {
      throw std::invalid_argument("[run] expected arrays");
    }
    previous = {extras.slots[0][0]};
    for (size_t j = 0; j < members.size(); ++j) {
      const auto& stage = stage_of(j);
      for (size_t slot = 0; slot < stage.nodes.size(); ++slot) {
        if (const auto& node = stage.nodes[slot]) {
          values[j].set(*node,
                        mx::astype(extras.slots[slot][j], node->dtype()));
        }
      }
    }
    set_sums(first.number);
  }
  const auto& skips = scalars.values[skip];
  for (size_t j = 0; j < members.size(); ++j) {
    const size_t i = chosen[j];
    const auto kept = [&](nb::handle before, const mx::array& after) {
      const bool may_keep = skips && before && is_array(before) &&
                            array_of(before).shape() == after.shape();
      return may_keep ? mx::where(*skips, array_of(before), after) : after;
    };
    if (const auto& node = trace(members[j]).parameter_node()) {
      parameters_[i] = nb::cast(kept(parameters_[i], values[j].of(*node)));
    }
    for (const auto& [name, node] : trace(members[j]).state_nodes()) {
      const nb::str key(name.c_str());
      changes_.push_back(
          {i, key, kept(entry(states_[i], key), values[j].of(node))});
    }
  }
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
