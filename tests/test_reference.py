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


def corrected(m: Array, v: Array, t: int, eps: float = 1e-8) -> Array:
    root = np.sqrt(v / (1 - 0.999**t))
    update: Array = m / (1 - 0.9**t) / (root + eps)
    return update


def amsgrad(p: Array, gradients: list[Array]) -> Array:
    """As torch.optim.AdamW has it: the bias is corrected after the maximum."""
    m, v, v_max = (np.zeros_like(p) for _ in range(3))
    for t, g in enumerate(gradients, 1):
        m = 0.9 * m + (1 - 0.9) * g
        v = 0.999 * v + (1 - 0.999) * g * g
        v_max = np.maximum(v_max, v)
        p = p - 1e-2 * 0.1 * p - 1e-2 * corrected(m, v_max, t)
    return p


def adabelief(p: Array, gradients: list[Array]) -> Array:
    m, s = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(gradients, 1):
        m = 0.9 * m + (1 - 0.9) * g
        s = 0.999 * s + (1 - 0.999) * (g - m) ** 2 + 1e-16
        p = p - 1e-2 * 0.1 * p - 1e-2 * corrected(m, s, t, 1e-16)
    return p


def adan(p: Array, gradients: list[Array]) -> Array:
    m, v, n = (np.zeros_like(p) for _ in range(3))
    before = gradients[0]
    for t, g in enumerate(gradients, 1):
        m = 0.98 * m + (1 - 0.98) * g
        v = 0.92 * v + (1 - 0.92) * (g - before)
        n = 0.99 * n + (1 - 0.99) * (g + 0.92 * (g - before)) ** 2
        size = 1e-2 / (np.sqrt(n / (1 - 0.99**t)) + 1e-8)
        ahead = m / (1 - 0.98**t) + 0.92 * v / (1 - 0.92**t)
        p = (p - size * ahead) / (1 + 1e-2 * 0.1)
        before = g
    return p


def nadam(p: Array, gradients: list[Array]) -> Array:
    """As torch.optim.NAdam, with coupled decay."""
    m, v, product = np.zeros_like(p), np.zeros_like(p), 1.0
    for t, g in enumerate(gradients, 1):
        g = g + 0.1 * p
        mu, after = (0.9 * (1 - 0.5 * 0.96 ** (i * 0.04)) for i in (t, t + 1))
        product *= mu
        m = 0.9 * m + (1 - 0.9) * g
        v = 0.999 * v + (1 - 0.999) * g * g
        ahead = after * m / (1 - product * after) + (1 - mu) * g / (1 - product)
        p = p - 1e-2 * ahead / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return p


def radam(p: Array, gradients: list[Array]) -> Array:
    """As torch.optim.RAdam, with decoupled decay."""
    m, v = np.zeros_like(p), np.zeros_like(p)
    most = 2 / (1 - 0.999) - 1
    for t, g in enumerate(gradients, 1):
        p = p - 1e-2 * 0.1 * p
        m = 0.9 * m + (1 - 0.9) * g
        v = 0.999 * v + (1 - 0.999) * g * g
        rho = most - 2 * t * 0.999**t / (1 - 0.999**t)
        update = m / (1 - 0.9**t)
        if rho > 5:
            rest = (most - 4) * (most - 2) * rho
            update *= np.sqrt((rho - 4) * (rho - 2) * most / rest)
            update *= np.sqrt(1 - 0.999**t) / (np.sqrt(v) + 1e-8)
        p = p - 1e-2 * update
    return p


def lamb(p: Array, gradients: list[Array]) -> Array:
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(gradients, 1):
        m = 0.9 * m + (1 - 0.9) * g
        v = 0.999 * v + (1 - 0.999) * g * g
        update = corrected(m, v, t, 1e-6) + 0.1 * p
        p = p - 1e-2 * np.linalg.norm(p) / np.linalg.norm(update) * update
    return p


def cautious(update: Array, g: Array) -> Array:
    mask = update * g > 0
    result: Array = update * mask / max(mask.mean(), 1e-3)
    return result


def cautious_adamw(p: Array, gradients: list[Array]) -> Array:
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(gradients, 1):
        m = 0.9 * m + (1 - 0.9) * g
        v = 0.999 * v + (1 - 0.999) * g * g
        p = p - 1e-2 * 0.1 * p - 1e-2 * cautious(corrected(m, v, t), g)
    return p


def cautious_lion(p: Array, gradients: list[Array]) -> Array:
    m = np.zeros_like(p)
    for g in gradients:
        update = cautious(np.sign(0.9 * m + (1 - 0.9) * g), g)
        p = p - 1e-2 * (update + 0.1 * p)
        m = 0.99 * m + (1 - 0.99) * g
    return p


