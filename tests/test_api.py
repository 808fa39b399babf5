"""The promises of the classes: state, subclasses, errors, compile, threads."""

import threading
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as stock
import mlx_fused_optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_map
from support import (
    MLX_VERSION,
    assert_trees_match,
    copy_tree,
    every_fused_optimizer,
    fill,
    leaves_of,
    oracle,
    random_array,
    snapshot,
    to_numpy,
)


def parameters_and_gradients(seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    parameters = {
        "layers": [{"w": random_array(rng, (4, 3), mx.float32)} for _ in range(2)],
        "bias": random_array(rng, (3,), mx.float32),
    }
    return parameters, fill(parameters, rng, mx.float32)


@every_fused_optimizer
def test_state_has_stock_keys_before_and_after_init(
    backend: str, name: str, options: dict[str, Any]
) -> None:
    parameters, _ = parameters_and_gradients()
    ours = getattr(optim, name)(1e-2, **options)
    theirs = getattr(oracle, name)(1e-2, **options)
    assert snapshot(ours.state) == snapshot(theirs.state)
    ours.init(parameters)
    theirs.init(parameters)
    assert snapshot(ours.state) == snapshot(theirs.state)
    assert isinstance(ours, stock.Optimizer)
    if hasattr(stock, name):
        assert isinstance(ours, getattr(stock, name))


def test_learning_rate_can_be_set_between_compiled_steps(backend: str) -> None:
    parameters, gradients = parameters_and_gradients()
    optimizer = optim.SGD(0.1)
    optimizer.init(parameters)
    traced = 0

    def step(parameters: Any, gradients: Any) -> Any:
        nonlocal traced
        traced += 1
        return optimizer.apply_gradients(gradients, parameters)

    compiled = mx.compile(step, inputs=optimizer.state, outputs=optimizer.state)
    for learning_rate in (0.1, 0.5, 0.0):
        optimizer.learning_rate = learning_rate
        updated = compiled(parameters, gradients)
        expected = to_numpy(parameters["bias"]) - np.float32(learning_rate) * to_numpy(
            gradients["bias"]
        )
        np.testing.assert_allclose(to_numpy(updated["bias"]), expected, rtol=1e-6)
        parameters = updated
    assert traced == 1
    assert int(optimizer.step) == 3


def test_update_of_a_model_with_frozen_layers(backend: str) -> None:
    models = []
    for module in (optim, oracle):
        mx.random.seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        model.layers[0].freeze()
        optimizer = module.AdamW(1e-1)

        def loss(model: nn.Module, x: mx.array) -> mx.array:
            return mx.square(model(x)).sum()

        for _ in range(3):
            _, grads = nn.value_and_grad(model, loss)(model, mx.ones((2, 3)))
            optimizer.update(model, grads)
        models.append((model, optimizer))
    (mine, ours), (reference, theirs) = models
    assert_trees_match(mine.parameters(), reference.parameters(), 1e-5)
    assert_trees_match(ours.state, theirs.state, 1e-5, 1e-7)


class Halving(optim.Optimizer):
    """A user's own optimizer, as upstream documents it."""

    def __init__(self) -> None:
        super().__init__()
        self._maybe_schedule("learning_rate", 0.5)

    def init_single(self, parameter: mx.array, state: dict[str, Any]) -> None:
        state["count"] = mx.zeros_like(parameter)

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]
    ) -> mx.array:
        state["count"] = state["count"] + 1
        updated: mx.array = parameter - self.learning_rate * gradient
        return updated


class Clamped(optim.Adam):
    """A user's change of a fused class."""

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]
    ) -> mx.array:
        updated = super().apply_single(mx.clip(gradient, -0.1, 0.1), parameter, state)
        return mx.clip(updated, -1, 1)


