"""Gradients are freed as the update goes on, also when they are clipped."""

from __future__ import annotations

import warnings
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_fused_optimizers as optim
import numpy as np
import pytest

LAYERS, WIDTH = 12, 512
GRADIENTS = LAYERS * WIDTH * (WIDTH + 1) * 4  # bytes


def loss(model: nn.Module, x: mx.array) -> mx.array:
    value: mx.array = mx.square(model(x)).mean()
    return value


def peak(**options: Any) -> float:
    """Of a training step in one evaluation, as a share of all gradients."""
    mx.random.seed(0)
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])
    optimizer = optim.AdamW(1e-4, **options)
    optimizer.init(model.trainable_parameters())
    mx.eval(model.state, optimizer.state)
    x = mx.ones((4, WIDTH))
    found = 0
    for _ in range(3):
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        value, gradients = nn.value_and_grad(model, loss)(model, x)
        optimizer.update(model, gradients)
        del gradients
        mx.eval(value, model.state, optimizer.state)
        found = mx.get_peak_memory() - before
    return found / GRADIENTS


@pytest.mark.fused
def test_peak_of_a_training_step() -> None:
    mx.set_default_device(mx.cpu)
    assert peak() < 0.5
    assert peak(state_dtype="int8") < 0.5
    # The norm needs all gradients; that of the step before needs none of these.
    assert peak(max_grad_norm=1e-3) > 0.9
    assert peak(max_grad_norm=1e-3, clip_by_last_norm=True) < 0.6


def test_the_last_norm_scales(backend: str) -> None:
    rng = np.random.default_rng(0)
    shapes = {str(i): (70 + i, 1000) for i in range(9)}  # several chunks
    trees = [
        {k: mx.array(rng.normal(size=x).astype(np.float32)) for k, x in shapes.items()}
        for _ in range(3)
    ]
    clipping = optim.SGD(0.1, max_grad_norm=1.0, clip_by_last_norm=True)
    plain = optim.SGD(0.1)
    ours = theirs = {key: mx.zeros(shape) for key, shape in shapes.items()}
    factor = mx.array(1.0)
    for gradients in trees:
        ours = clipping.apply_gradients(gradients, ours)
        scaled = {key: g * factor for key, g in gradients.items()}
        theirs = plain.apply_gradients(scaled, theirs)
        _, norm = optim.clip_grad_norm(gradients, 1.0)
        assert clipping.grad_norm is not None
        assert clipping.grad_norm.item() == pytest.approx(norm.item(), rel=1e-5)
        factor = 1.0 / (norm + 1e-6)
        for key in shapes:
            assert mx.allclose(ours[key], theirs[key], rtol=1e-5, atol=1e-7).item()


def warned(rate: float, scale: float = 1.0, **options: Any) -> list[str]:
    """The warnings of six steps of bfloat16 weights, beside float32 ones."""
    optimizer = optim.SGD(rate, **options)
    parameters = {"norm": mx.ones(64), "w": mx.ones((64, 64), mx.bfloat16)}
    gradients = {"norm": mx.ones(64), "w": mx.full((64, 64), scale, mx.bfloat16)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(6):
            parameters = optimizer.apply_gradients(gradients, parameters)
            mx.eval(parameters, optimizer.state)
    return [str(x.message) for x in caught]


def test_one_warning_of_steps_that_change_nothing(backend: str) -> None:
    (message,) = warned(1e-6)
    assert "SGD: a step changed no parameter of mlx.core.bfloat16" in message
    assert 'master_weights="24bit"' in message
    assert warned(0.1) == []
    assert warned(0.0) == []  # a warm-up's first step
    assert warned(1e-6, scale=0.0) == []
    assert warned(1e-6, master_weights="24bit") == []
    assert warned(1e-6, stochastic_rounding=True) == []
