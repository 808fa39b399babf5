"""``fuse``: somebody's own optimizer in one kernel, beside the class as it is."""

from __future__ import annotations

import copy
import pickle
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as stock
import mlx_fused_optimizers as optim
import numpy as np
import pytest
from conftest import SIMULATOR
from mlx.utils import tree_flatten, tree_map
from mlx_fused_optimizers._kernels import kernels
from support import more_dimensions_in_adafactor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.published import (
    PUBLISHED,
    AdaBelief,
    Adan,
    NAdam,
    QHAdam,
    State,
    Tiger,
)

on_kernels = pytest.mark.parametrize("backend", ["cpu", SIMULATOR], indirect=True)
on_the_cpu = pytest.mark.parametrize("backend", ["cpu"], indirect=True)
published = pytest.mark.parametrize("name", PUBLISHED)
SHAPES = [(33, 70), (5,), (2, 3, 4), (33, 70), ()]


def parameters_of(dtype: mx.Dtype = mx.float32, seed: int = 0) -> dict[str, Any]:
    keys = mx.random.split(mx.random.key(seed), len(SHAPES))
    arrays = [
        mx.random.normal(s, key=k).astype(dtype)
        for s, k in zip(SHAPES, keys, strict=True)
    ]
    return {"a": arrays[0], "b": arrays[1], "c": {"d": arrays[2], "e": arrays[3:]}}


def gradients_of(tree: Any, seed: int, transposed: bool = True) -> Any:
    """Gradients; those of matrices as views of transposed arrays."""
    count = 0

    def gradient(like: mx.array) -> mx.array:
        nonlocal count
        count += 1
        key = mx.random.key(100 * seed + count)
        shape = like.shape[::-1] if transposed else like.shape
        made = mx.random.normal(shape, key=key).astype(like.dtype)
        return made.T if transposed else made

    gradients = tree_map(gradient, tree)
    mx.eval(gradients)
    return gradients


def number(x: mx.array) -> float:
    value: Any = x.item()
    return float(value)


def flat(tree: Any) -> dict[str, Any]:
    found: Any = tree_flatten(tree)
    return dict(found)


def assert_close(actual: Any, expected: Any, limit: float = 2e-6) -> None:
    found, wanted = flat(actual), flat(expected)
    assert list(found) == list(wanted)
    for key, y in wanted.items():
        x = found[key]
        if not isinstance(y, mx.array):
            assert x == y, key
            continue
        assert (x.dtype, x.shape) == (y.dtype, y.shape), key
        x, y = x.astype(mx.float32), y.astype(mx.float32)
        size = mx.maximum(mx.abs(y), 1e-2 * mx.max(mx.abs(y)) + 1e-30)
        same = (x == y) | (mx.isnan(x) & mx.isnan(y))
        error = number(mx.max(mx.where(same, 0.0, mx.abs(x - y) / size)))
        assert error <= limit, (key, error)


def is_fused(optimizer: Any) -> bool:
    return optimizer._reason is None and bool(optimizer._explained)


def compare(
    make: Callable[[], stock.Optimizer],
    steps: int = 4,
    dtype: mx.Dtype = mx.float32,
    limit: float = 2e-6,
    **options: Any,
) -> Any:
    """Steps of both from the same parameters and states; the fused optimizer."""
    plain, fused = make(), optim.fuse(make(), **options)
    parameters = parameters_of(dtype)
    ours = parameters
    for step in range(steps):
        gradients = gradients_of(parameters, step)
        parameters = plain.apply_gradients(gradients, parameters)
        ours = fused.apply_gradients(gradients, ours)
        assert_close(ours, parameters, limit * (step + 1))
        assert_close(fused.state, plain.state, limit * (step + 1))
    return fused


@published
def test_the_numbers_are_those_of_the_class(name: str, backend: str) -> None:
    fused = compare(PUBLISHED[name])
    assert is_fused(fused) == (backend != "plain")
    assert isinstance(fused, type(PUBLISHED[name]()))


