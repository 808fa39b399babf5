"""What people who train run into: the faults behind public reports, by kind.

Each section is a kind of fault. Where ``mlx.optimizers`` has it too, the right values
are torch's, or those of float64 NumPy, and stand in the test.
"""

from __future__ import annotations

import copy
import inspect
import pickle
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
from mlx.utils import tree_map, tree_map_with_path, tree_unflatten
from support import (
    DECAYING_OPTIMIZERS,
    HAS_STREAM_ERRORS,
    MLX_VERSION,
    PARTLY_FUSED,
    assert_trees_match,
    copy_tree,
    every_optimizer,
    for_each,
    is_stocks,
    leaves_of,
    oracle,
    random_array,
    skip_more_dimensions,
    snapshot,
    to_numpy,
)

NAN = float("nan")
DECAYING = {name for name, _ in DECAYING_OPTIMIZERS}
decaying = for_each(DECAYING_OPTIMIZERS)
compiled_too = pytest.mark.parametrize(
    "compiled", [False, True], ids=["eager", "compiled"]
)


def make(name: str, options: dict[str, Any], **more: Any) -> Any:
    return getattr(optim, name)(**{"learning_rate": 1e-2, **options, **more})


def is_matrix(path: str, array: mx.array) -> bool:
    return array.ndim >= 2


def is_first(path: str, array: mx.array) -> bool:
    return path.split(".")[0] == "a"


def small_tree(seed: int = 0, dtype: mx.Dtype = mx.float32) -> Any:
    rng = np.random.default_rng(seed)
    return {
        "layers": [
            {
                "weight": random_array(rng, (6, 4), dtype),
                "bias": random_array(rng, (6,), dtype),
            }
        ],
        "scale": random_array(rng, (3,), dtype),
    }


def stepper(optimizer: Any, parameters: Any, compiled: bool) -> Callable[..., Any]:
    """A step as a function of parameters and gradients."""

    def step(parameters: Any, gradients: Any) -> Any:
        return optimizer.apply_gradients(gradients, parameters)

    if not compiled:
        return step
    optimizer.init(parameters)
    traced: Any = mx.compile(step, inputs=optimizer.state, outputs=optimizer.state)
    return traced  # type: ignore[no-any-return]


def backward(model: Any, x: mx.array | None = None) -> Any:
    """Gradients of the model's trainable parameters."""
    if x is None:
        x = mx.array(np.random.default_rng(9).standard_normal((5, 4)), mx.float32)
    # Without the model as an argument: MLX walks its private attributes then.
    return nn.value_and_grad(model, lambda: mx.square(model(x)).mean())()[1]


# Words of an error that shows our insides, or nanobind's.
INSIDES = ("_ext", "incompatible function arguments", "__init__()", "has no attribute")


def clear_error(
    action: Callable[[], Any], errors: Any, *words: str
) -> pytest.ExceptionInfo[Any]:
    """The error must have these words, and say nothing of how we are made."""
    with pytest.raises(errors) as caught:
        action()
    text = str(caught.value)
    for word in words:
        assert word in text, text
    for word in INSIDES:
        assert word not in text, text
    return caught


# 1. Options of MultiOptimizer and of its parts


OUTER: list[dict[str, Any]] = [
    {},
    {"max_grad_norm": 10.0},
    {"skip_nonfinite": True},
    {"max_grad_norm": 10.0, "skip_nonfinite": True},
]
with_outer_options = pytest.mark.parametrize(
    "outer", OUTER, ids=["plain", "clip", "skip", "clip-skip"]
)


class Reversed(optim.SGD):
    """A user's change of all gradients at once."""

    calls = 0

    def apply_gradients(  # type: ignore[override]
        self, gradients: Any, parameters: Any
    ) -> Any:
        self.calls += 1
        return super().apply_gradients(tree_map(lambda g: -g, gradients), parameters)


class Counting(optim.Optimizer):
    """A user's step that calls nothing of ours, and has a state entry of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.state["sum"] = mx.array(0.0)

    def init_single(self, parameter: mx.array, state: dict[str, Any]) -> None:
        state["v"] = mx.zeros_like(parameter)

    def apply_gradients(  # type: ignore[override]
        self, gradients: Any, parameters: Any
    ) -> Any:
        if not self._initialized:
            self.init(gradients)
        for g in leaves_of(gradients).values():
            self.state["sum"] = self.state["sum"] + mx.sum(g)
        return tree_map(lambda g: parameters["a"] - g, gradients)


@with_outer_options
@compiled_too
def test_a_part_of_multi_skips(
    backend: str, outer: dict[str, Any], compiled: bool
) -> None:
    part = optim.Adam(0.1, skip_nonfinite=True)
    optimizer: Any = optim.MultiOptimizer([part, optim.SGD(1.0)], [is_first], **outer)
    parameters = {"a": mx.ones(2), "b": mx.ones(2)}
    step = stepper(optimizer, parameters, compiled)
    gradients = {"a": mx.array([NAN, 1.0]), "b": mx.array([0.5, 0.25])}
    updated = step(parameters, gradients)
    mx.eval(updated, optimizer.state)
    assert updated["a"].tolist() == [1, 1]
    assert part.skipped_steps is not None
    assert int(part.step) == 0
    if not outer:
        assert int(part.skipped_steps) == 1
        assert updated["b"].tolist() == [0.5, 0.75]
    if outer.get("skip_nonfinite"):
        assert updated["b"].tolist() == [1, 1]
        assert int(optimizer.skipped_steps) == 1
    # What is finite again is stepped again, by all.
    gradients = {"a": mx.ones(2), "b": mx.ones(2)}
    updated = step(parameters, gradients)
    np.testing.assert_allclose(to_numpy(updated["b"]), 0, atol=1e-6)
    assert (to_numpy(updated["a"]) < 1).all()
    assert int(part.step) == 1


@compiled_too
def test_a_part_of_multi_clips_what_the_whole_has_clipped(
    backend: str, compiled: bool
) -> None:
    part = optim.SGD(1.0, max_grad_norm=0.5)
    optimizer: Any = optim.MultiOptimizer(
        [part, optim.SGD(1.0)], [is_first], max_grad_norm=2.0
    )
    parameters = {"a": mx.zeros(2), "b": mx.zeros(1)}
    step = stepper(optimizer, parameters, compiled)
    # Norms: 13 of all; after the whole's clipping 10/13 of a; then 0.5 of a.
    gradients = {"a": mx.array([3.0, 4.0]), "b": mx.array([12.0])}
    updated = step(parameters, gradients)
    assert float(optimizer.grad_norm) == pytest.approx(13, rel=1e-6)
    assert part.grad_norm is not None
    assert float(part.grad_norm) == pytest.approx(10 / 13, rel=1e-5)
    np.testing.assert_allclose(to_numpy(updated["a"]), [-0.3, -0.4], rtol=1e-5)
    np.testing.assert_allclose(to_numpy(updated["b"]), [-24 / 13], rtol=1e-5)


def test_a_multi_inside_a_multi_keeps_its_options(backend: str) -> None:
    inner: Any = optim.MultiOptimizer(
        [optim.SGD(1.0), optim.SGD(2.0)],
        [lambda path, _: path.endswith("one")],
        max_grad_norm=0.5,
        skip_nonfinite=True,
    )
    outer: Any = optim.MultiOptimizer(
        [inner, optim.SGD(1.0)], [is_first], max_grad_norm=2.0
    )
    parameters = {"a": {"one": mx.zeros(1), "two": mx.zeros(1)}, "b": mx.zeros(1)}
    gradients: Any = {
        "a": {"one": mx.array([3.0]), "two": mx.array([4.0])},
        "b": mx.array([12.0]),
    }
    updated = outer.apply_gradients(gradients, parameters)
    assert float(outer.grad_norm) == pytest.approx(13, rel=1e-6)
    assert float(inner.grad_norm) == pytest.approx(10 / 13, rel=1e-5)
    assert updated["a"]["one"].item() == pytest.approx(-0.3, rel=1e-5)
    assert updated["a"]["two"].item() == pytest.approx(-0.8, rel=1e-5)
    assert updated["b"].item() == pytest.approx(-24 / 13, rel=1e-5)

    before = snapshot([updated["a"], inner.state["states"]])
    gradients["a"]["two"] = mx.array([NAN])
    updated = outer.apply_gradients(gradients, updated)
    assert snapshot([updated["a"], inner.state["states"]]) == before
    assert int(inner.skipped_steps) == 1


@with_outer_options
def test_a_part_that_overrides_apply_gradients(
    backend: str, outer: dict[str, Any]
) -> None:
    """It gets the clipped gradients, and a skipped step leaves it as it was."""
    part = Reversed(1.0, momentum=0.5)
    optimizer: Any = optim.MultiOptimizer([part, optim.SGD(1.0)], [is_first], **outer)
    parameters = {"a": mx.zeros(2), "b": mx.zeros(1)}
    gradients = {"a": mx.array([3.0, 4.0]), "b": mx.array([12.0])}
    factor = 10 / 13 if "max_grad_norm" in outer else 1
    updated = optimizer.apply_gradients(gradients, parameters)
    assert part.calls == 1
    np.testing.assert_allclose(
        to_numpy(updated["a"]), [3 * factor, 4 * factor], rtol=1e-5
    )
    if outer.get("skip_nonfinite"):
        before = snapshot([updated, optimizer.state["states"]])
        gradients["b"] = mx.array([NAN])
        updated = optimizer.apply_gradients(gradients, updated)
        assert snapshot([updated, optimizer.state["states"]]) == before


@with_outer_options
def test_a_part_whose_step_is_all_its_own(backend: str, outer: dict[str, Any]) -> None:
    part = Counting()
    optimizer: Any = optim.MultiOptimizer([part, optim.SGD(1.0)], [is_first], **outer)
    parameters = {"a": mx.zeros(2), "b": mx.zeros(1)}
    gradients = {"a": mx.array([3.0, 4.0]), "b": mx.array([12.0])}
    factor = 10 / 13 if "max_grad_norm" in outer else 1
    updated = optimizer.apply_gradients(gradients, parameters)
    np.testing.assert_allclose(
        to_numpy(updated["a"]), [-3 * factor, -4 * factor], rtol=1e-5
    )
    assert part.state["sum"].item() == pytest.approx(7 * factor, rel=1e-5)
    if outer.get("skip_nonfinite"):
        before = snapshot([updated, optimizer.state["states"]])
        gradients["b"] = mx.array([NAN])
        updated = optimizer.apply_gradients(gradients, updated)
        assert snapshot([updated, optimizer.state["states"]]) == before


@with_outer_options
@decaying
def test_parts_keep_their_filter_and_dtype(
    name: str, options: dict[str, Any], outer: dict[str, Any]
) -> None:
    """Options that a part has alone, with the paths of the whole tree."""
    paths: list[str] = []

    def decays(path: str, array: mx.array) -> bool:
        paths.append(path)
        return array.ndim >= 2

    more = {
        "weight_decay": 0.3,
        "weight_decay_filter": decays,
        "state_dtype": mx.float32,
    }
    parameters, gradients = (small_tree(i, mx.float16) for i in range(2))
    optimizer: Any = optim.MultiOptimizer(
        [optim.SGD(1.0), make(name, options, **more)],
        [lambda path, _: path == "scale"],
        **outer,
    )
    updated = optimizer.apply_gradients(gradients, parameters)
    assert {*paths} == {"layers.0.weight", "layers.0.bias"}
    alone = make(name, options, **more)
    expected = alone.apply_gradients(gradients, parameters)
    assert_trees_match(updated["layers"], expected["layers"], 2e-3, 1e-5)
    state = optimizer.state["states"][1]["layers"]
    assert {p: x.dtype for p, x in leaves_of(state).items()} == {
        p: x.dtype for p, x in leaves_of(alone.state["layers"]).items()
    }


def test_an_optimizer_in_two_places() -> None:
    """Its state covers all of its parameters from the first step on."""
    adam = optim.Adam(0.1)
    filters = [lambda path, x: path == "a", lambda path, x: path == "b"]
    optimizer: Any = optim.MultiOptimizer([adam, optim.SGD(0.1), adam], filters)
    tree = {name: mx.ones(2) for name in "abc"}
    updated = optimizer.apply_gradients(tree, tree)
    first = 1 - 0.1 * 0.1 / 0.001**0.5
    for name, expected in (("a", first), ("b", 0.9), ("c", first)):
        np.testing.assert_allclose(to_numpy(updated[name]), expected, rtol=1e-5)
    optimizer.apply_gradients(tree, updated)
    assert {*adam.state} == {"step", "learning_rate", "a", "c"}


# 2. MultiOptimizer on any tree


class Odd(nn.Module):  # type: ignore[misc, unused-ignore]
    """Gaps, nested lists, a dict with numbers as keys, a module without parameters."""

    def __init__(self) -> None:
        super().__init__()
        mx.random.seed(0)
        self.blocks: Any = [nn.ReLU(), [nn.ReLU(), nn.Linear(4, 4)], nn.Linear(4, 4)]
        self.heads = {"0": nn.Linear(4, 4), "1": nn.ReLU()}
        self.dropout = nn.Dropout(0.0)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.blocks[2](self.blocks[1][1](x))
        result: mx.array = self.heads["0"](x)
        return result


def sequential() -> nn.Module:
    mx.random.seed(0)
    return nn.Sequential(
        nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)
    )


FILTERS: dict[str, Callable[[str, mx.array], bool]] = {
    "last": lambda path, _: path.startswith(("layers.4", "blocks.2")),
    "first": lambda path, _: path.startswith(("layers.0", "blocks.1")),
    "matrices": is_matrix,
    "none": lambda path, _: False,
    "all": lambda path, _: True,
}


@pytest.mark.parametrize("build", [sequential, Odd])
@pytest.mark.parametrize("which", FILTERS)
@pytest.mark.parametrize("clipped", [False, True], ids=["", "clip"])
@compiled_too
def test_multi_on_modules_without_parameters(
    build: Callable[[], nn.Module],
    which: str,
    clipped: bool,
    compiled: bool,
) -> None:
    """Each part does what it does alone."""
    model, reference = build(), build()
    chosen = FILTERS[which]
    options: Any = {"max_grad_norm": 1e9} if clipped else {}
    optimizer = optim.MultiOptimizer(
        [optim.AdamW(1e-2), optim.Muon(1e-2)], [chosen], **options
    )
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]

    def step() -> None:
        optimizer.update(model, backward(model))

    if compiled:
        step = mx.compile(step, inputs=state, outputs=state)
    alone = [optim.AdamW(1e-2), optim.Muon(1e-2)]
    for _ in range(2):
        step()
        gradients = backward(reference)
        results = [part.apply_gradients(gradients, reference) for part in alone]
        reference.update(
            tree_map_with_path(
                lambda path, first, second: first if chosen(path, first) else second,
                *results,
            )
        )
    assert_trees_match(model.parameters(), reference.parameters(), 1e-5, 1e-6)


@pytest.mark.parametrize("build", [sequential, Odd])
def test_multi_on_such_models_is_saved_and_loaded(
    tmp_path: Path, build: Callable[[], nn.Module]
) -> None:
    def run() -> tuple[nn.Module, Any]:
        parts = [optim.AdamW(1e-2), optim.Muon(1e-2)]
        return build(), optim.MultiOptimizer(parts, [FILTERS["last"]])

    model, optimizer = run()
    for _ in range(2):
        optimizer.update(model, backward(model))
    optim.save(tmp_path / "file", model, optimizer)
    other, resumed = run()
    optim.load(tmp_path / "file", other, resumed)
    optimizer.update(model, backward(model))
    resumed.update(other, backward(other))
    assert snapshot([other.parameters(), resumed.state]) == snapshot(
        [model.parameters(), optimizer.state]
    )


def test_multi_returns_a_tree_of_the_gradients_structure() -> None:
    """Tuples, dicts whose keys are numbers, and names with a dot."""
    tree: Any = {
        "a": (mx.ones(2), [mx.ones((2, 2)), {}]),
        "b": {"0": mx.ones(2), "1": mx.ones((2, 2))},
        "c.d": {"e": mx.ones(3)},
        7: {8: mx.ones(4)},
    }
    optimizer = optim.MultiOptimizer(
        [optim.SGD(0.5), optim.SGD(0.25, momentum=0.9)], [is_matrix]
    )
    for _ in range(2):
        updated = optimizer.apply_gradients(tree, tree)
        assert type(updated["a"]) is tuple and type(updated["a"][1]) is list
        assert updated["a"][0].tolist()[0] < 1
        assert updated["a"][1][0].tolist() == [[0.5, 0.5], [0.5, 0.5]]
        assert updated["b"]["1"].tolist() == [[0.5, 0.5], [0.5, 0.5]]
        assert [*updated["b"]] == ["0", "1"]
        assert updated["c.d"]["e"].shape == (3,) and updated[7][8].shape == (4,)


# 3. What update reads of a model


class Child(nn.Module):  # type: ignore[misc, unused-ignore]
    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        self._parent = parent
        self.linear = nn.Linear(4, 4)


class Parent(nn.Module):  # type: ignore[misc, unused-ignore]
    """Private attributes that lead back to the module, and to themselves."""

    def __init__(self) -> None:
        super().__init__()
        mx.random.seed(0)
        self.child = Child(self)
        self.frozen = nn.Linear(4, 4).freeze()
        self._log: list[Any] = []
        self._table: dict[str, Any] = {}
        self._table["self"] = self._table
        self._log.append(self._log)

    def __call__(self, x: mx.array) -> mx.array:
        result: mx.array = self.frozen(self.child.linear(x))
        return result


@pytest.mark.parametrize("several", [False, True], ids=["one", "multi"])
def test_update_of_a_module_with_cycles(several: bool) -> None:
    results = []
    for library in (optim, stock):
        model = Parent()
        optimizer: Any = library.AdamW(1e-2)
        if several:
            optimizer = library.MultiOptimizer([optimizer])
        for _ in range(2):
            optimizer.update(model, backward(model))
        results.append(model.child.linear.parameters())
    assert_trees_match(results[0], results[1], 1e-5, 1e-7)


def test_an_error_restores_what_the_gradients_name_and_no_more() -> None:
    """A user's own attributes keep what a schedule that raises has written."""
    model = Parent()

    def schedule(step: mx.array) -> mx.array:
        if int(step) == 1:
            model._log.append("written")
            model._table["count"] = 1
            model._note = mx.array(7.0)
            model.frozen.weight = mx.full((4, 4), 7.0)
            model.child.linear.weight = mx.full((4, 4), 7.0)
            raise RuntimeError("the schedule broke")
        return mx.array(0.1)

    optimizer = optim.SGD(schedule, momentum=0.9)
    optimizer.update(model, backward(model))
    gradients = backward(model)
    before = snapshot([model.child.linear.parameters(), optimizer.state])
    with pytest.raises(RuntimeError, match="the schedule broke"):
        optimizer.update(model, gradients)
    assert snapshot([model.child.linear.parameters(), optimizer.state]) == before
    assert model._log[-1] == "written" and model._table["count"] == 1
    assert model._note.item() == 7
    assert model.frozen.weight[0, 0].item() == 7


