#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "check.h"
#include "cpu/loops.h"
#include "cpu/parallel.h"
#include "graph/formats.h"
#include "graph/placement.h"
#include "graph/trace.h"
#include "program.h"
#include "python/trees.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using MaybeArray = std::optional<mlx::core::array>;

// One warning for kernels that failed their check since the last call.
void warn_of_failures() {
  const auto failures = mlx_fused::take_failures();
  if (failures.empty()) {
    return;
  }
  const auto message =
      "Metal kernels failed their check on this machine; plain MLX operations "
      "are used in their place. Please report this, with the output of "
      "`python -m mlx_fused_optimizers.selfcheck --json`, to the project's "
      "issues.\n" +
      failures;
  if (PyErr_WarnEx(PyExc_RuntimeWarning, message.c_str(), 1) < 0) {
    throw nb::python_error();
  }
}

// A hyper-parameter's sets as Python gives them: a dict each.
using Numbers = std::vector<std::pair<uint32_t, uint64_t>>;

std::vector<mlx_fused::Numbers> numbers_of(const Numbers& pairs) {
  std::vector<mlx_fused::Numbers> result;
  for (const auto& [tensor, first] : pairs) {
    result.push_back({tensor, first});
  }
  return result;
}

mlx_fused::Sets sets_of(const mlx_fused::RuleTraits& rule,
                        const std::vector<nb::dict>& dicts) {
  mlx_fused::Sets sets;
  for (const auto& dict : dicts) {
    mlx_fused::NamedValues named;
    for (const auto [key, value] : dict) {
      const auto name = nb::cast<std::string>(key);
      if (mlx::core::array array({}); nb::try_cast(value, array)) {
        named.emplace(name, array);
      } else {
        named.emplace(name, nb::cast<double>(value));
      }
    }
    sets.push_back(mlx_fused::in_order(rule, named));
  }
  return sets;
}

}  // namespace

