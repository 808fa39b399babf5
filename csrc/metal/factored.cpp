#include "metal/factored.h"

#include <algorithm>
#include <array>
#include <bit>
#include <string>
#include <vector>

#include "graph/placement.h"
#include "metal/encode.h"
#include "metal/kernel_source.h"
#include "metal_sources.h"

#define constant const
namespace mlx_fused {
#include "../../metal/factored.h"
}  // namespace mlx_fused
#undef constant

namespace mlx_fused {

namespace {

// Elements of a threadgroup's tile, and tiles of a tensor, about: of larger
// tensors tiles are larger.
constexpr int64_t tile_elements = 1 << 14;
constexpr int64_t most_tiles = 1 << 10;
// Matrices with fewer rows are read from where they are.
constexpr int64_t worth_staging = 16;

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t rounded_up(int64_t a, int64_t b) { return divided_up(a, b) * b; }

// Arguments that a launch's tensors share, behind their arrays.
enum Shared {
  partials,
  factors,
  updates,
  rule_numbers,
  tensor_table,
  walks,
  first_scalar,  // and the others, as in graph/layout.h
};
const char* const shared_types[first_scalar] = {"float* partials",
                                                "float* factors",
                                                "float* updates",
                                                "constant float* numbers",
                                                "",
                                                "constant int64_t* walks"};

// One array of a tensor as a kernel takes it.
struct Argument {
  const char* name;
  int slot;
  bool is_output = false;
};

// A kernel, for the dtypes of its group's slots.
struct Pass {
  std::string name;
  std::vector<Argument> arguments;  // of each tensor
  size_t tensors;                   // a launch
  std::vector<int> shared;          // in their order
  int output;                       // which of the shared is written, or -1
  std::string call;                 // what the kernel does
  std::string declarations = {};
  std::string index = "tensor_of_tile(tile, tensors)";