# 4. Copies


def with_each_option(name: str) -> list[dict[str, Any]]:
    each: list[dict[str, Any]] = [
        {},
        {"max_grad_norm": 0.5},
        {"skip_nonfinite": True},
        {"state_dtype": mx.float32},
        {"state_dtype": mx.bfloat16, "max_grad_norm": 0.5, "skip_nonfinite": True},
    ]
    if name in DECAYING:
        each.append({"weight_decay_filter": optim.decay_matrices_only})
    return each


def repickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": repickled,
}
either_copy = pytest.mark.parametrize("how", COPIES)


def assert_is_a_copy(
    duplicate: Any, original: Any, parameters: Any, gradients: Any
) -> None:
    """It steps as the original does, and neither changes the other."""
    assert type(duplicate) is type(original)
    assert snapshot(duplicate.state) == snapshot(original.state)
    before = snapshot(original.state)
    mine = duplicate.apply_gradients(gradients, parameters)
    mx.eval(mine, duplicate.state)
    assert snapshot(original.state) == before
    theirs = original.apply_gradients(gradients, parameters)
    assert snapshot([mine, duplicate.state]) == snapshot([theirs, original.state])


@either_copy
@every_optimizer
def test_copies_with_every_option(name: str, options: dict[str, Any], how: str) -> None:
    for more in with_each_option(name):
        parameters, gradients = small_tree(0, mx.float16), small_tree(1, mx.float16)
        optimizer = make(name, options, **more)
        fresh = COPIES[how](optimizer)
        parameters = optimizer.apply_gradients(gradients, parameters)
        mx.eval(parameters, optimizer.state)
        duplicate = COPIES[how](optimizer)
        for option, value in more.items():
            assert getattr(duplicate, option) == value
            assert getattr(fresh, option) == value
        assert_is_a_copy(duplicate, optimizer, parameters, gradients)
        twin = make(name, options, **more)
        assert_is_a_copy(fresh, twin, parameters, gradients)


@either_copy
@pytest.mark.parametrize("outer", OUTER, ids=["plain", "clip", "skip", "clip-skip"])
def test_copies_of_multi(how: str, outer: dict[str, Any]) -> None:
    optimizer = optim.MultiOptimizer(
        [
            optim.Muon(1e-2, state_dtype=mx.float32),
            optim.MultiOptimizer([optim.AdamW(1e-2), optim.SGD(0.1)], [is_first]),
        ],
        [is_matrix],
        **outer,
    )
    parameters, gradients = small_tree(0), small_tree(1)
    parameters = optimizer.apply_gradients(gradients, parameters)
    assert_is_a_copy(COPIES[how](optimizer), optimizer, parameters, gradients)


SCHEDULES: dict[str, Callable[[], Callable[[Any], Any]]] = {
    "constant": lambda: optim.constant(0.1),
    "inverse_sqrt": lambda: optim.inverse_sqrt(0.1, 5),
    "polynomial_decay": lambda: optim.polynomial_decay(0.1, 0.0, 10, 2.0),
    "warmup_stable_decay": lambda: optim.warmup_stable_decay(0.1, 3, 3, 3),
    "cosine_decay": lambda: optim.cosine_decay(0.1, 10),
    "exponential_decay": lambda: optim.exponential_decay(0.1, 0.9),
    "linear_schedule": lambda: optim.linear_schedule(0.1, 0.0, 10),
    "step_decay": lambda: optim.step_decay(0.1, 0.9, 2),
    "join_schedules": lambda: optim.join_schedules(
        [optim.linear_schedule(0.0, 0.1, 3), optim.cosine_decay(0.1, 10)], [3]
    ),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


@either_copy
@every_schedule
def test_copies_with_a_schedule(how: str, schedule: str) -> None:
    optimizer = optim.AdamW(SCHEDULES[schedule](), state_dtype=mx.float32)
    parameters, gradients = small_tree(0), small_tree(1)
    parameters = optimizer.apply_gradients(gradients, parameters)
    assert_is_a_copy(COPIES[how](optimizer), optimizer, parameters, gradients)


class Clamped(optim.Adam):
    """A user's class, with an attribute of its own."""

    bound = 0.5
    kind = mx.float16

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]
    ) -> mx.array:
        clamped = mx.clip(gradient, -self.bound, self.bound)
        return super().apply_single(clamped, parameter, state)


@either_copy
def test_copies_of_a_users_class(how: str) -> None:
    optimizer: Any = Clamped(1e-2, state_dtype=mx.float32)
    optimizer.bound, optimizer.kind = 0.25, mx.bfloat16
    parameters, gradients = small_tree(0), small_tree(1)
    parameters = optimizer.apply_gradients(gradients, parameters)
    duplicate = COPIES[how](optimizer)
    assert duplicate.bound == 0.25 and duplicate.kind == mx.bfloat16
    assert_is_a_copy(duplicate, optimizer, parameters, gradients)


@either_copy
@every_optimizer
def test_copies_of_a_compiled_steps_optimizer(
    name: str, options: dict[str, Any], how: str
) -> None:
    for more in with_each_option(name):
        parameters, gradients = small_tree(0), small_tree(1)
        optimizer = make(name, options, **more)
        step = stepper(optimizer, parameters, compiled=True)
        for _ in range(2):
            parameters = step(parameters, gradients)
        duplicate = COPIES[how](optimizer)
        before = snapshot(duplicate.state)
        assert before == snapshot(optimizer.state)
        expected = step(parameters, gradients)  # the compiled function goes on
        mx.eval(expected, optimizer.state)
        assert snapshot(duplicate.state) == before
        # And the copy can be compiled anew.
        again = stepper(duplicate, parameters, compiled=True)
        assert_trees_match(again(parameters, gradients), expected, 1e-6, 1e-8)
        assert_trees_match(duplicate.state, optimizer.state, 1e-6, 1e-12)


def test_copies_of_dtypes() -> None:
    """A user's attribute may be any; bool is not an attribute of mlx.core."""
    dtypes = {x for x in vars(mx).values() if isinstance(x, mx.Dtype)}
    assert {mx.bool_, mx.float64, mx.complex64, mx.uint8} <= dtypes
    for dtype in dtypes:
        assert copy.deepcopy(dtype) == repickled(dtype) == dtype


# 5. Options where a subclass overrides apply_single


def calling_super(name: str) -> Any:
    base: Any = getattr(optim, name)

    class Subclass(base):  # type: ignore[misc]
        def apply_single(
            self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]
        ) -> Any:
            return super().apply_single(gradient, parameter, state)

    return Subclass


def calling_stock(name: str) -> Any:
    base: Any = getattr(optim, name)

    class Subclass(base):  # type: ignore[misc]
        def apply_single(
            self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]
        ) -> Any:
            upstream: Any = getattr(stock, name)
            return upstream.apply_single(self, gradient, parameter, state)

    return Subclass


def on_the_instance(name: str) -> Any:
    def build(**options: Any) -> Any:
        optimizer = getattr(optim, name)(**options)
        usual = optimizer.apply_single
        optimizer.apply_single = lambda *arguments: usual(*arguments)
        return optimizer

    return build


OVERRIDES = {
    "super": calling_super,
    "stock": calling_stock,
    "instance": on_the_instance,
}
every_override = pytest.mark.parametrize("override", OVERRIDES)


def skip_what_writes_gradients(name: str, override: str) -> None:
    if (
        override == "stock"
        and MLX_VERSION < (0, 32, 3)
        and name in ("Adafactor", "SGD")
    ):
        pytest.skip("this MLX changes the gradients that it is given")


