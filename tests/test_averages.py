"""``ema=``: averages of the weights, written by the step's own kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import metal_simulator
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as stock
import mlx_fused_optimizers as optim
import numpy as np
import pytest
from metal_simulator.extension import extension, simulated
from mlx.utils import tree_map
from mlx_fused_optimizers import _ext
from support import (
    ALL_OPTIMIZERS,
    FLOATS,
    PARTLY_FUSED,
    assert_trees_match,
    copy_tree,
    fill,
    for_each,
    leaves_of,
    random_array,
    snapshot,
    to_numpy,
)
from users_classes import Plain, Shrinking

BETA = 0.9
AVERAGING = [x for x in ALL_OPTIMIZERS if getattr(optim, x[0]).takes_ema]
# Of which the simulator compiles kernels: of few states and many, of two launches.
SIMULATED = ("SGD", "AdamW", "Muon", "Adafactor", "LAMB")
SHAPES: Any = {
    "layer": {"weight": (24, 20), "bias": (24,)},
    "rest": [(70, 66), (), (0, 3), (5,)],
}


def arrays(seed: int, dtype: mx.Dtype = mx.float32) -> Any:
    rng = np.random.default_rng(seed)
    layer = {k: random_array(rng, s, dtype) for k, s in SHAPES["layer"].items()}
    rest = [random_array(rng, shape, dtype) for shape in SHAPES["rest"]]
    return copy_tree({"layer": layer, "rest": rest})


def make(name: str, **options: Any) -> Any:
    takes_rate = not options.get("relative_step", name == "Adafactor")
    given = {"learning_rate": 0.01} if takes_rate else {}
    return getattr(optim, name)(**{**given, **options})


def averages_of(state: Any) -> dict[str, mx.array]:
    """By the parameters' paths."""
    end = ".weight_average"
    return {
        path.removesuffix(end): x
        for path, x in leaves_of(state).items()
        if path.endswith(end)
    }


def without_averages(state: Any) -> dict[str, bytes]:
    return {k: x for k, x in snapshot(state).items() if "weight_average" not in k}


class Run:
    """An optimizer with its parameters, and their averages in float64."""

    def __init__(self, optimizer: Any, parameters: Any, compiled: bool = False) -> None:
        self.optimizer = optimizer
        self.parameters = copy_tree(parameters)
        optimizer.init(self.parameters)
        mx.eval(optimizer.state)
        self.expected = self.exact()

        def apply(parameters: Any, gradients: Any) -> Any:
            return optimizer.apply_gradients(gradients, parameters)

        self.apply = apply
        if compiled:
            state = optimizer.state
            self.apply = mx.compile(apply, inputs=state, outputs=state)

    def exact(self) -> dict[str, Any]:
        """The weights, with their masters."""
        wide, _ = optim.full_precision(self.parameters, self.optimizer)
        return {k: to_numpy(x).astype(np.float64) for k, x in leaves_of(wide).items()}

    def call(self, gradients: Any, beta: float = BETA) -> Run:
        self.parameters = self.apply(self.parameters, gradients)
        mx.eval(self.parameters, self.optimizer.state)
        for path, x in self.exact().items():
            self.expected[path] = beta * self.expected[path] + (1 - beta) * x
        return self

    def check(self, tolerance: float = 1e-6) -> None:
        found = averages_of(self.optimizer.state)
        assert found.keys() == self.expected.keys()
        for path, x in found.items():
            assert x.dtype == mx.float32
            np.testing.assert_allclose(
                to_numpy(x), self.expected[path], tolerance, tolerance, err_msg=path
            )