def test_users_subclasses(backend: str) -> None:
    parameters, gradients = parameters_and_gradients()
    halving = Halving()
    updated = halving.apply_gradients(gradients, parameters)
    np.testing.assert_allclose(
        to_numpy(updated["bias"]),
        to_numpy(parameters["bias"]) - 0.5 * to_numpy(gradients["bias"]),
        rtol=1e-6,
    )
    np.testing.assert_array_equal(to_numpy(halving.state["bias"]["count"]), 1)

    class StockClamped(stock.Adam):
        def apply_single(
            self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]
        ) -> mx.array:
            clipped = mx.clip(gradient, -0.1, 0.1)
            updated: mx.array = super().apply_single(clipped, parameter, state)
            return mx.clip(updated, -1, 1)

    ours, theirs = Clamped(1e-1), StockClamped(1e-1)
    assert_trees_match(
        ours.apply_gradients(gradients, parameters),
        theirs.apply_gradients(gradients, parameters),
        2e-6,
    )
    assert_trees_match(ours.state, theirs.state, 2e-6)


def failing_schedule(step: mx.array) -> mx.array:
    if int(step) == 2:
        raise RuntimeError("the schedule broke")
    return mx.array(0.1)


class Failing(optim.SGD):
    """Breaks after it has changed the state of the first parameters."""

    broken = False

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]
    ) -> mx.array:
        updated = super().apply_single(gradient, parameter, state)
        if self.broken and parameter.ndim == 1:
            raise KeyboardInterrupt
        return updated


def missing_parameter(parameters: Any, gradients: Any) -> tuple[Any, Any]:
    return {"bias": parameters["bias"]}, gradients


def unknown_gradient(parameters: Any, gradients: Any) -> tuple[Any, Any]:
    return parameters, {**gradients, "other": mx.ones((2,))}


def bad_shape(parameters: Any, gradients: Any) -> tuple[Any, Any]:
    return parameters, {**gradients, "bias": mx.ones((7,))}


def no_array(parameters: Any, gradients: Any) -> tuple[Any, Any]:
    return parameters, {**gradients, "bias": "text"}


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (missing_parameter, KeyError),
        (unknown_gradient, KeyError),
        (bad_shape, ValueError),
        (no_array, TypeError),
    ],
)
@pytest.mark.parametrize("started", [False, True], ids=["first step", "later"])
def test_a_refused_step_changes_nothing(
    backend: str, spoil: Any, error: type[Exception], started: bool
) -> None:
    parameters, gradients = parameters_and_gradients()
    optimizer = optim.SGD(optim.exponential_decay(0.1, 0.9), momentum=0.9)
    if started:
        parameters = optimizer.apply_gradients(gradients, parameters)
    before = snapshot([parameters, optimizer.state])
    with pytest.raises(error):
        optimizer.apply_gradients(*reversed(spoil(parameters, gradients)))
    assert snapshot([parameters, optimizer.state]) == before
    # And the next step is the one that would have been.
    twin = optim.SGD(optim.exponential_decay(0.1, 0.9), momentum=0.9)
    if started:
        twin.state = copy_tree(optimizer.state)
    assert snapshot(optimizer.apply_gradients(gradients, parameters)) == snapshot(
        twin.apply_gradients(gradients, parameters)
    )


def test_exceptions_in_users_code_change_nothing(backend: str) -> None:
    parameters, gradients = parameters_and_gradients()
    scheduled = optim.AdamW(failing_schedule)
    for _ in range(2):
        parameters = scheduled.apply_gradients(gradients, parameters)
    before = snapshot([parameters, scheduled.state])
    with pytest.raises(RuntimeError, match="the schedule broke"):
        scheduled.apply_gradients(gradients, parameters)
    assert snapshot([parameters, scheduled.state]) == before

    failing = Failing(0.1, momentum=0.9)
    parameters = failing.apply_gradients(gradients, parameters)
    before = snapshot([parameters, failing.state])
    failing.broken = True
    with pytest.raises(KeyboardInterrupt):
        failing.apply_gradients(gradients, parameters)
    assert snapshot([parameters, failing.state]) == before


