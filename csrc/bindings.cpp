#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "check.h"
#include "cpu/loops.h"
#include "cpu/parallel.h"
#include "ops.h"
#include "primitives.h"
#include "trees.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

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

std::vector<std::string> rule_names() {
  std::vector<std::string> names;
  for (const auto& rule : mlx_fused::rule_table) {
    names.push_back(rule.name);
  }
  return names;
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
      "fused_update",
      [](const std::string& rule, const std::vector<double>& hyperparameters,
         const mlx_fused::Arrays& parameters,
         const mlx_fused::Arrays& gradients,
         const std::vector<mlx_fused::Arrays>& states,
         const mlx::core::array& learning_rate, const mlx::core::array& step,
         const std::optional<mlx::core::array>& gradient_scale,
         bool keep_dtypes, const mlx_fused::Arrays& after) {
        auto result = mlx_fused::fused_update(
            rule, hyperparameters, parameters, gradients, states, learning_rate,
            step, gradient_scale, keep_dtypes, after);
        warn_of_failures();
        return result;
      },
      "rule"_a, "hyperparameters"_a, "parameters"_a, "gradients"_a, "states"_a,
      "learning_rate"_a, "step"_a, "gradient_scale"_a = nb::none(),
      "keep_dtypes"_a = false, "after"_a = mlx_fused::Arrays{},
      "One optimizer step; returns the new parameters and states.");
  m.def(
      "global_norm",
      [](const mlx_fused::Arrays& arrays, const mlx::core::array& max_norm) {
        auto result = mlx_fused::global_norm(arrays, max_norm);
        warn_of_failures();
        return result;
      },
      "arrays"_a, "max_norm"_a,
      "The global L2 norm and min(max_norm / (norm + 1e-6), 1).");
  m.def(
      "scale",
      [](const mlx_fused::Arrays& arrays, const mlx::core::array& factor) {
        auto result = mlx_fused::scale(arrays, factor);
        warn_of_failures();
        return result;
      },
      "arrays"_a, "factor"_a, "The arrays times a scalar.");
  m.def(
      "check_update",
      [](const std::string& rule, const mlx::core::array& parameter,
         const mlx::core::array& gradient, const mlx::core::array& state) {
        return mlx_fused::check_update(
            mlx_fused::rule_named(rule), parameter.dtype(), gradient.dtype(),
            state.dtype(),
            mlx::core::default_stream(mlx::core::default_device()));
      },
      "rule"_a, "parameter"_a, "gradient"_a, "state"_a,
      "What is wrong with the default device's kernel for arrays of these "
      "dtypes, or None.");
  m.def(
      "check_norm",
      [](const mlx::core::array& a) {
        return mlx_fused::check_norm(
            a.dtype(), mlx::core::default_stream(mlx::core::default_device()));
      },
      "array"_a,
      "What is wrong with the default device's norm of arrays of this dtype, "
      "or None.");
  using mlx_fused::Leaves;
  nb::class_<Leaves>(m, "Leaves",
                     "The leaves of a step's trees, collected in one walk.")
      .def(nb::init<nb::object, nb::object, nb::object>(), "gradients"_a,
           "parameters"_a = nb::none(), "state"_a = nb::none())
      .def("__len__", &Leaves::size)
      .def_prop_ro("tree", &Leaves::tree)
      .def_prop_ro("gradients", &Leaves::gradients)
      .def_prop_ro("parameters", &Leaves::parameters)
      .def_prop_ro("states", &Leaves::states)
      .def("dtypes", &Leaves::dtypes,
           "The distinct dtypes of the gradients; None if something is no "
           "array.")
      .def(
          "global_norm",
          [](const Leaves& leaves, const mlx::core::array& max_norm) {
            auto result = leaves.global_norm(max_norm);
            warn_of_failures();
            return result;
          },
          "max_norm"_a, "As global_norm, of the gradients.")
      .def(
          "fused_update",
          [](Leaves& leaves, const std::string& rule,
             const std::vector<double>& hyperparameters,
             const std::vector<nb::str>& keys,
             const mlx::core::array& learning_rate,
             const mlx::core::array& step,
             const std::optional<mlx::core::array>& gradient_scale,
             const std::optional<mlx::core::Dtype>& state_dtype,
             const std::optional<std::vector<size_t>>& indices) {
            const bool done =
                leaves.fused_update(rule, hyperparameters, keys, learning_rate,
                                    step, gradient_scale, state_dtype, indices);
            warn_of_failures();
            return done;
          },
          "rule"_a, "hyperparameters"_a, "keys"_a, "learning_rate"_a, "step"_a,
          "gradient_scale"_a.none(), "state_dtype"_a.none(), "indices"_a.none(),
          "Updates leaves by a rule; False if something is no array.")
      .def("set", &Leaves::set, "index"_a, "parameter"_a, "changes"_a,
           "What another way of computing it made of a leaf.")
      .def("commit", &Leaves::commit,
           "Writes the changes of the states; returns the updated parameters.")
      .def("replace", &Leaves::replace, "leaves"_a,
           "The gradients' tree with other leaves.");
  using mlx_fused::Snapshot;
  nb::class_<Snapshot>(m, "Snapshot", "What a tree's dicts and lists hold now.")
      .def(nb::init<nb::handle>(), "tree"_a)
      .def("restore", &Snapshot::restore, "Undoes every change since.");
  m.def("rule_names", &rule_names, "The rules that fused_update knows.");
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
