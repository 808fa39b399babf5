"""mlx.optimizers is the oracle: same trees, same keys, same numbers."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as stock
import mlx_fused_optimizers as optim
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from support import (
    FLOATS,
    HAS_FLAT_ADAFACTOR,
    LAYOUTS,
    assert_trees_match,
    copy_tree,
    every_fused_optimizer,
    every_optimizer,
    fill,
    leaves_of,
    oracle,
    random_array,
    snapshot,
    to_numpy,
    trees,
)

# A step may differ by rounding alone.
STEP_TOLERANCE = 2e-6

# The backend fixture sets a device for the whole test, which suits every example.
many = settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)


class ExactBeta(float):
    """A beta with which stock's bias correction, 1 - beta**step, does not cancel.

    Stock loses 1.3e-5 of 1 - 0.999 to float32's rounding of 0.999.
    """

    def __pow__(self, step: Any, modulo: None = None) -> Any:
        return Power(math.log(self), step)


class Power(NamedTuple):
    logarithm: float
    step: mx.array

    def __rsub__(self, one: int) -> mx.array:
        return -mx.expm1(self.step * self.logarithm)


def both(name: str, options: dict[str, Any], learning_rate: Any = 1e-2) -> Any:
    ours = getattr(optim, name)(learning_rate=learning_rate, **options)
    theirs = getattr(oracle, name)(learning_rate=learning_rate, **options)
    if options.get("bias_correction"):
        theirs.betas = tuple(map(ExactBeta, theirs.betas))
    return ours, theirs


@every_optimizer
@many
@given(shapes=trees(), seed=st.integers(0, 2**32), layout=st.sampled_from([*LAYOUTS]))
def test_one_step_of_float32_agrees(
    backend: str,
    name: str,
    options: dict[str, Any],
    shapes: Any,
    seed: int,
    layout: str,
) -> None:
    rng = np.random.default_rng(seed)
    parameters = fill(shapes, rng, mx.float32)
    # Stock's Muon divides by zero for a matrix without columns, and its Adafactor may
    # not return from a reduction of no elements.
    if name in ("Adafactor", "Muon"):
        assume(all(x.size > 0 for x in leaves_of(parameters).values()))
    if name == "Adafactor" and HAS_FLAT_ADAFACTOR:
        parameters = tree_map(
            lambda x: x.flatten(0, -2) if x.ndim > 2 else x, parameters
        )
    ours, theirs = both(name, options)
    mine, reference = copy_tree(parameters), copy_tree(parameters)
    # Adafactor's means, norms and Muon's products are summed in another order: a small
    # element of an update has the rounding errors of the large ones.
    absolute = {"Adafactor": 1e-6, "LAMB": 1e-7, "Muon": 1e-7}.get(name, 1e-8)
    for _ in range(2):
        gradients = fill(parameters, rng, mx.float32, layout)
        mine = ours.apply_gradients(gradients, mine)
        reference = theirs.apply_gradients(gradients, reference)
        assert_trees_match(mine, reference, STEP_TOLERANCE, absolute)
        assert_trees_match(ours.state, theirs.state, STEP_TOLERANCE, absolute)


@every_optimizer
def test_hundred_steps_of_float32_agree(
    backend: str, name: str, options: dict[str, Any]
) -> None:
    rng = np.random.default_rng(7)
    parameters = {
        "matrix": random_array(rng, (17, 9), mx.float32),
        "rest": [
            random_array(rng, (), mx.float32),
            random_array(rng, (33,), mx.float32),
        ],
    }
    ours, theirs = both(name, options)
    mine, reference = copy_tree(parameters), copy_tree(parameters)
    for step in range(1, 101):
        gradients = fill(parameters, rng, mx.float32)
        mine = ours.apply_gradients(gradients, mine)
        reference = theirs.apply_gradients(gradients, reference)
        mx.eval(mine, ours.state, reference, theirs.state)
        assert_trees_match(mine, reference, STEP_TOLERANCE * step, 1e-7)
        assert_trees_match(ours.state, theirs.state, STEP_TOLERANCE * step, 1e-7)


@every_fused_optimizer
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@many
@given(shapes=trees(6), seed=st.integers(0, 2**32), layout=st.sampled_from([*LAYOUTS]))
def test_half_precision_is_the_float32_step_rounded_once(
    backend: str,
    name: str,
    options: dict[str, Any],
    dtype: mx.Dtype,
    shapes: Any,
    seed: int,
    layout: str,
) -> None:
    """No result in half precision can be closer to float32's than that."""
    rng = np.random.default_rng(seed)
    parameters = fill(shapes, rng, dtype)
    ours, theirs = both(name, options)
    # Bias correction, and what stock does not have, is another by some last bits.
    if options.get("bias_correction") or not hasattr(stock, name):
        theirs, _ = both(name, options)
    for optimizer in (ours, theirs):
        optimizer.init(parameters)
    state = tree_map(
        lambda x: (
            mx.abs(random_array(rng, x.shape, x.dtype)) if x.dtype == dtype else x
        ),
        ours.state,
    )
    gradients = fill(parameters, rng, dtype, layout)

    def widen(tree: Any) -> Any:
        return tree_map(lambda x: x.astype(mx.float32) if x.dtype == dtype else x, tree)

    ours.state, theirs.state = copy_tree(state), widen(state)
    mine = ours.apply_gradients(gradients, copy_tree(parameters))
    wide = theirs.apply_gradients(widen(gradients), widen(parameters))

    def narrow(tree: Any, like: Any) -> Any:
        return tree_map(lambda x, y: x.astype(y.dtype), tree, like)

    # On a GPU float32 itself may differ by rounding, and then so may the last bit.
    tolerance = 0.0 if backend != "gpu" else 1e-2
    assert_trees_match(mine, narrow(wide, mine), tolerance)
    assert_trees_match(ours.state, narrow(theirs.state, ours.state), tolerance)