NB_MODULE(MLX_FUSED_MODULE, m) {
  m.doc() = "Fused optimizer updates for MLX.";
  // mlx.core defines the type mx.array.
  nb::module_::import_("mlx.core");

  m.def(
      "is_array_type",
      [](nb::handle type) { return nb::type<mlx::core::array>().is(type); },
      "type"_a,
      "Whether arrays of this type are MLX's here: not if mlx.core was built "
      "with another nanobind.");
  m.def(
      "rule_names",
      [] {
        std::vector<std::string> names;
        for (const auto& rule : mlx_fused::all_rules()) {
          if (!rule.averages()) {
            names.push_back(rule.name);
          }
        }
        return names;
      },
      "All rules of metal/update_rules.h. Those that write the parameter have "
      "a second one, behind whose name stands \"Averaged\".");
  m.def(
      "hyperparameters",
      [](const std::string& rule) {
        return mlx_fused::rule_named(rule).hyperparameters;
      },
      "rule"_a, "The names of a rule's hyper-parameters.");
  m.def(
      "states",
      [](const std::string& rule) {
        return mlx_fused::rule_named(rule).states;
      },
      "rule"_a, "The names of a rule's states.");
  m.def(
      "written_slots",
      [](const std::string& name) {
        const auto& rule = mlx_fused::rule_named(name);
        std::vector<size_t> written;
        for (size_t slot = 0; slot < rule.slots.size(); ++slot) {
          if (rule.slots[slot].is_written) {
            written.push_back(slot);
          }
        }
        return std::pair(rule.slots.size(), written);
      },
      "rule"_a, "The number of a rule's slots, and which of them it writes.");
  m.def(
      "sums_of_squares",
      [](const mlx_fused::Arrays& arrays, const mlx::core::array& max_norm) {
        const auto result = mlx_fused::sums_of_squares(arrays, max_norm);
        warn_of_failures();
        return std::tuple(result.sums, result.norm, result.factor,
                          result.carry);
      },
      "arrays"_a, "max_norm"_a,
      "The sum of squares of each array, their global norm, "
      "min(max_norm / (norm + 1e-6), 1), and an array that among others' has a "
      "later call go on from this sum.");
  m.def(
      "count_nonzero",
      [](const mlx_fused::Arrays& arrays) {
        const auto result = mlx_fused::sums_of_squares(
            arrays, mlx::core::array(1.0f), /*counts=*/true);
        warn_of_failures();
        return result.sums;
      },
      "arrays"_a, "How many elements of each array are not zero, as float32.");
  m.def(
      "scale",
      [](const mlx_fused::Arrays& arrays, const mlx::core::array& factor) {
        const auto result = mlx_fused::scale(arrays, factor);
        warn_of_failures();
        return result;
      },
      "arrays"_a, "factor"_a, "The arrays times a scalar.");
  m.def(
      "check_update",
      [](const std::string& name, const mlx::core::array& parameter,
         const mlx::core::array& gradient, const mlx::core::array& state,
         const std::string& parameter_storage, const std::string& state_storage,
         bool must_be_in_place) {
        using mlx_fused::Role;
        const auto& rule = mlx_fused::rule_named(name);
        mlx_fused::Formats formats;
        for (const auto& slot : rule.slots) {
          if (slot.is_average) {
            formats.emplace_back();
            continue;
          }
          const auto role = slot.role;
          const bool is_held = role == Role::state && slot.is_read;
          const auto& held = role == Role::parameter ? parameter_storage
                             : is_held               ? state_storage
                                                     : "plain";
          const auto& like = role == Role::parameter  ? parameter
                             : role == Role::gradient ? gradient
                                                      : state;
          formats.push_back({mlx_fused::storage_named(held), like.dtype(),
                             slot.is_never_negative});
        }
        return mlx_fused::check_update(
            rule, formats,
            mlx::core::default_stream(mlx::core::default_device()),
            must_be_in_place);
      },
      "rule"_a, "parameter"_a, "gradient"_a, "state"_a,
      "parameter_storage"_a = "plain", "state_storage"_a = "plain",
      "must_be_in_place"_a = true,
      "What is wrong with the default device's kernel for arrays of these "
      "dtypes, held so, or None.");
  m.def(
      "non_negative",
      [](const std::string& name) {
        const auto& rule = mlx_fused::rule_named(name);
        std::vector<std::string> names;
        for (size_t k = 0; k < rule.states.size(); ++k) {
          if (rule.slots[rule.slots.size() - 1 - rule.states.size() + k]
                  .is_never_negative) {
            names.push_back(rule.states[k]);
          }
        }
        return names;
      },
      "rule"_a, "The states of a rule that are never negative.");
  const auto codes = [](const std::string& storage, bool is_never_negative) {
    return mlx_fused::Format{mlx_fused::storage_named(storage),
                             mlx::core::float32, is_never_negative};
  };
  m.def(
      "encode",
      [codes](const mlx::core::array& values, const std::string& storage,
              bool is_never_negative) {
        return mlx_fused::encode(codes(storage, is_never_negative), values);
      },
      "values"_a, "storage"_a, "is_never_negative"_a,
      "A state as codes and scales.");
  m.def(
      "decode",
      [codes](const mlx::core::array& values, const mlx::core::array& scales,
              const std::vector<int>& shape, const std::string& storage,
              bool is_never_negative) {
        return mlx_fused::decode(codes(storage, is_never_negative), values,
                                 scales, {shape.begin(), shape.end()});
      },
      "codes"_a, "scales"_a, "shape"_a, "storage"_a, "is_never_negative"_a,
      "The state of codes and scales, as float32.");
  m.def(
      "split",
      [](const mlx::core::array& values, const std::string& storage,
         mlx::core::Dtype dtype) {
        return mlx_fused::split({mlx_fused::storage_named(storage), dtype},
                                values);
      },
      "values"_a, "storage"_a, "dtype"_a,
      "float32 as weights of half precision and their errors.");
  m.def(
      "round_stochastically",
      [](const mlx::core::array& values, mlx::core::Dtype dtype,
         const mlx::core::array& seed, const mlx::core::array& step,
         uint32_t tensor) {
        return mlx_fused::round_stochastically(values, dtype, seed, step,
                                               {tensor});
      },
      "values"_a, "dtype"_a, "seed"_a, "step"_a, "tensor"_a,
      "float32 rounded to half precision at random, by the tensor's number.");
  m.def("join", &mlx_fused::join, "weights"_a, "errors"_a,
        "The float32 of weights and their errors.");
  m.def(
      "check_sums",
      [](const mlx::core::array& a, bool counts) {
        return mlx_fused::check_sums(
            a.dtype(), counts,
            mlx::core::default_stream(mlx::core::default_device()));
      },
      "array"_a, "counts"_a = false,
      "What is wrong with the default device's sums of squares of arrays of "
      "this dtype, or None.");
  m.def(
      "known",
      [](const mlx::core::array& a) -> std::optional<int64_t> {
        if (a.is_tracer() || !a.is_available()) {
          return std::nullopt;
        }
        return mlx::core::array(a).item<uint32_t>();
      },
      "count"_a,
      "The value of a uint32 if it is computed already, or None: waits for "
      "nothing.");
  using mlx_fused::Recorded;
  using Named = std::vector<std::pair<std::string, mlx::core::array>>;
  m.def(
      "stand_in",
      [](const std::vector<int>& shape, mlx::core::Dtype dtype) {
        return mlx_fused::stand_in({shape.begin(), shape.end()}, dtype);
      },
      "shape"_a, "dtype"_a,
      "An array without values, to record what a function does with it.");
  nb::class_<Recorded>(m, "Trace",
                       "What apply_single did with stand-ins, as programs.")
      .def(
          "__init__",
          [](Recorded* trace, const mlx::core::array& parameter,
             const mlx::core::array& gradient, const Named& states,
             const mlx::core::array& new_parameter, const Named& new_states,
             const mlx_fused::Arrays& device_scalars,
             const std::vector<std::string>& kept,
             const std::vector<std::string>& non_negative) {
            new (trace) Recorded({parameter,
                                  gradient,
                                  states,
                                  new_parameter,
                                  new_states,
                                  device_scalars,
                                  {kept.begin(), kept.end()},
                                  {non_negative.begin(), non_negative.end()}});
          },
          "parameter"_a, "gradient"_a, "states"_a, "new_parameter"_a,
          "new_states"_a, "device_scalars"_a, "kept"_a, "non_negative"_a)
      .def("find_non_negative", &Recorded::find_non_negative)
      .def_prop_ro("rules",
                   [](const Recorded& trace) {
                     std::vector<std::string> names;
                     for (const auto& stage : trace.stages()) {
                       names.push_back(stage.rule->name);
                     }
                     return names;
                   })
      .def_prop_ro("elements",
                   [](const Recorded& trace) {
                     return trace.recording().parameter.size();
                   })
      .def_prop_ro("left_to_mlx", &Recorded::left_to_mlx)
      .def_prop_ro("keeps_parameter_in_slot", [](const Recorded& trace) {
        return !trace.parameter_node();
      });
  m.def(
      "program_text",
      [](const std::string& name) {
        return mlx_fused::text_of(*mlx_fused::rule_named(name).program);
      },
      "rule"_a, "A program's operations, for people.");
  using mlx_fused::Leaves;
  nb::class_<Leaves>(m, "Leaves",
                     "The leaves of a step's trees, collected in one walk.")
      .def(nb::init<nb::object, nb::object, nb::object, const std::string&>(),
           "gradients"_a, "parameters"_a = nb::none(), "state"_a = nb::none(),
           "what"_a = "gradient")
      .def("__len__", &Leaves::size)
      .def_prop_ro("tree", &Leaves::tree)
      .def_prop_ro("gradients", &Leaves::gradients)
      .def_prop_ro("parameters", &Leaves::parameters)
      .def_prop_ro("states", &Leaves::states)
      .def_rw("ema", &Leaves::ema, nb::arg("ema").none(),
              "The decay of an average of the weights, or None.")
      .def_rw("keep_dtypes", &Leaves::keep_dtypes,
              "Whether parameters and states keep their dtypes beside wider "
              "gradients.")
      .def("dtypes", &Leaves::dtypes,
           "The distinct dtypes of the gradients; None if something is no "
           "array.")
      .def(
          "update",
          [](Leaves& leaves, const std::string& rule_name,
             const std::vector<nb::dict>& hyperparameters,
             const std::optional<std::vector<uint32_t>>& sets,
             const MaybeArray& learning_rate, const MaybeArray& step,
             const MaybeArray& gradient_scale, const MaybeArray& skip,
             const MaybeArray& coefficient, const MaybeArray& seed,
             bool per_tensor,
             const std::optional<mlx::core::Dtype>& state_dtype,
             const std::optional<std::vector<size_t>>& indices,
             const mlx_fused::Arrays& after, const Numbers& numbers) {
            const auto* rule = &mlx_fused::rule_named(rule_name);
            auto values = sets_of(*rule, hyperparameters);
            const auto* averaged =
                leaves.ema ? mlx_fused::with_average(*rule) : nullptr;
            if (averaged) {
              rule = averaged;
              for (auto& set : values) {
                set.insert(set.begin(), *leaves.ema);
              }
            }
            const bool done =
                leaves.update({*rule,
                               std::move(values),
                               sets.value_or(std::vector<uint32_t>()),
                               {{learning_rate, step, gradient_scale, skip,
                                 coefficient, seed},
                                per_tensor},
                               false,
                               after,
                               numbers_of(numbers)},
                              state_dtype, indices);
            warn_of_failures();
            return done;
          },
          "rule"_a, "hyperparameters"_a, nb::kw_only(), "sets"_a = nb::none(),
          "learning_rate"_a = nb::none(), "step"_a = nb::none(),
          "gradient_scale"_a = nb::none(), "skip"_a = nb::none(),
          "coefficient"_a = nb::none(), "seed"_a = nb::none(),
          "per_tensor"_a = false, "state_dtype"_a = nb::none(),
          "indices"_a = nb::none(), "after"_a = mlx_fused::Arrays{},
          "numbers"_a = Numbers{},
          "Updates leaves by a rule; False if something is no array.")
      .def(
          "run",
          [](Leaves& leaves,
             const std::vector<std::shared_ptr<mlx_fused::Recorded>>& traces,
             const std::vector<size_t>& indices,
             const std::vector<uint32_t>& trace_of, const MaybeArray& step,
             const MaybeArray& gradient_scale, const MaybeArray& skip,
             const MaybeArray& seed,
             const std::optional<mlx::core::Dtype>& state_dtype,
             const mlx_fused::Arrays& after, const Numbers& numbers) {
            leaves.run(traces, indices, trace_of,
                       {{std::nullopt, step, gradient_scale, skip, std::nullopt,
                         seed}},
                       numbers_of(numbers), state_dtype, after);
            warn_of_failures();
          },
          "traces"_a, "indices"_a, "trace_of"_a, nb::kw_only(),
          "step"_a = nb::none(), "gradient_scale"_a = nb::none(),
          "skip"_a = nb::none(), "seed"_a = nb::none(),
          "state_dtype"_a = nb::none(), "after"_a = mlx_fused::Arrays{},
          "numbers"_a = Numbers{},
          "Updates leaves by what apply_single did with stand-ins; trace_of is "
          "of each of these leaves.")
      .def("set_gradient", &Leaves::set_gradient, "index"_a, "value"_a)
      .def("set_parameter", &Leaves::set_parameter, "index"_a, "value"_a)
      .def("set_state", &Leaves::set_state, "index"_a, "key"_a, "value"_a)
      .def("commit", &Leaves::commit,
           "Writes the changes of the states; returns the updated parameters.")
      .def("replace", &Leaves::replace, "leaves"_a,
           "The gradients' tree with other leaves.");
  using mlx_fused::Snapshot;
  nb::class_<Snapshot>(m, "Snapshot", "What a tree's dicts and lists hold now.")
      .def(nb::init<nb::handle, nb::handle>(), "tree"_a, "like"_a = nb::none())
      .def("restore", &Snapshot::restore, "Undoes every change since.");
  m.def("reset_trust", &mlx_fused::reset_trust,
        "Check every Metal kernel anew when it is next used.");
  m.def(
      "instruction_set", [] { return mlx_fused::cpu::loops().name; },
      "The instruction set of the CPU's loops.");
  m.def("bytes_copied", &mlx_fused::bytes_copied,
        "Bytes that could not be updated in place, since the process began.");
  m.def("num_threads", &mlx_fused::cpu::num_threads,
        "Threads that an update on the CPU uses.");
  m.def("set_num_threads", &mlx_fused::cpu::set_num_threads, "count"_a,
        "Sets the threads that an update on the CPU uses.");
}
