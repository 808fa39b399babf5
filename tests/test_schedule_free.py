"""The switch of schedule-free optimizers between training and evaluation."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_fused_optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_map
from support import fill, leaves_of, random_array, snapshot, to_numpy

KINDS = [optim.ScheduleFreeSGD, optim.ScheduleFreeAdamW]
each_kind = pytest.mark.parametrize("kind", KINDS)


class Model(nn.Module):
    def __init__(self, dtype: mx.Dtype = mx.float32) -> None:
        super().__init__()
        rng = np.random.default_rng(0)
        self.layers = [{"w": random_array(rng, (9, 70), dtype)} for _ in range(2)]
        self.bias = random_array(rng, (7,), dtype)
        self.frozen = mx.ones((3,), dtype)

    def gradients(self, rng: np.random.Generator) -> Any:
        tree = {name: x for name, x in self.parameters().items() if name != "frozen"}
        return fill(tree, rng, self.bias.dtype)


def average_in_float64(optimizer: Any, model: Model, beta: float = 0.9) -> Any:
    """x of y = (1 - beta) z + beta x, by paths."""
    states = leaves_of(optimizer.state)
    averages = {}
    for path, y in leaves_of(model.parameters()).items():
        if f"{path}.z" in states:
            z = to_numpy(states[f"{path}.z"]).astype(np.float64)
            averages[path] = (to_numpy(y).astype(np.float64) - (1 - beta) * z) / beta
    return averages


def trained(kind: Any, dtype: mx.Dtype = mx.float32, **options: Any) -> Any:
    model, rng = Model(dtype), np.random.default_rng(1)
    optimizer = kind(0.05, **options)
    for _ in range(4):
        optimizer.update(model, model.gradients(rng))
    return model, optimizer


@each_kind
def test_the_average_is_that_of_z(backend: str, kind: Any) -> None:
    """By its definition, over the steps, in float64."""
    model, rng = Model(), np.random.default_rng(1)
    optimizer = kind(0.05)
    z: list[Any] = []
    for _ in range(5):
        optimizer.update(model, model.gradients(rng))
        z.append(to_numpy(optimizer.state["bias"]["z"]).astype(np.float64))
    x = optimizer.average(model.parameters())
    # A constant learning rate has weights that are all the same.
    np.testing.assert_allclose(to_numpy(x["bias"]), np.mean(z, axis=0), rtol=1e-5)
    assert mx.array_equal(x["frozen"], model.frozen).item()


@each_kind
def test_averaged_puts_the_very_weights_back(backend: str, kind: Any) -> None:
    model, optimizer = trained(kind)
    expected = average_in_float64(optimizer, model)
    before = snapshot([model.parameters(), optimizer.state])
    with optimizer.averaged(model):
        found = leaves_of(model.parameters())
        for path, x in expected.items():
            np.testing.assert_allclose(to_numpy(found[path]), x, rtol=1e-5, atol=1e-6)
        assert found["frozen"].tolist() == [1.0] * 3
        with optimizer.averaged(model):  # nothing more
            assert snapshot(model.parameters()) == snapshot(found)
        assert snapshot(model.parameters()) == snapshot(found)
    assert snapshot([model.parameters(), optimizer.state]) == before
    with pytest.raises(KeyboardInterrupt), optimizer.averaged(model):
        raise KeyboardInterrupt
    assert snapshot([model.parameters(), optimizer.state]) == before


@each_kind
@pytest.mark.parametrize(
    ("dtype", "options", "tolerance"),
    [
        (mx.float32, {}, 1e-6),
        (mx.float32, {"state_dtype": "int8"}, 1e-6),
        (mx.bfloat16, {"master_weights": "24bit"}, 2.0**-14),
        (mx.bfloat16, {"master_weights": "32bit", "state_dtype": "int8"}, 1e-6),
        (mx.bfloat16, {"state_dtype": mx.float32}, 2.0**-7),
    ],
    ids=["float32", "int8", "24bit", "32bit", "bfloat16"],
)
def test_eval_and_train_go_there_and_back(
    backend: str, kind: Any, dtype: mx.Dtype, options: Any, tolerance: float
) -> None:
    model, optimizer = trained(kind, dtype, **options)
    before = tree_map(lambda x: x, model.parameters())
    expected = optimizer.average(before)
    optimizer.eval(model)
    optimizer.eval(model)
    assert snapshot(model.parameters()) == snapshot(expected)
    optimizer.train(model)
    optimizer.train(model)
    for path, x in leaves_of(model.parameters()).items():
        wide = to_numpy(leaves_of(before)[path])
        assert x.dtype == dtype
        np.testing.assert_allclose(to_numpy(x), wide, rtol=tolerance, atol=tolerance)
    assert "averaged" not in optimizer.state
    optimizer.update(model, model.gradients(np.random.default_rng(2)))


def test_masters_go_to_the_average_and_back() -> None:
    """The float32 that weight and error stand for, not the weight alone."""
    mx.set_default_device(mx.cpu)
    options: Any = {"master_weights": "32bit"}
    model, optimizer = trained(optim.ScheduleFreeAdamW, mx.bfloat16, **options)
    from mlx_fused_optimizers._kernels import kernels

    before = kernels.join(model.bias, optimizer.state["bias"]["error"])
    optimizer.eval(model)
    optimizer.train(model)
    after = kernels.join(model.bias, optimizer.state["bias"]["error"])
    np.testing.assert_allclose(np.array(after), np.array(before), rtol=1e-6)


@each_kind
def test_a_step_on_the_average_is_refused(backend: str, kind: Any) -> None:
    model, optimizer = trained(kind)
    gradients = model.gradients(np.random.default_rng(2))
    optimizer.eval(model)
    before = snapshot([model.parameters(), optimizer.state])
    with pytest.raises(RuntimeError, match=r"call optimizer\.train\(model\)"):
        optimizer.update(model, gradients)
    assert snapshot([model.parameters(), optimizer.state]) == before
    optimizer.train(model)
    optimizer.update(model, gradients)


@each_kind
def test_a_compiled_step_goes_on_after_the_switch(backend: str, kind: Any) -> None:
    results = []
    for compiled in (False, True):
        model, optimizer = Model(), kind(0.05, warmup_steps=3)
        model.freeze(keys="frozen")
        optimizer.init(model.trainable_parameters())
        captured = [model.state, optimizer.state]

        def step(gradients: Any, model: Any = model, optimizer: Any = optimizer) -> Any:
            optimizer.update(model, gradients)
            return mx.array(0)

        run: Any = step
        if compiled:
            run = mx.compile(step, inputs=captured, outputs=captured)
        rng = np.random.default_rng(3)
        for number in range(6):
            run(model.gradients(rng))
            mx.eval(model.parameters(), optimizer.state)
            if number == 2:
                with optimizer.averaged(model):
                    mx.eval(model.parameters())
            if number == 4:
                optimizer.eval(model)
                optimizer.train(model)
        results.append([model.parameters(), optimizer.state])
    for path, x in leaves_of(results[0]).items():
        other = leaves_of(results[1])[path]
        np.testing.assert_allclose(
            to_numpy(x), to_numpy(other), rtol=1e-5, atol=1e-6, err_msg=path
        )


def test_a_skipped_step_counts_for_nothing(backend: str) -> None:
    model, optimizer = trained(optim.ScheduleFreeAdamW, skip_nonfinite=True)
    gradients = model.gradients(np.random.default_rng(2))
    before = snapshot([model.parameters(), optimizer.state["weight_sum"]])
    gradients["bias"] = gradients["bias"] * float("nan")
    optimizer.update(model, gradients)
    assert snapshot([model.parameters(), optimizer.state["weight_sum"]]) == before
    assert optimizer.step.item() == 4


def test_a_learning_rate_of_zero_moves_nothing(backend: str) -> None:
    model, optimizer = Model(), optim.ScheduleFreeSGD(0.0)
    before = snapshot(model.parameters())
    optimizer.update(model, model.gradients(np.random.default_rng(2)))
    assert snapshot(model.parameters()) == before


def test_parts_of_a_multi_optimizer(backend: str) -> None:
    """Each part switches its own parameters."""
    model = Model()
    free = optim.ScheduleFreeAdamW(0.05)
    both = optim.MultiOptimizer(
        [free, optim.SGD(0.1)], [lambda path, _: "layers" in path], max_grad_norm=1.0
    )
    both.update(model, model.gradients(np.random.default_rng(2)))
    both.update(model, model.gradients(np.random.default_rng(3)))
    bias = np.array(model.bias)
    expected = average_in_float64(free, model)
    assert {*expected} == {"layers.0.w", "layers.1.w"}
    with free.averaged(model):
        np.testing.assert_array_equal(np.array(model.bias), bias)
        for path, x in leaves_of(model.parameters()).items():
            if path in expected:
                np.testing.assert_allclose(to_numpy(x), expected[path], rtol=1e-5)


def test_the_same_optimizer_twice_begins_at_the_parameters(backend: str) -> None:
    model, free = Model(), optim.ScheduleFreeSGD(0.0)
    both = optim.MultiOptimizer([free, free], [lambda path, _: "layers" in path])
    both.update(model, model.gradients(np.random.default_rng(2)))
    z = to_numpy(free.state["layers"][0]["w"]["z"])
    np.testing.assert_array_equal(z, to_numpy(model.layers[0]["w"]))


def test_checkpoints_keep_which_weights_they_have(tmp_path: Path) -> None:
    mx.set_default_device(mx.cpu)
    model, optimizer = trained(optim.ScheduleFreeAdamW)
    optim.save(tmp_path / "y", model, optimizer)
    other, resumed = Model(), optim.ScheduleFreeAdamW(0.05)
    optim.load(tmp_path / "y", other, resumed)
    assert snapshot([other.parameters(), resumed.state]) == snapshot(
        [model.parameters(), optimizer.state]
    )
    optimizer.eval(model)
    optim.save(tmp_path / "x", model, optimizer)
    with pytest.raises(ValueError, match="state 'averaged': found bool"):
        optim.load(tmp_path / "x", other, resumed)
    resumed.eval(other)
    optim.load(tmp_path / "x", other, resumed)
    assert snapshot(other.parameters()) == snapshot(model.parameters())
    resumed.train(other)
    optimizer.train(model)
    assert snapshot(other.parameters()) == snapshot(model.parameters())


def test_what_is_no_model_is_refused() -> None:
    optimizer = optim.ScheduleFreeSGD(0.1)
    for switch in (optimizer.eval, optimizer.train):
        with pytest.raises(TypeError, match=r"of type dict; expected an mlx\.nn\.Mod"):
            switch({})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="parameters is of type list"):
        optimizer.average([])


def test_z_is_never_in_codes(backend: str) -> None:
    weights = {"w": mx.ones((80, 64), mx.bfloat16)}
    optimizer = optim.ScheduleFreeAdamW(0.1, state_dtype="int8")
    optimizer.apply_gradients(weights, weights)
    assert sorted(optimizer.state["w"]) == ["v_int8", "v_scales", "z"]
    assert optimizer.state["w"]["z"].dtype == mx.float32