@every_override
@decaying
@compiled_too
def test_weight_decay_filter_in_subclasses(
    name: str, options: dict[str, Any], override: str, compiled: bool
) -> None:
    skip_what_writes_gradients(name, override)
    paths: list[str] = []

    def decays(path: str, array: mx.array) -> bool:
        paths.append(path)
        return array.ndim >= 2

    parameters, gradients = small_tree(0), small_tree(1)
    options = {**options, "learning_rate": 1e-2, "weight_decay": 0.3}
    optimizer = OVERRIDES[override](name)(**options, weight_decay_filter=decays)
    updated = stepper(optimizer, parameters, compiled)(parameters, gradients)
    plain = getattr(optim, name)(**options, weight_decay_filter=is_matrix)
    assert_trees_match(
        updated, plain.apply_gradients(gradients, parameters), 2e-5, 2e-6
    )
    assert {*paths} == {"layers.0.weight", "layers.0.bias", "scale"}
    assert optimizer.weight_decay == 0.3


def test_the_bias_of_a_subclass_does_not_decay(backend: str) -> None:
    optimizer = calling_super("AdamW")(
        learning_rate=0.1, weight_decay=0.5, weight_decay_filter=is_matrix
    )
    tree = {"weight": mx.ones((1, 1)), "bias": mx.ones(1)}
    updated = optimizer.apply_gradients(tree_map(mx.zeros_like, tree), tree)
    assert updated["weight"].item() == pytest.approx(0.95, rel=1e-6)
    assert updated["bias"].item() == 1


@every_override
@every_optimizer
def test_step_options_in_subclasses(
    name: str, options: dict[str, Any], override: str
) -> None:
    if override == "stock" and not is_stocks(name, options):
        pytest.skip("stock has no such class")
    skip_what_writes_gradients(name, override)
    options = {"learning_rate": 1e-2, **options}
    more: dict[str, Any] = {"max_grad_norm": 0.3, "skip_nonfinite": True}
    parameters, gradients = small_tree(0), small_tree(1)
    optimizer = OVERRIDES[override](name)(**options, **more)
    plain = getattr(optim, name)(**options, **more)
    updated = optimizer.apply_gradients(gradients, parameters)
    expected = plain.apply_gradients(gradients, parameters)
    assert_trees_match(updated, expected, 2e-5, 2e-6)
    assert float(optimizer.grad_norm) == pytest.approx(float(plain.grad_norm))
    before = snapshot([updated, {**optimizer.state, "grad_norm": mx.array(0)}])
    gradients["scale"] = mx.array([NAN, 0.0, 1.0])
    updated = optimizer.apply_gradients(gradients, updated)
    after = {**optimizer.state, "grad_norm": mx.array(0)}
    after["skipped_steps"] = after["skipped_steps"] - 1
    assert snapshot([updated, after]) == before


@every_override
@every_optimizer
def test_state_dtype_in_subclasses(
    name: str, options: dict[str, Any], override: str
) -> None:
    if override == "stock" and not is_stocks(name, options):
        pytest.skip("stock has no such class")
    options = {"learning_rate": 1e-2, **options}
    parameters, gradients = small_tree(0, mx.float16), small_tree(1, mx.float16)
    optimizer = OVERRIDES[override](name)(**options, state_dtype=mx.float32)
    plain = getattr(optim, name)(**options, state_dtype=mx.float32)
    for _ in range(2):
        updated = optimizer.apply_gradients(gradients, parameters)
        expected = plain.apply_gradients(gradients, parameters)
        assert_trees_match(updated, expected, 1e-2, 1e-3)
        dtypes = [
            {path: x.dtype for path, x in leaves_of(o.state).items()}
            for o in (optimizer, plain)
        ]
        assert dtypes[0] == dtypes[1]


# 6. Complex parameters

COMPLEX = {"w": mx.array([1 + 2j, -3 + 0.5j])}
COMPLEX_GRADIENTS = (
    [3 - 4j, 0.5 + 0.25j],
    [-1 + 2j, 2 - 2j],
    [0 + 1j, -1.5 + 0j],
)
# After these three gradients, by torch 2.14 in complex128, where a complex number is
# two real ones.
TORCH: list[tuple[str, dict[str, Any], list[complex], list[complex]]] = [
    (
        "SGD",
        {"momentum": 0.9},
        [0.377 + 2.604j, -3.3655 + 0.81225j],
        [],
    ),
    (
        "Adam",
        {"betas": (0.9, 0.99), "bias_correction": True},
        [
            0.8288417746415792 + 2.1328287587371526j,
            -3.2059081166637147 + 0.5160507924618072j,
        ],
        [0.098109 + 0.206416j, 0.06455025 + 0.0402125625j],
    ),
    (
        "AdamW",
        {"betas": (0.9, 0.99), "bias_correction": True, "weight_decay": 0.1},
        [
            0.8015317198449591 + 2.071170059313894j,
            -3.1139324996287705 + 0.5025363973853696j,
        ],
        [0.098109 + 0.206416j, 0.06455025 + 0.0402125625j],
    ),
    (
        "RMSprop",
        {"alpha": 0.9},
        [
            0.788600719889786 + 2.0933221699592504j,
            -3.431112579633809 + 0.4977997378440383j,
        ],
        [0.819 + 1.756j, 0.60525 + 0.3650625j],
    ),
    (
        "Adagrad",
        {},
        [
            0.931622776835017 + 2.033456851324024j,
            -3.1381794072332587 + 0.4992277911790589j,
        ],
        [10 + 21j, 6.5 + 4.0625j],
    ),
    (
        "AdaDelta",
        {"learning_rate": 1.0},
        [
            0.9983202215036097 + 1.9999240499216735j,
            -3.0037583447138965 + 0.5012788112549591j,
        ],
        [0.819 + 1.756j, 0.60525 + 0.3650625j],
    ),
]
COMPLEX_OPTIONS: list[dict[str, Any]] = [
    {},
    {"state_dtype": mx.float32},
    {"max_grad_norm": 1e9, "skip_nonfinite": True},
]


@pytest.mark.parametrize(
    ("name", "options", "expected", "second_moment"),
    TORCH,
    ids=[case[0] for case in TORCH],
)
@pytest.mark.parametrize("more", COMPLEX_OPTIONS, ids=["", "state_dtype", "clip-skip"])
def test_complex_parameters_are_torchs(
    backend: str,
    name: str,
    options: dict[str, Any],
    expected: list[complex],
    second_moment: list[complex],
    more: dict[str, Any],
) -> None:
    """With state_dtype=float32 too: complex64 is a pair of those."""
    optimizer = make(name, {"learning_rate": 0.1, **options}, **more)
    parameters = COMPLEX
    for gradient in COMPLEX_GRADIENTS:
        parameters = optimizer.apply_gradients({"w": mx.array(gradient)}, parameters)
    np.testing.assert_allclose(np.array(parameters["w"]), expected, rtol=2e-6)
    assert all(x.dtype == mx.complex64 for x in optimizer.state["w"].values())
    if second_moment:
        np.testing.assert_allclose(
            np.array(optimizer.state["w"]["v"]), second_moment, rtol=2e-6
        )


@pytest.mark.parametrize(
    ("name", "options"), [("Lion", {}), ("Adamax", {}), ("SGD", {"momentum": 0.9})]
)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_state_dtype_keeps_complex_moments(
    backend: str, name: str, options: dict[str, Any], dtype: mx.Dtype
) -> None:
    """There is no half a complex number: such moments stay complex64."""
    results: list[Any] = []
    for library, more in ((optim, {"state_dtype": dtype}), (stock, {})):
        optimizer: Any = getattr(library, name)(0.1, **options, **more)
        parameters: Any = COMPLEX
        for gradient in COMPLEX_GRADIENTS:
            gradients = {"w": mx.array(gradient)}
            parameters = optimizer.apply_gradients(gradients, parameters)
        results.append([parameters, optimizer.state])
    assert_trees_match(results[0], results[1], 2e-6)


@pytest.mark.parametrize("name", ["Adafactor", "Muon"])
@pytest.mark.parametrize("more", COMPLEX_OPTIONS, ids=["", "state_dtype", "clip-skip"])
def test_complex_matrices_are_refused_by_name(name: str, more: dict[str, Any]) -> None:
    """As torch does; upstream's formulas are wrong for them."""
    optimizer = make(name, {}, **more)
    matrix = {"inner": {"w": mx.array([[1 + 2j, 1j], [2 + 0j, 3 - 1j]])}}
    before = snapshot(optimizer.state)
    clear_error(
        lambda: optimizer.apply_gradients(matrix, matrix),
        (TypeError, ValueError),
        name,
        "inner.w",
        "complex64",
    )
    assert snapshot(optimizer.state) == before


def test_the_norm_of_complex_gradients(backend: str) -> None:
    gradients = {"a": mx.array([3j, 4 + 0j])}
    clipped, norm = optim.clip_grad_norm(gradients, 1.0)
    assert norm.dtype == mx.float32
    assert norm.item() == pytest.approx(5, rel=1e-6)
    np.testing.assert_allclose(np.array(clipped["a"]), [0.6j, 0.8], rtol=1e-5)
    optimizer: Any = optim.SGD(1.0, max_grad_norm=1.0)
    updated = optimizer.apply_gradients(gradients, {"a": mx.array([0j, 0j])})
    assert float(optimizer.grad_norm) == pytest.approx(5, rel=1e-6)
    np.testing.assert_allclose(np.array(updated["a"]), [-0.6j, -0.8], rtol=1e-5)


# 7. Options that change in mid-run


def half_model() -> nn.Module:
    mx.random.seed(0)
    model = nn.Linear(4, 4)
    model.set_dtype(mx.bfloat16)
    return model


def half_backward(model: nn.Module) -> Any:
    return backward(model, mx.ones((3, 4), mx.bfloat16))


ADDED: list[dict[str, Any]] = [
    {"max_grad_norm": 0.5},
    {"skip_nonfinite": True},
    {"weight_decay_filter": is_matrix},
    {"state_dtype": mx.float32},
    {
        "max_grad_norm": 0.5,
        "skip_nonfinite": True,
        "weight_decay_filter": is_matrix,
        "state_dtype": mx.float32,
    },
]
added_option = pytest.mark.parametrize(
    "added", ADDED, ids=["-".join(options) for options in ADDED]
)


@pytest.mark.parametrize(
    ("library", "strict"), [(optim, False), (stock, True)], ids=["ours", "stock"]
)
@decaying
@added_option
def test_a_plain_checkpoint_loads_into_an_optimizer_with_options(
    tmp_path: Path,
    name: str,
    options: dict[str, Any],
    added: dict[str, Any],
    strict: bool,
    library: Any,
) -> None:
    """Moments are converted, and one warning says which."""
    options = {"learning_rate": 1e-2, "weight_decay": 0.1, **options}
    model = half_model()
    optimizer = getattr(library, name)(**options)
    optimizer.update(model, half_backward(model))
    optim.save(tmp_path / "file", model, optimizer)

    other = half_model()
    resumed = getattr(optim, name)(**options, **added)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optim.load(tmp_path / "file", other, resumed, strict=strict)
    texts = [str(w.message) for w in caught if "convert" in str(w.message)]
    unused = name == "SGD" and "momentum" not in options
    if "state_dtype" not in added:
        assert texts == []
    elif not unused:
        assert len(texts) == 1
        assert "bfloat16" in texts[0] and "float32" in texts[0]
    assert int(resumed.step) == 1

    expected = getattr(optim, name)(**options, **added)
    expected.state = copy_tree(optimizer.state)
    twin = half_model()
    twin.update(other.parameters())
    resumed.update(other, half_backward(other))
    expected.update(twin, half_backward(twin))
    assert snapshot(other.parameters()) == snapshot(twin.parameters())
    moments = {k: v for k, v in resumed.state.items() if k in ("weight", "bias")}
    if "state_dtype" in added and not unused:
        assert {x.dtype for x in leaves_of(moments).values()} == {mx.float32}
    # And the run with options is saved and resumed in turn.
    optim.save(tmp_path / "again", other, resumed)
    optim.load(tmp_path / "again", twin, getattr(optim, name)(**options, **added))


def test_lenient_loading_leaves_out_options_and_converts(tmp_path: Path) -> None:
    model = half_model()
    optimizer = optim.AdamW(1e-2, state_dtype=mx.float32, skip_nonfinite=True)
    optimizer.update(model, half_backward(model))
    optim.save(tmp_path / "file", model, optimizer)
    other, plain = half_model(), optim.AdamW(1e-2)
    with pytest.warns(UserWarning, match="float32 .*bfloat16"):
        optim.load(tmp_path / "file", other, plain, strict=False)
    assert plain.state["weight"]["m"].dtype == mx.bfloat16
    np.testing.assert_array_equal(
        to_numpy(plain.state["weight"]["m"]),
        to_numpy(optimizer.state["weight"]["m"].astype(mx.bfloat16)),
    )
    assert plain.state.keys() == stock_keys(model)


def stock_keys(model: nn.Module) -> Any:
    theirs = stock.AdamW(1e-2)
    theirs.init(model.trainable_parameters())
    return theirs.state.keys()