@on_kernels
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_halves_are_as_close_to_float32_as_the_class(
    dtype: mx.Dtype, backend: str
) -> None:
    """After some steps from values that halves have; of the parameters."""
    for name in ("Tiger",) if backend == SIMULATOR else PUBLISHED:
        make = PUBLISHED[name]
        plain, fused, exact = make(), optim.fuse(make()), make()
        start = parameters_of(dtype)
        trees = [start, start, tree_map(lambda x: x.astype(mx.float32), start)]
        for step in range(3):
            gradients = gradients_of(start, step)
            for i, optimizer in enumerate((plain, fused, exact)):
                given = gradients
                if i == 2:
                    given = tree_map(lambda x: x.astype(mx.float32), gradients)
                trees[i] = optimizer.apply_gradients(given, trees[i])
        assert is_fused(fused)
        assert [k for k in flat(fused.state)] == [k for k in flat(plain.state)]
        for key, wanted in flat(trees[2]).items():
            found, theirs = flat(trees[1])[key], flat(trees[0])[key]
            assert found.dtype == theirs.dtype == dtype
            errors = [
                number(mx.mean(mx.abs(x.astype(mx.float32) - wanted)))
                for x in (found, theirs)
            ]
            unit = number(mx.mean(mx.abs(wanted))) * float(mx.finfo(dtype).eps)
            assert errors[0] <= 1.2 * errors[1] + unit, (name, key, errors)


@on_kernels
@published
def test_it_works_in_a_compiled_step(name: str, backend: str) -> None:
    if backend == SIMULATOR and name != "LAMB":
        pytest.skip("one with several kernels will do there")
    make = PUBLISHED[name]
    if name in ("QHAdam", "Adan"):
        pytest.skip("a Python number and a new entry of the state are baked in by MLX")
    plain, fused = make(), optim.fuse(make())
    parameters = ours = parameters_of()
    fused.init(parameters)

    @mx.compile
    def step(gradients: Any, parameters: Any, state: Any) -> Any:
        fused.state = state
        return fused.apply_gradients(gradients, parameters), fused.state

    state = fused.state
    for number in range(3):
        gradients = gradients_of(parameters, number)
        parameters = plain.apply_gradients(gradients, parameters)
        ours, state = step(gradients, ours, state)
        assert_close(ours, parameters, 2e-6 * (number + 1))
    assert_close(state, plain.state, 1e-5)
    assert is_fused(fused)


class Changing(stock.Optimizer):
    """Takes another branch at the second step, and has another state from the third."""

    def __init__(self, learning_rate: Any = 0.1) -> None:
        super().__init__()
        self._maybe_schedule("learning_rate", learning_rate)
        self.steps_of: dict[int, int] = {}

    def moved(self, parameter: mx.array, gradient: mx.array) -> mx.array:
        updated: mx.array = parameter - self.learning_rate * gradient
        return updated

    def init_single(self, parameter: mx.array, state: State) -> None:
        state["count"] = 0

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: State
    ) -> mx.array:
        state["count"] += 1
        if state["count"] == 2:
            gradient = mx.sign(gradient)
        if state["count"] >= 3:
            before = state.get("before", parameter)
            gradient = gradient + 0.1 * (parameter - before)
            state["before"] = parameter
        if state["count"] == 5:
            del state["before"]
        return self.moved(parameter, gradient)


class Counting(Changing):
    """What is no state changes at each call, and the branch with it."""

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: State
    ) -> mx.array:
        self.steps_of[0] = self.steps_of.get(0, 0) + 1
        if self.steps_of[0] % 3 == 0:
            return self.moved(parameter, 0.5 * gradient)
        return super().apply_single(gradient, parameter, state)


class OnDevice(Changing):
    """Asks the step count, which is no stand-in, for its value."""

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: State
    ) -> mx.array:
        if self.step.item() % 2 == 0:
            gradient = mx.tanh(gradient)
        return self.moved(parameter, gradient)


class Noisy(Changing):
    """Other random numbers for each tensor."""

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: State
    ) -> mx.array:
        noise = mx.random.normal(parameter.shape)
        return self.moved(parameter, gradient + 0.1 * noise)