  std::string full_name(const std::vector<mx::Dtype>& dtypes) const {
    auto result = "factored_" + name;
    for (const auto& [argument, slot, is_output] : arguments) {
      result += is_output ? "" : "_" + metal_type(dtypes[slot]);
    }
    return result;
  }
  std::string source(const std::vector<mx::Dtype>& dtypes) const;
};

std::string Pass::source(const std::vector<mx::Dtype>& dtypes) const {
  std::string parameters, choice;
  int index_of_buffer = 0;
  const auto add = [&](const std::string& parameter) {
    parameters += "    " + parameter + " [[buffer(" +
                  std::to_string(index_of_buffer++) + ")]],\n";
  };
  for (size_t tensor = 0; tensor < tensors; ++tensor) {
    const auto number = std::to_string(tensor);
    for (const auto& [argument, slot, is_output] : arguments) {
      const auto type = (is_output ? "device " : "const device ") +
                        metal_type(dtypes[slot]) + "* ";
      const std::string place = std::string(argument) + "_" + number;
      add(type + place);
      choice += tensor == 0
                    ? "  " + type + argument + " = " + place + ";\n"
                    : "  " + std::string(argument) + " = i == " + number +
                          " ? " + place + " : " + argument + ";\n";
    }
  }
  for (const int kind : shared) {
    if (kind == tensor_table) {
      add("constant FactoredTensor* tensors");
    } else if (kind >= first_scalar) {
      const auto& [scalar, dtype, type] = scalar_kinds[kind - first_scalar];
      add(std::string("constant ") + type + "* " + scalar);
    } else {
      const std::string type = shared_types[kind];
      add(type[0] == 'c'   ? type
          : kind == output ? "device " + type
                           : "const device " + type);
    }
  }
  return factored_source + "\n[[kernel]] void " + full_name(dtypes) + "(\n" +
         parameters +
         "    uint tile [[threadgroup_position_in_grid]],\n"
         "    uint thread_index [[thread_position_in_threadgroup]],\n"
         "    uint simdgroup [[simdgroup_index_in_threadgroup]],\n"
         "    uint lane [[thread_index_in_simdgroup]]) {\n" +
         declarations +
         "  const Thread at = {thread_index, simdgroup, lane};\n" +
         "  const uint i = " + index + ";\n" + choice + call + "}\n";
}

const std::string declare_shared =
    "  threadgroup float shared[factored_threads / 32 * simdgroup_columns];\n";

// The value of a scalar for a kernel's tensor.
std::string value(Scalar kind) {
  return std::string(scalar_kinds[kind].name) + "[tensors[i].scalars[" +
         std::to_string(kind) + "]]";
}

std::string declare_rule(const std::string& rate) {
  return "  Adafactor<float> rule;\n"
         "  set_numbers(rule, numbers + tensors[i].numbers);\n"
         "  rule.prepare(" +
         rate + ", float(" + value(step) + "));\n";
}

// The passes of a rule, in their order.
std::array<Pass, 4> passes_of(const RuleTraits& rule,
                              const std::vector<mx::Dtype>& dtypes) {
  const int gradient = static_cast<int>(rule.slots.size()) - 1;
  const int column = rule.means, moment = rule.means + 1;
  const bool has_moment = moment < gradient;
  const auto scalar = [](Scalar kind) {
    return static_cast<int>(first_scalar) + kind;
  };
  std::vector<Argument> means = {{"column", column},
                                 {"new_column", column, true}};
  if (rule.means == 2) {
    means.insert(means.end(), {{"row", 1}, {"new_row", 1, true}});
  }
  std::vector<Argument> written = {
      {"gradient", gradient}, {"parameter", 0}, {"new_parameter", 0, true}};
  if (has_moment) {
    written.insert(written.end(),
                   {{"moment", moment}, {"new_moment", moment, true}});
  }
  const std::string row =
      rule.means == 2 ? "row, new_row" : "column, new_column";
  const auto types = "WriteSlots<" + metal_type(dtypes[0]) + ", " +
                     metal_type(dtypes[gradient]) + ", " +
                     metal_type(dtypes[has_moment ? moment : 0]) + ">";
  const std::string slots =
      has_moment ? "{parameter, new_parameter, moment, new_moment, gradient}"
                 : "{parameter, new_parameter, nullptr, nullptr, gradient}";
  return {
      Pass{"sums",
           {{"parameter", 0}, {"gradient", gradient}},
           6,
           {partials, tensor_table, walks, scalar(gradient_scale)},
           partials,
           "  sum_squares(parameter, gradient, tensors[i], walks, " +
               value(gradient_scale) + ", partials, shared, tile, at);\n",
           declare_shared},
      Pass{"means",
           means,
           6,
           {partials, factors, rule_numbers, tensor_table, scalar(step),
            scalar(skip)},
           factors,
           declare_rule("0") + "  update_means(" + row +
               ", column, new_column, tensors[i], rule, " + value(skip) +
               ", partials, factors, shared, tile, at);\n",
           declare_shared,
           "tensor_of_group(tile, tensors)"},
      Pass{"squares",
           {{"gradient", gradient}},
           6,
           {factors, updates, tensor_table, walks, scalar(gradient_scale)},
           updates,
           "  sum_update_squares(gradient, tensors[i], walks, " +
               value(gradient_scale) +
               ", factors, updates, shared, tile, at);\n",
           declare_shared},
      Pass{has_moment ? "write_moment" : "write",
           written,
           has_moment ? 4u : 6u,
           {partials, factors, updates, rule_numbers, tensor_table, walks,
            scalar(learning_rate), scalar(step), scalar(gradient_scale),
            scalar(skip)},
           -1,
           declare_rule(value(learning_rate)) + "  const " + types +
               " slots = " + slots + ";\n  write_update<" +
               (has_moment ? "true" : "false") +
               ">(slots, tensors[i], walks, rule, " + value(gradient_scale) +
               ", " + value(skip) +
               ", partials, factors, updates, shared, stage, tile, at);\n",
           declare_shared + "  threadgroup float stage[stage_size];\n"},
  };
}

bool is_by_fours(int64_t elements) { return elements % 4 == 0; }

// A gradient's matrices, by columns if they are to be swapped.
FactoredTensor walked(const mx::array& g, bool swaps,
                      std::vector<int64_t>& walk_entries) {
  FactoredTensor t{};
  const int dimensions = static_cast<int>(g.ndim());
  t.size = g.size();
  t.rows = dimensions > 1 ? g.shape(-2) : 1;
  t.row_stride = dimensions > 1 ? g.strides(-2) : 0;
  t.columns = dimensions > 0 ? g.shape(-1) : 1;
  t.column_stride = dimensions > 0 ? g.strides(-1) : 1;
  if (swaps) {
    t.is_swapped = 1;
    std::swap(t.rows, t.columns);
    std::swap(t.row_stride, t.column_stride);
  }
  t.dimensions = std::max(dimensions - 2, 0);
  t.walk = walk_entries.size();
  t.vectorized = t.column_stride == 1 && is_by_fours(t.row_stride) &&
                 is_by_fours(g.offset() / g.itemsize());
  for (uint32_t d = 0; d < t.dimensions; ++d) {
    walk_entries.push_back(g.shape(d));
    t.vectorized &= is_by_fours(g.strides(d));
  }
  for (uint32_t d = 0; d < t.dimensions; ++d) {
    walk_entries.push_back(g.strides(d));
  }
  t.rows_at_once = std::min<uint32_t>(factored_threads / 32,
                                      std::bit_ceil<uint64_t>(t.rows));
  const int64_t at_once =
      factored_threads / 32 / t.rows_at_once * simdgroup_columns;
  const int64_t height = tile_elements / simdgroup_columns;
  const int64_t growth = divided_up(t.size, tile_elements * most_tiles);
  t.tile_columns = rounded_up(
      std::min(t.columns, tile_elements / std::min(t.rows, height)), at_once);
  t.tile_rows =
      std::min(t.rows, growth * std::max(height, tile_elements / t.columns));
  t.tiles_down = divided_up(t.rows, t.tile_rows);
  t.tiles_across = divided_up(t.columns, t.tile_columns);
  return t;
}

int64_t matrices_of(const FactoredTensor& t) {
  return t.size / (t.rows * t.columns);
}

uint32_t tiles_of(const FactoredTensor& t) {
  return matrices_of(t) * t.tiles_down * t.tiles_across;
}

bool is_aligned(const mx::array& a) {
  return is_by_fours(a.offset() / a.itemsize());
}

// A part of a buffer between the passes.
class Space {
 public:
  uint32_t take(int64_t size) { return std::exchange(size_, size_ + size); }
  mx::array array(mx::Stream stream) const {
    mx::array a({std::max(static_cast<int>(size_), 1)}, mx::float32, nullptr,
                {});
    allocate(a);
    mx::metal::get_command_encoder(stream).add_temporary(a);
    return a;
  }

