#include "check.h"

#include <map>
#include <mutex>
#include <sstream>
#include <tuple>
#include <vector>

#include "composed.h"
#include "metal/backend.h"
#include "mlx/ops.h"
#include "mlx/random.h"
#include "mlx/transforms.h"
#include "primitives.h"

namespace mlx_fused {

namespace {

using Arrays = std::vector<mx::array>;

// Sizes that meet each path: a lone element, a tail, vectors, several tiles.
const std::vector<mx::Shape> check_shapes = {{1},    {7},    {64, 3},
                                             {9001}, {5, 4}, {33}};
// Tensors of the norm's check: as many as one of its launches takes.
constexpr size_t check_norm_count = 24;

std::vector<double> check_hyperparameters(Rule rule) {
  switch (rule) {
    case Rule::SGD:
      return {0.01};
    case Rule::Momentum:
      return {0.9, 0.8, 0.01, 1};
    case Rule::Adam:
      return {0.9, 0.1, 0.99, 0.01, 1e-8, 0.01, 1};
    case Rule::Lion:
      return {0.9, 0.1, 0.99, 0.01, 0.01};
    case Rule::RMSprop:
    case Rule::AdaDelta:
      return {0.9, 0.1, 1e-6};
    case Rule::Adagrad:
      return {1e-8};
    case Rule::Adamax:
      return {0.9, 0.1, 0.99, 1e-8};
    case Rule::Adafactor:
      return {0.01};
    case Rule::AdafactorWithMoment:
      return {0.9, 0.1, 0.01};
    case Rule::MuonMoment:
      return {0.9, 0.1, 0.01, 1};
    case Rule::Scale:
      return {};
  }
  return {};
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
                                   const mx::array& expected) {
  const auto x = mx::astype(actual, mx::float32);
  const auto difference =
      mx::max(mx::abs(x - expected) / (mx::abs(expected) + mx::array(1e-3f)))
          .item<float>();
  if (difference <= tolerance(actual.dtype())) {  // false for NaN
    return std::nullopt;
  }
  std::ostringstream message;
  message << "relative error " << difference << ", at most "
          << tolerance(actual.dtype()) << " is allowed";
  return message.str();
}

std::mutex trust_mutex;
using Key = std::tuple<int, mx::Dtype::Val, mx::Dtype::Val, mx::Dtype::Val,
                       mx::Device::DeviceType>;
std::map<Key, bool> trust;
std::string failures;

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

std::string describe(std::initializer_list<mx::Dtype> dtypes) {
  std::ostringstream text;
  for (const auto dtype : dtypes) {
    text << " " << dtype;
  }
  return text.str();
}

}  // namespace

std::optional<std::string> check_update(Rule rule, mx::Dtype parameter,
                                        mx::Dtype gradient, mx::Dtype state,
                                        mx::Stream stream) try {
  const mx::StreamContext context(stream);
  const GroupLayout layout{max_group_size(traits(rule).states),
                           traits(rule).states, traits(rule).reads_gradient,
                           /*scaled=*/true};
  Arrays inputs;
  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> dtypes;
  for (int tensor = 0; tensor < layout.tensors; ++tensor) {
    const auto& shape = check_shapes[tensor];
    for (int k = 0; k < layout.outputs_each(); ++k) {
      shapes.push_back(shape);
      dtypes.push_back(k == 0 ? parameter : state);
      inputs.push_back(sample(shape, dtypes.back(), inputs.size()));
    }
    if (layout.reads_gradient) {
      inputs.push_back(transposed(sample(shape, gradient, inputs.size())));
    }
  }
  inputs.push_back(mx::array(0.1f));
  inputs.push_back(mx::array(uint64_t{3}));
  inputs.push_back(mx::array(0.75f));
  // Held by us, so the kernel works on copies.
  mx::eval(inputs);

  const auto hyperparameters = check_hyperparameters(rule);
  auto actual = mx::array::make_arrays(
      shapes, dtypes,
      std::make_shared<FusedUpdate>(stream, rule, hyperparameters, layout),
      inputs);
  Arrays wide;
  for (const auto& input : inputs) {
    wide.push_back(
        input.dtype() == mx::uint64 ? input : mx::astype(input, mx::float32));
  }
  auto expected = composed_update(rule, hyperparameters, layout, stream)(wide);
  mx::eval(actual);
  for (size_t i = 0; i < actual.size(); ++i) {
    if (auto difference = compare(actual[i], expected[i])) {
      return difference;
    }
  }
  return std::nullopt;
} catch (const KernelError& error) {
  return error.what();
}

std::optional<std::string> check_norm(mx::Dtype dtype, mx::Stream stream) try {
  const mx::StreamContext context(stream);
  Arrays inputs;
  for (size_t i = 0; i < check_norm_count; ++i) {
    const auto& shape = check_shapes[i % check_shapes.size()];
    inputs.push_back(transposed(sample(shape, dtype, i)));
  }
  inputs.push_back(mx::array(2.0f));
  mx::eval(inputs);
  auto actual =
      mx::array::make_arrays({{}, {}}, {mx::float32, mx::float32},
                             std::make_shared<GlobalNorm>(stream), inputs);
  const auto expected = composed_norm(stream)(inputs);
  mx::eval(actual);
  for (size_t i = 0; i < actual.size(); ++i) {
    if (auto difference = compare(actual[i], expected[i])) {
      return difference;
    }
  }
  return std::nullopt;
} catch (const KernelError& error) {
  return error.what();
}

bool is_trusted(Rule rule, mx::Dtype parameter, mx::Dtype gradient,
                mx::Dtype state, mx::Stream stream) {
  return look_up(
      {static_cast<int>(rule), parameter.val(), gradient.val(), state.val(),
       stream.device.type},
      traits(rule).name + describe({parameter, gradient, state}),
      [&] { return check_update(rule, parameter, gradient, state, stream); });
}

bool is_trusted_norm(mx::Dtype dtype, mx::Stream stream) {
  return look_up(
      {-1, dtype.val(), dtype.val(), dtype.val(), stream.device.type},
      "norm" + describe({dtype}), [&] { return check_norm(dtype, stream); });
}

std::string take_failures() {
  const std::lock_guard lock(trust_mutex);
  return std::exchange(failures, {});
}

void reset_trust() {
  const std::lock_guard lock(trust_mutex);
  trust.clear();
  failures.clear();
}

}  // namespace mlx_fused