@every_optimizer
@pytest.mark.parametrize("with_multi", [False, True], ids=["", "multi"])
def test_step_options_set_between_steps(
    name: str, options: dict[str, Any], with_multi: bool
) -> None:
    def build(**more: Any) -> Any:
        if with_multi:
            return optim.MultiOptimizer([make(name, options)], **more)
        return make(name, options, **more)

    parameters, gradients = small_tree(0), small_tree(1)
    optimizer, clipping = build(), build(max_grad_norm=0.3, skip_nonfinite=True)
    plain = build()
    parameters = optimizer.apply_gradients(gradients, parameters)
    plain_result = plain.apply_gradients(gradients, small_tree(0))
    keys = {*optimizer.state}
    clipping.state = copy_tree(plain.state)
    assert snapshot(plain_result) == snapshot(parameters)

    optimizer.skip_nonfinite = True
    optimizer.max_grad_norm = 0.3
    parameters = optimizer.apply_gradients(gradients, parameters)
    expected = clipping.apply_gradients(gradients, plain_result)
    assert snapshot([parameters, optimizer.state]) == snapshot(
        [expected, clipping.state]
    )
    bad = {**gradients, "scale": mx.array([NAN, 0.0, 0.0])}
    skipped = optimizer.apply_gradients(bad, parameters)
    assert snapshot(skipped) == snapshot(parameters)
    assert int(optimizer.skipped_steps) == 1

    # Off again: extra entries go, so that upstream can load the state.
    optimizer.skip_nonfinite = False
    optimizer.max_grad_norm = None
    optimizer.apply_gradients(gradients, parameters)
    assert optimizer.grad_norm is None and optimizer.skipped_steps is None
    assert {*optimizer.state} == keys


@every_optimizer
def test_state_dtype_set_between_steps(name: str, options: dict[str, Any]) -> None:
    parameters, gradients = small_tree(0, mx.float16), small_tree(1, mx.float16)
    optimizer, wide = make(name, options), make(name, options, state_dtype=mx.float32)
    parameters = optimizer.apply_gradients(gradients, parameters)
    wide.state = copy_tree(optimizer.state)
    optimizer.state_dtype = mx.float32
    mine = optimizer.apply_gradients(gradients, parameters)
    theirs = wide.apply_gradients(gradients, parameters)
    assert snapshot([mine, optimizer.state]) == snapshot([theirs, wide.state])


def test_options_set_between_steps_are_checked() -> None:
    optimizer: Any = optim.Adam(0.1)
    decays: Any = optim.AdamW(0.1)
    with pytest.raises(ValueError, match="max_grad_norm should be >=0, -1"):
        optimizer.max_grad_norm = -1.0
    with pytest.raises(ValueError, match="state_dtype should be float32, float16"):
        optimizer.state_dtype = mx.int32
    with pytest.raises(TypeError, match="takes no weight decay"):
        optimizer.weight_decay_filter = is_matrix
    with pytest.raises(TypeError, match="weight_decay_filter"):
        decays.weight_decay_filter = 3
    assert optimizer.max_grad_norm is None and optimizer.state_dtype is None
    assert decays.weight_decay_filter is None


@decaying
def test_weight_decay_filter_set_between_steps(
    name: str, options: dict[str, Any]
) -> None:
    parameters, gradients = small_tree(0), small_tree(1)
    optimizer = make(name, options, weight_decay=0.3)
    twin = make(name, options, weight_decay=0.3, weight_decay_filter=is_matrix)
    parameters = optimizer.apply_gradients(gradients, parameters)
    twin.state = copy_tree(optimizer.state)
    optimizer.weight_decay_filter = is_matrix
    mine = optimizer.apply_gradients(gradients, parameters)
    assert snapshot(mine) == snapshot(twin.apply_gradients(gradients, parameters))


# 8. Models that change


class Growing(nn.Module):  # type: ignore[misc, unused-ignore]
    def __init__(self) -> None:
        super().__init__()
        mx.random.seed(1)
        self.first = nn.Linear(4, 4)
        self.layers = [nn.Linear(4, 4), nn.Linear(4, 4)]

    def __call__(self, x: mx.array) -> mx.array:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x[..., :1]


class Adapted(nn.Module):  # type: ignore[misc, unused-ignore]
    """A frozen linear layer, and a product of two small matrices beside it."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear.freeze()
        self.lora_a = mx.random.normal((4, 2))
        self.lora_b = mx.zeros((2, 4))

    def __call__(self, x: mx.array) -> mx.array:
        result: mx.array = self.linear(x) + x @ self.lora_a @ self.lora_b
        return result


def replace(model: Any) -> None:
    model.layers[1] = nn.Linear(4, 6)


def append(model: Any) -> None:
    model.layers.append(nn.Linear(4, 4))


def add(model: Any) -> None:
    model.second = nn.Linear(4, 4)
    model.layers.append(model.second)


def remove(model: Any) -> None:
    model.layers.pop()


def unfreeze(model: Any) -> None:
    model.first.unfreeze()


def adapt(model: Any) -> None:
    model.layers[0] = Adapted(model.layers[0])


def nest(model: Any) -> None:
    model.layers[1] = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


def drop_bias(model: Any) -> None:
    model.layers[1] = nn.Linear(4, 4, bias=False)


# The change, and a path that the error names if the step cannot be.
CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "replaced": (replace, "layers.1.weight"),
    "appended": (append, "layers.2"),
    "added": (add, "layers.2"),
    "unfrozen": (unfreeze, "first"),
    "adapted": (adapt, "layers.0.lora_a"),
    "nested": (nest, "layers.1"),
    "removed": (remove, ""),
    "without bias": (drop_bias, ""),
}
BUILDERS: dict[str, Callable[[], Any]] = {
    "AdamW": lambda: optim.AdamW(optim.cosine_decay(1e-2, 10)),
    "SGD": lambda: optim.SGD(1e-2, momentum=0.9, max_grad_norm=1.0),
    "Adafactor": lambda: optim.Adafactor(beta_1=0.9),
    "Muon": lambda: optim.Muon(1e-2, skip_nonfinite=True),
    "multi": lambda: optim.MultiOptimizer(
        [optim.Muon(1e-2), optim.AdamW(1e-2)], [is_matrix], max_grad_norm=1.0
    ),
}


def moments(optimizer: Any, path: str) -> dict[str, mx.array]:
    """The state below a parameter's path, whichever part of a Multi has it."""
    parts = [o.state for o in getattr(optimizer, "optimizers", [optimizer])]
    return {
        f"{i}.{p.removeprefix(path)}": x
        for i, part in enumerate(parts)
        for p, x in leaves_of(part).items()
        if p.startswith(path)
    }


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", BUILDERS)
def test_a_model_that_changes(tmp_path: Path, change: str, kind: str) -> None:
    """A clear error or a step; after another init everything goes on."""
    model, optimizer = Growing(), BUILDERS[kind]()
    if change == "unfrozen":
        model.first.freeze()
    for _ in range(2):
        optimizer.update(model, backward(model))
    mx.eval(model.parameters(), optimizer.state)
    kept = moments(optimizer, "layers.0.")
    CHANGES[change][0](model)
    gradients = backward(model)
    before = snapshot([model.parameters(), optimizer.state])

    path = CHANGES[change][1]
    if path:
        caught = clear_error(
            lambda: optimizer.update(model, gradients),
            (KeyError, IndexError, ValueError),
            path,
            "optimizer.init",
        )
        assert caught.type is not IndexError or path in str(caught.value)
        assert snapshot([model.parameters(), optimizer.state]) == before
    else:
        optimizer.update(model, gradients)  # what is gone has no gradient
        kept = moments(optimizer, "layers.0.")
        clear_error(
            lambda: optim.save(tmp_path / "file", model, optimizer),
            ValueError,
            "layers.1",
            "optimizer.init",
        )

    steps = [int(o.step) for o in getattr(optimizer, "optimizers", [optimizer])]
    optimizer.init(model.trainable_parameters())
    if change != "adapted":
        assert snapshot(moments(optimizer, "layers.0.")) == snapshot(kept)
    assert steps == [int(o.step) for o in getattr(optimizer, "optimizers", [optimizer])]
    for p in leaves_of(model.trainable_parameters()):
        assert moments(optimizer, p), p
    for _ in range(2):
        optimizer.update(model, backward(model))
    optim.save(tmp_path / "file", model, optimizer)
    resumed = BUILDERS[kind]()
    optim.load(tmp_path / "file", model, resumed)
    assert snapshot(resumed.state) == snapshot(optimizer.state)


def test_another_init_gives_what_is_new_a_fresh_state() -> None:
    model, optimizer = Growing(), optim.AdamW(1e-2)
    for _ in range(2):
        optimizer.update(model, backward(model))
    kept = optimizer.state["layers"][0]["weight"]["m"]
    replace(model)
    model.layers[1].bias = mx.zeros(6)
    optimizer.init(model.trainable_parameters())
    state = optimizer.state["layers"]
    assert snapshot(state[0]["weight"]["m"]) == snapshot(kept)
    assert state[1]["weight"]["m"].shape == (6, 4)
    assert not state[1]["weight"]["m"].any().item()
    assert state[1]["bias"]["v"].shape == (6,)
    model.layers.pop()
    optimizer.init(model.trainable_parameters())
    assert len(leaves_of(optimizer.state["layers"])) == 4
    assert int(optimizer.step) == 2


def test_another_init_keeps_entries_that_are_no_parameters() -> None:
    """Scheduled values, counters, and what a user has put there."""
    optimizer: Any = optim.Adam(optim.constant(0.5), max_grad_norm=1.0)
    optimizer.init({"w": mx.ones(2)})
    optimizer.state["users"] = mx.array(3)
    optimizer.init({"w": mx.ones(2), "b": mx.ones(1)})
    assert {*optimizer.state} == {
        *("step", "learning_rate", "grad_norm", "users", "w", "b")
    }
    assert int(optimizer.state["users"]) == 3


def test_a_layer_of_another_shape_is_not_widened() -> None:
    """An old moment that broadcasts with the new gradient is an error too."""
    optimizer = optim.Adam(1e-2)
    tree = {"w": mx.ones((1, 3))}
    optimizer.apply_gradients(tree, tree)
    for shape in ((4, 3), (3,), (2, 1, 3)):
        wider = {"w": mx.ones(shape)}
        clear_error(
            lambda wider=wider: optimizer.apply_gradients(wider, wider),  # type: ignore[misc]
            ValueError,
            "'w'",
            "(1, 3)",
            str(shape),
            "optimizer.init",
        )
        optimizer.init(wider)
        assert optimizer.apply_gradients(wider, wider)["w"].shape == shape
        optimizer.init(tree)


def test_gradients_of_some_parameters_drop_no_state(tmp_path: Path) -> None:
    """The init of a first step after a load or an assignment only adds."""
    model, optimizer = Growing(), optim.AdamW(1e-2)
    optimizer.update(model, backward(model))
    optim.save(tmp_path / "file", model, optimizer)
    for load in (True, False):
        resumed = optim.AdamW(1e-2)
        if load:
            optim.load(tmp_path / "file", model, resumed)
        else:
            resumed.state = copy_tree(optimizer.state)
        before = snapshot(resumed.state["layers"])
        resumed.update(model, {"first": backward(model)["first"]})
        assert snapshot(resumed.state["layers"]) == before
        resumed.update(model, backward(model))


# 9. Schedules


@every_schedule
def test_schedules_take_any_number(schedule: str) -> None:
    function = SCHEDULES[schedule]()
    for step in (0, 2, 7, 30):
        expected = float(function(mx.array(step)))
        others: list[Any] = [
            *(step, float(step), np.int64(step), np.float32(step)),
            *(mx.array(step, mx.uint64), mx.array(float(step))),
        ]
        for other in others:
            assert float(function(other)) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@every_schedule
@pytest.mark.parametrize("step", [None, "3", [1, 2], 3j, mx.array(3j)], ids=repr)
def test_schedules_refuse_what_is_no_step(schedule: str, step: Any) -> None:
    clear_error(lambda: SCHEDULES[schedule]()(step), (TypeError, ValueError), "step")


NO_SCALARS: list[tuple[Any, str]] = [
    (None, "NoneType"),
    ("0.1", "str"),
    ([0.1, 0.2], "(2,)"),
    (np.array([0.1, 0.2], np.float32), "(2,)"),
    (mx.array([0.1, 0.2]), "(2,)"),
    (mx.ones((2, 1)), "(2, 1)"),
    (mx.zeros((0,)), "(0,)"),
    (0.1j, "complex"),
    (mx.array(0.1j), "complex"),
]


@pytest.mark.parametrize(("value", "given"), NO_SCALARS, ids=lambda x: repr(x)[:12])
def test_a_schedule_that_gives_no_scalar(value: Any, given: str) -> None:
    """Named when it is made or at its first step, and nothing has changed."""
    tree = {"w": mx.ones(2)}
    clear_error(
        lambda: optim.SGD(lambda step: value).apply_gradients(tree, tree),
        (TypeError, ValueError),
        "learning_rate",
        given,
        "scalar",
    )

    def late(step: mx.array) -> Any:
        return 0.5 if int(step) == 0 else value

    optimizer: Any = optim.Adam(late)
    tree = optimizer.apply_gradients(tree, tree)
    before = snapshot([tree, optimizer.state])
    clear_error(
        lambda: optimizer.apply_gradients(tree, tree),
        (TypeError, ValueError),
        "learning_rate",
        given,
        "scalar",
    )
    assert snapshot([tree, optimizer.state]) == before


