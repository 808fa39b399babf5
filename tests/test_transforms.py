"""mx.grad, mx.vjp, mx.jvp and mx.vmap through an update give what stock gives."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx_fused_optimizers as optim
import numpy as np
import pytest
from support import (
    MLX_VERSION,
    every_fused_optimizer,
    leaves_of,
    oracle,
    random_array,
    to_numpy,
)

X = random_array(np.random.default_rng(0), (4, 3), mx.float32)
START = random_array(np.random.default_rng(1), (3,), mx.float32)


def after_two_steps(
    module: ModuleType, name: str, options: dict[str, Any]
) -> Callable[[mx.array], mx.array]:
    """A loss after two optimizer steps, as a function of where they started."""

    def loss(w: mx.array) -> mx.array:
        return mx.square(X @ w).sum() + w[0]

    def outer(w: mx.array) -> mx.array:
        optimizer = getattr(module, name)(1e-2, **options)
        for _ in range(2):
            gradient = mx.grad(loss)(w)
            w = optimizer.apply_gradients({"w": gradient}, {"w": w})["w"]
        state: mx.array = sum(x.sum() for x in optimizer.state["w"].values())
        return loss(w) + 0.1 * state

    return outer


def both(name: str, options: dict[str, Any]) -> Any:
    return (after_two_steps(module, name, options) for module in (optim, oracle))


def assert_close(mine: mx.array, theirs: mx.array) -> None:
    assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
    np.testing.assert_allclose(to_numpy(mine), to_numpy(theirs), rtol=2e-5, atol=1e-6)


@every_fused_optimizer
def test_gradients_of_first_and_second_order(
    backend: str, name: str, options: dict[str, Any]
) -> None:
    mine, theirs = both(name, options)
    assert_close(mx.grad(mine)(START), mx.grad(theirs)(START))
    second = [
        mx.grad(lambda w, f=f: mx.grad(f)(w).sum())(START) for f in (mine, theirs)
    ]
    assert_close(*second)
    (_, (a,)), (_, (b,)) = (
        mx.vjp(f, [START], [mx.array(2.0)]) for f in both(name, options)
    )
    assert_close(a, b)


@pytest.mark.skipif(MLX_VERSION < (0, 32, 0), reason="jvp of mx.where ends the process")
@every_fused_optimizer
def test_forward_mode(backend: str, name: str, options: dict[str, Any]) -> None:
    tangent = mx.array([1.0, -2.0, 0.5])
    (_, (mine,)), (_, (theirs,)) = (
        mx.jvp(f, [START], [tangent]) for f in both(name, options)
    )
    assert_close(mine, theirs)


@every_fused_optimizer
@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0), (1, 0), (0, 1)])
def test_vmap_over_parameters_and_gradients(
    backend: str, name: str, options: dict[str, Any], axes: tuple[Any, Any]
) -> None:
    rng = np.random.default_rng(2)
    shapes = {0: (5, 3), 1: (3, 5), None: (3,)}
    arguments = [random_array(rng, shapes[axis], mx.float32) for axis in axes]
    results = []
    for module in (optim, oracle):

        def step(parameter: mx.array, gradient: mx.array, m: Any = module) -> Any:
            optimizer = getattr(m, name)(1e-2, **options)
            updated = optimizer.apply_gradients({"w": gradient}, {"w": parameter})
            return updated["w"], list(optimizer.state["w"].values())

        results.append(leaves_of(mx.vmap(step, in_axes=axes)(*arguments)))
    mine, theirs = results
    assert mine.keys() == theirs.keys()
    for path, x in mine.items():
        assert_close(x, theirs[path])


@every_fused_optimizer
def test_vmap_of_a_gradient(backend: str, name: str, options: dict[str, Any]) -> None:
    batch = random_array(np.random.default_rng(3), (4, 3), mx.float32)
    mine, theirs = (mx.vmap(mx.grad(f))(batch) for f in both(name, options))
    assert_close(mine, theirs)


def test_a_step_inside_of_compile_grad_and_vmap(backend: str) -> None:
    mine, theirs = both("AdamW", {"bias_correction": True})
    batch = random_array(np.random.default_rng(4), (4, 3), mx.float32)

    def nest(f: Any) -> Any:
        return mx.compile(lambda w: mx.vmap(mx.grad(f))(w))(batch)

    assert_close(nest(mine), nest(theirs))


@pytest.mark.parametrize("pending", [False, True], ids=["computed", "pending"])
@pytest.mark.parametrize("first", ["function", "update"])
def test_an_update_that_a_function_captures(
    backend: str, first: str, pending: bool
) -> None:
    """mx.compile evaluates the captured graph each time, for arrays of its own."""
    held = []
    for module in (optim, oracle):
        optimizer = module.AdamW(1e-2)
        gradients = {"w": START * 0.5, "b": START - 1}
        parameters = {"w": START * 2, "b": START * 3}
        optimizer.init(parameters)
        if not pending:
            mx.eval(gradients, parameters, optimizer.state)
        updated = optimizer.apply_gradients(gradients, parameters)
        moment = optimizer.state["w"]["m"]

        @mx.compile
        def function(
            x: mx.array, updated: Any = updated, moment: mx.array = moment
        ) -> mx.array:
            total: mx.array = x + updated["w"] + moment
            return total

        if first == "update":
            mx.eval(updated, optimizer.state)
        results = [function(mx.array(float(i))) for i in range(3)]
        mx.eval(results)
        results += [function(mx.array(3.0)), updated["b"], *parameters.values()]
        results += leaves_of(optimizer.state).values()
        results.append(mx.grad(lambda x, f=function: f(x).sum())(START))
        held.append(results)
    for mine, theirs in zip(*held, strict=True):
        assert_close(mine, theirs)


def test_an_update_evaluated_inside_of_a_transformation(backend: str) -> None:
    """There MLX keeps graphs, and arrays may be evaluated more than once."""
    results = []
    for module in (optim, oracle):
        optimizer = module.Adam(1e-2)
        parameters = {"w": START * 2}
        optimizer.init(parameters)
        mx.eval(parameters, optimizer.state)
        updated = optimizer.apply_gradients({"w": START + 1}, parameters)

        def function(x: mx.array, updated: Any = updated) -> mx.array:
            mx.eval(updated)
            product: mx.array = x * updated["w"]
            return product.sum()

        results.append([mx.grad(function)(START), mx.grad(function)(START)])
        results[-1] += [updated["w"], parameters["w"], optimizer.state["w"]["v"]]
    for mine, theirs in zip(*results, strict=True):
        assert_close(mine, theirs)