@for_each(AVERAGING)
def test_the_average(backend: str, name: str, options: dict[str, Any]) -> None:
    """And everything else is, to the bit, as without it."""
    if backend == "metal-simulator" and (options or name not in SIMULATED):
        pytest.skip("the simulator compiles a kernel for each")
    ours = Run(make(name, ema=BETA, **options), arrays(0))
    plain = Run(make(name, **options), arrays(0))
    ours.check(0)  # starts as the weights
    for i in range(3):
        ours.call(arrays(i + 1))
        plain.call(arrays(i + 1))
    ours.check()
    assert snapshot(ours.parameters) == snapshot(plain.parameters)
    assert without_averages(ours.optimizer.state) == snapshot(plain.optimizer.state)


@for_each(AVERAGING)
def test_compiled(name: str, options: dict[str, Any]) -> None:
    run = Run(make(name, ema=BETA, **options), arrays(0), compiled=True)
    for i in range(3):
        run.call(arrays(i + 1))
    run.check()


# Of half precision without a master the average takes in what was not rounded yet.
HALF = 0.02
OPTIONS: dict[str, tuple[dict[str, Any], mx.Dtype, float]] = {
    "max_grad_norm": ({"max_grad_norm": 0.5}, mx.float32, 1e-6),
    "clip_by_last_norm": (
        {"max_grad_norm": 0.5, "clip_by_last_norm": True},
        mx.float32,
        1e-6,
    ),
    "filter": (
        {"weight_decay_filter": optim.decay_matrices_only},
        mx.float32,
        1e-6,
    ),
    "groups": (
        {"groups": [(lambda path, array: array.ndim < 2, {"learning_rate": 0.3})]},
        mx.float32,
        1e-6,
    ),
    "int8": (
        {"state_dtype": "int8", "quantize_filter": lambda path, array: True},
        mx.float32,
        1e-6,
    ),
    "bfloat16 states": ({"state_dtype": mx.bfloat16}, mx.float32, 1e-6),
    "int4 and 32bit": (
        {
            "state_dtype": "int4",
            "quantize_filter": lambda path, array: True,
            "master_weights": "32bit",
        },
        mx.bfloat16,
        1e-6,
    ),
    "24bit": ({"master_weights": "24bit"}, mx.bfloat16, 2e-4),
    "24bit float16": ({"master_weights": "24bit"}, mx.float16, 2e-4),
    "stochastic": ({"stochastic_rounding": True}, mx.bfloat16, HALF),
    "bfloat16": ({}, mx.bfloat16, HALF),
    "float16": ({}, mx.float16, HALF),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("option", OPTIONS)
def test_with_other_options(backend: str, option: str, compiled: bool) -> None:
    if compiled and backend != "cpu":
        pytest.skip("the same kernels")
    if backend == "metal-simulator" and option in ("float16", "24bit float16", "int8"):
        pytest.skip("the simulator compiles a kernel for each")
    options, dtype, tolerance = OPTIONS[option]
    ours = Run(optim.AdamW(0.01, ema=BETA, **options), arrays(0, dtype), compiled)
    plain = Run(optim.AdamW(0.01, **options), arrays(0, dtype), compiled)
    for i in range(3):
        ours.call(arrays(i + 1, dtype))
        plain.call(arrays(i + 1, dtype))
    ours.check(tolerance)
    assert snapshot(ours.parameters) == snapshot(plain.parameters)
    assert without_averages(ours.optimizer.state) == snapshot(plain.optimizer.state)


@pytest.mark.parametrize("name", ["Muon", "Adafactor"])
@pytest.mark.parametrize("master", [None, "32bit"])
def test_averages_of_halves(backend: str, name: str, master: str | None) -> None:
    run = Run(make(name, ema=BETA, master_weights=master), arrays(0, mx.bfloat16))
    for i in range(3):
        run.call(arrays(i + 1, mx.bfloat16))
    run.check(1e-6 if master else HALF)


def test_an_average_of_halves_moves(backend: str) -> None:
    """In bfloat16, of 8 bits, 0.999 times one plus 0.001 times two would be one."""
    optimizer = optim.SGD(1.0, ema=0.999)
    parameters = {"a": mx.ones((8,), mx.bfloat16)}
    optimizer.init(parameters)
    for i in range(10):
        g = {"a": mx.full((8,), -1.0 if i == 0 else 0.0, mx.bfloat16)}
        parameters = optimizer.apply_gradients(g, parameters)
    expected = 2 - 0.999**10
    np.testing.assert_allclose(
        to_numpy(optimizer.state["a"]["weight_average"]), expected, rtol=1e-6
    )


@pytest.mark.parametrize("name", ["AdamW", "Muon", "Adafactor"])
def test_skipped_steps_change_no_average(backend: str, name: str) -> None:
    run = Run(make(name, ema=BETA, skip_nonfinite=True), arrays(0))
    run.call(arrays(1))
    before = {k: to_numpy(x) for k, x in averages_of(run.optimizer.state).items()}
    spoilt = arrays(2)
    spoilt["rest"][3][0] = mx.inf
    run.optimizer.apply_gradients(spoilt, run.parameters)
    after = averages_of(run.optimizer.state)
    for path, x in before.items():
        np.testing.assert_array_equal(x, to_numpy(after[path]))
    run.call(arrays(3)).check()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_averages_at_real_steps_alone(backend: str, name: str, compiled: bool) -> None:
    if compiled and backend != "cpu":
        pytest.skip("the same kernels")
    ours = Run(make(name, ema=BETA, accumulate=2), arrays(0), compiled)
    plain = Run(make(name, ema=BETA), arrays(0), compiled)
    for step in range(2):
        pair = [arrays(2 * step + i + 1) for i in range(2)]
        for g in pair:
            ours.call(g)
        plain.call(tree_map(lambda a, b: (a + b) / 2, *pair))
    tolerance = 2e-5 if compiled and name == "Muon" else 1e-6
    assert_trees_match(
        averages_of(ours.optimizer.state),
        averages_of(plain.optimizer.state),
        tolerance,
        tolerance,
    )
    plain.check()


@pytest.mark.parametrize("dtype", [mx.complex64, mx.float64], ids=str)
def test_other_dtypes(dtype: mx.Dtype) -> None:
    mx.set_default_device(mx.cpu)
    parameters = tree_map(lambda x: x.astype(dtype), arrays(0))
    optimizer = optim.Adam(0.01, ema=BETA)
    optimizer.init(parameters)
    expected = leaves_of(parameters)
    for i in range(3):
        gradients = tree_map(lambda x: x.astype(dtype), arrays(i + 1))
        parameters = optimizer.apply_gradients(gradients, parameters)
        now = leaves_of(parameters)
        expected = {k: BETA * expected[k] + (1 - BETA) * now[k] for k in now}
    found = averages_of(optimizer.state)
    assert_trees_match(found, expected, 1e-6, 1e-7)
    assert {x.dtype for x in found.values()} == {dtype}


BUILDS: list[Callable[..., Any]] = [
    lambda **o: Plain(**o),
    lambda **o: Shrinking(0.01, **o),
]


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("options", [{}, {"skip_nonfinite": True, "accumulate": 2}])
def test_users_classes(
    backend: str, build: Callable[..., Any], options: dict[str, Any]
) -> None:
    run = Run(build(ema=BETA, **options), arrays(0))
    for i in range(2):
        run.call(arrays(i + 1), beta=1.0 if options and i == 0 else BETA)
    run.check()


def multi(**options: Any) -> Any:
    part: dict[str, Any] = options.pop("part", {})
    return optim.MultiOptimizer(
        [optim.SGD(0.1, momentum=0.9, **part), optim.AdamW(0.01, **part)],
        [lambda path, array: array.ndim == 2],
        **options,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"ema": BETA},
        {"part": {"ema": BETA}},
        {"ema": BETA, "max_grad_norm": 0.5, "skip_nonfinite": True},
    ],
    ids=str,
)
def test_of_a_multi_optimizer(backend: str, options: dict[str, Any]) -> None:
    run = Run(multi(**options), arrays(0))
    run.expected = {
        k: to_numpy(x).astype(np.float64) for k, x in leaves_of(arrays(0)).items()
    }
    for i in range(3):
        run.parameters = run.apply(run.parameters, arrays(i + 1))
        for k, x in leaves_of(run.parameters).items():
            run.expected[k] = BETA * run.expected[k] + (1 - BETA) * to_numpy(x)
    found: dict[str, mx.array] = {}
    for part in run.optimizer.optimizers:
        found |= averages_of(part.state)
    assert found.keys() == run.expected.keys()
    for path, x in found.items():
        np.testing.assert_allclose(to_numpy(x), run.expected[path], 1e-6, 1e-6)


