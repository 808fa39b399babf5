"""Each tensor of a launch may have scalars and hyper-parameters of its own."""

from typing import Any

import metal_simulator
import mlx.core as mx
import numpy as np
import pytest
from conftest import SIMULATOR
from mlx_fused_optimizers._kernels import kernels
from support import random_array, snapshot

# Few and small enough to share one launch.
SHAPES = [(20, 30), (7,), (5, 4), (33,)]
RULES = {
    "AdamBiasCorrected": {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8},
    "Lion": {"beta1": 0.9, "beta2": 0.99},
    "SGD": {},
}


def arrays(rng: np.random.Generator) -> list[mx.array]:
    return [random_array(rng, shape, mx.float32) for shape in SHAPES]


def update(rule: str, trees: Any, values: Any, **arguments: Any) -> Any:
    """The parameters and states after an update of all tensors."""
    parameters, gradients, states = trees
    states = [dict(state) for state in states]
    leaves = kernels.Leaves(gradients, parameters, states)
    assert leaves.update(rule, values, step=mx.array(3), **arguments)
    return leaves.commit(), states


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_scalars_and_hyperparameters_per_tensor(
    backend: str, rule: str, compiled: bool
) -> None:
    rng = np.random.default_rng(0)
    states = [
        {key: mx.abs(random_array(rng, shape, mx.float32)) for key in names}
        for shape, names in zip(SHAPES, [kernels.states(rule)] * 4, strict=True)
    ]
    trees: list[Any] = [arrays(rng), arrays(rng), states]
    sets = [{**RULES[rule], "weight_decay": decay} for decay in (0.0, 0.1)]
    set_of = [0, 1, 1, 0]
    rates, scales = [0.1, 0.2, 0.3, 0.4], [1.0, 0.5, 2.0, 1.5]
    skips = [False, True, False, False]

    def together(rate: mx.array, scale: mx.array, skip: mx.array) -> Any:
        return update(
            rule,
            trees,
            sets,
            sets=set_of,
            learning_rate=rate,
            gradient_scale=scale,
            skip=skip,
            per_tensor=True,
        )

    step: Any = mx.compile(together) if compiled else together
    results = step(mx.array(rates), mx.array(scales), mx.array(skips))
    for i in range(len(SHAPES)):
        alone = update(
            rule,
            [[tree[i]] for tree in trees],
            [sets[set_of[i]]],
            learning_rate=mx.array(rates[i]),
            gradient_scale=mx.array(scales[i]),
            skip=mx.array(skips[i]),
        )
        assert snapshot([tree[i] for tree in results]) == snapshot(
            [tree[0] for tree in alone]
        )


@pytest.mark.fused
@pytest.mark.parametrize("backend", [SIMULATOR], indirect=True)
def test_it_is_one_launch(backend: str) -> None:
    rng = np.random.default_rng(1)
    trees = [arrays(rng), arrays(rng), [{}] * 4]
    values = [{"weight_decay": 0.0}, {"weight_decay": 0.1}]
    arguments = {
        "sets": [0, 1, 0, 1],
        "learning_rate": mx.array([0.1, 0.2, 0.3, 0.4]),
        "per_tensor": True,
    }
    mx.eval(update("SGD", trees, values, **arguments))  # the kernel is checked
    metal_simulator.reset()
    mx.eval(update("SGD", trees, values, **arguments))
    launches = [x for x in metal_simulator.counters() if "SGD" in x.kernel]
    assert len(launches) == 1


def test_the_plain_path_has_them_too(backend: str) -> None:
    """Of float64, which has no kernel, and of gradients that broadcast."""
    if backend == "gpu":
        pytest.skip("float64 is the CPU's alone")
    parameters = [mx.ones((3,), mx.float64), mx.ones((4,))]
    gradients = [mx.ones((3,), mx.float64), mx.ones((2, 4))]
    leaves = kernels.Leaves(gradients, parameters, [{}, {}])
    assert leaves.update(
        "SGD",
        [{"weight_decay": 0.0}, {"weight_decay": 1.0}],
        sets=[0, 1],
        learning_rate=mx.array([0.5, 0.25]),
        skip=mx.array([False, False]),
        per_tensor=True,
    )
    first, second = leaves.commit()
    assert first.tolist() == [0.5] * 3
    assert second.tolist() == [[0.5] * 4] * 2
