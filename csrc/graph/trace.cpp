#include "graph/trace.h"

#include <algorithm>
#include <functional>
#include <map>
#include <stdexcept>

#include "mlx/ops.h"
#include "mlx/primitives.h"
#include "rules.h"

namespace mlx_fused {

namespace {

using Id = std::uintptr_t;

std::string name_of(const mx::array& node) { return node.primitive().name(); }

// The node whose values this one has: of what changes nothing but the graph.
const mx::array& seen_through(const mx::array& node) {
  const mx::array* found = &node;
  while (found->has_primitive()) {
    const auto name = name_of(*found);
    const bool is_transparent =
        name == "StopGradient" || name == "Copy" || name == "Contiguous" ||
        name == "Full" ||
        (name == "Broadcast" && found->inputs()[0].size() == 1) ||
        ((name == "Reshape" || name == "ExpandDims" || name == "Squeeze") &&
         found->size() == 1);
    if (!is_transparent) {
      break;
    }
    found = &found->inputs()[0];
  }
  return *found;
}

// Of a scalar whose memory has it.
std::optional<double> value_of(const mx::array& number) {
  switch (number.dtype().val()) {
    case mx::Dtype::Val::bool_:
      return *number.data<bool>();
    case mx::Dtype::Val::int32:
      return *number.data<int32_t>();
    case mx::Dtype::Val::float32:
      return *number.data<float>();
    case mx::Dtype::Val::float64:
      return *number.data<double>();
    case mx::Dtype::Val::float16:
      return static_cast<float>(*number.data<mx::float16_t>());
    case mx::Dtype::Val::bfloat16:
      return static_cast<float>(*number.data<mx::bfloat16_t>());
    default:
      return std::nullopt;
  }
}

}  // namespace

mx::array stand_in(const mx::Shape& shape, mx::Dtype dtype) {
  mx::array a(shape, dtype, nullptr, {});
  a.set_tracer(true);
  return a;
}

mx::array unread(const mx::Shape& shape, mx::Dtype dtype) {
  return mx::broadcast_to(mx::array(0, dtype), shape);
}

bool Trace::is_dependent(const mx::array& node) const {
  return dependent_.contains(node.id());
}

mx::array Values::of(const mx::array& node) {
  if (!trace_.is_dependent(node)) {
    return node;
  }
  if (const auto found = known_.find(node.id()); found != known_.end()) {
    return found->second;
  }
  Arrays inputs;
  for (const auto& input : node.inputs()) {
    inputs.push_back(of(input));
  }
  const auto nodes = node.outputs();
  if (nodes.size() == 1) {
    mx::array made(node.shape(), node.dtype(), node.primitive_ptr(),
                   std::move(inputs));
    set(node, made);
    return made;
  }
  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> dtypes;
  for (const auto& a : nodes) {
    shapes.push_back(a.shape());
    dtypes.push_back(a.dtype());
  }
  const auto made = mx::array::make_arrays(std::move(shapes), dtypes,
                                           node.primitive_ptr(), inputs);
  for (size_t i = 0; i < nodes.size(); ++i) {
    set(nodes[i], made[i]);
  }
  return known_.at(node.id());
}

// Divides a recording into stages.
class TraceBuilder {
 public:
  explicit TraceBuilder(Trace& trace)
      : trace_(trace),
        recording_(trace.recording_),
        shape_(recording_.parameter.shape()) {
    leaves_[recording_.parameter.id()] = "";
    leaves_[recording_.gradient.id()] = "";
    for (const auto& [key, node] : recording_.states) {
      leaves_[node.id()] = key;
    }
    for (const auto& a : recording_.device_scalars) {
      device_.insert(a.id());
    }
  }

  void build() {
    find_dependent(recording_.new_parameter);
    for (const auto& [key, node] : recording_.new_states) {
      find_dependent(node);
    }
    find_results();
    for (const auto& result : results_) {
      if (result.node && is_vector(*result.node)) {
        materialize(*result.node, true);
      } else if (result.node) {
        find_hosts(*result.node);
      }
    }
    for (int stage = 0; stage <= last_stage_; ++stage) {
      make_stage(stage);
    }
    finish();
  }

 private:
  struct Result {
    std::string key;  // of a state
    bool is_parameter;
    std::optional<mx::array> node;  // nothing if it did not change
    std::optional<mx::array> before;
    bool is_in_slot = false;
  };