def test_multi_refuses() -> None:
    with pytest.raises(ValueError, match=r"ema is set to 0\.9 and that of a part to"):
        multi(ema=0.9, part={"ema": 0.99})
    with pytest.raises(ValueError, match="ema needs optimizers of mlx_fused"):
        optim.MultiOptimizer([stock.SGD(0.1)], ema=0.9)
    optimizer = multi(ema=0.9)
    optimizer.ema = None
    assert [part.ema for part in optimizer.optimizers] == [None, None]


@pytest.mark.parametrize("value", [1.0, -0.1, 1.5])
def test_refuses_other_numbers(value: float) -> None:
    with pytest.raises(ValueError, match=rf"ema should be in \[0, 1\), {value} was"):
        optim.SGD(0.1, ema=value)


def test_parts_with_averages_of_their_own() -> None:
    optimizer = optim.MultiOptimizer(
        [optim.ScheduleFreeSGD(0.1), optim.AdamW(0.01, ema=BETA)],
        [lambda path, array: array.ndim == 2],
    )
    model = trained(optimizer)
    weights = model.parameters()
    expected = leaves_of(optimizer.optimizers[0].average(weights))
    expected |= averages_of(optimizer.optimizers[1].state)
    with optimizer.averaged(model):
        assert snapshot(model.parameters()) == snapshot(expected)
        with pytest.raises(RuntimeError, match="within averaged"):
            optimizer.update(model, weights)
    assert snapshot(model.parameters()) == snapshot(weights)
    optimizer.update(model, weights)