@pytest.mark.parametrize("shape", [(1,), (1, 1), (1, 1, 1)])
@every_optimizer
def test_a_schedule_does_not_reshape_the_parameters(
    name: str, options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    """One element is a scalar, as upstream takes it where that does no harm."""
    tree = {"w": mx.ones(2), "s": mx.array(1.0)}
    optimizer = make(name, options, learning_rate=lambda step: mx.full(shape, 0.1))
    expected = make(name, options, learning_rate=0.1)
    for _ in range(2):
        updated = optimizer.apply_gradients(tree, tree)
        assert snapshot(updated) == snapshot(expected.apply_gradients(tree, tree))
    if "learning_rate" in optimizer.state:
        assert optimizer.learning_rate.shape == ()


@pytest.mark.parametrize(
    "value", [np.float64(0.5), np.float32(0.5), 0.5, mx.array(0.5)]
)
def test_a_schedule_may_give_any_number(value: Any) -> None:
    optimizer = optim.SGD(lambda step: value)
    updated = optimizer.apply_gradients({"w": mx.ones(2)}, {"w": mx.ones(2)})
    assert updated["w"].tolist() == [0.5, 0.5]
    assert optimizer.learning_rate.dtype == mx.float32


@pytest.mark.parametrize("value", [None, "0.1", {}, 1j], ids=repr)
def test_a_learning_rate_that_is_no_number(value: Any) -> None:
    def assign() -> None:
        optimizer = optim.SGD(0.1)
        optimizer.learning_rate = value

    for action in (lambda: optim.SGD(value), lambda: optim.Adam(value), assign):
        clear_error(
            action, (TypeError, ValueError), "learning_rate", type(value).__name__
        )


def test_joining_what_is_no_schedule() -> None:
    bad: Any = [optim.constant(0.1), None]
    clear_error(
        lambda: optim.join_schedules(bad, [3]), TypeError, "schedules[1]", "NoneType"
    )


# 10. Errors


def test_trees_that_are_none() -> None:
    model: Any = nn.Linear(2, 2)
    tree = model.trainable_parameters()
    nothing: Any = None
    each: list[Any] = [{}, {"max_grad_norm": 1.0}]
    for options in each:
        single: Any = optim.Adam(0.1, **options)
        several: Any = optim.MultiOptimizer(
            [optim.SGD(0.1), optim.Adam(0.1)], [is_matrix], **options
        )
        for optimizer in (single, several):
            for action, word in (
                (lambda o: o.update(model, nothing), "gradients"),
                (lambda o: o.update(nothing, tree), "model"),
                (lambda o: o.apply_gradients(nothing, tree), "gradients"),
                (lambda o: o.apply_gradients(tree, nothing), "parameters"),
                (lambda o: o.init(nothing), "parameters"),
            ):
                before = snapshot([tree, optimizer.state])
                clear_error(
                    partial(action, optimizer), (TypeError, ValueError), word, "None"
                )
                assert snapshot([tree, optimizer.state]) == before
        single.update(model, tree)
        several.update(model, tree)


@pytest.mark.parametrize(
    ("tree", "kind"),
    [([mx.ones(2)], "list"), ((mx.ones(2),), "tuple"), (mx.ones(2), "array")],
    ids=["list", "tuple", "array"],
)
def test_trees_that_are_no_dicts(tree: Any, kind: str) -> None:
    """The state has entries of its own beside the parameters', so it is a dict."""
    for optimizer in (optim.Adam(0.1), optim.SGD(0.1, momentum=0.9)):
        before = snapshot(optimizer.state)
        for action, word in (
            (lambda o: o.apply_gradients(tree, tree), "gradients"),
            (lambda o: o.init(tree), "parameters"),
        ):
            clear_error(
                partial(action, optimizer), (TypeError, ValueError), word, kind, "dict"
            )
        assert snapshot(optimizer.state) == before


LEAVES: list[tuple[Any, str]] = [
    *((None, "NoneType"), ("text", "str"), (1.5, "float")),
    (np.ones(2, np.float32), "ndarray"),
]


@pytest.mark.parametrize(("leaf", "kind"), LEAVES, ids=[kind for _, kind in LEAVES])
@every_optimizer
def test_leaves_that_are_no_arrays(
    name: str, options: dict[str, Any], leaf: Any, kind: str
) -> None:
    """At the first step, at a later one, and in a part of a Multi."""
    good = {"layers": [{"w": mx.ones((2, 2))}], "b": mx.ones(2)}
    bad = {"layers": [{"w": leaf}], "b": mx.ones(2)}
    late = make(name, options)
    late.apply_gradients(good, good)
    multi = optim.MultiOptimizer(
        [make(name, options), optim.SGD(0.1)], [lambda path, _: path != "b"]
    )
    single = optim.MultiOptimizer([make(name, options)], max_grad_norm=1.0)
    clipping = make(name, options, max_grad_norm=1.0)
    for optimizer in (make(name, options), late, clipping, multi, single):
        before = snapshot(optimizer.state)
        clear_error(
            partial(optimizer.apply_gradients, bad, good), TypeError, "layers.0.w", kind
        )
        assert snapshot(optimizer.state) == before
        mx.eval(optimizer.apply_gradients(good, good))


@pytest.mark.parametrize(("leaf", "kind"), LEAVES, ids=[kind for _, kind in LEAVES])
def test_what_clip_grad_norm_refuses(leaf: Any, kind: str) -> None:
    clip: Any = optim.clip_grad_norm
    good = {"a": [mx.ones(2)]}
    clear_error(lambda: clip({"a": [leaf]}, 1.0), TypeError, "a.0", kind)
    clear_error(lambda: clip(leaf, 1.0), TypeError, "grads", kind)
    if not isinstance(leaf, float):
        clear_error(lambda: clip(good, leaf), TypeError, "max_norm", kind)
    clear_error(lambda: clip(good, mx.ones(2)), ValueError, "max_norm", "(2,)")
    clear_error(lambda: clip(good, NAN), ValueError, "max_norm", "nan")


@pytest.mark.parametrize(
    "name", ["step", "learning_rate", "grad_norm", "skipped_steps"]
)
@pytest.mark.parametrize("several", [False, True], ids=["one", "multi"])
def test_a_parameter_named_like_a_state_entry(name: str, several: bool) -> None:
    options: Any = {"max_grad_norm": 1.0, "skip_nonfinite": True}
    optimizer: Any = optim.Adam(0.1, **options)
    if several:
        optimizer = optim.MultiOptimizer([optim.SGD(1.0), optimizer], [is_matrix])
    tree = {name: mx.ones(2), "w": mx.ones((2, 2))}
    for action in (optimizer.init, lambda tree: optimizer.apply_gradients(tree, tree)):
        clear_error(partial(action, tree), ValueError, f"'{name}'", "state")
    # Without the option there is no such entry.
    if "_norm" in name or "skipped" in name:
        updated = optim.Adam(0.1).apply_gradients(tree, tree)
        assert updated[name].shape == (2,)


def test_attributes_that_are_not_there() -> None:
    """MultiOptimizer's step is its first part's, as its learning rate is."""
    tree = {"w": mx.ones((2, 2)), "b": mx.ones(2)}
    optimizer: Any = optim.MultiOptimizer(
        [optim.SGD(0.1), optim.Adam(0.1)], [is_matrix]
    )
    assert int(optimizer.step) == 0
    for _ in range(3):
        optimizer.apply_gradients(tree, tree)
    assert int(optimizer.step) == 3
    adafactor: Any = optim.Adafactor()
    clear_error(
        lambda: adafactor.learning_rate,
        (AttributeError, KeyError),
        "Adafactor",
        "learning_rate",
        "relative_step",
    )


BAD_OPTIONS: list[tuple[str, Any, str]] = [
    ("max_grad_norm", "1", "str"),
    ("max_grad_norm", mx.array([1.0, 2.0]), "(2,)"),
    ("state_dtype", "float32", "'float32'"),
    ("state_dtype", 32, "mlx.core.float32"),
    ("weight_decay_filter", 3, "int"),
]


@pytest.mark.parametrize(("option", "value", "given"), BAD_OPTIONS)
def test_options_of_wrong_types(option: str, value: Any, given: str) -> None:
    bad: Any = {option: value}
    clear_error(lambda: optim.AdamW(0.1, **bad), (TypeError, ValueError), option, given)
    if option == "max_grad_norm":
        clear_error(
            lambda: optim.MultiOptimizer([optim.SGD(0.1)], **bad),
            (TypeError, ValueError),
            option,
            given,
        )


def test_arguments_of_multi() -> None:
    nothing: Any = None
    number: Any = [3]
    clear_error(lambda: optim.MultiOptimizer(nothing), TypeError, "optimizers", "None")
    clear_error(lambda: optim.MultiOptimizer([]), ValueError, "optimizers")
    clear_error(lambda: optim.MultiOptimizer(number), TypeError, "optimizers", "int")
    clear_error(
        lambda: optim.MultiOptimizer([optim.SGD(0.1)] * 2, number),
        TypeError,
        "filters",
        "int",
    )


CLASSES: list[tuple[str, tuple[str, ...]]] = [
    ("SGD", ("momentum", "weight_decay", "dampening")),
    ("RMSprop", ("alpha", "eps")),
    ("Adagrad", ("eps",)),
    ("AdaDelta", ("rho", "eps")),
    ("Adam", ("betas", "eps")),
    ("AdamW", ("betas", "eps", "weight_decay")),
    ("Adamax", ("betas", "eps")),
    ("Lion", ("betas", "weight_decay")),
    ("Muon", ("momentum", "weight_decay")),
    ("Adafactor", ("clip_threshold", "decay_rate", "weight_decay")),
    ("AdEMAMix", ("betas", "alpha", "eps", "weight_decay", "warmup")),
]


@pytest.mark.parametrize(("name", "arguments"), CLASSES)
def test_hyperparameters_that_are_no_numbers(
    name: str, arguments: tuple[str, ...]
) -> None:
    build: Any = partial(getattr(optim, name), learning_rate=0.1)
    for argument in arguments:
        for value in (None, "0.1"):
            given = type(value).__name__
            action = partial(build, **{argument: value})
            clear_error(action, TypeError, name, argument, given)
        if argument == "betas":
            clear_error(
                partial(build, betas=(0.9,)), ValueError, name, "betas", "length 1"
            )
            clear_error(
                partial(build, betas=[None] * (3 if name == "AdEMAMix" else 2)),
                TypeError,
                *(name, "beta1", "NoneType"),
            )
    clear_error(partial(build, foo=1), TypeError, name, "'foo'")


def test_hyperparameters_that_become_no_numbers() -> None:
    tree = {"w": mx.ones((2, 2))}
    optimizer: Any = optim.AdamW(0.1)
    tree = optimizer.apply_gradients(tree, tree)
    before = snapshot([tree, optimizer.state])
    optimizer.weight_decay = None
    clear_error(
        lambda: optimizer.apply_gradients(tree, tree),
        TypeError,
        *("AdamW", "weight_decay", "NoneType"),
    )
    assert snapshot([tree, optimizer.state]) == before


@pytest.mark.parametrize("state", [None, [], mx.ones(2)], ids=repr)
def test_states_that_are_no_dicts(state: Any) -> None:
    for optimizer in (optim.Adam(0.1), optim.MultiOptimizer([optim.Adam(0.1)])):
        before = snapshot(optimizer.state)
        clear_error(
            partial(setattr, optimizer, "state", state),
            TypeError,
            *("state", type(state).__name__, "dict"),
        )
        assert snapshot(optimizer.state) == before


def test_states_that_lack_an_entry() -> None:
    tree = {"w": mx.ones((2, 2))}

    def step(entry: str, value: Any, remove: bool = False) -> None:
        optimizer: Any = optim.Adam(0.1)
        optimizer.init(tree)
        optimizer.state[entry] = value
        if remove:
            del optimizer.state[entry]
        optimizer.apply_gradients(tree, tree)

    for entry in ("step", "learning_rate"):
        clear_error(partial(step, entry, None, True), KeyError, "Adam", entry)
        for value in (None, "3"):
            kind = type(value).__name__
            clear_error(partial(step, entry, value), TypeError, "Adam", entry, kind)
    # Adafactor takes none by default, and needs one without relative steps.
    adafactor: Any = optim.Adafactor(relative_step=False)
    clear_error(
        lambda: adafactor.apply_gradients(tree, tree),
        AttributeError,
        *("learning_rate", "relative_step=False"),
    )
    adafactor.learning_rate = 0.1
    adafactor.apply_gradients(tree, tree)


# 11. Half precision in Adafactor and Muon


HALF_SCALES = [1e-4, 1.0, 1000.0]
in_half = pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
at_half_scales = pytest.mark.parametrize("scale", HALF_SCALES)
partly_fused = for_each(PARTLY_FUSED)


def widen(tree: Any) -> Any:
    return tree_map(lambda x: x.astype(mx.float32), tree)


def half_case(scale: float, dtype: mx.Dtype) -> tuple[Any, Any]:
    rng = np.random.default_rng(3)
    shapes = {"w": (8, 16), "tall": (16, 8), "conv": (4, 3, 3, 2), "b": (7,)}
    parameters = {k: random_array(rng, s, dtype) for k, s in shapes.items()}
    gradients = {
        k: (random_array(rng, s, mx.float32) * scale).astype(dtype)
        for k, s in shapes.items()
    }
    return parameters, gradients


@partly_fused
@at_half_scales
@in_half
@pytest.mark.parametrize(
    "more",
    [{}, {"state_dtype": mx.float32}, {"max_grad_norm": 1.0, "skip_nonfinite": True}],
    ids=["", "state_dtype", "clip-skip"],
)
def test_half_precision_is_float32_rounded_once(
    backend: str,
    name: str,
    options: dict[str, Any],
    scale: float,
    dtype: mx.Dtype,
    more: dict[str, Any],
) -> None:
    """The first step; Muon's products may be in half precision, but not its norm."""
    skip_more_dimensions(name)
    parameters, gradients = half_case(scale, dtype)
    optimizer = make(name, {"learning_rate": 0.1, **options}, **more)
    updated = optimizer.apply_gradients(gradients, parameters)
    wide = widen(gradients)
    if "max_grad_norm" in more:
        wide, _ = stock.clip_grad_norm(wide, 1.0)
    reference = getattr(oracle, name)(**{"learning_rate": 0.1, **options})
    expected = reference.apply_gradients(wide, widen(parameters))
    if "skip_nonfinite" in more:
        assert int(optimizer.skipped_steps) == 0
    bits = 11 if dtype == mx.float16 else 8
    for path, x in leaves_of(updated).items():
        assert x.dtype == dtype
        difference = to_numpy(widen(x)) - to_numpy(expected[path])
        rounding = 1.01 * np.abs(to_numpy(expected[path])) * 2.0**-bits + 1e-7
        # Muon's direction has elements of up to 1, times the learning rate and the
        # square root of the aspect.
        # Others' updates are of the gradient's dtype, and at most about 2.
        products = 0.1 * 1.5 * (0.02 if bits == 11 else 0.1) if name == "Muon" else 0.0
        if name not in ("Adafactor", "Muon"):
            products = 0.1 * 2 * 2.0**-bits
        # Numbers next to a tie may be rounded to either side.
        assert (np.abs(difference) <= 2 * rounding + products).all(), path
        assert np.mean(np.abs(difference) <= rounding + products) > 0.9, path


@partly_fused
@at_half_scales
@in_half
@pytest.mark.parametrize("wide", [False, True], ids=["", "state_dtype"])
def test_half_precision_keeps_stepping(
    backend: str,
    name: str,
    options: dict[str, Any],
    scale: float,
    dtype: mx.Dtype,
    wide: bool,
) -> None:
    """Moments whose squares leave the dtype's range do not end the run.

    With state_dtype each step is that of float32 rounded; without it, steps are of
    the right direction and size.
    """
    skip_more_dimensions(name)
    parameters, gradients = half_case(scale, dtype)
    options = {"learning_rate": 0.1, **options, "weight_decay": 0.0}
    more: Any = {"state_dtype": mx.float32} if wide else {}
    optimizer = make(name, options, **more)
    reference = getattr(oracle, name)(**options)
    for step in range(4):
        expected = reference.apply_gradients(widen(gradients), widen(parameters))
        updated = optimizer.apply_gradients(gradients, parameters)
        for path, x in leaves_of(updated).items():
            old = to_numpy(widen(parameters[path]))
            mine = to_numpy(widen(x)) - old
            theirs = to_numpy(expected[path]) - old
            assert np.isfinite(mine).all(), (step, path)
            # Where the step is well above the parameter's last bit.
            bits = 11 if dtype == mx.float16 else 8
            seen = np.abs(theirs) > 16 * np.abs(old) * 2.0**-bits
            if not seen.any():
                continue
            mine, theirs = mine[seen], theirs[seen]
            ratio = np.sum(mine * theirs) / np.sum(theirs * theirs)
            least, most = (0.9, 1.1) if wide else (0.5, 2.0)
            assert least < ratio < most, (step, path)
        parameters = updated


@pytest.mark.parametrize("parameter_dtype", [mx.float16, mx.float32], ids=str)
@pytest.mark.parametrize("scale", [1e-7, 1e-6, 1e-5])
def test_muon_of_small_gradients_in_float16(
    backend: str, scale: float, parameter_dtype: mx.Dtype
) -> None:
    """Their direction would be of float16's least numbers, or none at all."""
    rng = np.random.default_rng(0)
    start = random_array(rng, (6, 4), mx.float16)
    gradient = (random_array(rng, (6, 4), mx.float32) * scale).astype(mx.float16)
    results = []
    for dtype in (mx.float16, mx.float32):
        optimizer: Any = optim.Muon(0.1, weight_decay=0.0, state_dtype=mx.float32)
        tree = {"w": start.astype(parameter_dtype)}
        for _ in range(2):
            tree = optimizer.apply_gradients({"w": gradient.astype(dtype)}, tree)
        assert tree["w"].dtype == parameter_dtype
        assert optimizer.state["w"]["v"].dtype == mx.float32
        results.append(to_numpy(tree["w"]))
    assert np.abs(results[1] - to_numpy(start)).max() > 0.05
    np.testing.assert_allclose(results[0], results[1], atol=2e-3)
    kept: Any = optim.Muon(0.1)
    half = {"w": start}
    assert kept.apply_gradients({"w": gradient}, half)["w"].dtype == mx.float16
    assert kept.state["w"]["v"].dtype == mx.float16


# 12. The range of norms and of bias correction


NORMS: list[tuple[list[float], float]] = [
    ([3e25, 4e25], 5e25),
    ([3e37, 4e37], 5e37),
    ([1e20] * 4, 2e20),
    ([3e20, 4e20, 1e-30], 5e20),
    ([3.0, 4.0], 5.0),
]


@pytest.mark.parametrize(("values", "norm"), NORMS)
@compiled_too
def test_norms_whose_squares_leave_float32(
    backend: str, values: list[float], norm: float, compiled: bool
) -> None:
    gradients = {"a": mx.array(values[:1]), "b": [mx.array(values[1:])]}
    parameters = tree_map(mx.zeros_like, gradients)
    limit = norm / 2
    expected = [0.5 * x for x in values]

    def flat(tree: Any) -> list[float]:
        return [*tree["a"].tolist(), *tree["b"][0].tolist()]

    clipped, measured = optim.clip_grad_norm(gradients, limit)
    assert measured.item() == pytest.approx(norm, rel=1e-5, abs=0)
    if norm > 1:  # upstream's formula adds 1e-6 to the norm
        np.testing.assert_allclose(flat(clipped), expected, rtol=1e-5)
    for several in (False, True):
        part: Any = optim.SGD(1.0)
        optimizer: Any = (
            optim.MultiOptimizer([part], max_grad_norm=limit, skip_nonfinite=True)
            if several
            else optim.SGD(1.0, max_grad_norm=limit, skip_nonfinite=True)
        )
        updated = stepper(optimizer, parameters, compiled)(parameters, gradients)
        assert float(optimizer.grad_norm) == pytest.approx(norm, rel=1e-5, abs=0)
        assert int(optimizer.skipped_steps) == 0
        if norm > 1:
            np.testing.assert_allclose(flat(updated), [-x for x in expected], rtol=1e-5)
        bad = {**gradients, "a": mx.array([float("inf")])}
        optimizer.apply_gradients(bad, parameters)
        assert int(optimizer.skipped_steps) == 1


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [lambda x: x, lambda x: x.T], ids=["", "transposed"])
def test_large_norms_of_large_arrays(
    backend: str, dtype: mx.Dtype, layout: Callable[[mx.array], mx.array]
) -> None:
    """As many elements as several threads and threadgroups take."""
    big = layout(mx.full((300, 500), 2.0**70, dtype))
    small = mx.full((77,), 2.0**-70, dtype)
    expected = 2.0**70 * np.sqrt(300 * 500)
    optimizer: Any = optim.SGD(1.0, max_grad_norm=1.0)
    tree = {"small": small, "big": big}
    updated = optimizer.apply_gradients(tree, tree_map(mx.zeros_like, tree))
    assert float(optimizer.grad_norm) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(
        to_numpy(updated["big"]), -(2.0**70) / expected, rtol=5e-3
    )


