"""Accuracy against float64 NumPy references written from the papers."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx_fused_optimizers as optim
import numpy as np
import numpy.typing as npt
import pytest
from support import random_array, to_numpy

Array = npt.NDArray[np.float64]
STEPS = 50


def sgd(p: Array, gradients: list[Array]) -> Array:
    v = np.zeros_like(p)
    for g in gradients:
        g = g + 0.01 * p
        v = 0.9 * v + g
        p = p - 1e-2 * (g + 0.9 * v)
    return p


def adamw(p: Array, gradients: list[Array]) -> Array:
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(gradients, 1):
        m = 0.9 * m + (1 - 0.9) * g
        v = 0.999 * v + (1 - 0.999) * g * g
        p = p * (1 - 1e-2 * 0.1)
        p = p - 1e-2 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return p


def lion(p: Array, gradients: list[Array]) -> Array:
    m = np.zeros_like(p)
    for g in gradients:
        update = np.sign(0.9 * m + (1 - 0.9) * g)
        p = p - 1e-2 * (update + 0.1 * p)
        m = 0.99 * m + (1 - 0.99) * g
    return p


CASES: list[tuple[Callable[..., Any], dict[str, Any], Callable[..., Array]]] = [
    (optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}, sgd),
    (optim.AdamW, {"weight_decay": 0.1, "bias_correction": True}, adamw),
    (optim.Lion, {"weight_decay": 0.1}, lion),
]


@pytest.mark.parametrize(("make", "options", "reference"), CASES)
def test_float32_follows_the_paper(
    backend: str,
    make: Callable[..., Any],
    options: dict[str, Any],
    reference: Callable[..., Array],
) -> None:
    rng = np.random.default_rng(0)
    start = random_array(rng, (41, 3), mx.float32)
    gradients = [random_array(rng, (41, 3), mx.float32) for _ in range(STEPS)]
    expected = reference(
        to_numpy(start).astype(np.float64),
        [to_numpy(g).astype(np.float64) for g in gradients],
    )
    optimizer = make(1e-2, **options)
    parameters = {"w": start}
    for g in gradients:
        parameters = optimizer.apply_gradients({"w": g}, parameters)
    np.testing.assert_allclose(
        to_numpy(parameters["w"]), expected, rtol=2e-6 * STEPS, atol=1e-6 * STEPS
    )


def test_infinities_and_nans_stay_where_they_are(backend: str) -> None:
    gradients = mx.array([1.0, float("inf"), float("nan"), -1.0, float("-inf")] * 5)
    for make in (optim.SGD, optim.Adam, optim.AdamW, optim.Lion):
        optimizer = make(0.1)
        updated = optimizer.apply_gradients({"w": gradients}, {"w": mx.ones(25)})
        finite = np.isfinite(to_numpy(updated["w"]))
        clean = np.array([True, False, False, True, False] * 5)
        if make is optim.Lion:  # the sign of an infinity is 1, and of NaN is 0
            assert finite.all()
        else:
            assert (finite[clean]).all() and not finite[2::5].any()


def test_float16_overflows_to_infinity(backend: str) -> None:
    parameters = {"w": mx.full((9,), 60000.0, mx.float16)}
    gradients = {"w": mx.full((9,), -60000.0, mx.float16)}
    updated = optim.SGD(1.0).apply_gradients(gradients, parameters)
    assert np.isposinf(to_numpy(updated["w"])).all()