def test_refuses_two_averages() -> None:
    with pytest.raises(ValueError, match="ScheduleFreeSGD keeps an average of its own"):
        optim.ScheduleFreeSGD(0.1, ema=0.9)


@pytest.mark.parametrize("value", ["0.9", True, [0.9]])
def test_refuses_what_is_no_number(value: Any) -> None:
    with pytest.raises(TypeError, match="ema is of type"):
        optim.SGD(0.1, ema=value)


# The context


def trained(optimizer: Any, dtype: mx.Dtype = mx.float32) -> nn.Module:
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    model.set_dtype(dtype)
    rng = np.random.default_rng(0)
    for _ in range(3):
        optimizer.update(model, fill(model.trainable_parameters(), rng, dtype))
        mx.eval(model.parameters(), optimizer.state)
    return model


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["AdamW", "Muon", "Adafactor", "multi"])
def test_a_model_with_its_averages(kind: str, dtype: mx.Dtype) -> None:
    optimizer = multi(ema=BETA) if kind == "multi" else make(kind, ema=BETA)
    model = trained(optimizer, dtype)
    before = leaves_of(model.parameters())
    bits = snapshot(before)
    state = snapshot(optimizer.state)
    parts = optimizer.optimizers if kind == "multi" else [optimizer]
    expected: dict[str, mx.array] = {}
    for part in parts:
        expected |= averages_of(part.state)
    with optimizer.averaged(model) as same:
        assert same is model
        inside = leaves_of(model.parameters())
        assert inside.keys() == expected.keys()
        for path, x in inside.items():
            assert x.dtype == dtype
            assert mx.array_equal(x, expected[path].astype(dtype)).item()
            assert not mx.array_equal(x, before[path]).item()
        model.layers[0].weight *= 0  # the model's own, not the average
    after = leaves_of(model.parameters())
    assert all(after[path] is x for path, x in before.items())
    assert snapshot(after) == bits
    assert snapshot(optimizer.state) == state