@on_the_cpu
@pytest.mark.parametrize("kind", [Changing, Counting, OnDevice])
def test_another_branch_is_taken_where_the_class_takes_it(
    kind: type[stock.Optimizer], backend: str
) -> None:
    assert is_fused(compare(kind, steps=6))


@on_the_cpu
def test_random_numbers_are_those_of_the_class(backend: str) -> None:
    plain, fused = Noisy(), optim.fuse(Noisy())
    parameters = parameters_of()
    gradients = gradients_of(parameters, 0)
    results = []
    for optimizer in (plain, fused):
        mx.random.seed(3)
        results.append(optimizer.apply_gradients(gradients, parameters))
    assert_close(results[1], results[0])
    assert is_fused(fused)


@on_the_cpu
def test_numbers_are_no_part_of_a_kernel(backend: str) -> None:
    """Neither a counter nor another argument makes another program."""
    parameters = {"a": mx.ones((40, 30))}
    rules = set()
    for beta in (0.9, 0.5):
        fused = optim.fuse(QHAdam(1e-3, betas=(beta, 0.999)))
        for step in range(5):
            fused.apply_gradients(gradients_of(parameters, step), parameters)
            ((_, names, _, _),) = fused._explained
            rules.add(tuple(names))
    assert len(rules) == 1


class Everything(stock.Optimizer):
    """Every operation that a program has."""

    def __init__(self, operation: Callable[[mx.array, mx.array], mx.array]) -> None:
        super().__init__()
        self.state["learning_rate"] = mx.array(0.1)
        self.operation = operation

    def init_single(self, parameter: mx.array, state: State) -> None:
        state["x"] = parameter * 0.5 + 0.1

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: State
    ) -> mx.array:
        state["x"] = self.operation(gradient, state["x"])
        return parameter


OPERATIONS: dict[str, Callable[[mx.array, mx.array], mx.array]] = {
    "arithmetic": lambda a, b: (a + b) * (a - 2) / (3 - b) + -a,
    "products": lambda a, b: 0.1 * a + b * 0.3 - a * b + (a * a + 2.0 * b),
    "quotient": lambda a, b: a / (mx.sqrt(mx.abs(b)) + 0.1),
    "extremes": lambda a, b: mx.maximum(a, b) + mx.minimum(a, 0.3) * mx.abs(b),
    "powers": lambda a, b: mx.abs(a) ** 0.7 + b**2 + mx.abs(b) ** 0.5 + a**3,
    "other powers": lambda a, b: (mx.abs(a) + 1) ** b + 2.0**a + (a * a + 1) ** -0.5,
    "roots": lambda a, b: mx.sqrt(mx.square(a)) + mx.rsqrt(mx.square(b) + 0.1),
    "exp": lambda a, b: mx.exp(3 * a) + mx.expm1(0.01 * b),
    "log": lambda a, b: mx.log(mx.abs(a)) + mx.log1p(mx.square(b)),
    "tanh": lambda a, b: mx.tanh(a) + mx.sigmoid(3 * b) + mx.tanh(0.01 * b),
    "waves": lambda a, b: mx.sin(10 * a) + mx.cos(b) + mx.arctan(a),
    "arctan2": lambda a, b: mx.arctan2(a, b),
    "steps": lambda a, b: mx.floor(a) + mx.ceil(b) + mx.round(3 * a) + mx.sign(b),
    "comparisons": lambda a, b: (
        (a > b).astype(mx.float32)
        + 2.0 * (a >= 0.1)
        + 4.0 * (a < b)
        + 8.0 * (a <= b)
        + 16.0 * ((a == b) | (a != b))
        + 32.0 * ((a > 0) & (b > 0))
    ),
    "choices": lambda a, b: mx.where(
        mx.logical_and(a > 0, mx.logical_not(b > 0)), a, mx.where(a * b, b, 0.5)
    ),
    "rounding": lambda a, b: (
        a.astype(mx.float16).astype(mx.float32) + b.astype(mx.bfloat16)
    ),
    "stopped": lambda a, b: mx.stop_gradient(a) + mx.contiguous(b),
    "broadcast": lambda a, b: a + mx.zeros_like(b) + mx.full(a.shape, 0.5) * b,
    "rows": lambda a, b: a - mx.mean(a, axis=-1, keepdims=True) if a.ndim else a,
    "masks": lambda a, b: mx.where(mx.argsort(a.flatten()).reshape(a.shape) > 3, a, b),
}