 private:
  int64_t size_ = 0;
};

}  // namespace

void eval_factored(const GroupUpdate& update, const Arrays& inputs,
                   Arrays& outputs, mx::Stream stream) {
  const auto& layout = *update.layout;
  const auto& rule = *layout.rule;
  const int gradient = layout.slots() - 1;
  std::vector<mx::Dtype> dtypes;
  for (int slot = 0; slot < layout.slots(); ++slot) {
    dtypes.push_back(inputs[layout.input(0, slot)].dtype());
  }
  const auto passes = passes_of(rule, dtypes);
  std::vector<Pipeline> pipelines;
  for (const auto& pass : passes) {
    pipelines.push_back(build(stream, pass.full_name(dtypes),
                              [&] { return pass.source(dtypes); }));
  }
  auto& encoder = mx::metal::get_command_encoder(stream);
  Placement placement(inputs, outputs, layout, [&] { return inputs; });

  std::vector<float> all_numbers;
  std::vector<uint32_t> first_number;
  std::vector<bool> scales_parameter;
  const auto scaling =
      std::find(rule.hyperparameters.begin(), rule.hyperparameters.end(),
                "scale_parameter") -
      rule.hyperparameters.begin();
  for (const auto& set : *update.sets) {
    const auto of_set = numbers(set);
    first_number.push_back(all_numbers.size());
    all_numbers.insert(all_numbers.end(), of_set.begin(), of_set.end());
    scales_parameter.push_back(of_set[3 * scaling] != 0);
  }

  // Each tensor's arrays, and how it is walked: by the first passes and by the
  // last.
  struct Tensor {
    Arrays sources, targets;
    FactoredTensor reading, writing;
  };
  std::vector<Tensor> tensors;
  std::vector<int64_t> walk_entries = {0};  // Metal binds no empty argument
  Space partial_space, factor_space, update_space;
  for (int i = 0, output = 0; i < layout.tensors; ++i) {
    Tensor tensor;
    for (int slot = 0; slot < layout.slots(); ++slot) {
      const auto& in = inputs[layout.input(i, slot)];
      tensor.sources.push_back(in);
      tensor.targets.push_back(in);
      if (slot == gradient) {
        continue;
      }
      auto& target = tensor.targets.back() = outputs[output];
      if (placement.in_place(output++)) {
        tensor.sources.back() = target;
      } else if (!in.flags().row_contiguous && in.size() > 0) {
        copy_array(in, target, stream);
        tensor.sources.back() = target;
      }
    }
    const auto& g = tensor.sources[gradient];
    if (g.size() == 0) {
      continue;
    }
    auto& writing = tensor.writing = walked(g, false, walk_entries);
    const bool is_transposed = rule.means == 2 && writing.row_stride == 1 &&
                               writing.column_stride != 1;
    writing.is_staged = is_transposed && writing.rows >= worth_staging;
    writing.is_whole = tiles_of(writing) == 1 &&
                       writing.rows * (writing.columns + 1) <= stage_size;
    writing.is_vector = rule.means == 1;
    writing.parameter_vectorized = 1;
    for (const int slot : {0, rule.means + 1}) {
      if (slot != gradient) {
        writing.parameter_vectorized &= is_aligned(tensor.sources[slot]) &&
                                        is_aligned(tensor.targets[slot]);
      }
    }
    const auto& entry = update.entries[i];
    writing.numbers = first_number[entry.hyperparameters];
    for (int kind = 0; kind < coefficient; ++kind) {
      const int input = layout.input(static_cast<Scalar>(kind));
      if (input >= 0 && update.per_tensor && inputs[input].size() > 1) {
        writing.scalars[kind] = inputs[input].strides(0) * entry.scalar;
      }
    }
    auto& reading = tensor.reading = walked(g, is_transposed, walk_entries);
    const int64_t matrices = matrices_of(reading);
    reading.is_vector = writing.is_vector;
    reading.is_whole = writing.is_whole;
    reading.numbers = writing.numbers;
    std::copy_n(writing.scalars, seed, reading.scalars);
    reading.parameter_vectorized = writing.parameter_vectorized;
    reading.sums = tiles_of(reading);
    if (scales_parameter[entry.hyperparameters]) {
      reading.parameter_share =
          rounded_up(divided_up(reading.size, reading.sums), 4);
    }
    reading.row_groups = divided_up(writing.rows, factored_threads);
    reading.column_groups = divided_up(writing.columns, factored_threads);
    reading.across_sums =
        partial_space.take(matrices * reading.rows *
                           divided_up(reading.columns, simdgroup_columns));
    reading.down_sums =
        partial_space.take(matrices * reading.tiles_down * reading.columns);
    reading.parameter_sums = partial_space.take(reading.sums);
    reading.down_factors = factor_space.take(matrices * reading.rows);
    reading.across_factors = factor_space.take(matrices * reading.columns);
    reading.row_sums = factor_space.take(matrices * reading.row_groups);
    reading.update_sums = update_space.take(reading.sums);
    writing.sums = reading.sums;
    writing.row_groups = reading.row_groups;
    writing.parameter_sums = reading.parameter_sums;
    writing.down_factors =
        is_transposed ? reading.across_factors : reading.down_factors;
    writing.across_factors =
        is_transposed ? reading.down_factors : reading.across_factors;
    writing.row_sums = reading.row_sums;
    writing.update_sums = reading.update_sums;
    tensors.push_back(std::move(tensor));
  }
  if (tensors.empty()) {
    placement.commit();
    return;
  }
  std::vector<mx::array> between = {partial_space.array(stream),
                                    factor_space.array(stream),
                                    update_space.array(stream)};

  for (size_t number = 0; number < passes.size(); ++number) {
    const auto& pass = passes[number];
    for (size_t first = 0; first < tensors.size(); first += pass.tensors) {
      const size_t count = std::min(pass.tensors, tensors.size() - first);
      std::vector<FactoredTensor> table;
      FactoredTensor end{};
      for (size_t i = first; i < first + count; ++i) {
        const bool is_last = number + 1 == passes.size();
        auto& t = table.emplace_back(is_last ? tensors[i].writing
                                             : tensors[i].reading);
        t.first_tile = end.first_tile;
        t.first_group = end.first_group;
        end.first_tile +=
            pass.name == "squares" && t.is_whole ? 0 : tiles_of(t);
        end.first_group += matrices_of(t) * (t.row_groups + t.column_groups);
      }
      table.push_back(end);
      const uint32_t threadgroups =
          pass.name == "means" ? end.first_group : end.first_tile;
      if (threadgroups == 0) {
        continue;
      }
      encoder.set_compute_pipeline_state(pipelines[number]);
      int index = 0;
      for (size_t place = 0; place < pass.tensors; ++place) {
        // Places left over are bound to the first tensor and never read.
        auto& tensor = tensors[first + (place < count ? place : 0)];
        for (const auto& [name, slot, is_output] : pass.arguments) {
          if (is_output) {
            encoder.set_output_array(tensor.targets[slot], index++);
          } else {
            encoder.set_input_array(tensor.sources[slot], index++);
          }
        }
      }
      for (const int kind : pass.shared) {
        if (kind >= first_scalar) {
          const auto scalar = static_cast<Scalar>(kind - first_scalar);
          if (layout.has[scalar]) {
            encoder.set_input_array(inputs[layout.input(scalar)], index++);
          } else if (scalar == gradient_scale) {
            encoder.set_bytes(1.0f, index++);
          } else {
            encoder.set_bytes(false, index++);
          }
        } else if (kind == rule_numbers) {
          encoder.set_vector_bytes(all_numbers, index++);
        } else if (kind == tensor_table) {
          encoder.set_vector_bytes(table, index++);
        } else if (kind == walks) {
          encoder.set_vector_bytes(walk_entries, index++);
        } else if (kind == pass.output) {
          encoder.set_output_array(between[kind], index++);
        } else {
          encoder.set_input_array(between[kind], index++);
        }
      }
      encoder.dispatch_threadgroups(MTL::Size(threadgroups, 1, 1),
                                    MTL::Size(factored_threads, 1, 1));
    }
  }
  placement.commit();
}

}  // namespace mlx_fused