@every_fused_optimizer
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_half_precision_stays_closer_to_float32_than_stock(
    backend: str, name: str, options: dict[str, Any], dtype: mx.Dtype
) -> None:
    rng = np.random.default_rng(11)
    start = {"w": random_array(rng, (256, 128), dtype)}
    ours, theirs = both(name, options)
    reference = getattr(oracle, name)(1e-2, **options)
    mine, half = copy_tree(start), copy_tree(start)
    exact = tree_map(lambda x: x.astype(mx.float32), start)
    for _ in range(20):
        gradients = fill(start, rng, dtype)
        mine = ours.apply_gradients(gradients, mine)
        half = theirs.apply_gradients(gradients, half)
        exact = reference.apply_gradients(
            tree_map(lambda x: x.astype(mx.float32), gradients), exact
        )

    def error(tree: Any) -> float:
        return float(np.square(to_numpy(tree["w"]) - to_numpy(exact["w"])).mean())

    # Equal where the rounding of parameters outweighs all else; it is random. Stock's
    # float16 Adam rounds eps to zero, and with that divides by zero.
    assert np.isfinite(error(mine))
    assert np.isnan(error(half)) or error(mine) <= error(half) * 1.03


@every_fused_optimizer
@pytest.mark.parametrize("gradient_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("parameter_dtype", FLOATS, ids=str)
def test_mixed_dtypes_promote_as_in_mlx(
    backend: str,
    name: str,
    options: dict[str, Any],
    parameter_dtype: mx.Dtype,
    gradient_dtype: mx.Dtype,
) -> None:
    rng = np.random.default_rng(3)
    parameters = {"w": random_array(rng, (5, 7), parameter_dtype)}
    gradients = {"w": random_array(rng, (5, 7), gradient_dtype)}
    results = []
    for optimizer in both(name, options):
        optimizer.init(parameters)
        updated = optimizer.apply_gradients(gradients, copy_tree(parameters))
        results.append((updated, optimizer.state))
    half = mx.float32 not in (parameter_dtype, gradient_dtype)
    tolerance = 2e-2 if half or parameter_dtype != gradient_dtype else STEP_TOLERANCE
    for mine, theirs in zip(*results, strict=True):
        assert_trees_match(mine, theirs, tolerance, tolerance)


@every_optimizer
def test_other_dtypes_take_the_composed_path(
    backend: str, name: str, options: dict[str, Any]
) -> None:
    if backend == "gpu":
        pytest.skip("float64 is the CPU's alone")
    rng = np.random.default_rng(5)
    wide = mx.array(rng.standard_normal((4, 3))).astype(mx.float64)
    mixed = {"wide": wide, "narrow": random_array(rng, (6,), mx.float32)}
    gradients = tree_map(lambda x: x * 0.5 + 0.1, mixed)
    results = []
    for optimizer in both(name, options):
        updated = optimizer.apply_gradients(gradients, copy_tree(mixed))
        results.append((updated, optimizer.state))
    for mine, theirs in zip(*results, strict=True):
        assert_trees_match(mine, theirs, STEP_TOLERANCE)


@every_fused_optimizer
def test_gradients_that_broadcast(
    backend: str, name: str, options: dict[str, Any]
) -> None:
    rng = np.random.default_rng(5)
    parameters = {"a": random_array(rng, (4, 3), mx.float32), "b": mx.array([1.0])}
    gradients = {
        "a": random_array(rng, (3,), mx.float32),
        "b": random_array(rng, (5,), mx.float32),  # the parameter grows
    }
    results = []
    for optimizer in both(name, options):
        optimizer.init(parameters)
        updated = optimizer.apply_gradients(gradients, copy_tree(parameters))
        results.append((updated, optimizer.state))
    for mine, theirs in zip(*results, strict=True):
        assert_trees_match(mine, theirs, STEP_TOLERANCE, 1e-8)


def test_learning_rate_arrays_and_hyperparameter_arrays(backend: str) -> None:
    parameters = {"w": mx.arange(6.0).reshape(2, 3)}
    gradients = {"w": mx.ones((2, 3))}
    cases: list[tuple[str, Any, dict[str, Any]]] = [
        ("SGD", mx.array([0.1, 0.2, 0.3]), {"momentum": 0.9}),
        ("AdamW", mx.array([0.1]), {}),
        ("AdamW", 0.1, {"weight_decay": mx.array(0.2)}),
        ("Lion", mx.array(0.1, mx.float16), {}),
    ]
    for name, learning_rate, options in cases:
        ours, theirs = both(name, options, learning_rate)
        assert_trees_match(
            ours.apply_gradients(gradients, parameters),
            theirs.apply_gradients(gradients, parameters),
            STEP_TOLERANCE,
            1e-4 if name == "Lion" else 1e-8,
        )


def load(path: str) -> dict[str, mx.array]:
    arrays: dict[str, mx.array] = mx.load(path)  # type: ignore[assignment]
    return arrays


def make_model(seed: int) -> nn.Module:
    mx.random.seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.relu, nn.Linear(16, 3))
    mx.eval(model.parameters())
    return model


