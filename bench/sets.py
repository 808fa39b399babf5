"""The sets of tensors that a step updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from . import models

Shapes = list[tuple[int, ...]]


class Set(NamedTuple):
    """A label, and the gradients; those of a model as autodiff gives them."""

    label: str
    gradients: Callable[[mx.Dtype], models.Gradients]
    is_real: bool = False


def tensors(shapes: Shapes, dtype: mx.Dtype) -> dict[str, mx.array]:
    """Arrays, evaluated; time does not depend on their values."""
    tree = {f"p{i}": mx.full(shape, 0.02, dtype) for i, shape in enumerate(shapes)}
    mx.eval(tree)
    return tree


def gpt2(
    width: int = 768, layers: int = 12, vocabulary: int = 50257, context: int = 1024
) -> Shapes:
    """A decoder of GPT-2's layout; by default 124M parameters in 148 tensors."""
    layer: Shapes = [
        *[(width,)] * 2,  # norm
        *[(3 * width, width), (3 * width,)],
        *[(width, width), (width,)],
        *[(width,)] * 2,  # norm
        *[(4 * width, width), (4 * width,)],
        *[(width, 4 * width), (width,)],
    ]
    ends: Shapes = [(vocabulary, width), (context, width), (width,), (width,)]
    return [*ends, *layer * layers]


def of_shapes(label: str, shapes: Shapes) -> Set:
    """Contiguous gradients of these shapes."""
    return Set(label, lambda dtype: tensors(shapes, dtype))


SETS: dict[str, Set] = {
    "decoder": Set("a 38M decoder", models.decoder, is_real=True),
    "adapters": Set("256 rank-8 adapters of width 2048", models.adapters, is_real=True),
    "convolutions": Set("a 5.9M convolutional net", models.convolutions, is_real=True),
    "large": of_shapes("8 matrices of 4096 x 1024", [(4096, 1024)] * 8),
    "gpt2": of_shapes("GPT-2's 148 tensors", gpt2()),
    "small": of_shapes("800 vectors of 32", [(32,)] * 800),
}


def elements(shapes: Shapes) -> int:
    """Parameters in all."""
    total = 0
    for shape in shapes:
        size = 1
        for length in shape:
            size *= length
        total += size
    return total