def test_after_an_exception() -> None:
    optimizer = optim.AdamW(0.01, ema=BETA)
    model = trained(optimizer)
    bits = snapshot(model.parameters())
    with pytest.raises(ZeroDivisionError), optimizer.averaged(model):
        raise ZeroDivisionError
    assert snapshot(model.parameters()) == bits
    optimizer.update(model, model.trainable_parameters())  # and it goes on


@pytest.mark.parametrize("kind", ["AdamW", "multi"])
def test_what_the_context_refuses(kind: str, tmp_path: Path) -> None:
    optimizer = multi(ema=BETA) if kind == "multi" else make(kind, ema=BETA)
    model = trained(optimizer)
    gradients = copy_tree(model.trainable_parameters())
    optim.save(tmp_path / "a", model, optimizer)
    with optimizer.averaged(model):
        state, bits = snapshot(optimizer.state), snapshot(model.parameters())
        with (
            pytest.raises(RuntimeError, match=r"averaged\(\) within averaged\(\)"),
            optimizer.averaged(model),
        ):
            pass
        with pytest.raises(RuntimeError, match=r"a step within averaged\(\)"):
            optimizer.update(model, gradients)
        with pytest.raises(RuntimeError, match=r"a checkpoint within averaged\(\)"):
            optim.save(tmp_path / "b", model, optimizer)
        with pytest.raises(RuntimeError, match=r"a checkpoint within averaged\(\)"):
            optim.load(tmp_path / "a", model, optimizer)
        assert snapshot(optimizer.state) == state
        assert snapshot(model.parameters()) == bits
    plain = optim.AdamW(0.01)
    with (
        pytest.raises(ValueError, match=r"averaged\(\) needs averages: pass ema=0\.99"),
        plain.averaged(model),
    ):
        pass
    with (
        pytest.raises(ValueError, match="there are no averages of this model's"),
        optim.AdamW(0.01, ema=BETA).averaged(model),
    ):
        pass
    with (
        pytest.raises(TypeError, match="model is of type dict"),
        optimizer.averaged({}),
    ):
        pass


def test_frozen_parameters_keep_their_weights() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3), nn.Linear(3, 3))
    model.layers[1].freeze()
    optimizer = optim.AdamW(0.1, ema=BETA)
    for _ in range(2):
        optimizer.update(model, model.trainable_parameters())
    before = leaves_of(model.parameters())
    with optimizer.averaged(model):
        for path, x in leaves_of(model.parameters()).items():
            is_same = mx.array_equal(x, before[path]).item()
            assert is_same == path.startswith("layers.1")


def test_in_a_compiled_training() -> None:
    """The compiled functions see the averages inside and the weights outside."""
    optimizer = optim.AdamW(0.05, ema=BETA)
    model = nn.Linear(4, 2)
    optimizer.init(model.trainable_parameters())
    loss_and_grad = nn.value_and_grad(model, lambda x: mx.square(model(x)).mean())
    state = [model.state, optimizer.state]

    def train(x: mx.array) -> mx.array:
        loss, gradients = loss_and_grad(x)
        optimizer.update(model, gradients)
        return loss  # type: ignore[no-any-return]

    step = mx.compile(train, inputs=state, outputs=state)
    evaluate = mx.compile(lambda x: model(x), inputs=model.state)
    x = mx.random.normal((8, 4))
    for _ in range(4):
        mx.eval(step(x), state)
    outside = evaluate(x)
    average = copy.deepcopy(optimizer.state["weight"]["weight_average"])
    bias = optimizer.state["bias"]["weight_average"]
    with optimizer.averaged(model):
        inside = evaluate(x)
        np.testing.assert_allclose(
            to_numpy(inside), to_numpy(x @ average.T + bias), rtol=1e-5, atol=1e-6
        )
    assert mx.array_equal(evaluate(x), outside).item()
    mx.eval(step(x), state)
    assert optimizer.step.item() == 5