@pytest.mark.parametrize("scale", [1e200, 1e40, 1.0, 1e-200])
def test_norms_of_float64(scale: float) -> None:
    """Its range is not float32's; nor is the factor's that clips."""
    with mx.stream(mx.cpu):
        gradients = {
            "a": mx.array([3 * scale, 4 * scale], dtype=mx.float64),
            "b": mx.array([0.0]),
            "z": mx.zeros((0, 2), mx.float64),
        }
        zeros = tree_map(mx.zeros_like, gradients)
        limit = 0.5 * scale if scale > 1e-6 else 1.0
        expected = [-0.3 * scale, -0.4 * scale] if scale > 1e-6 else [-3e-200, -4e-200]
        one: Any = optim.SGD(1.0, max_grad_norm=limit, skip_nonfinite=True)
        several: Any = optim.MultiOptimizer(
            [optim.SGD(1.0), optim.SGD(1.0)],
            [is_first],
            max_grad_norm=limit,
            skip_nonfinite=True,
        )
        for optimizer in (one, several):
            updated = optimizer.apply_gradients(gradients, zeros)
            assert float(optimizer.grad_norm) == pytest.approx(5 * scale, abs=0)
            np.testing.assert_allclose(
                updated["a"].tolist(), expected, rtol=3e-6 if scale == 1 else 1e-12
            )
            bad = {**gradients, "b": mx.array([float("nan")])}
            optimizer.apply_gradients(bad, zeros)
            assert int(optimizer.skipped_steps) == 1


def test_muon_of_large_gradients(backend: str) -> None:
    """The iteration does not depend on the gradient's scale."""
    direction = random_array(np.random.default_rng(0), (6, 4), mx.float32)
    results = []
    for scale in (1.0, 2.0**80):
        optimizer = optim.Muon(0.1, weight_decay=0.0)
        zero = {"w": mx.zeros((6, 4))}
        updated = optimizer.apply_gradients({"w": direction * scale}, zero)
        results.append(to_numpy(updated["w"]))
    assert np.abs(results[0]).max() > 0.01
    np.testing.assert_allclose(results[1], results[0], rtol=1e-4, atol=1e-5)


BETAS = [
    *((0.0, 0.0), (0.9, 0.99), (0.9, 0.999), (0.9, 0.99999), (0.9, 0.999999)),
    *((0.9, 1 - 1e-8), (1 - 1e-7, 1 - 1e-9), (0.99999, 0.5)),
]


@pytest.mark.parametrize("betas", BETAS, ids=str)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.complex64], ids=str)
@compiled_too
def test_bias_correction_of_any_betas(
    backend: str,
    betas: tuple[float, float],
    dtype: mx.Dtype,
    compiled: bool,
) -> None:
    """Against float64: steps t from moments that are zero."""
    beta1, beta2 = betas
    for t in (1, 2, 10, 1000, 1_000_000):
        optimizer = optim.Adam(
            1.0, betas, eps=0.0, bias_correction=True, state_dtype=mx.float32
        )
        zero = {"w": mx.zeros((3,), dtype)}
        optimizer.state["step"] = mx.array(t - 1, mx.uint64)
        step = stepper(optimizer, zero, compiled)
        updated = step(zero, {"w": mx.full((3,), 0.5).astype(dtype)})
        corrections = 1 - np.array(betas) ** t
        first = (1 - beta1) / corrections[0]
        second = (1 - beta2) / corrections[1]
        expected = -first / np.sqrt(second)
        relative = 2.0**-8 if dtype == mx.bfloat16 else 3e-6
        real = updated["w"].real if dtype == mx.complex64 else updated["w"]
        np.testing.assert_allclose(to_numpy(real), expected, rtol=relative)


# 13. mx.compile with the state as inputs alone


def sgd_of_two_parts(**options: Any) -> Any:
    parts = [optim.SGD(**options), optim.SGD(**options)]
    return optim.MultiOptimizer(parts, [is_matrix])


INPUTS_ONLY: dict[str, Callable[[], Any]] = {
    "plain": lambda: optim.SGD(-1.0),
    "filter": lambda: optim.SGD(-1.0, weight_decay_filter=is_matrix),
    "clip": lambda: optim.SGD(-1.0, max_grad_norm=1e9),
    "multi": lambda: sgd_of_two_parts(learning_rate=-1.0),
    "subclass": lambda: calling_super("SGD")(learning_rate=-1.0),
}


@pytest.mark.parametrize("kind", INPUTS_ONLY)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=str)
def test_a_step_compiled_with_the_state_as_inputs_only(
    backend: str, kind: str, dtype: mx.Dtype
) -> None:
    """SGD without momentum reads nothing that such a step leaves behind."""
    parameters = {"w": mx.ones((5, 5), dtype), "b": mx.ones(3, dtype)}
    gradients = tree_map(mx.ones_like, parameters)
    optimizer = INPUTS_ONLY[kind]()
    optimizer.init(parameters)

    @partial(mx.compile, inputs=optimizer.state)
    def update(gradients: Any) -> Any:
        return optimizer.apply_gradients(gradients, parameters)

    for learning_rate in (-1.0, -2.0, -3.0):
        optimizer.learning_rate = learning_rate
        for path, x in leaves_of(update(gradients)).items():
            np.testing.assert_array_equal(to_numpy(x), 1 - learning_rate, path)


# 14. Promises under mx.compile


def tracing(fails: Callable[[], bool], several: bool) -> tuple[Any, Any, Any]:
    """Model, optimizer and a compiled step, of which a trace may fail."""
    mx.random.seed(0)
    model = nn.Linear(4, 4)

    def schedule(step: mx.array) -> mx.array:
        if fails():
            raise RuntimeError("broken")
        return mx.array(0.1)

    optimizer: Any = optim.SGD(schedule, momentum=0.9)
    if several:
        optimizer = optim.MultiOptimizer([optim.Muon(0.1), optimizer], [is_matrix])
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(x: mx.array) -> None:
        optimizer.update(model, backward(model, x))

    return model, optimizer, step