@on_the_cpu
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations(operation: str, backend: str) -> None:
    assert is_fused(
        # MLX's own tanh and sine are less exact than ours.
        compare(lambda: Everything(OPERATIONS[operation]), 1, limit=1e-5)
    ), operation


@pytest.mark.parametrize("backend", [SIMULATOR], indirect=True)
def test_operations_on_metal(backend: str) -> None:
    """All in one kernel, the sum of their results."""

    def all_of_them(a: mx.array, b: mx.array) -> mx.array:
        a = mx.clip(a, -2, 2)
        results = [f(a, b) for f in OPERATIONS.values()]
        return sum(mx.clip(x, -9, 9) for x in results)  # type: ignore[return-value]

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that a kernel is not trusted
        assert is_fused(compare(lambda: Everything(all_of_them), 1, limit=1e-5))


def first(function: Any, a: mx.array, b: mx.array) -> Any:
    return function(a)


def test_functions_of_the_cpu_over_their_whole_range() -> None:
    """Beside NumPy's float64, in units of the result; and what is no number."""
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 1e-40, 3e38, -3e38]
    powers = 10.0 ** np.linspace(-37, 38, 5001)
    ranges = [np.linspace(-2, 2, 5001), np.linspace(-100, 100, 5001), powers, -powers]
    x = np.concatenate([special, *ranges]).astype(np.float32)
    functions: list[tuple[Any, Any]] = [
        (mx.exp, np.exp),
        (mx.log, np.log),
        (mx.expm1, np.expm1),
        (mx.log1p, np.log1p),
        (mx.tanh, np.tanh),
        (mx.sigmoid, lambda x: 1 / (1 + np.exp(-x))),
        (mx.sin, np.sin),
        (mx.rsqrt, lambda x: 1 / np.sqrt(x)),
    ]
    for function, exact in functions:
        optimizer = optim.fuse(Everything(partial(first, function)))
        optimizer.apply_gradients({"a": mx.array(x)}, {"a": mx.zeros(x.shape)})
        assert is_fused(optimizer)
        found = np.array(optimizer.state["a"]["x"])
        with np.errstate(all="ignore"):
            wanted = exact(x.astype(np.float64)).astype(np.float32)
            same = (found == wanted) | (np.isnan(found) & np.isnan(wanted))
            error = np.abs(found - wanted) / (np.abs(wanted) + 1e-37)
        error[same] = 0
        assert error.max() <= 5e-7, (function, x[error.argmax()], error.max())


class Undecided(Changing):
    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: State
    ) -> mx.array:
        if mx.max(gradient).item() > 1:  # type: ignore[operator]  # the line
            gradient = gradient * 0.5
        return self.moved(parameter, gradient)


class OfLists(Changing):
    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: State
    ) -> mx.array:
        state["last"] = [gradient]
        return self.moved(parameter, gradient)