def loss_of(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(x), y, reduction="mean")


def train(
    model: nn.Module, optimizer: stock.Optimizer, steps: int, compiled: bool = False
) -> None:
    """The documented training loop."""
    rng = np.random.default_rng(0)
    loss_and_grad = nn.value_and_grad(model, loss_of)

    def step(x: mx.array, y: mx.array) -> mx.array:
        loss, grads = loss_and_grad(model, x, y)
        optimizer.update(model, grads)
        return loss  # type: ignore[no-any-return]

    if compiled:
        optimizer.init(model.trainable_parameters())
        state = [model.state, optimizer.state]
        step = mx.compile(step, inputs=state, outputs=state)
    for _ in range(steps):
        x = random_array(rng, (8, 6), mx.float32)
        y = mx.array(rng.integers(0, 3, 8))
        step(x, y)
        mx.eval(model.parameters(), optimizer.state)


@every_optimizer
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_documented_training_loop(
    backend: str, name: str, options: dict[str, Any], compiled: bool
) -> None:
    schedules = [
        module.join_schedules(
            [module.linear_schedule(0, 1e-2, 5), module.cosine_decay(1e-2, 20)], [5]
        )
        for module in (optim, oracle)
    ]
    ours, theirs = (
        getattr(module, name)(learning_rate=schedule, **options)
        for module, schedule in zip((optim, oracle), schedules, strict=True)
    )
    mine, reference = make_model(1), make_model(1)
    train(mine, ours, 12, compiled)
    train(reference, theirs, 12, compiled)
    # Rounding in an update comes back through the gradients.
    assert_trees_match(mine.parameters(), reference.parameters(), 1e-4, 1e-5)
    assert_trees_match(ours.state, theirs.state, 1e-3, 1e-5)


@every_optimizer
def test_checkpoints_of_either_library_load_in_the_other(
    backend: str, name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    for saver, loader in [(oracle, optim), (optim, oracle)]:
        model = make_model(2)
        optimizer = getattr(saver, name)(learning_rate=1e-2, **options)
        train(model, optimizer, 3)
        path = str(tmp_path / "optimizer.safetensors")
        mx.save_safetensors(path, dict(tree_flatten(optimizer.state)))

        other = make_model(3)
        other.update(model.parameters())
        resumed = getattr(loader, name)(learning_rate=1e-2, **options)
        resumed.state = tree_unflatten(list(load(path).items()))
        assert snapshot(resumed.state) == snapshot(optimizer.state)
        train(model, optimizer, 3)
        train(other, resumed, 3)
        assert_trees_match(other.parameters(), model.parameters(), 1e-5, 1e-6)
        assert_trees_match(resumed.state, optimizer.state, 1e-4, 1e-6)


def test_every_public_name_of_mlx_optimizers_is_here() -> None:
    public = {
        name
        for name, value in vars(stock).items()
        if getattr(value, "__module__", "").startswith("mlx.optimizers")
    }
    assert public <= set(optim.__all__)
    assert optim.schedulers.cosine_decay is optim.cosine_decay
    for name in public:
        value = getattr(optim, name)
        if isinstance(value, type):
            assert issubclass(value, getattr(stock, name))
            if issubclass(value, stock.Optimizer):
                assert issubclass(value, optim.Optimizer)


def test_adafactor_without_a_learning_rate(backend: str) -> None:
    rng = np.random.default_rng(8)
    start = {"w": random_array(rng, (7, 5), mx.float32)}
    ours, theirs = optim.Adafactor(), stock.Adafactor()
    mine, reference = copy_tree(start), copy_tree(start)
    for _ in range(3):
        gradients = fill(start, rng, mx.float32)
        mine = ours.apply_gradients(gradients, mine)
        reference = theirs.apply_gradients(gradients, reference)
    assert_trees_match(mine, reference, 1e-5, 1e-6)
    assert_trees_match(ours.state, theirs.state, 1e-5, 1e-6)
