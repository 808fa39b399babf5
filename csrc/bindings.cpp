#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "cpu/parallel.h"
#include "ops.h"

namespace nb = nanobind;
using namespace nb::literals;

NB_MODULE(_ext, m) {
  m.doc() = "Fused optimizer updates for MLX.";
  // mlx.core defines the type mx.array.
  nb::module_::import_("mlx.core");

  m.def(
      "fused_update",
      [](const std::string& rule, const std::vector<double>& hyperparameters,
         const mlx_fused::Arrays& parameters,
         const mlx_fused::Arrays& gradients,
         const std::vector<mlx_fused::Arrays>& states,
         const mlx::core::array& learning_rate, const mlx::core::array& step,
         const std::optional<mlx::core::array>& gradient_scale) {
        return mlx_fused::fused_update(rule, hyperparameters, parameters,
                                       gradients, states, learning_rate, step,
                                       gradient_scale);
      },
      "rule"_a, "hyperparameters"_a, "parameters"_a, "gradients"_a, "states"_a,
      "learning_rate"_a, "step"_a, "gradient_scale"_a = nb::none(),
      "One optimizer step; returns the new parameters and states.");
  m.def(
      "global_norm",
      [](const mlx_fused::Arrays& arrays, const mlx::core::array& max_norm) {
        return mlx_fused::global_norm(arrays, max_norm);
      },
      "arrays"_a, "max_norm"_a,
      "The global L2 norm and min(max_norm / (norm + 1e-6), 1).");
  m.def(
      "scale",
      [](const mlx_fused::Arrays& arrays, const mlx::core::array& factor) {
        return mlx_fused::scale(arrays, factor);
      },
      "arrays"_a, "factor"_a, "The arrays times a scalar.");
  m.def("num_threads", &mlx_fused::cpu::num_threads,
        "Threads that an update on the CPU uses.");
  m.def("set_num_threads", &mlx_fused::cpu::set_num_threads, "count"_a,
        "Sets the threads that an update on the CPU uses.");
}