def test_starts_at_weights_that_were_loaded_after_init() -> None:
    optimizer = optim.SGD(0.1, ema=BETA)
    optimizer.init(arrays(0))
    run = Run(optimizer, arrays(1))
    run.check(0)
    run.call(arrays(2)).check()
    kept = snapshot(averages_of(optimizer.state))
    optimizer.init(run.parameters)  # in mid-run it stays
    assert snapshot(averages_of(optimizer.state)) == kept


def test_without_init(backend: str) -> None:
    """The first step has gradients, of which no average starts."""
    for optimizer in (optim.AdamW(0.01, ema=BETA), Plain(ema=BETA)):
        parameters = arrays(0)
        updated = optimizer.apply_gradients(arrays(1), parameters)
        expected = tree_map(lambda a, b: BETA * a + (1 - BETA) * b, arrays(0), updated)
        assert_trees_match(
            averages_of(optimizer.state), leaves_of(expected), 1e-6, 1e-6
        )


def test_switched_on_and_off(backend: str) -> None:
    run = Run(optim.AdamW(0.01), arrays(0))
    run.call(arrays(1))
    run.optimizer.ema = BETA
    run.expected = run.exact()
    run.call(arrays(2)).call(arrays(3)).check()
    run.optimizer.ema = 0.5
    run.call(arrays(4), beta=0.5).check()
    run.optimizer.ema = None
    run.call(arrays(5))
    assert averages_of(run.optimizer.state) == {}


# Checkpoints


@pytest.mark.parametrize("kind", ["AdamW", "Muon", "Adafactor", "multi", "masters"])
def test_a_checkpoint(kind: str, tmp_path: Path) -> None:
    def build() -> Any:
        if kind == "multi":
            return multi(ema=BETA)
        if kind == "masters":
            return make("AdamW", ema=BETA, master_weights="24bit", accumulate=2)
        return make(kind, ema=BETA)

    dtype = mx.bfloat16 if kind == "masters" else mx.float32
    runs = []
    for seed in (0, 9):
        optimizer, parameters = build(), arrays(seed, dtype)
        optimizer.init(parameters)
        runs.append((optimizer, parameters))
    (optimizer, parameters), (again, others) = runs
    for i in range(3):
        parameters = optimizer.apply_gradients(arrays(i, dtype), parameters)
    optim.save(tmp_path / "a", parameters, optimizer)
    optim.load(tmp_path / "a", others, again)
    for i in range(3, 6):
        parameters = optimizer.apply_gradients(arrays(i, dtype), parameters)
        others = again.apply_gradients(arrays(i, dtype), others)
    assert snapshot(others) == snapshot(parameters)
    assert snapshot(again.state) == snapshot(optimizer.state)


@pytest.mark.parametrize("of", ["stock", "ours"])
def test_a_checkpoint_without_averages(of: str, tmp_path: Path) -> None:
    """They start at the file's weights."""
    source = (stock if of == "stock" else optim).AdamW(0.01)
    parameters = arrays(0)
    source.init(parameters)
    parameters = source.apply_gradients(arrays(1), parameters)
    optim.save(tmp_path / "a", parameters, source)
    run = Run(optim.AdamW(0.01, ema=BETA), arrays(7))
    run.call(arrays(8))
    optim.load(tmp_path / "a", run.parameters, run.optimizer)
    run.expected = run.exact()
    run.call(arrays(2)).check()
    optim.save(tmp_path / "b", run.parameters, run.optimizer)
    other = optim.AdamW(0.01)
    with pytest.raises(ValueError, match="'ema': found"):
        optim.load(tmp_path / "b", run.parameters, other)
    with pytest.warns(UserWarning, match="weight_average"):
        optim.load(tmp_path / "b", run.parameters, other, strict=False)
    assert snapshot(other.state) == without_averages(run.optimizer.state)