def schedule_free(
    p: Array, gradients: list[Array], beta: float, adapts: bool, power: float
) -> Array:
    """The sequences of the paper, of which y is what the model has."""
    x, z, v, total = p, p, np.zeros_like(p), 0.0
    for t, g in enumerate(gradients, 1):
        y = (1 - beta) * z + beta * x
        rate = 1e-2 * min(t / 7, 1)
        weight = t**power * rate**2
        total += weight
        v = 0.999 * v + (1 - 0.999) * g * g
        root = np.sqrt(v / (1 - 0.999**t)) + 1e-8
        z = z - rate * (g / (root if adapts else 1.0) + 0.1 * y)
        x = x + weight / total * (z - x)
    return (1 - beta) * z + beta * x


def schedule_free_sgd(p: Array, gradients: list[Array]) -> Array:
    return schedule_free(p, gradients, 0.8, False, 1.0)


def schedule_free_adamw(p: Array, gradients: list[Array]) -> Array:
    return schedule_free(p, gradients, 0.9, True, 0.0)


ADAMW = {"weight_decay": 0.1, "bias_correction": True}
FREE = {"weight_decay": 0.1, "warmup_steps": 7}
CASES: list[tuple[Callable[..., Any], dict[str, Any], Callable[..., Array]]] = [
    (optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}, sgd),
    (optim.AdamW, {"weight_decay": 0.1, "bias_correction": True}, adamw),
    (optim.Lion, {"weight_decay": 0.1}, lion),
    (optim.AdEMAMix, {"weight_decay": 0.1, "warmup": 30}, ademamix),
    (optim.AdamW, {**ADAMW, "amsgrad": True}, amsgrad),
    (optim.AdaBelief, {"weight_decay": 0.1}, adabelief),
    (optim.Adan, {"weight_decay": 0.1}, adan),
    (optim.NAdam, {"weight_decay": 0.1, "momentum_decay": 0.04}, nadam),
    (optim.RAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}, radam),
    (optim.LAMB, {"weight_decay": 0.1}, lamb),
    (optim.AdamW, {**ADAMW, "cautious": True}, cautious_adamw),
    (optim.Lion, {"weight_decay": 0.1, "cautious": True}, cautious_lion),
    (optim.ScheduleFreeSGD, {**FREE, "momentum": 0.8, "r": 1.0}, schedule_free_sgd),
    (optim.ScheduleFreeAdamW, FREE, schedule_free_adamw),
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


# Of three elements that start at 0.5, -1 and 2, after four times these gradients:
# by torch 2.14 in float64.
GRADIENTS = [[1.0, -0.5, 0.25], [0.5, 1.0, -2.0], [-3.0, 0.1, 0.7]]
TORCHS: list[tuple[str, dict[str, Any], list[float]]] = [
    (
        "NAdam",
        {"weight_decay": 0.1, "momentum_decay": 2.0},
        [0.550585072, -1.055033119, 2.032206239],
    ),
    (
        "NAdam",
        {"betas": (0.95, 0.9), "weight_decay": 0.1, "decoupled_weight_decay": True},
        [0.524921843, -1.036723116, 1.888753839],
    ),
    ("RAdam", {"betas": (0.9, 0.99999)}, [0.407946416, -1.028020207, 2.17973229]),
    (
        "RAdam",
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        [0.368260887, -0.920942027, 1.945609439],
    ),
    ("RAdam", {"betas": (0.9, 0.6)}, [0.715788201, -1.160253306, 2.427432568]),
    (
        "Adam",
        {"amsgrad": True, "betas": (0.5, 0.6), "bias_correction": True},
        [0.577605056, -1.223697353, 2.202604013],
    ),
    (
        "AdamW",
        {
            "amsgrad": True,
            "betas": (0.5, 0.6),
            "weight_decay": 0.1,
            "bias_correction": True,
        },
        [0.527834544, -1.104511923, 1.969511529],
    ),
]


@pytest.mark.parametrize(("name", "options", "expected"), TORCHS)
def test_steps_are_torchs(
    backend: str, name: str, options: dict[str, Any], expected: list[float]
) -> None:
    optimizer = getattr(optim, name)(0.1, **options)
    parameters = {"w": mx.array([0.5, -1.0, 2.0])}
    for _ in range(4):
        for g in GRADIENTS:
            parameters = optimizer.apply_gradients({"w": mx.array(g)}, parameters)
    np.testing.assert_allclose(to_numpy(parameters["w"]), expected, rtol=1e-5)


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