  bool find_dependent(const mx::array& node) {
    if (leaves_.contains(node.id())) {
      trace_.dependent_.insert(node.id());
      return true;
    }
    if (const auto found = known_.find(node.id()); found != known_.end()) {
      return found->second;
    }
    // Of what MLX does not trace no stand-in is an input.
    bool is_dependent = false;
    if (node.has_primitive() && node.is_tracer()) {
      for (const auto& input : node.inputs()) {
        is_dependent = find_dependent(input) || is_dependent;
      }
    }
    known_[node.id()] = is_dependent;
    if (is_dependent) {
      trace_.dependent_.insert(node.id());
    }
    return is_dependent;
  }

  bool is_leaf(const mx::array& node) const {
    return leaves_.contains(node.id());
  }
  bool is_dependent(const mx::array& node) const {
    return trace_.is_dependent(node);
  }

  // Whether a kernel can have it: an element for each of the parameter's.
  bool has_elements(const mx::array& node) const {
    return node.shape() == shape_ &&
           (has_kernels(node.dtype()) || node.dtype() == mx::bool_);
  }

  struct Kind {
    bool is_vector;  // a stand-in, or an operation of a program
    std::optional<Operation> operation;
    bool is_same = false;  // as its input
  };

  const Kind& kind_of(const mx::array& node) {
    if (const auto found = kinds_.find(node.id()); found != kinds_.end()) {
      return found->second;
    }
    return kinds_[node.id()] = find_kind(node);
  }

  Kind find_kind(const mx::array& node) {
    if (!is_dependent(node) || !has_elements(node)) {
      return {false, {}};
    }
    if (is_leaf(node)) {
      return {node.dtype() != mx::bool_, {}};
    }
    const auto name = name_of(node);
    const auto& inputs = node.inputs();
    const auto may_have = [&](const mx::array& input) {
      const auto& seen = seen_through(input);
      return has_elements(input) ||
             (seen.size() == 1 && seen.dtype() != mx::complex64);
    };
    if (!std::all_of(inputs.begin(), inputs.end(), may_have)) {
      return {false, {}};
    }
    if (name == "StopGradient" || name == "Copy" || name == "Contiguous") {
      return {true, {}, true};
    }
    if (name == "AsType") {
      const auto from = inputs[0].dtype();
      const auto to = node.dtype();
      if (to == mx::bool_) {
        return {from != mx::bool_, Operation::to_bool};
      }
      if (to == mx::float32 || from == mx::bool_ || from == to) {
        return {true, {}, true};
      }
      return {true, to == mx::float16 ? Operation::to_float16
                                      : Operation::to_bfloat16};
    }
    // Of truth values, as & and | give them.
    const bool is_truth = node.dtype() == mx::bool_;
    const std::optional<Operation> operation =
        is_truth && name == "BitwiseAnd"   ? Operation::logical_and
        : is_truth && name == "BitwiseOr"  ? Operation::logical_or
        : is_truth && name == "BitwiseXor" ? Operation::not_equal
                                           : operation_of(name);
    if (!operation ||
        inputs.size() != static_cast<size_t>(traits_of(*operation).operands)) {
      return {false, {}};
    }
    return {is_truth == traits_of(*operation).gives_truth, operation};
  }

  bool is_vector(const mx::array& node) { return kind_of(node).is_vector; }

  // The stage that computes a vector, or after which MLX can compute a host's
  // value: -1 if it needs none.
  int stage_of(const mx::array& node) {
    if (!is_dependent(node)) {
      return -1;
    }
    if (const auto found = stages_.find(node.id()); found != stages_.end()) {
      return found->second;
    }
    int stage = -1;
    if (is_leaf(node)) {
      stage = -1;
    } else if (is_vector(node)) {
      stage = 0;
      for (const auto& input : node.inputs()) {
        const auto& seen = is_vector(input) ? input : seen_through(input);
        stage = std::max(stage,
                         is_vector(seen) ? stage_of(seen) : stage_of(seen) + 1);
      }
    } else {
      for (const auto& input : node.inputs()) {
        stage = std::max(stage, stage_of(input));
      }
    }
    stages_[node.id()] = stage;
    return stage;
  }

