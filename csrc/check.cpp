#include "check.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <sstream>
#include <tuple>
#include <vector>

#include "graph/composed.h"
#include "graph/formats.h"
#include "graph/fused_update.h"
#include "graph/sums_of_squares.h"
#include "metal/backend.h"
#include "mlx/ops.h"
#include "mlx/random.h"
#include "mlx/transforms.h"
#include "plan.h"
#include "program.h"

namespace mlx_fused {

namespace {

// Sizes that meet each path: a lone element, a tail, several tiles, strides;
// blocks of transposed matrices, with vectors and without, and with whole
// blocks of codes.
const std::vector<mx::Shape> check_shapes = {{7},      {72, 192},   {9001},
                                             {66, 18}, {2, 20, 24}, {1}};
// The same for Adafactor's matrices: one tile and several, rows that are walked
// as columns and turned, strides without neighbours, a lone row.
const std::vector<mx::Shape> check_matrices = {
    {1, 7}, {140, 130}, {64, 3}, {3, 40, 36}, {5, 4}, {1, 300}};
// Arrays of the check of sums: as many as one of its launches takes.
constexpr size_t check_sums_count = 24;

// Hyper-parameters that make the most of small mistakes: at step 1, 1 - beta2
// is lost by a careless power.
Hyperparameters check_hyperparameters(const RuleTraits& rule) {
  Hyperparameters values;
  for (const auto& name : rule.hyperparameters) {
    // Adafactor's moment is subtracted from the parameter, and must be smaller.
    values.push_back(name == "beta2"                         ? 0.999
                     : name == "eps"                         ? 1e-6
                     : name == "weight_decay"                ? 0.01
                     : name == "decay_rate"                  ? -0.8
                     : name == "relative_step"               ? 0.0
                     : name == "beta1" && rule.is_factored() ? 0.1
                                                             : 0.9);
  }
  return values;
}

// Half of a unit in the last place of the dtype is what rounding may cost;
// twice as much where the float32 result lies near the middle of two values.
double tolerance(mx::Dtype dtype) {
  return dtype == mx::float32   ? 1e-5
         : dtype == mx::float16 ? 1.0 / (1 << 10)
                                : 1.0 / (1 << 7);
}

// Values between 0.5 and 1.5: every rule is smooth there, so an error is not
// magnified by what it is fed.
mx::array sample(const mx::Shape& shape, mx::Dtype dtype, uint64_t seed) {
  return mx::astype(mx::random::uniform(0.5f, 1.5f, shape, mx::float32,
                                        mx::random::key(seed)),
                    dtype);
}

// The same values in another order in memory, so that reading strides is
// checked too; arrays of one dimension stay as they are.
mx::array transposed(const mx::array& a) {
  return mx::transpose(mx::contiguous(mx::transpose(a)));
}

std::optional<std::string> compare(const mx::array& actual,
                                   const mx::array& expected, double allowed) {
  const auto x = mx::astype(actual, mx::float32);
  // Infinite or no number in both is right.
  const auto is_same =
      mx::logical_or(mx::equal(x, expected),
                     mx::logical_and(mx::isnan(x), mx::isnan(expected)));
  const auto difference =
      mx::max(mx::where(is_same, mx::array(0.0f),
                        mx::abs(x - expected) /
                            (mx::abs(expected) + mx::array(1e-3f))))
          .item<float>();
  if (difference <= allowed) {  // false for NaN
    return std::nullopt;
  }
  std::ostringstream message;
  message << "relative error " << difference << ", at most " << allowed
          << " is allowed";
  return message.str();
}

std::mutex trust_mutex;
using Key = std::tuple<const RuleTraits*,
                       std::vector<std::pair<mx::Dtype::Val, Storage>>,
                       mx::Device::DeviceType>;
std::map<Key, bool> trust;
std::string failures;

Key key_of(const RuleTraits* rule, const Formats& formats, mx::Stream stream) {
  Key key{rule, {}, stream.device.type};
  for (const auto& format : formats) {
    std::get<1>(key).emplace_back(format.dtype.val(), format.storage);
  }
  return key;
}

template <typename Check>
bool look_up(const Key& key, const std::string& name, const Check& check) {
  {
    const std::lock_guard lock(trust_mutex);
    if (const auto known = trust.find(key); known != trust.end()) {
      return known->second;
    }
  }
  const auto failure = check();
  const std::lock_guard lock(trust_mutex);
  trust[key] = !failure;
  if (failure) {
    failures += name + ": " + *failure + "\n";
  }
  return !failure;
}

std::string describe(const Formats& formats) {
  std::ostringstream text;
  for (const auto& format : formats) {
    text << " ";
    if (format.storage != Storage::plain) {
      text << name_of(format.storage);
    }
    if (!format.has_codes()) {
      text << format.dtype;
    }
  }
  return text.str();
}

// What a slot's values may differ by: for codes, by a code.
double tolerance(const Format& format) {
  return format.storage == Storage::codes8    ? 0.07
         : format.storage == Storage::codes4  ? 1.5
         : format.storage == Storage::split24 ? 1.0 / (1 << 14)
         : format.storage == Storage::split32 ? 1e-5
                                              : tolerance(format.dtype);
}

}  // namespace

namespace {

// What is checked: an update of as many tensors as a group has at most. Each
// has scalars of its own: every second one decays, the first is skipped.
GroupUpdate check_group(const RuleTraits& rule, const Formats& formats) {
  const bool is_random = formats[0].storage == Storage::stochastic;
  const int tensors = static_cast<int>(max_group_size(rule, formats));
  GroupUpdate update{
      std::make_shared<GroupLayout>(
          rule, tensors,
          std::array<bool, scalar_count>{
              rule.reads_learning_rate, rule.reads_step || is_random, true,
              true, rule.reads_coefficient, is_random},
          formats),
      nullptr,
      {},
      true};
  auto plain = check_hyperparameters(rule);
  for (size_t k = 0; k < plain.size(); ++k) {
    if (rule.hyperparameters[k] == "weight_decay") {
      plain[k] = 0.0;
    }
  }
  update.sets =
      std::make_shared<const Sets>(Sets{check_hyperparameters(rule), plain});
  for (uint32_t tensor = 0; tensor < static_cast<uint32_t>(tensors); ++tensor) {
    update.entries.push_back({tensor % 2, tensor, {tensor}});
  }
  return update;
}

// Its inputs, the same each time, but nobody else's.
Arrays check_inputs(const GroupLayout& layout) {
  const auto& rule = *layout.rule;
  const auto& formats = layout.formats;
  const int tensors = layout.tensors;
  Arrays inputs;
  std::vector<float> rates, scales, coefficients;
  std::vector<uint64_t> steps;
  for (uint32_t tensor = 0; tensor < static_cast<uint32_t>(tensors); ++tensor) {
    rates.push_back(0.1f / static_cast<float>(tensor + 1));
    scales.push_back(0.75f - 0.1f * static_cast<float>(tensor));
    coefficients.push_back(0.9f - 0.1f * static_cast<float>(tensor));
    // At step 1 Adafactor forgets its means.
    steps.push_back(tensor + (rule.is_factored() ? 3 : 1));
    for (int slot = 0; slot < layout.slots(); ++slot) {
      const auto& format = formats[slot];
      auto shape =
          rule.means == 2 ? check_matrices[tensor] : check_shapes[tensor];
      if (rule.means == 1 && shape.size() > 1) {
        shape = {shape[0] * shape[1]};
      }
      const auto a = sample(rule.shape(slot, shape),
                            format.has_companion() ? mx::float32 : format.dtype,
                            inputs.size());
      const bool is_gradient = slot + 1 == layout.slots();
      if (format.has_companion()) {
        const auto [values, companion] =
            format.has_codes() ? encode(format, a) : split(format, a);
        inputs.push_back(values);
        inputs.push_back(companion);
      } else {
        inputs.push_back(is_gradient ? transposed(a) : a);
      }
    }
  }
  if (rule.reads_learning_rate) {
    auto rate = mx::array(rates.begin(), {tensors});
    if (rule.program) {  // a row of scalars each
      rate = mx::reshape(rate, {tensors, 1}) +
             mx::arange(0.0, rule.program->scalars, mx::float32) *
                 mx::array(0.01f);
    }
    inputs.push_back(mx::contiguous(rate));
  }
  if (layout.has[step]) {
    inputs.push_back(mx::array(steps.begin(), {tensors}));
  }
  inputs.push_back(mx::array(scales.begin(), {tensors}));
  inputs.push_back(mx::equal(mx::arange(tensors), mx::array(0)));
  if (layout.has[coefficient]) {
    inputs.push_back(mx::array(coefficients.begin(), {tensors}));
  }
  if (layout.has[seed]) {
    inputs.push_back(mx::array(uint32_t{7}));
  }
  mx::eval(inputs);
  return inputs;
}

// What differs between the outputs of a kernel and of plain operations.
std::optional<std::string> compare_outputs(const GroupLayout& layout,
                                           const Arrays& actual,
                                           const Arrays& expected,
                                           const Arrays& inputs) {
  const auto& rule = *layout.rule;
  for (size_t i = 0; i < actual.size(); ++i) {
    const auto& part = layout.parts[layout.written[i % layout.written.size()]];
    const auto& format = layout.format(part);
    auto found = actual[i], wanted = expected[i];
    if (format.has_companion()) {
      const int tensor = static_cast<int>(i / layout.written.size());
      const auto& shape = inputs[layout.gradient(tensor)].shape();
      ++i;  // the second of a pair
      const auto values = [&](const Arrays& arrays) {
        return format.is_split()
                   ? join(arrays[i - 1], arrays[i])
                   : decode(format, arrays[i - 1], arrays[i], shape);
      };
      found = values(actual);
      wanted = values(expected);
    }
    // A program's logarithm near 1 or difference near 0 magnifies what its
    // functions may be off.
    const double allowed = std::max(tolerance(format), rule.program ? 3e-4 : 0);
    if (auto difference = compare(found, wanted, allowed)) {
      return difference;
    }
  }
  return std::nullopt;
}

}  // namespace

std::optional<std::string> check_update(const RuleTraits& rule,
                                        const Formats& formats,
                                        mx::Stream stream,
                                        bool must_be_in_place) try {
  const mx::StreamContext context(stream);
  const auto update = check_group(rule, formats);
  const auto& layout = *update.layout;
  const auto inputs = check_inputs(layout);
  // In float32, where it is plain.
  Arrays wide;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const auto tensors = static_cast<size_t>(layout.input(layout.tensors, 0));
    const bool widens =
        i < tensors &&
        layout.format(layout.parts[i % layout.parts.size()]).storage ==
            Storage::plain;
    wide.push_back(widens ? mx::astype(inputs[i], mx::float32) : inputs[i]);
  }
  const auto expected =
      composed_update(update, /*keep_dtypes=*/true, stream)(wide);
  const auto outputs_of = [&](Arrays given) {
    auto outputs = FusedUpdate::make_outputs(
        std::make_shared<FusedUpdate>(stream, update), std::move(given), {});
    mx::eval(outputs);
    return outputs;
  };
  // First on copies, because we hold the inputs, then in their memory.
  if (auto difference =
          compare_outputs(layout, outputs_of(inputs), expected, inputs)) {
    return difference;
  }
  auto given = check_inputs(layout);
  mx::synchronize(stream);  // nothing under way holds them
  std::vector<const void*> memory;
  for (int tensor = 0; tensor < layout.tensors; ++tensor) {
    for (const int part : layout.written) {
      memory.push_back(given[layout.input(tensor, part)].buffer().ptr());
    }
  }
  const auto actual = outputs_of(std::move(given));
  for (size_t i = 0; i < actual.size() && must_be_in_place; ++i) {
    const auto& part = layout.parts[layout.written[i % layout.written.size()]];
    // A gradient that is transposed moves where its order has to change.
    if (rule.slots[part.slot].role != Role::gradient &&
        actual[i].buffer().ptr() != memory[i]) {
      return "an array was copied that nobody holds";
    }
  }
  return compare_outputs(layout, actual, expected, inputs);
} catch (const KernelError& error) {
  return error.what();
}

