#include "metal/kernel_source.h"

#include <algorithm>
#include <vector>

#include "metal/launch.h"
#include "metal_sources.h"
#include "program.h"

namespace mlx_fused {

namespace {

// The name of an array in the type Slots: what is read, and behind "new_" what
// is written.
std::string name_of(const RuleTraits& rule, const Part& part) {
  const bool has_parameter = rule.slots[0].role == Role::parameter;
  const auto number = std::to_string(part.slot - has_parameter);
  switch (rule.slots[part.slot].role) {
    case Role::parameter:
      return part.is_companion ? "error" : "parameter";
    case Role::gradient:
      return "gradient";
    default:
      return (part.is_companion ? "scales" : "state") + number;
  }
}

std::string type_of(const Format& format, const Part& part) {
  return part.is_companion    ? format.has_codes()                   ? "float"
                                : format.storage == Storage::split24 ? "int8_t"
                                                                     : "int16_t"
         : format.has_codes() ? "uint8_t"
                              : metal_type(format.dtype);
}

std::string buffer(const std::string& type, const std::string& name,
                   int index) {
  return "    " + type + " " + name + " [[buffer(" + std::to_string(index) +
         ")]],\n";
}

// Text with $1, $2, ... replaced.
std::string filled(std::string text, const std::vector<std::string>& values) {
  for (size_t i = values.size(); i > 0; --i) {
    const auto mark = "$" + std::to_string(i);
    for (size_t at = 0; (at = text.find(mark, at)) != std::string::npos;
         at += values[i - 1].size()) {
      text.replace(at, mark.size(), values[i - 1]);
    }
  }
  return text;
}

// An operand in a rule's text.
std::string text_of(const Program& program, const Operand& operand) {
  const auto i = std::to_string(operand.index);
  switch (operand.kind) {
    case Operand::slot:
      return operand.index + 1u == program.results.size() ? "g"
             : operand.index == 0 && program.has_parameter
                 ? "p"
                 : "s[" +
                       std::to_string(operand.index - program.has_parameter) +
                       "]";
    case Operand::result:
      return "x" + i;
    case Operand::number:
      return "numbers_[" + i + "].value";
    default:
      return "scalars_[" + i + "]";
  }
}

// A program as a rule in the language of metal/update_rules.h.
std::string rule_text(const RuleTraits& traits) {
  const auto& program = *traits.program;
  const auto constant = [](const std::string& type, const std::string& name,
                           const std::string& value) {
    return "  static constexpr constant " + type + " " + name + " = " + value +
           ";\n";
  };
  const auto is_written = [&](size_t slot) {
    return program.results[slot] ? "true" : "false";
  };
  const auto states = program.states.size();
  std::string text =
      "\ntemplate <typename T>\nstruct " + traits.name + " : RuleDefaults {\n";
  // The numbers stand first.
  if (program.numbers > 0) {
    text += "  Number<T> numbers_[" + std::to_string(program.numbers) + "];\n";
  }
  if (program.scalars > 0) {
    text += "  T scalars_[" + std::to_string(program.scalars) + "];\n";
  }
  text += constant("int", "numbers", std::to_string(program.numbers)) +
          constant("int", "states", std::to_string(states)) +
          constant("bool", "reads_parameter",
                   program.has_parameter ? "true" : "false") +
          constant("bool", "writes_parameter",
                   program.has_parameter ? is_written(0) : "false") +
          constant("bool", "writes_gradient",
                   is_written(program.results.size() - 1)) +
          "\n  void prepare(constant float* values) thread {\n";
  for (int i = 0; i < program.scalars; ++i) {
    const auto number = std::to_string(i);
    text += "    scalars_[" + number + "] = values[" + number + "];\n";
  }
  text +=
      "  }\n\n"
      "  void update(thread T& g, thread T& p, thread T* s) const thread {\n";
  for (size_t i = 0; i < program.instructions.size(); ++i) {
    const auto& [operation, operands] = program.instructions[i];
    const auto& [name, primitive, count, is_truth] = traits_of(operation);
    text += "    const T x" + std::to_string(i) + " = op_" + name + "(";
    for (int k = 0; k < count; ++k) {
      text += (k > 0 ? ", " : "") + text_of(program, operands[k]);
    }
    text += ");\n";
  }
  // All that is read before anything is written.
  std::string writes;
  for (size_t slot = 0; slot < program.results.size(); ++slot) {
    if (const auto& result = program.results[slot]) {
      const auto name = "y" + std::to_string(slot);
      text += "    const T " + name + " = " + text_of(program, *result) + ";\n";
      writes += "    " +
                text_of(program, {Operand::slot, static_cast<uint16_t>(slot)}) +
                " = " + name + ";\n";
    }
  }
  return text + writes + "  }\n};\n";
}

}  // namespace

std::string metal_type(mx::Dtype dtype) {
  return dtype == mx::float32    ? "float"
         : dtype == mx::float16  ? "half"
         : dtype == mx::bfloat16 ? "bfloat"
         : dtype == mx::int8     ? "int8_t"
         : dtype == mx::uint8    ? "uint8_t"
                                 : "int16_t";
}

bool UpdateKernel::is_separate(const Part& part) const {
  const auto role = layout.rule->slots[part.slot].role;
  const bool is_state = role == Role::state || part.is_companion;
  return part.is_written && part.is_read && (!is_state || separate_states);
}

BlockSize UpdateKernel::block_size() const {
  if (!layout.has_codes()) {
    return {64, 64};
  }
  return {layout.formats.back().dtype == mx::float32 ? 32 : 64, 128};
}

int UpdateKernel::buffers_per_tensor() const {
  int buffers = 0;
  for (const auto& part : layout.parts) {
    buffers += is_separate(part) ? 2 : 1;
  }
  return buffers;
}

int UpdateKernel::tensors_per_launch() const {
  const int most = layout.has[coefficient] ? coefficient_buffer
                   : layout.has[seed]      ? seed_buffer
                                           : scalars_buffer;
  return std::min<int>(max_group_size(*layout.rule, layout.formats),
                       most / buffers_per_tensor());
}

std::string UpdateKernel::name() const {
  std::string name = "fused_update_" + layout.rule->name;
  for (const auto& format : layout.formats) {
    name += "_";
    if (format.storage != Storage::plain) {
      name += mlx_fused::name_of(format.storage);
    }
    if (!format.has_codes()) {
      name += metal_type(format.dtype);
    }
  }
  return name + (separate_states ? "_separate" : "") +
         (stages_gradient ? "_staged" : "");
}

std::string UpdateKernel::source() const {
  const auto& rule = *layout.rule;
  const bool reads_parameter = rule.slots[0].role == Role::parameter;
  const std::string states = std::to_string(rule.states.size());
  const auto [rows, columns] = block_size();
  const auto shape = std::to_string(rows) + ", " + std::to_string(columns);
  int coded = 0, scales_block = 64;
  std::string fields, loads, stores, load_scales, store_scales, in_place;
  for (const auto& part : layout.parts) {
    const auto& format = layout.format(part);
    const auto type = type_of(format, part);
    const auto name = name_of(rule, part);
    if (part.is_read) {
      fields += "  const device " + type + "* " + name + ";\n";
    }
    if (part.is_written) {
      fields += "  device " + type + "* new_" + name + ";\n";
      // Without an input there are zeros to write.
      in_place +=
          part.is_read ? " && " + name + " == new_" + name : " && false";
    }
    const bool is_state = rule.slots[part.slot].role == Role::state;
    if (part.is_companion || (!is_state && name != "parameter")) {
      continue;
    }
    const auto values =
        is_state ? "s[" + std::to_string(part.slot - reads_parameter) + "]"
                 : "p";
    if (format.has_codes()) {
      scales_block = format.block();
      const std::vector<std::string> words = {
          format.storage == Storage::codes8 ? "8" : "4",
          format.is_never_negative ? "true" : "false",
          std::to_string(part.slot - reads_parameter), std::to_string(coded++)};
      loads += filled(
          "    load_codes<$1, $2>(state$3, at, raw.codes[$3]);\n"
          "    decode_vector<$1, $2>(raw.codes[$3], "
          "scales[$4 * pitch + index / block_size], s[$3]);\n",
          words);
      stores += filled(
          "    float scale$3 = scales[$4 * pitch + index / block_size];\n"
          "    if (!skip) {\n"
          "      scale$3 = encode_vector<$1, $2>(s[$3], at.count, "
          "raw.codes[$3]);\n"
          "    }\n"
          "    if (index % block_size == 0) {\n"
          "      scales[(coded + $4) * pitch + index / block_size] = scale$3;\n"
          "    }\n"
          "    store_codes<$1>(raw.codes[$3], at, new_state$3);\n",
          words);
      load_scales += filled(
          "    scales[$4 * pitch + j] = from < 0 ? 0.0f : scales$3[from];\n",
          words);
      store_scales +=
          filled("      new_scales$3[to] = scales[(coded + $4) * pitch + j];\n",
                 words);
      continue;
    }
    const std::vector<std::string> words = {
        name, values, type,
        type_of(format, {part.slot, true, part.is_written})};
    if (format.is_split()) {
      loads += filled(
          "    load_vector($1, at, raw.weights);\n"
          "    load_vector(error, at, raw.errors);\n"
          "    FOR_EACH_OF_VECTOR {\n"
          "      p[i] = Master<$3, $4>::joined(raw.weights[i], "
          "raw.errors[i]);\n"
          "    }\n",
          words);
      if (part.is_written) {
        stores += filled(
            "    if (!skip) {\n"
            "      FOR_EACH_OF_VECTOR {\n"
            "        Master<$3, $4>::split(p[i], raw.weights[i], "
            "raw.errors[i]);\n"
            "      }\n"
            "    }\n"
            "    store_vector(raw.weights, at, new_$1);\n"
            "    store_vector(raw.errors, at, new_error);\n",
            words);
      }
      continue;
    }
    loads += filled(part.is_read ? "    load_vector($1, at, $2);\n"
                                 : "    FOR_EACH_OF_VECTOR { $2[i] = 0.0f; }\n",
                    words);
    if (part.is_written) {
      if (format.storage == Storage::stochastic) {
        stores += filled(
            "    if (!skip) {\n"
            "      round_vector<$3>(key, first, at, $2);\n"
            "    }\n",
            words);
      }
      stores += filled("    store_vector($2, at, new_$1);\n", words);
    }
  }

  std::string buffers, choice;
  for (int tensor = 0, index = 0; tensor < tensors_per_launch(); ++tensor) {
    const auto number = std::to_string(tensor);
    choice += tensor == 0 ? "  if (i == 0) {\n"
                          : " else if (i == " + number + ") {\n";
    for (const auto& part : layout.parts) {
      const auto name = name_of(rule, part);
      const auto type = "device " + type_of(layout.format(part), part) + "*";
      const bool reads_alone = !part.is_written || is_separate(part);
      const auto argument = name + "_" + number;
      buffers +=
          buffer(reads_alone ? "const " + type : type, argument, index++);
      if (part.is_read) {
        choice += "    slots." + name + " = " + argument + ";\n";
      }
      if (part.is_written) {
        choice += "    slots.new_" + name + " = " +
                  (reads_alone ? "new_" : "") + argument + ";\n";
      }
      if (is_separate(part)) {
        buffers += buffer(type, "new_" + argument, index++);
      }
    }
    choice += "  }";
  }
  // The value of a scalar for this tensor.
  std::string bound;
  const auto value = [&](Scalar kind) {
    const auto& [name, dtype, type] = scalar_kinds[kind];
    if (bound.find(name) == std::string::npos) {
      bound += std::string(name) + ",";
      buffers += buffer(std::string("constant ") + type + "*", name,
                        buffer_of_scalar(kind));
    }
    return std::string(name) + "[" +
           (kind == seed ? "0"
                         : "tensors[i].scalars[" + std::to_string(kind) + "]") +
           "]";
  };
  const auto prepare =
      rule.program
          ? "  rule.prepare(" +
                (rule.reads_learning_rate ? "&" + value(learning_rate)
                                          : std::string("numbers")) +
                ");\n"
          : "  rule.prepare(" +
                (rule.reads_learning_rate ? value(learning_rate) : "0") +
                ", float(" + (rule.reads_step ? value(step) : "0") + ")" +
                (rule.reads_coefficient ? ", " + value(coefficient) : "") +
                ");\n";
  const auto key = layout.has[seed]
                       ? "  slots.key = random_key<uint>(" + value(seed) +
                             ", uint(" + value(step) +
                             "), tensors[i].number);\n"
                             "  slots.first = tensors[i].first;\n"
                       : "";
  const auto scale_and_skip = value(gradient_scale) + ", " + value(skip);
  buffers += buffer("constant float*", "numbers", numbers_buffer) +
             buffer("constant LaunchTensor*", "tensors", tensors_buffer) +
             buffer("constant int64_t*", "walks", walks_buffer);
  const std::string common = "(slots, tensors[i], walks, rule, " +
                             scale_and_skip + ", tile, thread_index";
  const std::string elements = "const thread Elements& at, int index, ";
  const std::string arrays = " Raw<" + states + ">& raw, thread float* p, " +
                             "thread float (*s)[vector_size]) const thread {\n";
  // A tile's scales, and as many new ones.
  const auto pitch = std::max(tile_size, rows * columns) / scales_block;
  return fused_update_source +
         (rule.program ? rule_text(rule) : std::string()) +
         "\nstruct Slots {\n" + fields +
         "  static constexpr constant int coded = " + std::to_string(coded) +
         ";\n  static constexpr constant int block_size = " +
         std::to_string(scales_block) +
         ";\n  static constexpr constant int pitch = " + std::to_string(pitch) +
         ";\n  threadgroup float* scales;\n  uint key;\n  int64_t first;\n" +
         "\n  void load(" + elements + "thread" + arrays + loads +
         "  }\n\n  void store(" + elements + "bool skip, thread" + arrays +
         stores +
         "  }\n\n  void load_scales(int j, int64_t from) const thread {\n" +
         load_scales +
         "  }\n\n  void store_scales(int j, int64_t to) const thread {\n"
         "    if (to >= 0) {\n" +
         store_scales +
         "    }\n  }\n\n  bool is_in_place() const thread {\n    return true" +
         in_place + ";\n  }\n};\n\n[[kernel]] void " + name() + "(\n" +
         buffers +
         "    uint tile [[threadgroup_position_in_grid]],\n"
         "    uint thread_index [[thread_position_in_threadgroup]]) {\n"
         "  const uint i = tensor_of_tile(tile, tensors);\n"
         "  Slots slots;\n" +
         choice + "\n  " +
         (rule.averages() ? "Averaged<" + rule.averaged + "<float>>"
                          : rule.name + "<float>") +
         " rule;\n" + "  set_numbers(rule, numbers + tensors[i].numbers);\n" +
         prepare + key +
         (coded > 0 ? "  threadgroup float scales[2 * Slots::coded * "
                      "Slots::pitch];\n  slots.scales = scales;\n"
                    : "") +
         (stages_gradient
              ? "  threadgroup " + metal_type(layout.formats.back().dtype) +
                    " stage[BlockShape<" + shape +
                    ">::staged];\n"
                    "  if (tensors[i].is_transposed != 0) {\n"
                    "    update_block<" +
                    shape + ">" + common + ", stage);\n    return;\n  }\n"
              : "") +
         "  update_tile" + common + ");\n}\n";
}

std::string sums_kernel_name(mx::Dtype dtype, bool counts) {
  return (counts ? "count_nonzero_" : "sums_of_squares_") + metal_type(dtype);
}

std::string sums_kernel_source(mx::Dtype dtype, bool counts) {
  const auto type = "const device " + metal_type(dtype) + "*";
  std::string buffers, choice = "  " + type + " in = in_0;\n";
  for (int i = 0; i < max_sums_group; ++i) {
    const auto number = std::to_string(i);
    buffers += buffer(type, "in_" + number, i);
    if (i > 0) {
      choice += "  in = i == " + number + " ? in_" + number + " : in;\n";
    }
  }
  return sums_source + "\n[[kernel]] void " + sums_kernel_name(dtype, counts) +
         "(\n" + buffers +
         buffer("device float2*", "partials", partials_buffer) +
         buffer("constant LaunchTensor*", "tensors", sums_tensors) +
         buffer("constant int64_t*", "walks", sums_walks) +
         "    uint tile [[threadgroup_position_in_grid]],\n"
         "    uint thread_index [[thread_position_in_threadgroup]],\n"
         "    uint simdgroups [[simdgroups_per_threadgroup]],\n"
         "    uint simdgroup [[simdgroup_index_in_threadgroup]],\n"
         "    uint lane [[thread_index_in_simdgroup]]) {\n"
         "  threadgroup float sums[2 * simd_size];\n"
         "  const uint i = tensor_of_tile(tile, tensors);\n" +
         choice + "  sum_tile<" + (counts ? "true" : "false") +
         ">(in, tensors[i], walks, partials, sums, tile, "
         "thread_index, simdgroups, simdgroup, lane);\n}\n";
}

}  // namespace mlx_fused
