#include "check.h"

#include <map>
#include <mutex>
#include <sstream>
#include <tuple>
#include <vector>

#include "graph/composed.h"
#include "graph/fused_update.h"
#include "graph/sums_of_squares.h"
#include "metal/backend.h"
#include "mlx/ops.h"
#include "mlx/random.h"
#include "mlx/transforms.h"
#include "plan.h"

namespace mlx_fused {

namespace {

// Sizes that meet each path: a lone element, a tail, several tiles, strides;
// blocks of transposed matrices, with vectors and without.
const std::vector<mx::Shape> check_shapes = {{7},      {70, 36},    {9001},
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
  const auto difference =
      mx::max(mx::abs(x - expected) / (mx::abs(expected) + mx::array(1e-3f)))
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
using Key = std::tuple<const RuleTraits*, std::vector<mx::Dtype::Val>,
                       mx::Device::DeviceType>;
std::map<Key, bool> trust;
std::string failures;

std::vector<mx::Dtype::Val> vals(const std::vector<mx::Dtype>& dtypes) {
  std::vector<mx::Dtype::Val> result;
  for (const auto dtype : dtypes) {
    result.push_back(dtype.val());
  }
  return result;
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

std::string describe(const std::vector<mx::Dtype>& dtypes) {
  std::ostringstream text;
  for (const auto dtype : dtypes) {
    text << " " << dtype;
  }
  return text.str();
}

}  // namespace

std::optional<std::string> check_update(const RuleTraits& rule,
                                        const std::vector<mx::Dtype>& dtypes,
                                        mx::Stream stream) try {
  const mx::StreamContext context(stream);
  const int tensors = static_cast<int>(max_group_size(rule));
  GroupUpdate update{
      {&rule, tensors, {rule.reads_learning_rate, rule.reads_step, true, true}},
      nullptr,
      {},
      true};
  const auto& layout = update.layout;
  // Each tensor has scalars of its own: every second one decays, the first is
  // skipped.
  auto plain = check_hyperparameters(rule);
  for (size_t k = 0; k < plain.size(); ++k) {
    if (rule.hyperparameters[k] == "weight_decay") {
      plain[k] = 0.0;
    }
  }
  update.sets =
      std::make_shared<const Sets>(Sets{check_hyperparameters(rule), plain});
  Arrays inputs;
  std::vector<float> rates, scales;
  for (int tensor = 0; tensor < tensors; ++tensor) {
    update.entries.push_back(
        {static_cast<uint32_t>(tensor % 2), static_cast<uint32_t>(tensor)});
    rates.push_back(0.1f / static_cast<float>(tensor + 1));
    scales.push_back(0.75f - 0.1f * static_cast<float>(tensor));
    for (int slot = 0; slot < layout.slots(); ++slot) {
      auto shape =
          rule.means == 2 ? check_matrices[tensor] : check_shapes[tensor];
      if (rule.means == 1 && shape.size() > 1) {
        shape = {shape[0] * shape[1]};
      }
      const auto a =
          sample(rule.shape(slot, shape), dtypes[slot], inputs.size());
      const bool is_gradient = slot + 1 == layout.slots();
      inputs.push_back(is_gradient ? transposed(a) : a);
    }
  }
  if (rule.reads_learning_rate) {
    inputs.push_back(mx::array(rates.begin(), {tensors}));
  }
  if (rule.reads_step) {
    // At step 1 Adafactor forgets its means.
    inputs.push_back(mx::array(uint64_t{rule.is_factored() ? 3u : 1u}));
  }
  inputs.push_back(mx::array(scales.begin(), {tensors}));
  inputs.push_back(mx::equal(mx::arange(tensors), mx::array(0)));
  // Held by us, so the kernel works on copies.
  mx::eval(inputs);

  Arrays wide;
  for (const auto& input : inputs) {
    wide.push_back(mx::issubdtype(input.dtype(), mx::floating)
                       ? mx::astype(input, mx::float32)
                       : input);
  }
  auto expected = composed_update(update, /*keep_dtypes=*/true, stream)(wide);
  auto actual = FusedUpdate::make_outputs(
      std::make_shared<FusedUpdate>(stream, std::move(update)),
      std::move(inputs), {});
  mx::eval(actual);
  for (size_t i = 0; i < actual.size(); ++i) {
    if (auto difference =
            compare(actual[i], expected[i], tolerance(actual[i].dtype()))) {
      return difference;
    }
  }
  return std::nullopt;
} catch (const KernelError& error) {
  return error.what();
}

std::optional<std::string> check_sums(mx::Dtype dtype, mx::Stream stream) try {
  const mx::StreamContext context(stream);
  Arrays inputs;
  for (size_t i = 0; i < check_sums_count; ++i) {
    const auto& shape = check_shapes[i % check_shapes.size()];
    inputs.push_back(transposed(sample(shape, dtype, i)));
  }
  // MLX adds thousands of squares in float32, and loses more than we do.
  const mx::array limit(2.0f);
  mx::eval(inputs);
  auto actual = SumsOfSquares::make_outputs(inputs, limit, stream);
  inputs.push_back(limit);
  const auto expected = composed_sums(stream)(inputs);
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

bool is_trusted(const RuleTraits& rule, const std::vector<mx::Dtype>& dtypes,
                mx::Stream stream) {
  return look_up({&rule, vals(dtypes), stream.device.type},
                 rule.name + describe(dtypes),
                 [&] { return check_update(rule, dtypes, stream); });
}

bool is_trusted_sum(mx::Dtype dtype, mx::Stream stream) {
  return look_up({nullptr, vals({dtype}), stream.device.type},
                 "sums" + describe({dtype}),
                 [&] { return check_sums(dtype, stream); });
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
