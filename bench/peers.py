"""One step of an optimizer, by each of those that are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as stock
import mlx_fused_optimizers as optim

from .sets import Shapes


def import_torch() -> Any:
    """The module, or None where it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    return torch


torch = import_torch()

Step = Callable[[], None]

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

# With bias correction, as torch does always.
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("AdamW", {"bias_correction": True}),
    "Adam": ("Adam", {"bias_correction": True}),
    "SGD momentum": ("SGD", {"momentum": 0.9}),
    "SGD": ("SGD", {}),
    "Lion": ("Lion", {"weight_decay": 0.1}),
    "RMSprop": ("RMSprop", {}),
    "Adagrad": ("Adagrad", {}),
    "AdaDelta": ("AdaDelta", {}),
    "Adamax": ("Adamax", {}),
}

OURS, STOCK = "ours", "MLX"
OURS_COMPILED, STOCK_COMPILED = "ours compiled", "MLX compiled"
TORCH = "torch fused"


def tensors(shapes: Shapes, dtype: mx.Dtype) -> dict[str, mx.array]:
    """Arrays, evaluated; time does not depend on their values."""
    tree = {f"p{i}": mx.full(shape, 0.02, dtype) for i, shape in enumerate(shapes)}
    mx.eval(tree)
    return tree


def mlx_step(
    module: Any,
    optimizer: str,
    shapes: Shapes,
    dtype: mx.Dtype,
    gradients: dict[str, mx.array],
    compiled: bool = False,
    options: dict[str, Any] | None = None,
) -> Step:
    """A step of ``mlx.optimizers`` or of ours; it keeps what it updates."""
    name, usual = OPTIMIZERS[optimizer]
    instance = getattr(module, name)(learning_rate=1e-4, **usual, **(options or {}))
    parameters = tensors(shapes, dtype)
    instance.init(parameters)
    mx.eval(instance.state)
    apply = instance.apply_gradients
    if compiled:
        apply = mx.compile(apply, inputs=instance.state, outputs=instance.state)

    def step() -> None:
        nonlocal parameters
        parameters = apply(gradients, parameters)
        mx.eval(parameters, instance.state)

    return step


def torch_step(optimizer: str, shapes: Shapes, dtype: str) -> Step | None:
    """A step of torch's fused optimizer; None where it has none."""
    if torch is None:
        return None
    device = "mps" if mx.default_device() == mx.gpu else "cpu"
    classes: dict[str, Callable[..., Any]] = {
        "AdamW": torch.optim.AdamW,
        "Adam": torch.optim.Adam,
        "SGD momentum": lambda p, **k: torch.optim.SGD(p, momentum=0.9, **k),
        "SGD": torch.optim.SGD,
        "Adagrad": torch.optim.Adagrad,
    }
    if optimizer not in classes or (optimizer == "Adagrad" and device == "mps"):
        return None
    parameters = [
        torch.nn.Parameter(
            torch.full(shape, 0.02, device=device, dtype=getattr(torch, dtype))
        )
        for shape in shapes
    ]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 0.02)
    instance = classes[optimizer](parameters, lr=1e-4, fused=True)

    def step() -> None:
        instance.step()
        if device == "mps":
            torch.mps.synchronize()

    return step


def peers(optimizer: str, shapes: Shapes, dtype: str) -> dict[str, Step]:
    """A step by each."""
    kind = DTYPES[dtype]
    gradients = tensors(shapes, kind)
    steps = {
        label: mlx_step(module, optimizer, shapes, kind, gradients, compiled)
        for label, module, compiled in (
            (OURS, optim, False),
            (OURS_COMPILED, optim, True),
            (STOCK, stock, False),
            (STOCK_COMPILED, stock, True),
        )
    }
    fused = torch_step(optimizer, shapes, dtype)
    return steps | ({TORCH: fused} if fused else {})