def test_hyperparameters_are_checked_as_in_stock() -> None:
    cases: list[tuple[str, dict[str, Any]]] = [
        ("SGD", {"nesterov": True}),
        ("SGD", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}),
        ("Adam", {"betas": (1.0, 0.9)}),
        ("Adam", {"eps": -1.0}),
        ("AdamW", {"betas": (0.9, -0.1)}),
        ("Lion", {"betas": (0.9, 1.5)}),
    ]
    if MLX_VERSION < (0, 32, 2):  # it checks SGD's alone
        cases = cases[:2]
    for name, options in cases:
        with pytest.raises(ValueError) as expected:
            getattr(oracle, name)(0.1, **options)
        with pytest.raises(ValueError) as given:
            getattr(optim, name)(0.1, **options)
        assert str(given.value) == str(expected.value)
    with pytest.raises(TypeError, match="unexpected keyword argument 'beta'"):
        optim.Adam(0.1, beta=0.9)  # type: ignore[call-arg]


def test_empty_trees_and_zero_size_arrays(backend: str) -> None:
    optimizer = optim.AdamW(optim.exponential_decay(1e-1, 0.9))
    for _ in range(5):
        optimizer.update(nn.Module(), {})
    assert float(optimizer.learning_rate) == pytest.approx(0.1 * 0.9**4)
    parameters = {"none": mx.zeros((0, 3)), "some": mx.ones(())}
    fresh = optim.AdamW(1e-1)
    result = fresh.apply_gradients(parameters, parameters)
    assert result["none"].shape == (0, 3)
    assert result["some"].shape == ()
    assert float(result["some"]) < 1
    only_empty = optim.Lion(1e-1).apply_gradients(
        {"a": mx.zeros((0,))}, {"a": mx.zeros(0)}
    )
    mx.eval(only_empty)


def test_accumulated_and_averaged_gradients(backend: str) -> None:
    parameters, first = parameters_and_gradients(1)
    _, second = parameters_and_gradients(2)
    results = []
    for module in (optim, oracle):
        optimizer = module.AdamW(1e-2)
        total = tree_map(lambda a, b: (a + b) / 2, first, second)
        averaged = nn.average_gradients(total)
        results.append(optimizer.apply_gradients(averaged, copy_tree(parameters)))
    mine, theirs = results
    assert_trees_match(mine, theirs, 2e-6)


def test_parameters_added_later_need_a_new_init(backend: str) -> None:
    parameters, gradients = parameters_and_gradients()
    more = {**parameters, "added": mx.ones((2, 2))}
    results = []
    for module in (optim, oracle):
        optimizer = module.Adam(1e-2)
        updated = optimizer.apply_gradients(gradients, copy_tree(parameters))
        optimizer.init(more)
        more_gradients = {**gradients, "added": mx.ones((2, 2))}
        both = {**updated, "added": mx.ones((2, 2))}
        updated = optimizer.apply_gradients(more_gradients, both)
        partial = optimizer.apply_gradients({"added": mx.ones((2, 2))}, updated)
        results.append([updated, partial, optimizer.state])
    mine, theirs = results
    assert_trees_match(mine, theirs, 2e-6, 1e-8)


def test_several_optimizers_in_several_threads(backend: str) -> None:
    def run(seed: int) -> dict[str, bytes]:
        with mx.stream(mx.new_stream(mx.default_device())):
            parameters, _ = parameters_and_gradients(seed)
            optimizer = optim.AdamW(1e-2, bias_correction=True)
            rng = np.random.default_rng(seed)
            for _ in range(20):
                gradients = fill(parameters, rng, mx.float32)
                parameters = optimizer.apply_gradients(gradients, parameters)
                mx.eval(parameters, optimizer.state)
            return snapshot([parameters, optimizer.state])

    results: dict[int, dict[str, bytes]] = {}
    device = mx.default_device()

    def work(seed: int) -> None:
        mx.set_default_device(device)
        results[seed] = run(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        assert results[seed] == run(seed)


def test_optimizer_states_are_walked_in_any_tree(backend: str) -> None:
    parameters = {"a": (mx.ones(3), [mx.ones(2), {"b": mx.ones(())}])}
    optimizer = optim.SGD(0.1, momentum=0.9)
    updated = optimizer.apply_gradients(parameters, parameters)
    assert isinstance(updated["a"], tuple)
    assert [*leaves_of(updated)] == ["a.0", "a.1.0", "a.1.1.b"]
    for x in leaves_of(updated).values():
        np.testing.assert_allclose(to_numpy(x), 0.9, rtol=1e-6)
