"""One step of an optimizer, by each of those that are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as stock
import mlx_fused_optimizers as optim

from .models import Gradients, contiguous
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
CONTIGUOUS = "ours on contiguous"
TORCH = "torch fused"


def mlx_step(
    module: Any,
    optimizer: str,
    dtype: mx.Dtype,
    gradients: Gradients,
    compiled: bool = False,
    options: dict[str, Any] | None = None,
) -> Step:
    """A step of ``mlx.optimizers`` or of ours; it keeps what it updates."""
    name, usual = OPTIMIZERS[optimizer]
    instance = getattr(module, name)(learning_rate=1e-4, **usual, **(options or {}))
    parameters = {path: mx.full(x.shape, 0.02, dtype) for path, x in gradients.items()}
    mx.eval(parameters)
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


def peers(
    optimizer: str, gradients: Gradients, dtype: str, is_real: bool
) -> dict[str, Step]:
    """A step by each; of ours also on contiguous gradients, if they are a model's."""
    kind = DTYPES[dtype]
    steps = {
        label: mlx_step(module, optimizer, kind, gradients, compiled)
        for label, module, compiled in (
            (OURS, optim, False),
            (OURS_COMPILED, optim, True),
            (STOCK, stock, False),
            (STOCK_COMPILED, stock, True),
        )
    }
    if is_real:
        steps[CONTIGUOUS] = mlx_step(optim, optimizer, kind, contiguous(gradients))
    fused = torch_step(optimizer, [x.shape for x in gradients.values()], dtype)
    return steps | ({TORCH: fused} if fused else {})