  void find_results() {
    const auto add = [&](const std::string& key, bool is_parameter,
                         const mx::array& node,
                         std::optional<mx::array> before) {
      const bool is_same = before && before->id() == node.id();
      results_.push_back({key, is_parameter,
                          is_same ? std::nullopt : std::optional(node),
                          std::move(before)});
    };
    add("", true, recording_.new_parameter, recording_.parameter);
    for (const auto& [key, node] : recording_.new_states) {
      std::optional<mx::array> before;
      for (const auto& [name, state] : recording_.states) {
        if (name == key) {
          before = state;
        }
      }
      add(key, false, node, before);
    }
  }

  // Has a vector written by its stage, for MLX, for a later stage or as a
  // result.
  void materialize(const mx::array& node, bool is_result = false) {
    if (is_leaf(node) && !is_result) {
      return;
    }
    const int stage = std::max(stage_of(node), 0);
    last_stage_ = std::max(last_stage_, stage);
    auto& written = written_[stage];
    if (!is_written_.insert(node.id()).second) {
      return;
    }
    written.push_back(node);
    visit(node, stage);
  }

  // The vectors of earlier stages and the hosts that a vector needs.
  void visit(const mx::array& node, int stage) {
    if (is_leaf(node) || !visited_.insert(node.id()).second) {
      return;
    }
    for (const auto& input : node.inputs()) {
      const auto& seen = is_vector(input) ? input : seen_through(input);
      if (!is_dependent(seen)) {
        continue;
      }
      if (!is_vector(seen)) {
        find_hosts(seen);
      } else if (stage_of(seen) < stage && !is_leaf(seen)) {
        materialize(seen);
      } else {
        visit(seen, stage);
      }
    }
  }

  // What is squared in a sum of all squares, if the node is one.
  const mx::array* squared_in_sum(const mx::array& node) {
    if (node.size() != 1 || name_of(node) != "Sum" ||
        node.dtype() != mx::float32) {
      return nullptr;
    }
    const auto reshaped = [](const mx::array* a) {
      while (a->has_primitive() &&
             (name_of(*a) == "Flatten" || name_of(*a) == "Reshape")) {
        a = &a->inputs()[0];
      }
      return a;
    };
    const auto* square = reshaped(&node.inputs()[0]);
    if (!square->has_primitive()) {
      return nullptr;
    }
    const auto name = name_of(*square);
    const bool is_square = name == "Square" ||
                           (name == "Multiply" && square->inputs()[0].id() ==
                                                      square->inputs()[1].id());
    const auto* squared = is_square ? reshaped(&square->inputs()[0]) : nullptr;
    return squared && is_vector(*squared) && squared->dtype() == mx::float32
               ? squared
               : nullptr;
  }

  void find_hosts(const mx::array& node) {
    if (!is_dependent(node) || is_leaf(node) ||
        !visited_.insert(node.id()).second) {
      return;
    }
    trace_.left_.push_back(name_of(node));
    if (const auto* squared = squared_in_sum(node)) {
      trace_.sums_.push_back({node, *squared, stage_of(*squared)});
      stages_[node.id()] = stage_of(*squared);
      materialize(*squared);
      return;
    }
    for (const auto& input : node.inputs()) {
      if (is_dependent(input) && is_vector(input)) {
        materialize(input);
      } else {
        find_hosts(input);
      }
    }
  }

  // Builds one stage's program.
  struct Draft {
    Program program;
    Trace::Stage stage;
    std::unordered_map<Id, Operand> known;
    std::vector<mx::array> slots;  // what they hold before
    std::vector<std::string> names;
    std::unordered_map<uint16_t, mx::array> nodes;  // what they get
  };

  uint16_t slot_for(Draft& draft, const mx::array& node,
                    const std::string& name, bool is_read) {
    draft.slots.push_back(node);
    draft.names.push_back(name);
    draft.program.is_read.push_back(is_read);
    return static_cast<uint16_t>(draft.slots.size() - 1);
  }

  uint16_t extra_for(Draft& draft, const mx::array& node, bool is_read) {
    const auto name = "#" + std::to_string(draft.stage.extras.size());
    draft.stage.extras.push_back(node);
    draft.stage.is_extra_read.push_back(is_read);
    return slot_for(draft, node, name, is_read);
  }