std::optional<std::string> check_sums(mx::Dtype dtype, bool counts,
                                      mx::Stream stream) try {
  const mx::StreamContext context(stream);
  Arrays inputs;
  for (size_t i = 0; i < check_sums_count; ++i) {
    const auto& shape = check_shapes[i % check_shapes.size()];
    auto a = transposed(sample(shape, dtype, i));
    if (counts) {  // some of them zero
      a = mx::maximum(a - mx::array(1.0f, dtype), mx::array(0.0f, dtype));
    }
    inputs.push_back(a);
  }
  // MLX adds thousands of squares in float32, and loses more than we do.
  const mx::array limit(2.0f);
  mx::eval(inputs);
  auto actual = SumsOfSquares::make_outputs(inputs, limit, counts, stream);
  inputs.push_back(limit);
  auto expected = composed_sums(counts, stream)(inputs);
  // The carry, as what it stands for.
  for (auto* found : {&actual, &expected}) {
    found->back() = mx::sqrt(mx::sum(mx::square(found->back())));
  }
  mx::eval(actual);
  for (size_t i = 0; i < actual.size(); ++i) {
    if (auto difference = compare(actual[i], expected[i], 5e-5)) {
      return difference;
    }
  }
  return std::nullopt;
} catch (const KernelError& error) {
  return error.what();
}

bool is_trusted(const RuleTraits& rule, const Formats& formats,
                mx::Stream stream) {
  return look_up(key_of(&rule, formats, stream), rule.name + describe(formats),
                 [&] { return check_update(rule, formats, stream); });
}

bool is_trusted_sum(mx::Dtype dtype, bool counts, mx::Stream stream) {
  const Formats formats(counts ? 2 : 1, {Storage::plain, dtype});
  return look_up(key_of(nullptr, formats, stream),
                 (counts ? "counts" : "sums") + describe({formats[0]}),
                 [&] { return check_sums(dtype, counts, stream); });
}

std::string take_failures() {
  const std::lock_guard lock(trust_mutex);
  return std::exchange(failures, {});
}

void reset_trust() {
  const std::lock_guard lock(trust_mutex);
  trust.clear();
  failures.clear();
  reset_plans();
}

}  // namespace mlx_fused
