"""What the optimizers of matrices share."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from .base import paths


def refuse_complex(
    name: str,
    tree: Any,
    parameters: list[Any],
    gradients: list[Any],
    least_ndim: int = 0,
) -> None:
    """Raise TypeError for complex arrays: upstream's formulas are wrong for them."""
    for i, arrays in enumerate(zip(parameters, gradients, strict=True)):
        for kind, array in zip(("parameter", "gradient"), arrays, strict=True):
            if (
                isinstance(array, mx.array)
                and array.dtype == mx.complex64
                and array.ndim >= least_ndim
            ):
                raise TypeError(
                    f"[{name}] the {kind} of '{paths(tree)[i]}' is of dtype complex64; "
                    "expected a real one"
                )
