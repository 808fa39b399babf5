"""Programs written for mlx.optimizers, with the import changed.

MLX's own tests of its optimizers are not in its wheels. Here is each behaviour that
they hold, and each way in which they call the classes. Where MLX's file is at hand,
``MLX_OPTIMIZER_TESTS=/path/to/python/tests/test_optimizers.py`` runs it as well.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_fused_optimizers as opt
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from support import MLX_VERSION, leaves_of, more_dimensions_in_adafactor, to_numpy

FILE = os.environ.get("MLX_OPTIMIZER_TESTS")
# Found as a program that walks the module would.
CLASSES: dict[str, Any] = {
    name: value
    for name, value in inspect.getmembers(opt, inspect.isclass)
    if issubclass(value, opt.Optimizer)
    and value not in (opt.Optimizer, opt.MultiOptimizer)
}
every_class = pytest.mark.parametrize("name", CLASSES)


def nested() -> tuple[Any, Any]:
    parameters = {"first": [mx.zeros((10,)), mx.zeros((1,))], "second": mx.zeros((1,))}
    return parameters, tree_map(mx.ones_like, parameters)


@pytest.mark.skipif(FILE is None, reason="MLX_OPTIMIZER_TESTS names no file")
def test_mlxs_own_file(tmp_path: Path) -> None:
    source = Path(FILE or "")
    text, changed = re.subn(
        r"^import mlx\.optimizers as opt$",
        "import mlx_fused_optimizers as opt",
        source.read_text(),
        flags=re.MULTILINE,
    )
    assert changed == 1
    (tmp_path / source.name).write_text(text)
    shutil.copy(source.with_name("mlx_tests.py"), tmp_path)
    command = [sys.executable, "-m", "unittest", "-v", source.stem]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    ran = re.search(r"^Ran (\d+) tests", result.stderr, re.MULTILINE)
    assert ran is not None and int(ran[1]) >= 25


def test_every_class_is_found() -> None:
    assert len(CLASSES) == 18


def test_the_state_is_a_plain_dict() -> None:
    optimizer: Any = opt.SGD(0.1)
    optimizer.state["hello"] = "world"
    assert optimizer.state["hello"] == "world"
    optimizer.state = {0: 1}
    assert optimizer.state == {0: 1}


@every_class
def test_a_step_keeps_structure_and_shapes(backend: str, name: str) -> None:
    parameters, gradients = nested()
    updated = CLASSES[name](0.1).apply_gradients(gradients, parameters)
    mx.eval(updated)
    assert {p: x.shape for p, x in leaves_of(updated).items()} == {
        p: x.shape for p, x in leaves_of(parameters).items()
    }


@every_class
def test_a_step_keeps_the_dtype(backend: str, name: str) -> None:
    parameters = {"w": mx.ones((5, 5), mx.float16)}
    gradients = tree_map(mx.ones_like, parameters)
    updated = CLASSES[name](0.1).apply_gradients(gradients, parameters)
    assert updated["w"].dtype == mx.float16


STATES = {
    "SGD": ("v",),
    "RMSprop": ("v",),
    "Adagrad": ("v",),
    "AdaDelta": ("v", "u"),
    "Adam": ("m", "v"),
    "AdamW": ("m", "v"),
    "Adamax": ("m", "v"),
    "Lion": ("m",),
    "Muon": ("v",),
}


@pytest.mark.parametrize("name", STATES)
def test_an_explicit_init_gives_zeros(backend: str, name: str) -> None:
    parameters, _ = nested()
    parameters["conv"] = mx.zeros((16, 8, 3, 3))
    optimizer = CLASSES[name](1e-2)
    optimizer.init(parameters)
    state = leaves_of({k: optimizer.state[k] for k in parameters})
    assert {*state} == {f"{p}.{s}" for p in leaves_of(parameters) for s in STATES[name]}
    for path, moment in state.items():
        parameter = leaves_of(parameters)[path.rpartition(".")[0]]
        assert moment.shape == parameter.shape and not moment.any().item()


def test_an_implicit_init_comes_with_the_first_step(backend: str) -> None:
    parameters, gradients = nested()
    momentum, running = opt.SGD(1e-2, momentum=0.9), opt.RMSprop(1e-2, alpha=0.99)
    for optimizer, value in ((momentum, 1.0), (running, 0.01)):
        optimizer.apply_gradients(gradients, parameters)
        for path in leaves_of(gradients):
            moment = leaves_of(optimizer.state)[f"{path}.v"]
            np.testing.assert_allclose(to_numpy(moment), value, rtol=1e-5)


@pytest.mark.skipif(MLX_VERSION < (0, 32, 0), reason="MLX takes an eps of 0 there")
@pytest.mark.parametrize("name", ["RMSprop", "Adagrad", "AdaDelta"])
def test_an_epsilon_that_would_divide_by_zero(name: str) -> None:
    for eps in (-1.0, 0.0):
        with pytest.raises(ValueError, match=">0"):
            CLASSES[name](learning_rate=1e-2, eps=eps)


def test_bias_correction_in_half_precision(backend: str) -> None:
    parameters, gradients = (
        tree_map(lambda x: x.astype(mx.float16), tree) for tree in nested()
    )
    updated = opt.Adam(1e-2, bias_correction=True).apply_gradients(
        gradients, parameters
    )
    assert {x.dtype for x in leaves_of(updated).values()} == {mx.float16}


def test_adamw_is_torchs(backend: str) -> None:
    """A step of torch.optim.AdamW(lr=3e-4), of torch 2.14 in float64."""
    parameters = {
        "weight": mx.array([[0.25, -0.5, 0.125]]),
        "bias": mx.array([0.0625]),
    }
    gradients = {"weight": mx.array([[0.75, -0.1, 1e-3]]), "bias": mx.array([-2.0])}
    optimizer = opt.AdamW(learning_rate=3e-4, bias_correction=True)
    updated = optimizer.apply_gradients(gradients, parameters)
    np.testing.assert_allclose(
        to_numpy(updated["weight"]),
        [[0.249699250004, -0.49969850003, 0.12469962799997]],
        rtol=1e-6,
    )
    np.testing.assert_allclose(to_numpy(updated["bias"]), [0.0627998124985], rtol=1e-6)


@pytest.mark.parametrize("shape", [(5, 5), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=str)
def test_adafactor_without_arguments(
    backend: str, shape: tuple[int, ...], dtype: mx.Dtype
) -> None:
    parameters = {"x": mx.zeros(shape, dtype)}
    gradients = tree_map(mx.ones_like, parameters)
    optimizer = opt.Adafactor()
    for _ in range(2):
        parameters = optimizer.apply_gradients(gradients, parameters)
        assert parameters["x"].dtype == dtype and parameters["x"].shape == shape
        assert mx.isfinite(parameters["x"]).all().item()
    assert optimizer.state["step"] == 2


@more_dimensions_in_adafactor
def test_adafactors_estimate_is_an_outer_product(backend: str) -> None:
    row = mx.array([[1.0, 4.0, 9.0], [16.0, 25.0, 36.0]])
    column = mx.array([[1.0, 4.0, 9.0, 16.0], [25.0, 36.0, 49.0, 64.0]])
    estimate = opt.Adafactor()._approximate_exp_moving_avg(row, column)
    mean = to_numpy(row).mean(axis=-1, keepdims=True)
    expected = np.sqrt(mean / to_numpy(row))[..., None] / np.sqrt(
        to_numpy(column)[:, None, :]
    )
    np.testing.assert_allclose(to_numpy(estimate), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"nesterov": False}, {"momentum": 0.0}], ids=["", "plain", "none"]
)
def test_muon_of_vectors_matrices_and_filters(
    backend: str, options: dict[str, Any]
) -> None:
    parameters = {
        "first": [mx.zeros((10, 5)), mx.zeros((1,))],
        "second": mx.zeros((3, 3)),
        "conv": mx.zeros((16, 8, 3, 3)),
    }
    gradients = tree_map(mx.ones_like, parameters)
    updated = opt.Muon(1e-2, **options).apply_gradients(gradients, parameters)
    for path, x in leaves_of(updated).items():
        assert x.shape == leaves_of(parameters)[path].shape
        assert (x != 0).all().item()


def test_a_compiled_step_is_the_eager_one(backend: str) -> None:
    """As a pure function of parameters and state, and with both captured."""
    mx.random.seed(0)
    model, x = nn.Linear(10, 10), mx.random.uniform(shape=(2, 10))
    original = model.parameters()

    def loss(model: nn.Module, x: mx.array) -> Any:
        return model(x).sum()

    def build() -> opt.SGD:
        model.update(original)
        return opt.SGD(learning_rate=1e-2, momentum=0.9)

    optimizer = build()
    for _ in range(3):
        optimizer.update(model, nn.value_and_grad(model, loss)(model, x)[1])
    expected = {p: to_numpy(v) for p, v in leaves_of(model.parameters()).items()}

    pure = build()

    def of_parameters(parameters: Any, x: mx.array) -> Any:
        model.update(parameters)
        return loss(model, x)

    @mx.compile
    def pure_step(parameters: Any, state: Any, x: mx.array) -> Any:
        gradients = mx.grad(of_parameters)(parameters, x)
        pure.state = state
        return pure.apply_gradients(gradients, parameters), pure.state

    pure.init(model.parameters())
    parameters, state = model.parameters(), pure.state
    for _ in range(3):
        parameters, state = pure_step(parameters, state, x)

    captured = build()
    capture = [model.state, captured.state]

    @partial(mx.compile, inputs=capture, outputs=capture)
    def step(x: mx.array) -> None:
        _, gradients = nn.value_and_grad(model, loss)(model, x)
        captured.update(model, gradients)

    for _ in range(3):
        step(x)
    for path, value in expected.items():
        for actual in (parameters, model.parameters()):
            np.testing.assert_allclose(
                to_numpy(leaves_of(actual)[path]), value, rtol=1e-5, atol=1e-6
            )


def test_a_learning_rate_is_set_for_a_step_compiled_with_inputs_alone(
    backend: str,
) -> None:
    parameters = {"w": mx.ones((5, 5))}
    gradients = tree_map(mx.ones_like, parameters)
    optimizer = opt.SGD(-1.0)

    @partial(mx.compile, inputs=optimizer.state)
    def update(gradients: Any) -> Any:
        return optimizer.apply_gradients(gradients, parameters)

    for learning_rate in (-1.0, -2.0):
        optimizer.learning_rate = learning_rate
        result = update(gradients)
        np.testing.assert_allclose(to_numpy(result["w"]), 1 - learning_rate)


@every_class
def test_a_schedule_is_followed(backend: str, name: str) -> None:
    optimizer = CLASSES[name](learning_rate=opt.step_decay(1e-1, 0.9, 1))
    parameters = {"w": mx.ones((5, 5))}
    gradients = tree_map(mx.ones_like, parameters)
    for i in range(10):
        optimizer.apply_gradients(gradients, parameters)
        assert optimizer.learning_rate.item() == pytest.approx(0.1 * 0.9**i, rel=1e-5)


def test_schedules_of_python_numbers() -> None:
    cosine = 0.1 * 0.5 * (1 + math.cos(math.pi * 4 / 10))
    for schedule, step, expected in (
        (opt.step_decay(0.1, 0.9, 1000), 2500, 0.1 * 0.9**2),
        (opt.exponential_decay(0.1, 0.99), 10, 0.1 * 0.99**10),
        (opt.cosine_decay(0.1, 10), 4, cosine),
        (opt.cosine_decay(0.1, 10, 0.05), 20, 0.05),
    ):
        assert float(schedule(step)) == pytest.approx(expected, abs=1e-7)
    assert opt.cosine_decay(0.1, 10, 0.05)(9) > 0.05


def test_joined_schedules() -> None:
    constants: list[Any] = [lambda _: 3, lambda _: 4, lambda _: 5]
    with pytest.raises(ValueError, match="Received 3 boundaries but expected 2"):
        opt.schedulers.join_schedules(constants, [2, 3, 4])
    schedule = opt.schedulers.join_schedules(constants, [2, 4])
    assert [schedule(step).item() for step in (0, 1, 2, 3, 5, 7)] == [3, 3, 4, 4, 5, 5]

    warmup = opt.schedulers.linear_schedule(0.0, 1e-5, 100)
    cosine = opt.schedulers.cosine_decay(1e-5, 100)
    joined = opt.schedulers.join_schedules([warmup, cosine], [101])
    assert joined(0) == 0
    assert joined(101).item() == pytest.approx(1e-5)
    optimizer: Any = opt.Adam(learning_rate=joined)
    for steps in (100, 100):
        for _ in range(steps):
            optimizer.update({}, {})
        expected = float(joined(int(optimizer.step) - 1))
        assert optimizer.learning_rate.item() == pytest.approx(expected)


def test_a_compiled_step_follows_a_schedule(backend: str) -> None:
    schedule = opt.exponential_decay(1e-1, 0.9)
    optimizer: Any = opt.SGD(learning_rate=schedule)

    @partial(mx.compile, inputs=optimizer.state, outputs=optimizer.state)
    def update() -> None:
        optimizer.update({}, {})

    for step in range(5):
        update()
        assert optimizer.learning_rate.item() == pytest.approx(0.1 * 0.9**step)


def test_clipping(backend: str) -> None:
    small = {
        "first": [mx.array([0.1, 0.2]), mx.array([0.1])],
        "second": mx.array([0.3]),
    }
    clipped, _ = opt.clip_grad_norm(small, 10.0)
    for path, x in leaves_of(small).items():
        assert mx.array_equal(leaves_of(clipped)[path], x).item()
    # Integers too.
    large = {"first": [mx.array([10, 20]), mx.array([10])], "second": mx.array([30])}
    clipped, norm = opt.clip_grad_norm(large, 1.0)
    assert float(norm) == pytest.approx(math.sqrt(1500), rel=1e-6)
    for path, x in leaves_of(large).items():
        np.testing.assert_allclose(
            to_numpy(leaves_of(clipped)[path]), to_numpy(x) / math.sqrt(1500), atol=1e-6
        )
    with pytest.raises(ValueError, match="max_norm should be >=0"):
        opt.clip_grad_norm(small, -1.0)


class Model(nn.Module):  # type: ignore[misc, unused-ignore]
    """Has modules without parameters, which a flattened state loses."""

    def __init__(self) -> None:
        super().__init__()
        self.l1 = nn.Linear(2, 2)
        self.drop = nn.Dropout(p=0.5)
        self.l2 = nn.Linear(2, 2)
        self.vals = [nn.Linear(2, 2), nn.ReLU(), nn.ReLU()]


def test_a_flattened_state_is_loaded(backend: str) -> None:
    model = Model()
    optimizer = opt.Adam(learning_rate=3e-4)
    optimizer.init(model.trainable_parameters())
    flat: Any = tree_flatten(optimizer.state)
    resumed = opt.Adam(learning_rate=3e-4)
    resumed.state = tree_unflatten(flat)
    resumed.update(model, model.trainable_parameters())
    assert resumed.step.item() == 1
    mx.eval(model.parameters())


def test_multi_splits_the_state(backend: str) -> None:
    model = Model()
    optimizer = opt.MultiOptimizer(
        [opt.Adam(learning_rate=0.001), opt.SGD(learning_rate=0.1)],
        [lambda path, weight: weight.ndim > 1],
    )
    optimizer.init(model.trainable_parameters())
    assert len(optimizer.state["states"]) == 2
    adam, sgd = (leaves_of(state) for state in optimizer.state["states"])
    assert (len(sgd) - 2) * 2 == len(adam) - 2
    assert not any("bias" in path for path in adam)
    assert not any("weight" in path for path in sgd)


def test_multi_on_modules_without_parameters(backend: str) -> None:
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    mx.eval(model.parameters())
    optimizer = opt.MultiOptimizer(
        [opt.Muon(learning_rate=0.01), opt.AdamW(learning_rate=0.01)],
        [lambda _, w: w.ndim >= 2],
    )
    loss = nn.value_and_grad(model, lambda m, x: m(x).sum())
    _, gradients = loss(model, mx.ones((1, 4)))
    for _ in range(2):
        before = {p: to_numpy(x) for p, x in leaves_of(model.parameters()).items()}
        optimizer.update(model, gradients)
        after = {p: to_numpy(x) for p, x in leaves_of(model.parameters()).items()}
        for path, x in before.items():
            assert not np.array_equal(x, after[path]), path


def test_gradients_are_accumulated_in_a_compiled_step(backend: str) -> None:
    """As mlx-lm's trainer does: one function, a flag, and gradients carried over."""
    x = mx.array(np.random.default_rng(0).standard_normal((6, 4, 4)), mx.float32)

    def run(compiled: bool) -> tuple[nn.Module, opt.AdamW]:
        mx.random.seed(0)
        model = nn.Linear(4, 4)
        optimizer = opt.AdamW(1e-2)
        state = [model.state, optimizer.state, mx.random.state]
        loss = nn.value_and_grad(model, lambda m, x: mx.square(m(x)).mean())

        def step(x: mx.array, before: Any, update: bool) -> Any:
            _, gradients = loss(model, x)
            if before is not None:
                gradients = tree_map(lambda a, b: a + b, gradients, before)
            if not update:
                return gradients
            optimizer.update(model, tree_map(lambda g: g / 2, gradients))
            return None

        call: Any = mx.compile(step, inputs=state, outputs=state) if compiled else step
        carried = None
        for i in range(6):
            carried = call(x[i], carried, i % 2 == 1)
            mx.eval(state, carried)
        return model, optimizer

    (model, optimizer), (eager, reference) = run(True), run(False)
    assert optimizer.step.item() == reference.step.item() == 3
    for path, value in leaves_of(eager.parameters()).items():
        np.testing.assert_allclose(
            to_numpy(leaves_of(model.parameters())[path]), to_numpy(value), rtol=1e-5
        )


def test_the_state_is_made_inside_a_compiled_step(backend: str) -> None:
    model = nn.Linear(4, 4)
    optimizer: Any = opt.Adam(1e-2, max_grad_norm=1.0, skip_nonfinite=True)
    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(x: mx.array) -> None:
        loss = nn.value_and_grad(model, lambda m, x: mx.square(m(x)).mean())
        optimizer.update(model, loss(model, x)[1])

    for i in range(4):
        step(mx.ones((2, 4)))
        mx.eval(state)
        assert optimizer.step.item() == i + 1
    assert optimizer.skipped_steps.item() == 0
