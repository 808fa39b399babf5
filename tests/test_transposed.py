"""Gradients in any order of dimensions give the bits of contiguous ones."""

import itertools
from typing import Any

import metal_simulator
import mlx.core as mx
import mlx_fused_optimizers as optim
import numpy as np
import pytest
from conftest import SIMULATOR
from support import FLOATS, copy_tree, fill, random_array, snapshot

# Blocks with and without tails, rows that are no vectors, matrices too small for a
# block, more dimensions.
SHAPES: list[tuple[int, ...]] = [
    (64, 64),
    (130, 68),
    (67, 131),
    (16, 300),
    (7, 65),
    (1, 5),
    (20, 3, 24),
    (5, 18, 33),
    (4, 3, 20, 17),
]
OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("AdamW", {"bias_correction": True}),
    ("SGD", {"momentum": 0.9}),
    ("AdEMAMix", {}),
]


def permuted(x: mx.array, order: tuple[int, ...]) -> mx.array:
    """The same array, whose memory has its dimensions in this order."""
    inverse = [order.index(d) for d in range(x.ndim)]
    return mx.contiguous(x.transpose(order)).transpose(inverse)


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("state_dtype", [None, mx.float32], ids=str)
def test_any_order_of_dimensions(
    backend: str,
    name: str,
    options: dict[str, Any],
    dtype: mx.Dtype,
    state_dtype: mx.Dtype | None,
) -> None:
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        orders = list(itertools.permutations(range(len(shape))))[:8]
        tree = {str(order): random_array(rng, shape, dtype) for order in orders}
        gradients = fill(tree, rng, dtype)
        results = []
        for is_permuted in (True, False):
            given = gradients
            if is_permuted:
                given = {
                    str(order): permuted(gradients[str(order)], order)
                    for order in orders
                }
            optimizer = getattr(optim, name)(
                1e-2, state_dtype=state_dtype, skip_nonfinite=True, **options
            )
            updated = optimizer.apply_gradients(given, copy_tree(tree))
            results.append(snapshot([updated, optimizer.state]))
        norms = [result.pop("1.grad_norm") for result in results]
        assert results[0] == results[1]
        pair = [float(np.frombuffer(norm[-4:], np.float32)[0]) for norm in norms]
        assert pair[0] == pytest.approx(pair[1], rel=1e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_clipping_keeps_the_order_of_memory(backend: str, dtype: mx.Dtype) -> None:
    rng = np.random.default_rng(1)
    tree = {str(shape): random_array(rng, shape, dtype) for shape in SHAPES}
    turned = {key: permuted(x, tuple(range(x.ndim))[::-1]) for key, x in tree.items()}
    (clipped, norm), (expected, wanted) = (
        optim.clip_grad_norm(gradients, 1.0) for gradients in (turned, tree)
    )
    np.testing.assert_allclose(float(norm), float(wanted), rtol=1e-6)
    for key, x in clipped.items():
        np.testing.assert_allclose(
            np.array(x.astype(mx.float32)),
            np.array(expected[key].astype(mx.float32)),
            rtol=1e-5 if dtype == mx.float32 else 1e-2,
        )


@pytest.mark.fused
@pytest.mark.parametrize("backend", [SIMULATOR], indirect=True)
@pytest.mark.parametrize(
    ("dtype", "most"), [(mx.float32, 28.5), (mx.bfloat16, 14.5)], ids=str
)
def test_each_line_of_the_cache_is_moved_once(
    backend: str, dtype: mx.Dtype, most: float
) -> None:
    rng = np.random.default_rng(2)
    tree = {"w": random_array(rng, (256, 512), dtype)}
    optimizer = optim.AdamW(1e-2, bias_correction=True)
    for _ in range(2):  # the kernel is checked in the first
        gradients = {"w": permuted(random_array(rng, (256, 512), dtype), (1, 0))}
        mx.eval(tree, gradients, optimizer.state)
        metal_simulator.reset()
        tree = optimizer.apply_gradients(gradients, tree)
        mx.eval(tree, optimizer.state)
    (launch,) = (x for x in metal_simulator.counters() if "Adam" in x.kernel)
    lines = launch.line_bytes_read + launch.line_bytes_written
    assert lines / (256 * 512) <= most
