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


def ademamix(p: Array, gradients: list[Array]) -> Array:
    m1, m2, v = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p)
    beta1, beta2, beta3, alpha, warmup = 0.9, 0.999, 0.9999, 5.0, 30
    for t, g in enumerate(gradients, 1):
        done = min(t / warmup, 1.0)
        logs = np.log(beta1), np.log(beta3)
        slow = np.exp(logs[0] * logs[1] / ((1 - done) * logs[1] + done * logs[0]))
        m1 = beta1 * m1 + (1 - beta1) * g
        m2 = slow * m2 + (1 - slow) * g
        v = beta2 * v + (1 - beta2) * g * g
        step = (m1 / (1 - beta1**t) + done * alpha * m2) / (
            np.sqrt(v / (1 - beta2**t)) + 1e-8
        )
        p = p - 1e-2 * (step + 0.1 * p)
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
    (optim.AdEMAMix, {"weight_decay": 0.1, "warmup": 30}, ademamix),
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


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.999999, 1 - 1e-9])
@pytest.mark.parametrize("step", [1, 2, 10, 1000, 10**6, 10**12])
def test_bias_correction_is_exact_for_any_beta(
    backend: str, beta: float, step: int
) -> None:
    """The moments of a gradient of ones, corrected, are ones: one step of size 1."""
    optimizer = optim.Adam(1.0, betas=(beta, beta), eps=0.0, bias_correction=True)
    optimizer.init({"w": mx.zeros(9)})
    optimizer.state["step"] = mx.array(step - 1, mx.uint64)
    correction = -np.expm1(step * np.log(beta)) if beta else 1.0
    before = (correction - (1 - beta)) / beta if beta else 0.0
    for key in ("m", "v"):
        optimizer.state["w"][key] = mx.full((9,), before)
    updated = optimizer.apply_gradients({"w": mx.ones(9)}, {"w": mx.zeros(9)})
    np.testing.assert_allclose(to_numpy(updated["w"]), -1, rtol=1e-6)


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