  Operand uniform(Draft& draft, const mx::array& node) {
    const bool may_know = !node.has_primitive() && !is_dependent(node) &&
                          node.is_available() && !device_.contains(node.id());
    const auto value = may_know ? value_of(node) : std::nullopt;
    Operand operand;
    if (value) {
      operand = {Operand::number,
                 static_cast<uint16_t>(draft.program.numbers++)};
      draft.stage.numbers.push_back(*value);
    } else {
      operand = {Operand::scalar,
                 static_cast<uint16_t>(draft.program.scalars++)};
      draft.stage.scalars.push_back(node);
      draft.stage.are_scalars_shared &= !is_dependent(node);
    }
    return operand;
  }

  Operand operand(Draft& draft, const mx::array& input, int stage) {
    const auto& node = is_vector(input) ? input : seen_through(input);
    if (const auto found = draft.known.find(node.id());
        found != draft.known.end()) {
      return found->second;
    }
    Operand made;
    if (is_vector(node) && (is_leaf(node) || stage_of(node) < stage)) {
      if (is_leaf(node)) {
        const auto& key = leaves_.at(node.id());
        made = {Operand::slot, slot_for(draft, node, key, true)};
      } else {
        made = {Operand::slot, extra_for(draft, node, true)};
      }
    } else if (is_vector(node)) {
      const auto& kind = kind_of(node);
      if (kind.is_same) {
        made = operand(draft, node.inputs()[0], stage);
      } else {
        Instruction instruction{*kind.operation};
        const auto& inputs = node.inputs();
        bool has_elements = false;
        for (size_t k = 0; k < inputs.size(); ++k) {
          auto& operand = instruction.operands[k];
          operand = this->operand(draft, inputs[k], stage);
          has_elements = has_elements || operand.kind == Operand::slot ||
                         operand.kind == Operand::result;
        }
        if (!has_elements) {  // the same number, broadcast
          instruction.operands[0] = {Operand::slot,
                                     extra_for(draft, inputs[0], true)};
        }
        draft.program.instructions.push_back(instruction);
        made = {Operand::result,
                static_cast<uint16_t>(draft.program.instructions.size() - 1)};
      }
    } else if (node.size() == 1 &&
               (shape_ != node.shape() || !is_dependent(node))) {
      made = uniform(draft, node);
    } else {
      made = {Operand::slot, extra_for(draft, node, true)};
    }
    draft.known.insert_or_assign(node.id(), made);
    return made;
  }

  void make_stage(int number) {
    Draft draft;
    draft.stage.number = number;
    std::vector<std::pair<mx::array, Operand>> made;
    for (const auto& node : written_[number]) {
      made.emplace_back(node, operand(draft, node, number));
    }
    if (made.empty()) {
      return;
    }
    // Which slots get them.
    std::vector<std::optional<Operand>> results(draft.slots.size());
    const auto put = [&](uint16_t slot, const Operand& value) {
      results.resize(draft.slots.size());
      results[slot] = value;
    };
    for (const auto& [node, value] : made) {
      bool has_slot = false;
      for (auto& result : results_) {
        if (!result.node || result.node->id() != node.id() || !result.before ||
            result.is_in_slot || !recording_.kept.contains(result.key) ||
            !is_vector(*result.before) ||
            (result.is_parameter && is_read_later(*result.before, number))) {
          continue;
        }
        const auto& before = *result.before;
        const auto found = draft.known.find(before.id());
        const auto slot = found != draft.known.end()
                              ? found->second.index
                              : slot_for(draft, before, result.key, true);
        draft.known[before.id()] = {Operand::slot, slot};
        put(slot, value);
        draft.nodes.insert_or_assign(slot, node);
        result.is_in_slot = has_slot = true;
      }
      const bool is_missing = std::any_of(
          results_.begin(), results_.end(), [&](const Result& result) {
            return result.node && result.node->id() == node.id() &&
                   !result.is_in_slot;
          });
      if (!has_slot || (is_leaf(node) && is_missing)) {
        const auto slot = extra_for(draft, node, false);
        put(slot, value);
        draft.nodes.insert_or_assign(slot, node);
      }
    }
    results.resize(draft.slots.size());
    finish_stage(draft, std::move(results));
  }

