#include "metal/kernel_source.h"

#include <algorithm>

#include "metal_sources.h"

namespace mlx_fused {

namespace {

// The names of a slot in the type Slots: what is read, and behind "new_" what
// is written.
std::string slot_name(const RuleTraits& rule, int slot) {
  switch (rule.slots[slot].role) {
    case Role::parameter:
      return "parameter";
    case Role::gradient:
      return "gradient";
    default:
      return "state" +
             std::to_string(slot - (rule.slots[0].role == Role::parameter));
  }
}

std::string buffer(const std::string& type, const std::string& name,
                   int index) {
  return "    " + type + " " + name + " [[buffer(" + std::to_string(index) +
         ")]],\n";
}

}  // namespace

std::string metal_type(mx::Dtype dtype) {
  return dtype == mx::float32   ? "float"
         : dtype == mx::float16 ? "half"
                                : "bfloat";
}

bool UpdateKernel::is_separate(int slot) const {
  const auto& [role, is_written] = rule->slots[slot];
  return is_written && (role != Role::state || separate_states);
}

int UpdateKernel::buffers_per_tensor() const {
  int buffers = 0;
  for (size_t slot = 0; slot < rule->slots.size(); ++slot) {
    buffers += is_separate(slot) ? 2 : 1;
  }
  return buffers;
}

int UpdateKernel::tensors_per_launch() const {
  return std::min<int>(max_group_size(*rule),
                       scalars_buffer / buffers_per_tensor());
}

std::string UpdateKernel::name() const {
  std::string name = "fused_update_" + rule->name;
  for (const auto dtype : dtypes) {
    name += "_" + metal_type(dtype);
  }
  return name + (separate_states ? "_separate" : "") +
         (stages_gradient ? "_staged" : "");
}

std::string UpdateKernel::source() const {
  const int slots = static_cast<int>(rule->slots.size());
  const std::string states = std::to_string(rule->states.size() + 1);
  std::string fields, loads, stores, buffers, choice;
  for (int slot = 0; slot < slots; ++slot) {
    const auto name = slot_name(*rule, slot);
    const auto type = metal_type(dtypes[slot]);
    fields += "  const device " + type + "* " + name + ";\n";
    if (rule->slots[slot].is_written) {
      fields += "  device " + type + "* new_" + name + ";\n";
    }
    if (rule->slots[slot].role == Role::state) {
      const auto values = ", s[" + name.substr(5) + "]";
      loads += "  load_vector(slots." + name + ", at" + values + ");\n";
      stores += "  store_vector(" + values.substr(2) + ", at, slots.new_" +
                name + ");\n";
    }
  }
  for (int tensor = 0, index = 0; tensor < tensors_per_launch(); ++tensor) {
    const auto number = std::to_string(tensor);
    choice += tensor == 0 ? "  if (i == 0) {\n"
                          : " else if (i == " + number + ") {\n";
    for (int slot = 0; slot < slots; ++slot) {
      const auto name = slot_name(*rule, slot);
      const auto type = "device " + metal_type(dtypes[slot]) + "*";
      const bool is_written = rule->slots[slot].is_written;
      const bool reads_alone = !is_written || is_separate(slot);
      const auto argument = name + "_" + number;
      choice += "    slots." + name + " = " + argument + ";\n";
      buffers +=
          buffer(reads_alone ? "const " + type : type, argument, index++);
      if (is_written) {
        choice += "    slots.new_" + name + " = " +
                  (reads_alone ? "new_" : "") + argument + ";\n";
      }
      if (is_separate(slot)) {
        buffers += buffer(type, "new_" + argument, index++);
      }
    }
    choice += "  }";
  }
  // The value of a scalar for this tensor.
  const auto value = [&](Scalar kind) {
    const bool is_there = kind == learning_rate ? rule->reads_learning_rate
                          : kind == step        ? rule->reads_step
                                                : true;
    if (!is_there) {
      return std::string("0");
    }
    const auto& [name, dtype, type] = scalar_kinds[kind];
    buffers += buffer(std::string("constant ") + type + "*", name,
                      static_cast<int>(scalars_buffer) + kind);
    return std::string(name) + "[tensors[i].scalars[" + std::to_string(kind) +
           "]]";
  };
  const auto prepare = "rule.prepare(" + value(learning_rate) + ", float(" +
                       value(step) + "));\n";
  const auto scale_and_skip = value(gradient_scale) + ", " + value(skip);
  buffers += buffer("constant float*", "numbers", numbers_buffer) +
             buffer("constant LaunchTensor*", "tensors", tensors_buffer) +
             buffer("constant int64_t*", "walks", walks_buffer);
  const auto values = " float (&s)[" + states + "][vector_size]";
  const std::string common = "(slots, tensors[i], walks, rule, " +
                             scale_and_skip + ", tile, thread_index";
  const auto gradient = metal_type(dtypes.back());
  return fused_update_source + "\nstruct Slots {\n" + fields +
         "};\n\nMETAL_FUNC void load_states(const thread Slots& slots, "
         "const thread Elements& at, thread" +
         values + ") {\n" + loads +
         "}\n\nMETAL_FUNC void store_states(const thread" + values +
         ", const thread Elements& at, const thread Slots& slots) {\n" +
         stores + "}\n\n[[kernel]] void " + name() + "(\n" + buffers +
         "    uint tile [[threadgroup_position_in_grid]],\n"
         "    uint thread_index [[thread_position_in_threadgroup]]) {\n"
         "  const uint i = tensor_of_tile(tile, tensors);\n"
         "  Slots slots;\n" +
         choice + "\n  " + rule->name + "<float> rule;\n" +
         "  set_numbers(rule, numbers + tensors[i].numbers);\n  " + prepare +
         (stages_gradient ? "  threadgroup " + gradient +
                                " stage[block * block_pitch];\n"
                                "  if (tensors[i].is_transposed != 0) {\n"
                                "    update_block" +
                                common + ", stage);\n    return;\n  }\n"
                          : "") +
         "  update_tile" + common + ");\n}\n";
}

std::string sums_kernel_name(mx::Dtype dtype) {
  return "sums_of_squares_" + metal_type(dtype);
}

std::string sums_kernel_source(mx::Dtype dtype) {
  const auto type = "const device " + metal_type(dtype) + "*";
  std::string buffers, choice = "  " + type + " in = in_0;\n";
  for (int i = 0; i < max_sums_group; ++i) {
    const auto number = std::to_string(i);
    buffers += buffer(type, "in_" + number, i);
    if (i > 0) {
      choice += "  in = i == " + number + " ? in_" + number + " : in;\n";
    }
  }
  return sums_source + "\n[[kernel]] void " + sums_kernel_name(dtype) + "(\n" +
         buffers + buffer("device float2*", "partials", partials_buffer) +
         buffer("constant LaunchTensor*", "tensors", sums_tensors) +
         buffer("constant int64_t*", "walks", sums_walks) +
         "    uint tile [[threadgroup_position_in_grid]],\n"
         "    uint thread_index [[thread_position_in_threadgroup]],\n"
         "    uint simdgroups [[simdgroups_per_threadgroup]],\n"
         "    uint simdgroup [[simdgroup_index_in_threadgroup]],\n"
         "    uint lane [[thread_index_in_simdgroup]]) {\n"
         "  threadgroup float sums[2 * simd_size];\n"
         "  const uint i = tensor_of_tile(tile, tensors);\n" +
         choice +
         "  sum_tile(in, tensors[i], walks, partials, sums, tile, "
         "thread_index, simdgroups, simdgroup, lane);\n}\n";
}

}  // namespace mlx_fused