def test_full_precision_leaves_them_out() -> None:
    run = Run(optim.AdamW(0.01, ema=BETA), arrays(0))
    _, state = optim.full_precision(run.parameters, run.optimizer)
    assert state["layer"]["bias"].keys() == {"m", "v"}


def test_errors_change_nothing(backend: str) -> None:
    run = Run(optim.AdamW(0.01, ema=BETA), arrays(0))
    run.call(arrays(1))
    before = snapshot(run.optimizer.state)
    wrong = arrays(2)
    wrong["layer"]["weight"] = mx.zeros((3, 7))
    with pytest.raises(ValueError, match=r"layer\.weight"):
        run.optimizer.apply_gradients(wrong, run.parameters)
    assert snapshot(run.optimizer.state) == before


# Memory


@pytest.mark.fused
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@for_each([x for x in AVERAGING if x not in PARTLY_FUSED])
def test_a_step_allocates_nothing(
    name: str, options: dict[str, Any], compiled: bool
) -> None:
    mx.set_default_device(mx.cpu)
    shapes = {"a": (300, 200), "b": (40, 30), "c": (40, 30)}
    rng = np.random.default_rng(0)
    parameters = {
        k: random_array(rng, shape, mx.float32) for k, shape in shapes.items()
    }
    optimizer = make(name, ema=BETA, **options)
    optimizer.init(parameters)
    mx.eval(parameters, optimizer.state)

    def step(parameters: Any, gradients: Any) -> Any:
        return optimizer.apply_gradients(gradients, parameters)

    if compiled:
        step = mx.compile(step, inputs=optimizer.state, outputs=optimizer.state)
    for i in range(4):
        gradients = fill(parameters, rng, mx.float32)
        mx.eval(gradients)
        mx.synchronize()
        mx.reset_peak_memory()
        before, copied = mx.get_active_memory(), _ext.bytes_copied()
        parameters = step(parameters, gradients)
        mx.eval(parameters, optimizer.state)
        if i > 0:
            assert mx.get_peak_memory() - before < 4096
            assert _ext.bytes_copied() == copied


@pytest.mark.fused
def test_bytes_on_metal() -> None:
    """8 more a float32 parameter in the same launches; Adafactor's need one more."""
    if extension() is None:
        pytest.skip("the simulator is not built")
    shapes = {"a": (64, 128), "b": (4096,)}
    elements = 64 * 128 + 4096
    moved: dict[tuple[str, Any], float] = {}
    launches: dict[tuple[str, Any], int] = {}
    with simulated():
        for name in ("SGD", "AdamW"):
            for ema in (None, BETA):
                optimizer = make(name, ema=ema)
                parameters = {k: mx.ones(shape) for k, shape in shapes.items()}
                optimizer.init(parameters)
                mx.eval(parameters, optimizer.state)
                for _ in range(2):
                    g = {
                        "a": mx.contiguous(mx.ones((128, 64))).T,
                        "b": mx.ones((4096,)),
                    }
                    mx.eval(g)
                    mx.synchronize()
                    metal_simulator.reset()
                    parameters = optimizer.apply_gradients(g, parameters)
                    mx.eval(parameters, optimizer.state)
                    mx.synchronize()
                    found = metal_simulator.counters()
                total = sum(x.bytes_read + x.bytes_written for x in found)
                moved[name, ema] = total / elements
                launches[name, ema] = len(found)
    assert metal_simulator.take_errors() == []
    assert moved == {
        ("SGD", None): 12,
        ("SGD", BETA): 20,
        ("AdamW", None): 28,
        ("AdamW", BETA): 36,
    }
    assert len({*launches.values()}) == 1