  // Whether a later stage's program reads a stand-in.
  bool is_read_later(const mx::array& leaf, int stage) {
    for (int later = stage + 1; later <= last_stage_; ++later) {
      std::unordered_set<Id> seen;
      const std::function<bool(const mx::array&)> reads =
          [&](const mx::array& node) {
            if (node.id() == leaf.id()) {
              return true;
            }
            if (!is_dependent(node) || is_leaf(node) || !is_vector(node) ||
                stage_of(node) < later || !seen.insert(node.id()).second) {
              return false;
            }
            return std::any_of(
                node.inputs().begin(), node.inputs().end(),
                [&](const mx::array& input) {
                  return reads(is_vector(input) ? input : seen_through(input));
                });
          };
      for (const auto& node : written_[later]) {
        if (reads(node)) {
          return true;
        }
      }
    }
    return false;
  }

  // Brings the slots into their order: the parameter first, a gradient last.
  void finish_stage(Draft& draft, std::vector<std::optional<Operand>> results) {
    const size_t count = draft.slots.size();
    std::vector<uint16_t> order;
    std::optional<uint16_t> first, last;
    for (uint16_t k = 0; k < count; ++k) {
      if (draft.names[k][0] == '#') {
        continue;
      }
      if (draft.slots[k].id() == recording_.parameter.id()) {
        first = k;
      } else if (draft.slots[k].id() == recording_.gradient.id()) {
        last = k;
      }
    }
    draft.stage.has_gradient = last.has_value();
    // Some other stands in its place: one that is read alone, if there is one.
    std::string last_name;
    for (uint16_t k = 0; k < count && !last; ++k) {
      if (draft.names[k][0] == '#' && !results[k]) {
        last = k;
      }
    }
    if (!last) {
      // The gradient itself, which nothing reads.
      last = slot_for(draft, recording_.gradient, "", true);
      results.emplace_back();
      draft.stage.has_gradient = true;
    }
    if (first) {
      order.push_back(*first);
    }
    for (uint16_t k = 0; k < draft.slots.size(); ++k) {
      if (k != first && k != last) {
        order.push_back(k);
      }
    }
    order.push_back(*last);
    if (order.size() > static_cast<size_t>(max_slots)) {
      throw std::invalid_argument(
          "it reads and writes " + std::to_string(order.size()) +
          " arrays of a parameter's shape at a time; kernels take " +
          std::to_string(max_slots));
    }
    std::vector<uint16_t> place(order.size());
    for (size_t k = 0; k < order.size(); ++k) {
      place[order[k]] = static_cast<uint16_t>(k);
    }
    const auto moved = [&](Operand operand) {
      if (operand.kind == Operand::slot) {
        operand.index = place[operand.index];
      }
      return operand;
    };
    auto& program = draft.program;
    for (auto& instruction : program.instructions) {
      for (auto& operand : instruction.operands) {
        operand = moved(operand);
      }
    }
    // Extras are numbered in the order of their slots, the last slot's behind.
    Arrays extras;
    std::vector<bool> is_extra_read, is_read;
    program.has_parameter = first.has_value();
    for (size_t k = 0; k < order.size(); ++k) {
      const auto from = order[k];
      is_read.push_back(program.is_read[from]);
      program.results.push_back(
          results[from] ? std::optional(moved(*results[from])) : std::nullopt);
      program.is_never_negative.push_back(
          recording_.non_negative.contains(draft.names[from]));
      const auto node = draft.nodes.find(from);
      draft.stage.nodes.push_back(node == draft.nodes.end()
                                      ? std::nullopt
                                      : std::optional(node->second));
      const bool is_state =
          k + 1 < order.size() && !(k == 0 && program.has_parameter);
      const bool is_extra = draft.names[from][0] == '#';
      if (is_extra) {
        if (is_state) {
          program.states.push_back("#" + std::to_string(extras.size()));
        }
        extras.push_back(draft.slots[from]);
        is_extra_read.push_back(program.is_read[from]);
      } else if (is_state) {
        program.states.push_back(draft.names[from]);
      }
    }
    program.is_read = std::move(is_read);
    draft.stage.extras = std::move(extras);
    draft.stage.is_extra_read = std::move(is_extra_read);
    draft.stage.rule = &rule_of(std::move(program));
    if (draft.stage.rule->program->code.empty()) {
      throw std::invalid_argument("it has too many intermediate values");
    }
    trace_.stages_.push_back(std::move(draft.stage));
  }

