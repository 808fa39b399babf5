"""clip_grad_norm against mlx.optimizers and float64."""

from typing import Any

import mlx.core as mx
import mlx.optimizers as stock
import mlx_fused_optimizers as optim
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import (
    FLOATS,
    LAYOUTS,
    MLX_VERSION,
    assert_trees_match,
    fill,
    leaves_of,
    snapshot,
    to_numpy,
    trees,
)


def norm_of(tree: Any) -> float:
    leaves = [to_numpy(x).astype(np.float64) for x in leaves_of(tree).values()]
    return float(np.sqrt(sum(np.square(x).sum() for x in leaves)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    shapes=trees(),
    seed=st.integers(0, 2**32),
    layout=st.sampled_from([*LAYOUTS]),
    max_norm=st.sampled_from([0.0, 0.5, 3.0, 1e6]),
)
def test_clips_as_mlx_does(
    backend: str, dtype: mx.Dtype, shapes: Any, seed: int, layout: str, max_norm: float
) -> None:
    if MLX_VERSION < (0, 32, 4) and dtype != mx.float32:
        pytest.skip("MLX sums and scales half precision in half precision")
    gradients = fill(shapes, np.random.default_rng(seed), dtype, layout)
    before = snapshot(gradients)
    clipped, norm = optim.clip_grad_norm(gradients, max_norm)
    expected, stock_norm = stock.clip_grad_norm(gradients, max_norm)
    assert (norm.dtype, norm.shape) == (stock_norm.dtype, stock_norm.shape)
    exact = norm_of(gradients)
    assert float(norm) == pytest.approx(
        exact, rel=1e-2 if dtype == mx.bfloat16 else 1e-5
    )
    assert abs(float(norm) - exact) <= abs(float(stock_norm) - exact) + 1e-5 * exact
    # Stock sums float32 in one chain, and scales bfloat16 by a bfloat16 norm.
    tolerance = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 5e-2}[dtype]
    stocks_error = 0.0
    if dtype == mx.float32 and exact > max_norm:
        stocks_error = abs(float(stock_norm) / exact - 1)
        factor = max_norm / (exact + 1e-6)
        for path, x in leaves_of(gradients).items():
            np.testing.assert_allclose(
                to_numpy(leaves_of(clipped)[path]), factor * to_numpy(x), 1e-5, 1e-7
            )
    assert_trees_match(clipped, expected, tolerance + stocks_error, 1e-7)
    if exact > max_norm:
        assert norm_of(clipped) <= max_norm * (1 + tolerance)
    assert snapshot(gradients) == before


def test_norm_of_many_and_large_tensors(backend: str) -> None:
    rng = np.random.default_rng(0)
    shapes = [(300, 401), (65537,), *[(i,) for i in range(80)]]
    gradients = [
        mx.array(rng.standard_normal(shape).astype(np.float32)) for shape in shapes
    ]
    _, norm = optim.clip_grad_norm(gradients, 1.0)
    assert float(norm) == pytest.approx(norm_of(gradients), rel=1e-6)


def test_float16_does_not_overflow(backend: str) -> None:
    clipped, norm = optim.clip_grad_norm({"w": mx.full((64,), 6e4, mx.float16)}, 1.0)
    assert float(norm) == pytest.approx(8 * 6e4, rel=1e-3)
    np.testing.assert_allclose(to_numpy(clipped["w"]), 0.125, rtol=1e-3)


def test_clipping_is_deterministic(backend: str) -> None:
    values = np.random.default_rng(0).standard_normal((400, 300)).astype(np.float32)
    results = []
    for _ in range(5):
        results.append(snapshot(optim.clip_grad_norm({"w": mx.array(values)}, 1.0)))
    assert all(result == results[0] for result in results)


def test_nan_gradients_give_a_nan_norm(backend: str) -> None:
    _, norm = optim.clip_grad_norm([mx.array([1.0, float("nan")]), mx.ones(3)], 1.0)
    assert np.isnan(float(norm))


def test_other_dtypes_empty_trees_and_bad_values(backend: str) -> None:
    for tree in (
        {},
        {"a": mx.array([2, 3]), "b": mx.array([1])},
        {"a": mx.zeros((0,))},
    ):
        clipped, norm = optim.clip_grad_norm(tree, 2.0)
        expected, stock_norm = stock.clip_grad_norm(tree, 2.0)
        assert_trees_match(clipped, expected, 1e-6)
        assert float(norm) == pytest.approx(float(stock_norm))
    with pytest.raises(ValueError, match=r"max_norm should be >=0, -1\.0 was provided"):
        optim.clip_grad_norm({"w": mx.ones(3)}, -1.0)


@pytest.mark.parametrize("dtype", [mx.float64, mx.complex64], ids=str)
def test_only_arrays_without_elements(dtype: mx.Dtype) -> None:
    """Of dtypes that no kernel has, among options that reduce."""
    mx.set_default_device(mx.cpu)
    tree = {"a": mx.zeros((0, 0), dtype), "b": mx.zeros((1, 0), dtype)}
    for make in (optim.LAMB, optim.AdamW):
        options: Any = {"cautious": True} if make is optim.AdamW else {}
        optimizer: Any = make(0.1, max_grad_norm=1.0, **options)
        assert_trees_match(optimizer.apply_gradients(tree, tree), tree, 0)
        assert optimizer.grad_norm.item() == 0


def test_gradient_through_clipping(backend: str) -> None:
    x = mx.array([3.0, -4.0, 1.0])

    def loss(module: Any) -> Any:
        def f(x: mx.array) -> mx.array:
            clipped, norm = module.clip_grad_norm({"a": x, "b": x[:2] * 2}, 1.0)
            total: mx.array = (
                (clipped["a"] * mx.arange(3)).sum() + clipped["b"][0] + norm
            )
            return total

        return f

    np.testing.assert_allclose(
        to_numpy(mx.grad(loss(optim))(x)), to_numpy(mx.grad(loss(stock))(x)), rtol=1e-5
    )
    batch = mx.stack([x, 2 * x, x * 0.01])
    np.testing.assert_allclose(
        to_numpy(mx.vmap(loss(optim))(batch)),
        to_numpy(mx.vmap(loss(stock))(batch)),
        rtol=1e-5,
    )