@pytest.mark.skipif(not HAS_STREAM_ERRORS, reason="errors of a stream end Python")
@pytest.mark.fused  # Python cannot tell the placeholders from arrays
@pytest.mark.parametrize("several", [False, True], ids=["one", "multi"])
def test_an_exception_inside_a_compiled_step(
    backend: str, several: bool, tmp_path: Path
) -> None:
    """Model and state are as before, or the next step says what to do, and that helps.

    mx.compile replaces the arrays before it calls the function, and does not put them
    back when that raises.
    """
    failing = False
    model, optimizer, step = tracing(lambda: failing, several)
    step(mx.ones((3, 4)))
    mx.eval(model.parameters(), optimizer.state)
    optim.save(tmp_path / "file", model, optimizer)
    before = snapshot([model.parameters(), optimizer.state])
    failing = True
    with pytest.raises(RuntimeError, match="broken"):
        step(mx.ones((5, 4)))  # another shape, and so another trace
    failing = False
    gradients = tree_map(mx.ones_like, {"weight": mx.ones((4, 4)), "bias": mx.ones(4)})
    try:
        assert snapshot([model.parameters(), optimizer.state]) == before
    except RuntimeError:
        clear_error(
            lambda: optimizer.update(model, gradients),
            (RuntimeError, ValueError),
            "mx.compile",
            "optim.load",
        )
        optim.load(tmp_path / "file", model, optimizer)
        assert snapshot([model.parameters(), optimizer.state]) == before
    optimizer.update(model, gradients)
    step(mx.ones((3, 4)))
    step(mx.ones((5, 4)))
    mx.eval(model.parameters(), optimizer.state)
    assert np.isfinite(to_numpy(model.weight)).all()


def test_a_compiled_step_keeps_the_dict_that_it_captured() -> None:
    """As in upstream, another dict is not seen, and the docstring says so.

    To write into the old dict instead would change the trees that programs hold, as
    in ``saved = optimizer.state; optimizer.state = other; optimizer.state = saved``.
    """
    model, optimizer, step = tracing(lambda: False, several=False)
    step(mx.ones((3, 4)))
    mx.eval(model.parameters(), optimizer.state)
    state = copy_tree(optimizer.state)
    state["step"] = mx.array(41, mx.uint64)
    optimizer.state.update(state)
    step(mx.ones((3, 4)))
    assert int(optimizer.step) == 42
    saved = optimizer.state
    kept = snapshot(saved)
    optimizer.state = state
    assert optimizer.state is state
    assert snapshot(saved) == kept
    text = inspect.getdoc(optim.Optimizer.state) or ""
    assert "mx.compile" in text and "update" in text


def test_saving_placeholders(tmp_path: Path) -> None:
    """The file that is there stays, and the error says what has happened."""
    failing = False
    model, optimizer, step = tracing(lambda: failing, several=False)
    step(mx.ones((3, 4)))
    optim.save(tmp_path / "file", model, optimizer)
    before = (tmp_path / "file").read_bytes()
    failing = True
    with pytest.raises(RuntimeError, match="broken"):
        step(mx.ones((5, 4)))
    clear_error(
        lambda: optim.save(tmp_path / "file", model, optimizer),
        RuntimeError,
        *("mx.compile", "placeholders"),
    )
    assert (tmp_path / "file").read_bytes() == before
    assert [x.name for x in tmp_path.iterdir()] == ["file"]


# 15. Arguments without effect


WITHOUT_EFFECT: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("Adafactor", {"learning_rate": 1e-6}, ("learning_rate", "relative_step")),
    (
        "Adafactor",
        {"learning_rate": 1e-3, "relative_step": False, "warmup_init": True},
        ("warmup_init", "relative_step"),
    ),
    ("SGD", {"learning_rate": 0.1, "dampening": 0.5}, ("dampening", "momentum")),
    ("SGD", {"learning_rate": 0.1, "momentum": -0.9}, ("momentum",)),
    (
        "Muon",
        {"learning_rate": 0.1, "weight_decay": 0.0, "decoupled_weight_decay": True},
        ("decoupled_weight_decay",),
    ),
    (
        "Muon",
        {"learning_rate": 0.1, "ns_steps": 0, "ns_coefficients": "polar_express"},
        ("ns_coefficients", "ns_steps"),
    ),
    ("AdEMAMix", {"learning_rate": 0.1, "alpha": 0.0, "warmup": 9}, ("warmup",)),
    (
        "SGD",
        {"learning_rate": 0.1, "state_dtype": mx.float32},
        ("state_dtype", "momentum"),
    ),
    *(
        (
            name,
            {
                "learning_rate": 0.1,
                "weight_decay": 0.0,
                "weight_decay_filter": is_matrix,
            },
            ("weight_decay_filter", "weight_decay"),
        )
        for name in ("SGD", "AdamW", "Lion", "Muon")
    ),
]