  void finish() {
    for (auto& result : results_) {
      if (!result.node || result.is_in_slot) {
        continue;
      }
      if (result.is_parameter) {
        trace_.parameter_ = result.node;
      } else {
        trace_.state_nodes_.emplace_back(result.key, *result.node);
      }
    }
    std::sort(trace_.left_.begin(), trace_.left_.end());
  }

  Trace& trace_;
  Recording& recording_;
  mx::Shape shape_;
  std::unordered_map<Id, std::string> leaves_;  // the keys of states
  std::unordered_set<Id> device_;
  std::unordered_map<Id, bool> known_;
  std::unordered_map<Id, Kind> kinds_;
  std::unordered_map<Id, int> stages_;
  std::vector<Result> results_;
  std::map<int, Arrays> written_;
  std::unordered_set<Id> is_written_, visited_;
  int last_stage_ = -1;
};

namespace {

// Whether an operation gives nothing negative, by its operands.
bool is_never_negative(Operation operation, const std::array<bool, 3>& is,
                       bool is_square) {
  if (traits_of(operation).gives_truth) {
    return true;
  }
  switch (operation) {
    case Operation::add:
    case Operation::divide:
    case Operation::minimum:
      return is[0] && is[1];
    case Operation::multiply:
      return (is[0] && is[1]) || is_square;
    case Operation::maximum:
      return is[0] || is[1];
    case Operation::power:
    case Operation::exponential_minus_1:
    case Operation::logarithm_of_1_plus:
    case Operation::hyperbolic_tangent:
    case Operation::sign:
    case Operation::floor:
    case Operation::ceiling:
    case Operation::rounded:
    case Operation::to_float16:
    case Operation::to_bfloat16:
      return is[0];
    case Operation::absolute:
    case Operation::square:
    case Operation::square_root:
    case Operation::reciprocal_root:
    case Operation::exponential:
    case Operation::sigmoid:
      return true;
    case Operation::select:
      return is[1] && is[2];
    default:
      return false;
  }
}

}  // namespace

std::vector<std::string> Trace::find_non_negative() const {
  // All are supposed to be, and those that then are not fall out.
  std::unordered_set<std::string> supposed;
  for (const auto& [key, node] : recording_.states) {
    if (node.shape() == recording_.parameter.shape()) {
      supposed.insert(key);
    }
  }
  for (const auto& [key, node] : state_nodes_) {
    supposed.erase(key);
  }
  for (bool has_changed = true; has_changed;) {
    has_changed = false;
    std::unordered_set<Id> nodes;  // that are not negative
    for (const auto& stage : stages_) {
      const auto& program = *stage.rule->program;
      std::vector<bool> results;
      const auto state_of = [&](size_t slot) -> const std::string* {
        const bool is_state = slot + 1 < program.results.size() &&
                              !(slot == 0 && program.has_parameter);
        return is_state ? &program.states[slot - program.has_parameter]
                        : nullptr;
      };
      const auto is = [&](const Operand& operand) {
        if (operand.kind == Operand::result) {
          return bool{results[operand.index]};
        }
        if (operand.kind == Operand::number) {
          return std::get<double>(stage.numbers[operand.index]) >= 0;
        }
        if (operand.kind == Operand::scalar) {
          return false;
        }
        const auto* state = state_of(operand.index);
        if (state && (*state)[0] == '#') {
          return nodes.contains(stage.extras[number_of_extra(*state)].id());
        }
        return state && supposed.contains(*state);
      };
      for (const auto& [operation, operands] : program.instructions) {
        std::array<bool, 3> given{};
        for (int k = 0; k < traits_of(operation).operands; ++k) {
          given[k] = is(operands[k]);
        }
        results.push_back(
            is_never_negative(operation, given, operands[0] == operands[1]));
      }
      for (size_t slot = 0; slot < program.results.size(); ++slot) {
        const auto& result = program.results[slot];
        if (!result) {
          continue;
        }
        if (is(*result) && stage.nodes[slot]) {
          nodes.insert(stage.nodes[slot]->id());
        }
        const auto* state = state_of(slot);
        if (state && !is(*result) && supposed.erase(*state) > 0) {
          has_changed = true;
        }
      }
    }
  }
  return {supposed.begin(), supposed.end()};
}

Trace::Trace(Recording recording) : recording_(std::move(recording)) {
  TraceBuilder(*this).build();
}

}  // namespace mlx_fused