@on_the_cpu
def test_what_cannot_be_fused_works_as_it_is_with_one_warning(
    backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, texts in (
        (Undecided, ["the line", Path(__file__).name, "eval"]),
        (OfLists, ["'last' is a list of arrays"]),
    ):
        with pytest.warns(UserWarning, match="works as it is") as caught:
            fused = compare(kind)
        assert len(caught) == 1
        assert all(text in str(caught[0].message) for text in texts)
        fused.explain()
        assert all(text in capsys.readouterr().out for text in texts[:1])


@on_the_cpu
def test_an_error_of_the_class_is_raised_and_changes_nothing(backend: str) -> None:
    class Broken(Changing):
        def apply_single(
            self, gradient: mx.array, parameter: mx.array, state: State
        ) -> mx.array:
            state["count"] += 1
            raise ZeroDivisionError("mine")

    fused = optim.fuse(Broken())
    parameters = parameters_of()
    fused.init(parameters)
    before = copy.deepcopy(fused.state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ZeroDivisionError, match="mine"):
            fused.apply_gradients(gradients_of(parameters, 0), parameters)
    assert_close(fused.state, before)


@on_the_cpu
def test_explain_tells_what_was_fused_and_what_was_not(
    backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fused = optim.fuse(PUBLISHED["LAMB"]())
    fused.explain()
    assert "no step" in capsys.readouterr().out
    parameters = {"a": mx.ones((40, 30)), "b": mx.ones((40, 30))}
    fused.apply_gradients(gradients_of(parameters, 0), parameters)
    fused.explain()
    text = capsys.readouterr().out
    for part in ("2 tensors of 1,200", "kernel 1 of 2", "square_root", "Sum", "m ="):
        assert part in text


# Options


def clipped(gradients: Any, limit: float) -> Any:
    return stock.clip_grad_norm(gradients, limit)[0]


@on_the_cpu
@pytest.mark.parametrize("name", ["AdaBelief", "LAMB", "Adan"])
def test_max_grad_norm(name: str, backend: str) -> None:
    make = PUBLISHED[name]
    plain, fused = make(), optim.fuse(make(), max_grad_norm=0.5)
    parameters = ours = parameters_of()
    for step in range(3):
        gradients = gradients_of(parameters, step)
        parameters = plain.apply_gradients(clipped(gradients, 0.5), parameters)
        ours = fused.apply_gradients(gradients, ours)
        assert_close(ours, parameters, 1e-5)
    assert is_fused(fused)
    assert fused.grad_norm.item() > 10


@on_kernels
@pytest.mark.parametrize("name", ["AdaBelief", "LAMB", "NAdam", "Adan"])
def test_skip_nonfinite(name: str, backend: str) -> None:
    if backend == SIMULATOR and name != "LAMB":
        pytest.skip("one with several kernels will do there")
    fused = optim.fuse(PUBLISHED[name](), skip_nonfinite=True)
    parameters = parameters_of()
    for step in range(2):
        parameters = fused.apply_gradients(gradients_of(parameters, step), parameters)
    before = copy.deepcopy([parameters, fused.state])
    bad = gradients_of(parameters, 3)
    bad["b"] = bad["b"] * mx.array(mx.nan)
    parameters = fused.apply_gradients(bad, parameters)
    assert fused.skipped_steps.item() == 1
    before[1]["skipped_steps"] += 1
    before[1]["grad_norm"] = fused.state["grad_norm"]
    assert_close([parameters, fused.state], before, 0)
    assert is_fused(fused)


@on_the_cpu
def test_a_skipped_step_makes_zeros_of_a_new_state(backend: str) -> None:
    fused = optim.fuse(PUBLISHED["Adan"](), skip_nonfinite=True)
    parameters = {"a": mx.ones((40, 30))}
    fused.apply_gradients({"a": mx.full((40, 30), mx.nan)}, parameters)
    assert mx.all(fused.state["a"]["previous"] == 0).item()


@on_kernels
def test_weight_decay_filter_and_groups(backend: str) -> None:
    parameters = parameters_of()
    gradients = gradients_of(parameters, 0)
    make: Any = PUBLISHED["AdaBelief"]
    fused = optim.fuse(
        make(),
        weight_decay_filter=lambda path, x: x.ndim > 1,
        groups=[(lambda path, x: path == "a", {"learning_rate": 0.5})],
    )
    ours = fused.apply_gradients(gradients, parameters)
    usual, undecayed, fast = make(), make(), make()
    undecayed.weight_decay = 0.0
    fast.learning_rate = 0.5
    trees = [o.apply_gradients(gradients, parameters) for o in (usual, undecayed, fast)]
    wanted = {
        key: trees[2 if key == "a" else 0 if x.ndim > 1 else 1]
        for key, x in flat(parameters).items()
    }
    assert_close(ours, {**parameters, **ours})
    for key, tree in wanted.items():
        assert_close({key: flat(ours)[key]}, {key: flat(tree)[key]})
    assert is_fused(fused)
    assert fused.learning_rate.item() == pytest.approx(1e-2)
    assert fused.weight_decay == 0.01


@on_kernels
@pytest.mark.parametrize("state_dtype", [mx.float32, mx.bfloat16, "int8", "int4"])
def test_state_dtype(state_dtype: Any, backend: str) -> None:
    if backend == SIMULATOR and not isinstance(state_dtype, str):
        pytest.skip("codes alone are of interest there")
    shape = (80, 64)
    parameters = {"a": mx.random.normal(shape, key=mx.random.key(1))}
    exact, fused = AdaBelief(1e-2), optim.fuse(AdaBelief(1e-2), state_dtype=state_dtype)
    wanted = ours = parameters
    for step in range(4):
        gradients = gradients_of(parameters, step)
        wanted = exact.apply_gradients(gradients, wanted)
        ours = fused.apply_gradients(gradients, ours)
    assert is_fused(fused)
    state = fused.state["a"]
    if isinstance(state_dtype, str):
        assert {"m_scales", "s_scales", f"m_{state_dtype}"} <= state.keys()
        if state_dtype == "int8":  # never negative: no sign
            assert state["s_int8"].dtype == mx.uint8
    else:
        assert state["m"].dtype == state_dtype
    moved = number(mx.mean(mx.abs(wanted["a"] - parameters["a"])))
    error = number(mx.mean(mx.abs(wanted["a"] - ours["a"])))
    limit = {mx.float32: 1e-6, mx.bfloat16: 0.02}.get(state_dtype, 0.2)
    assert error <= limit * moved


@on_kernels
@pytest.mark.parametrize(
    "options",
    [
        {"master_weights": "24bit"},
        {"master_weights": "32bit", "state_dtype": "int8"},
        {"stochastic_rounding": True},
        {"state_dtype": mx.float32},
    ],
    ids=str,
)
def test_weights_of_half_precision(options: dict[str, Any], backend: str) -> None:
    """Small steps that bfloat16 alone loses."""
    if backend == SIMULATOR and len(options) == 1:
        pytest.skip("one will do there")
    parameters = {"a": mx.ones((80, 64), mx.bfloat16)}
    fused = optim.fuse(Tiger(1e-4), **options)
    ours = parameters
    for _ in range(6):
        gradients = {"a": mx.ones((64, 80), mx.bfloat16).T}
        ours = fused.apply_gradients(gradients, ours)
    assert is_fused(fused)
    assert ours["a"].dtype == mx.bfloat16
    if "master_weights" in options:
        exact = kernels.join(ours["a"], fused.state["a"]["error"])
        assert number(mx.max(mx.abs(exact - (1 - 6e-4 - 6e-6)))) < 5e-5
    elif "stochastic_rounding" in options:
        mean = number(mx.mean(ours["a"].astype(mx.float32)))
        assert mean == pytest.approx(1 - 6e-4, abs=2e-4)
        assert mean < 1


@on_the_cpu
def test_states_that_appear_later_come_into_codes(backend: str) -> None:
    parameters = {"a": mx.random.normal((80, 64), key=mx.random.key(1))}
    fused = optim.fuse(Adan(1e-2), state_dtype="int8")
    exact = Adan(1e-2)
    wanted = ours = parameters
    for step in range(3):
        gradients = gradients_of(parameters, step)
        wanted = exact.apply_gradients(gradients, wanted)
        ours = fused.apply_gradients(gradients, ours)
    assert "previous_int8" in fused.state["a"]
    assert is_fused(fused)
    moved = number(mx.mean(mx.abs(wanted["a"] - parameters["a"])))
    assert number(mx.mean(mx.abs(wanted["a"] - ours["a"]))) <= 0.2 * moved


@on_the_cpu
@pytest.mark.parametrize("name", ["AdaBelief", "LAMB"])
def test_accumulation_and_averages(name: str, backend: str) -> None:
    plain = PUBLISHED[name]()
    fused = optim.fuse(PUBLISHED[name](), accumulate=2, ema=0.5)
    parameters = ours = parameters_of()
    average = parameters  # it begins as the weights
    for step in range(3):
        pair = [gradients_of(parameters, 10 * step + i) for i in range(2)]
        mean = tree_map(lambda x, y: (x + y) / 2, *pair)
        parameters = plain.apply_gradients(mean, parameters)
        for gradients in pair:
            ours = fused.apply_gradients(gradients, ours)
        average = tree_map(lambda a, p: 0.5 * a + 0.5 * p, average, parameters)
    assert_close(ours, parameters, 1e-5)
    assert is_fused(fused)
    averages = {k: v for k, v in flat(fused.state).items() if "weight_average" in k}
    wanted = {f"{k}.weight_average": x for k, x in flat(average).items()}
    assert_close(averages, {k: wanted[k] for k in averages}, 1e-5)
    assert len(averages) == len(SHAPES)


@on_the_cpu
def test_in_a_multi_optimizer_clipped_by_one_norm(backend: str) -> None:
    def both(wrap: Callable[[Any], Any]) -> list[Any]:
        return [wrap(PUBLISHED["AdaBelief"]()), wrap(PUBLISHED["Tiger"]())]

    filters = [lambda path, x: x.ndim > 1]
    fused = optim.MultiOptimizer(both(optim.fuse), filters, max_grad_norm=0.5)
    plain = optim.MultiOptimizer(both(lambda o: o), filters)
    parameters = ours = parameters_of()
    for step in range(3):
        gradients = gradients_of(parameters, step)
        wanted = clipped(gradients, 0.5)
        parameters = plain.apply_gradients(wanted, parameters)
        ours = fused.apply_gradients(gradients, ours)
        assert_close(ours, parameters, 1e-5)
    assert all(map(is_fused, fused.optimizers))


@on_the_cpu
@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8"}], ids=str)
def test_checkpoints(options: dict[str, Any], backend: str, tmp_path: Path) -> None:
    model = nn.Linear(64, 80)
    fused = optim.fuse(NAdam(1e-2), **options)
    gradients = gradients_of(model.trainable_parameters(), 0)
    fused.update(model, gradients)
    optim.save(tmp_path / "c", model, fused)
    other_model = nn.Linear(64, 80)
    other = optim.fuse(NAdam(1e-2), **options)
    optim.load(tmp_path / "c", other_model, other)
    fused.update(model, gradients)
    other.update(other_model, gradients)
    assert_close(other.state, fused.state, 0)
    assert_close(other_model.parameters(), model.parameters(), 0)


Decorated = optim.fuse(Tiger)


@on_the_cpu
def test_classes_instances_copies_and_pickles(backend: str) -> None:
    assert issubclass(Decorated, Tiger)
    assert Decorated is optim.fuse(Tiger)
    made = Decorated(1e-2, beta=0.9, max_grad_norm=2.0)
    assert (made.beta, made.max_grad_norm) == (0.9, 2.0)
    assert optim.fuse(made) is made
    assert optim.fuse(optim.Adam(1e-3)).__class__ is optim.Adam
    parameters = parameters_of()
    ours = made.apply_gradients(gradients_of(parameters, 0), parameters)
    gradients = gradients_of(parameters, 1)
    copies = [copy.deepcopy(made), pickle.loads(pickle.dumps(made))]
    wanted = made.apply_gradients(gradients, ours)
    for other in copies:
        assert type(other) is type(made)
        assert_close(other.apply_gradients(gradients, ours), wanted, 0)


@more_dimensions_in_adafactor
@on_the_cpu
def test_stock_and_its_subclasses(backend: str) -> None:
    """Every optimizer of mlx.optimizers; of a subclass the user's apply_single."""

    class Half(stock.AdamW):
        def apply_single(
            self, gradient: mx.array, parameter: mx.array, state: State
        ) -> mx.array:
            updated: mx.array = super().apply_single(gradient * 0.5, parameter, state)
            return updated

    makes: list[Callable[[], Any]] = [
        lambda: stock.Adam(1e-2, bias_correction=True),
        lambda: stock.SGD(1e-2, momentum=0.9, nesterov=True),
        lambda: stock.Lion(optim.cosine_decay(1e-2, 10)),
        lambda: stock.Adafactor(),
        lambda: Half(1e-2),
    ]
    for make in makes:
        assert is_fused(compare(make, limit=4e-6))


def test_refusals() -> None:
    with pytest.raises(TypeError, match="expected an optimizer or its class"):
        optim.fuse(3)
    with pytest.raises(TypeError, match="fuse the optimizers that it has"):
        optim.fuse(optim.MultiOptimizer([optim.Adam(1e-3)]))
    with pytest.raises(TypeError, match="give them to the constructor"):
        optim.fuse(Tiger, max_grad_norm=1.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'norm'"):
        optim.fuse(Tiger(1e-3), norm=1.0)
    with pytest.raises(TypeError, match="takes no weight decay"):
        optim.fuse(NAdam(1e-3), weight_decay_filter=lambda path, x: True)

    class Own(Tiger):
        def update(self, model: Any, gradients: Any) -> None:
            pass

    class Taken(Tiger):
        def __init__(self, max_grad_norm: float) -> None:
            super().__init__(1e-3)

    for kind, text in ((Own, "update of its own"), (Taken, "name of an option")):
        with pytest.warns(UserWarning, match=text):
            assert optim.fuse(kind) is kind


# Memory and bytes


@on_kernels
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["AdaBelief", "NAdam", "QHAdam", "Tiger", "Adan"])
def test_a_step_allocates_nothing(name: str, compiled: bool, backend: str) -> None:
    if backend == SIMULATOR and name != "Tiger":
        pytest.skip("one will do there")
    if compiled and name == "QHAdam":
        pytest.skip("a Python number in the state is baked in by MLX")
    fused = optim.fuse(PUBLISHED[name]())
    parameters = {"a": mx.ones((90, 50)), "b": mx.ones((40, 30))}
    parameters = fused.apply_gradients(gradients_of(parameters, 9), parameters)
    mx.eval(parameters, fused.state)

    def step(parameters: Any, gradients: Any) -> Any:
        return fused.apply_gradients(gradients, parameters)

    if compiled:
        step = mx.compile(step, inputs=fused.state, outputs=fused.state)
    for i in range(4):
        gradients = gradients_of(parameters, i)
        mx.synchronize()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        parameters = step(parameters, gradients)
        mx.eval(parameters, fused.state)
        if i > 0:  # tracing holds the first arguments
            assert mx.get_peak_memory() - before < 4096


@pytest.mark.parametrize("backend", [SIMULATOR], indirect=True)
def test_metal_moves_the_least_bytes_of_its_slots(backend: str) -> None:
    import metal_simulator

    least = {"AdaBelief": 28, "Tiger": 20, "Adan": 44}
    for name, bytes_each in least.items():
        for dtype in [mx.bfloat16 if name == "Tiger" else mx.float32]:
            fused = optim.fuse(PUBLISHED[name]())
            parameters = {f"{i}": mx.ones((64, 32), dtype) for i in range(6)}
            parameters = fused.apply_gradients(
                gradients_of(parameters, 0, False), parameters
            )
            mx.eval(parameters, fused.state)  # the kernel is checked at its first use
            parameters = fused.apply_gradients(
                gradients_of(parameters, 1, False), parameters
            )
            mx.eval(parameters, fused.state)
            gradients = gradients_of(parameters, 2)
            metal_simulator.reset()
            parameters = fused.apply_gradients(gradients, parameters)
            mx.eval(parameters, fused.state)
            launches = metal_simulator.counters()
            moved = sum(x.bytes_read + x.bytes_written for x in launches)
            elements = 6 * 64 * 32
            assert moved == bytes_each * elements * dtype.size // 4, name
            assert len(launches) <= 3, name