@pytest.mark.parametrize(("name", "options", "words"), WITHOUT_EFFECT)
def test_one_warning_of_arguments_without_effect(
    name: str, options: dict[str, Any], words: tuple[str, ...]
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = getattr(optim, name)(**options)
        tree = {"w": mx.ones((2, 2))}
        for _ in range(2):
            optimizer.apply_gradients(tree, tree)
    assert len(caught) == 1
    assert caught[0].category is UserWarning
    assert caught[0].filename == __file__  # where the user called
    for word in (name, *words):
        assert word in str(caught[0].message)


def test_a_learning_rate_that_is_set_without_effect() -> None:
    """A schedule, or the relative step, gives it anew at the next step."""
    scheduled = optim.SGD(optim.constant(0.5))
    with pytest.warns(UserWarning, match=r"learning_rate.*schedule"):
        scheduled.learning_rate = 0.1
    with pytest.warns(UserWarning, match=r"learning_rate.*relative_step"):
        optim.Adafactor().learning_rate = 0.1


@every_optimizer
def test_no_warning_where_all_has_an_effect(name: str, options: dict[str, Any]) -> None:
    if name == "Adafactor" and options.get("relative_step", True):
        build = partial(optim.Adafactor, **options)
    else:
        build = partial(getattr(optim, name), learning_rate=0.1, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = build(max_grad_norm=1.0, skip_nonfinite=True)
        tree = {"w": mx.ones((2, 2))}
        optimizer.apply_gradients(tree, tree)


# 16. Muon's scale for filters


@pytest.mark.parametrize(
    ("shape", "ratio"),
    [
        ((64, 7, 7, 3), (7 / 3) ** 0.5),
        ((64, 1, 1, 1), 1 / 8),
        ((64, 1, 1, 16), 1 / 2),
        ((8, 3, 3, 4), 1.0),
        ((6, 4), 1.0),
    ],
)
@pytest.mark.parametrize("more", [{}, {"max_grad_norm": 1.0}], ids=["", "clip"])
def test_muons_scale_for_filters(
    backend: str, shape: tuple[int, ...], ratio: float, more: dict[str, Any]
) -> None:
    """Upstream's from the last two dimensions, or by an argument the matrix's."""
    gradient = random_array(np.random.default_rng(0), shape, mx.float32)

    def step(gradient: mx.array, **options: Any) -> Any:
        optimizer = optim.Muon(0.1, weight_decay=0.0, **more, **options)
        zero = {"w": mx.zeros_like(gradient)}
        return to_numpy(optimizer.apply_gradients({"w": gradient}, zero)["w"])

    matrix = step(gradient.reshape(shape[0], -1)).reshape(shape)
    np.testing.assert_allclose(step(gradient), matrix * ratio, rtol=1e-4, atol=1e-6)
    if not more:
        upstream = stock.Muon(0.1, weight_decay=0.0)
        zero = {"w": mx.zeros(shape)}
        expected = to_numpy(upstream.apply_gradients({"w": gradient}, zero)["w"])
        np.testing.assert_allclose(step(gradient), expected, rtol=1e-4, atol=1e-6)
    own = step(gradient, matrix_scale=True)
    np.testing.assert_allclose(own, matrix, rtol=1e-4, atol=1e-6)
    assert "matrix_scale" in (inspect.getdoc(optim.Muon) or "")


# 17. Adapters

WHOLE: tuple[Any, Any] = optim.save, optim.load
FUNCTIONS = tuple(partial(function, trainable=True) for function in WHOLE)


def adapted_model(seed: int, quantized: bool = False) -> Any:
    mx.random.seed(0)
    base = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    if quantized:
        nn.quantize(base, group_size=64, bits=4)
    base.freeze()
    mx.random.seed(seed)

    class Adapter(nn.Module):  # type: ignore[misc, unused-ignore]
        def __init__(self, linear: nn.Module) -> None:
            super().__init__()
            self.linear = linear
            self.lora_a = mx.random.normal((64, 4))
            self.lora_b = mx.random.normal((4, 64))

        def __call__(self, x: mx.array) -> mx.array:
            result: mx.array = self.linear(x) + x @ self.lora_a @ self.lora_b
            return result

    base.layers[0], base.layers[2] = map(Adapter, (base.layers[0], base.layers[2]))
    return base


def adapter_step(model: Any, optimizer: Any) -> None:
    optimizer.update(model, backward(model, mx.ones((3, 64))))
    mx.eval(model.parameters(), optimizer.state)


@pytest.mark.parametrize("quantized", [False, True], ids=["", "quantized"])
@pytest.mark.parametrize("kind", ["AdamW", "multi"])
def test_adapters_alone_are_saved_and_loaded(
    tmp_path: Path, quantized: bool, kind: str
) -> None:
    build, path = BUILDERS[kind], tmp_path / "adapters"
    save, load = FUNCTIONS
    model, optimizer = adapted_model(1, quantized), build()
    adapter_step(model, optimizer)
    save(path, model, optimizer)
    arrays: Any = mx.load(str(path), format="safetensors")
    trainable = leaves_of(model.trainable_parameters())
    assert {n for n in arrays if n.startswith("model.")} == {
        f"model.{p}" for p in trainable
    }
    assert len(trainable) == 4

    other, resumed = adapted_model(2, quantized), build()
    base = other.layers[0].linear.weight
    load(path, other, resumed)
    assert other.layers[0].linear.weight is base
    assert snapshot([other.parameters(), resumed.state]) == snapshot(
        [model.parameters(), optimizer.state]
    )
    adapter_step(model, optimizer)
    adapter_step(other, resumed)
    assert snapshot(other.parameters()) == snapshot(model.parameters())


def test_a_layer_that_was_frozen_later_is_left_out(tmp_path: Path) -> None:
    """Its moments too, which the optimizer still has."""
    save, load = FUNCTIONS
    model, optimizer = Growing(), optim.AdamW(1e-2)
    optimizer.update(model, backward(model))
    model.layers[0].freeze()
    optimizer.update(model, backward(model))
    save(tmp_path / "file", model, optimizer)
    arrays: Any = mx.load(str(tmp_path / "file"), format="safetensors")
    assert not any("layers.0" in name for name in arrays)
    other, resumed = Growing(), optim.AdamW(1e-2)
    other.layers[0].update(model.layers[0].parameters())
    other.layers[0].freeze()
    load(tmp_path / "file", other, resumed)
    optimizer.update(model, backward(model))
    resumed.update(other, backward(other))
    assert snapshot(other.parameters()) == snapshot(model.parameters())


def test_what_trainable_refuses(tmp_path: Path) -> None:
    save, load = FUNCTIONS
    model, optimizer = adapted_model(1), optim.AdamW(1e-2)
    adapter_step(model, optimizer)
    path = tmp_path / "adapters"
    save(path, model, optimizer)
    before = snapshot([model.parameters(), optimizer.state])
    # A file of adapters is no whole model: the error says with which argument it is.
    clear_error(
        lambda: optim.load(path, model, optimizer),
        ValueError,
        "layers.0.linear.weight",
        "trainable=True",
    )
    other = adapted_model(1)
    other.layers[2].lora_a = mx.zeros((64, 8))
    clear_error(
        lambda: load(path, other, optim.AdamW(1e-2)), ValueError, "layers.2.lora_a"
    )
    # A plain tree has no frozen parameters.
    for function in (save, load):
        clear_error(
            partial(function, path, {"w": mx.ones(2)}, optim.SGD(0.1)),
            TypeError,
            "trainable",
            "dict",
        )
    assert snapshot([model.parameters(), optimizer.state]) == before


def test_a_compiled_step_goes_on_after_adapters_are_loaded(tmp_path: Path) -> None:
    save, load = FUNCTIONS
    runs = []
    for seed in (1, 2):
        model, optimizer = adapted_model(seed), optim.AdamW(1e-2)
        optimizer.init(model.trainable_parameters())
        state = [model.state, optimizer.state]
        step = mx.compile(
            partial(adapter_step_unevaluated, model, optimizer),
            inputs=state,
            outputs=state,
        )
        step()
        runs.append((model, optimizer, step))
    (model, optimizer, step), (other, resumed, other_step) = runs
    save(tmp_path / "file", model, optimizer)
    load(tmp_path / "file", other, resumed)
    step()
    other_step()
    assert snapshot(other.parameters()) == snapshot(model.parameters())


def adapter_step_unevaluated(model: Any, optimizer: Any) -> None:
    optimizer.update(model, backward(model, mx.ones((3, 64))))


# Further reports


@partly_fused
@in_half
@pytest.mark.parametrize(
    "more", [{}, {"state_dtype": mx.float32}, {"max_grad_norm": 1.0}]
)
def test_gradients_of_zero_in_half_precision(
    backend: str,
    name: str,
    options: dict[str, Any],
    dtype: mx.Dtype,
    more: dict[str, Any],
) -> None:
    """microsoft/LLM2CLIP#64: Adafactor's epsilon of 1e-30 is zero there."""
    parameters, _ = half_case(1.0, dtype)
    optimizer = make(name, options, weight_decay=0.0, **more)
    zeros = tree_map(mx.zeros_like, parameters)
    for _ in range(2):
        updated = optimizer.apply_gradients(zeros, parameters)
        assert snapshot(updated) == snapshot(parameters)
    # A row, a column and a vector of zeros beside others.
    gradients = {k: mx.ones_like(x) for k, x in parameters.items()}
    gradients["w"][2] = 0
    gradients["tall"][:, 3] = 0
    updated = optimizer.apply_gradients(gradients, parameters)
    assert all(mx.isfinite(x).all().item() for x in leaves_of(updated).values())


@partly_fused
@at_half_scales
@in_half
def test_gradients_in_half_precision_of_float32_parameters(
    backend: str, name: str, options: dict[str, Any], scale: float, dtype: mx.Dtype
) -> None:
    """google-deepmind/optax#377: the step is that of the widened gradients.

    With an explicit init: the first step would take the moments' dtype from them.
    """
    parameters, gradients = half_case(scale, dtype)
    parameters = widen(parameters)
    mine, wide = (make(name, options) for _ in range(2))
    mine.init(parameters)
    for _ in range(2):
        updated = mine.apply_gradients(gradients, parameters)
        expected = wide.apply_gradients(widen(gradients), parameters)
        assert_trees_match(updated, expected, 1e-5, 1e-6)
        parameters = updated


def test_a_schedules_own_array_is_not_changed(backend: str) -> None:
    """pytorch/pytorch#126854: in-place arithmetic on a learning rate."""
    given: Any = mx.array(0.5)
    tree = {"w": mx.ones(2)}
    one: Any = optim.SGD(given)
    scheduled: Any = optim.SGD(lambda step: given)
    both: Any = optim.MultiOptimizer([optim.SGD(0.1), optim.SGD(0.1)], [is_matrix])
    both.learning_rate = given
    for optimizer in (one, scheduled, both):
        optimizer.apply_gradients(tree, tree)
        rate = optimizer.learning_rate
        rate *= 0.5
        assert given.item() == 0.5
    assert both.optimizers[1].learning_rate.item() == 0.5


@every_optimizer
def test_the_callers_arrays_keep_their_values(
    name: str, options: dict[str, Any]
) -> None:
    """ml-explore/mlx#4426: weight decay changed the gradients that were given."""
    for more in with_each_option(name):
        parameters, gradients = small_tree(0), small_tree(1)
        held = tree_map(lambda x: x, [parameters, gradients])
        before = snapshot(held)
        optimizer = make(name, options, **more)
        for _ in range(2):
            parameters = optimizer.apply_gradients(gradients, parameters)
            mx.eval(parameters, optimizer.state)
        assert snapshot(held) == before
    mx.eval(optim.clip_grad_norm(gradients, 1e-3))
    assert snapshot(gradients) == snapshot(small_tree(1))


@every_optimizer
def test_one_array_in_several_places(
    backend: str, name: str, options: dict[str, Any]
) -> None:
    """paiml/entrenar#314, by arrays: each place has a step of its own."""
    rng = np.random.default_rng(0)
    shared, gradient = (random_array(rng, (64, 64), mx.float32) for _ in range(2))
    tied = {"a": shared, "b": shared, "c": shared.T, "d": shared[:32]}
    gradients = {
        "a": gradient,
        "b": gradient,
        "c": gradient * 2,
        "d": gradient[32:],
    }
    expected = copy_tree(tied)
    ours, apart = make(name, options), make(name, options)
    del shared
    for _ in range(3):
        tied = ours.apply_gradients(gradients, tied)
        expected = apart.apply_gradients(copy_tree(gradients), expected)
        mx.eval(tied, expected, ours.state, apart.state)
    assert_trees_match(tied, expected, 1e-6, 1e-7)


def test_a_norm_of_zero_and_a_limit_of_zero(backend: str) -> None:
    """google-deepmind/optax#1752, tensorflow/tensorflow#21363."""
    zeros, ones = {"w": mx.zeros(3)}, {"w": mx.ones(3)}
    for tree in (zeros, ones):
        clipped, _ = optim.clip_grad_norm(tree, 0.0)
        assert clipped["w"].tolist() == [0, 0, 0]
        updated = optim.SGD(1.0, max_grad_norm=0.0).apply_gradients(tree, ones)
        assert updated["w"].tolist() == [1, 1, 1]
    # A norm that is infinite is no reason to go on as if there were no gradient.
    clipped, norm = optim.clip_grad_norm({"w": mx.array([float("inf"), 1.0])}, 1.0)
    assert norm.item() == float("inf")
    assert not mx.isfinite(clipped["w"]).all().item()


@pytest.mark.parametrize("clipping", ["function", "option"])
def test_clipping_of_float16(backend: str, clipping: str) -> None:
    """tracel-ai/burn#5699 and unslothai/unsloth-zoo#1261: squares and small factors."""
    gradients = {"w": mx.full((1000,), 30000.0, mx.float16)}
    if clipping == "function":
        clipped, norm = optim.clip_grad_norm(gradients, 1e-2)
    else:
        optimizer: Any = optim.SGD(-1.0, max_grad_norm=1e-2)
        clipped = optimizer.apply_gradients(
            gradients, {"w": mx.zeros_like(gradients["w"])}
        )
        norm = optimizer.grad_norm
    assert float(norm) == pytest.approx(30000 * 1000**0.5, rel=1e-5)
    np.testing.assert_allclose(to_numpy(clipped["w"]), 1e-2 / 1000**0.5, rtol=1e-3)


def test_a_part_without_parameters(tmp_path: Path) -> None:
    """pytorch/pytorch#143828: an empty group, saved and loaded."""

    def build() -> Any:
        parts = [optim.Adam(0.1), optim.SGD(0.1, momentum=0.9)]
        return optim.MultiOptimizer(parts, [lambda path, x: True], max_grad_norm=1.0)

    model, optimizer, resumed = nn.Linear(4, 4), build(), build()
    for _ in range(2):
        optimizer.update(model, backward(model))
    optim.save(tmp_path / "file", model, optimizer)
    optim.load(tmp_path / "file", model, resumed)
    resumed.update(model, backward(model))
    assert [int(part.step) for part in resumed.optimizers] == [3, 3]


def test_hyperparameters_of_other_types() -> None:
    """pytorch/pytorch#147921, #145461: arrays and NumPy's numbers are as floats."""
    tree = {"w": mx.array([0.5, -2.0])}
    expected = optim.AdamW(0.1, (0.9, 0.999), 1e-8, 0.1, True)
    plain = to_numpy(expected.apply_gradients(tree, tree)["w"])
    kinds: list[Any] = [np.float32, np.float64, mx.array]
    for kind in kinds:
        optimizer = optim.AdamW(
            kind(0.1), (kind(0.9), kind(0.999)), kind(1e-8), kind(0.1), True
        )
        updated = optimizer.apply_gradients(tree, tree)
        np.testing.assert_allclose(to_numpy(updated["w"]), plain, rtol=1e-4)


def test_warmup_ends_at_its_peak() -> None:
    """ml-explore/mlx#2617."""
    warmup = optim.linear_schedule(0.0, 1e-5, 100)
    cosine = optim.cosine_decay(1e-5, 1000, 1e-6)
    schedule = optim.join_schedules([warmup, cosine], [100])
    values = [schedule(mx.array(i, mx.uint64)).item() for i in (0, 50, 100, 1100, 5000)]
    np.testing.assert_allclose(values, [0, 5e-6, 1e-5, 1e-6, 1e-6], rtol=1e-5)


class Dropping(nn.Module):  # type: ignore[misc, unused-ignore]
    """Modules without parameters in a list, in a dict and as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(4, 4), nn.Dropout(0.1), nn.Linear(4, 4), nn.ReLU()]
        self.named = {"a": nn.Linear(4, 4), "d": nn.Dropout(0.1)}
        self.drop = nn.Dropout(0.1)

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x)
        return self.drop(self.named["a"](x))  # type: ignore[no-any-return, unused-ignore]


@every_optimizer
def test_a_state_without_the_empty_dicts_of_dropout(
    name: str, options: dict[str, Any]
) -> None:
    """ml-explore/mlx#1328: a file of arrays does not have them."""
    for several in (False, True):

        def build(several: bool = several) -> Any:
            part = make(name, options)
            parts = [part, optim.SGD(0.1)]
            return optim.MultiOptimizer(parts, [is_matrix]) if several else part

        model, optimizer, resumed = Dropping(), build(), build()
        optimizer.update(model, backward(model))
        mx.eval(model.parameters(), optimizer.state)
        resumed.state = tree_unflatten([*leaves_of(optimizer.state).items()])
        other = Dropping()
        other.update(copy_tree(model.parameters()))
        gradients = backward(model)
        for _ in range(2):
            optimizer.update(model, copy_tree(gradients))
            resumed.update(other, copy_tree(gradients))
        assert int(resumed.step) == 3
        assert snapshot(other.parameters()) == snapshot(model.parameters())


@every_optimizer
def test_a_state_in_two_optimizers(name: str, options: dict[str, Any]) -> None:
    """pytorch/pytorch#196083: neither steps on the arrays of the other."""
    parameters, gradients = small_tree(0), small_tree(1)
    original, twin = make(name, options), make(name, options)
    parameters = original.apply_gradients(gradients, parameters)
    mx.eval(parameters, original.state)
    twin.state = tree_map(lambda x: x, original.state)
    before = snapshot(original.state)
    for _ in range(3):
        parameters = twin.apply_gradients(gradients, parameters)
        mx.eval(parameters, twin.state)
    assert snapshot(original.state) == before
    assert int(twin.step) == 4


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_a_step_count_in_half_precision_goes_on(dtype: mx.Dtype) -> None:
    """pytorch/ao#4915: a state that was cast as a whole; 256 + 1 is 256 there."""
    tree = {"w": mx.ones(2)}
    optimizer: Any = optim.Adam(1e-3, bias_correction=True)
    optimizer.init(tree)
    last = 256 if dtype == mx.bfloat16 else 2048
    optimizer.state["step"] = mx.array(last - 2, mx.uint64)
    optimizer.state = tree_map(lambda x: x.astype(dtype), optimizer.state)
    for _ in range(5):
        tree = optimizer.apply_gradients({"w": mx.full(2, 0.1)}, tree)
    assert int(optimizer.step) == last + 3
    several: Any = optim.MultiOptimizer([optim.SGD(0.1)], skip_nonfinite=True)
    several.optimizers[0].state["step"] = mx.array(last, dtype)
    several.apply_gradients(tree, tree)
    assert int(several.step) == last + 1


@pytest.mark.parametrize("step", [5, 5.0, np.int64(5), mx.array(5), mx.array([5])])
def test_a_step_count_of_another_type(step: Any) -> None:
    """pytorch/pytorch#118326."""
    tree = {"w": mx.array([0.5, -2.0])}
    results = []
    for value in (mx.array(5, mx.uint64), step):
        optimizer: Any = optim.Adam(0.1, bias_correction=True)
        optimizer.init(tree)
        optimizer.state["step"] = value
        updated = optimizer.apply_gradients(tree, tree)
        results.append(to_numpy(optimizer.apply_gradients(tree, updated)["w"]))
        assert int(optimizer.step) == 7
    np.testing.assert_array_equal(results[0], results[1])


@decaying
def test_what_has_no_gradient_does_not_decay(
    name: str, options: dict[str, Any]
) -> None:
    """KellerJordan/Muon#54."""
    model = Growing()
    optimizer = make(name, options, weight_decay=0.5)
    gradients = backward(model)
    optimizer.update(model, gradients)
    before = snapshot(model.parameters())
    first = next(iter(gradients))
    optimizer.update(model, {first: gradients[first]})
    after = snapshot(model.parameters())
    assert {path.split(".")[0] for path in before if before[path] != after[path]} == {
        first
    }


@compiled_too
def test_two_optimizers_of_one_model(backend: str, compiled: bool) -> None:
    """ml-explore/mlx#2305: a tree of the matrices and one of the vectors."""

    def split(tree: Any) -> list[Any]:
        leaves = leaves_of(tree)
        return [
            tree_unflatten([(k, x) for k, x in leaves.items() if (x.ndim > 1) == big])
            for big in (True, False)
        ]

    def train(module: Any, compiled: bool) -> Any:
        mx.random.seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        optimizers = [module.AdamW(0.01, weight_decay=x) for x in (0.1, 0.0)]
        for optimizer, part in zip(
            optimizers, split(model.trainable_parameters()), strict=True
        ):
            optimizer.init(part)
        state = [model.state, *(x.state for x in optimizers)]

        def step() -> None:
            for optimizer, part in zip(optimizers, split(backward(model)), strict=True):
                optimizer.update(model, part)

        run: Any = mx.compile(step, inputs=state, outputs=state) if compiled else step
        for _ in range(3):
            run()
            mx.eval(state)
        return model.parameters()

    assert_trees_match(train(optim, compiled), train(stock, False), 1e-5, 1e-6)


def test_a_last_batch_of_another_size(backend: str) -> None:
    """ml-explore/mlx#1160: a second trace of the step goes on where the first was."""
    model, optimizer, step = tracing(lambda: False, several=True)
    for count, size in enumerate((8, 8, 3, 8, 3), 1):
        step(mx.ones((size, 4)))
        mx.eval(model.state, optimizer.state)
        assert int(optimizer.step) == count
    other, eager, _ = tracing(lambda: False, several=True)
    for size in (8, 8, 3, 8, 3):
        eager.update(other, backward(other, mx.ones((size, 4))))
    assert_trees_match(model.parameters(), other.parameters(), 1e-5, 1e-6)
