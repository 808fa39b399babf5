"""Updates whose size follows from the whole update of a tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator

import mlx.core as mx

from .._kernels import kernels
from .options import FUSED_DTYPES

# Rules that put the update in the gradient's place; the rule Descent ends the step.
DIRECTIONS = ("AdamDirection", "LionDirection")

# Updates whose sizes are found in one launch, at most.
LARGEST_BATCH = 24


def batches(gradients: list[mx.array]) -> Iterator[list[int]]:
    """Which are updated together, from the last to the first, as they become ready.

    Up to a sixth of all elements: those of a batch have to be in memory together.
    """
    largest = sum(g.size for g in gradients) // 6
    batch: list[int] = []
    elements = 0
    for i in reversed(range(len(gradients))):
        if batch and (
            len(batch) == LARGEST_BATCH or elements + gradients[i].size > largest
        ):
            yield batch
            batch, elements = [], 0
        batch.append(i)
        elements += gradients[i].size
    if batch:
        yield batch


def cautious_sizes(updates: list[mx.array]) -> mx.array:
    """Of each update, its elements over those that are left, 1000 at most.

    Liang et al., "Cautious optimizers", arXiv:2411.16085; the limit is the authors'.
    """
    if all(x.dtype in FUSED_DTYPES for x in updates):
        kept = kernels.count_nonzero(updates)
    else:
        kept = mx.stack([_sum(_parts(x) != 0) for x in updates])
    sizes = mx.array([float(max(_parts(x).size, 1)) for x in updates])
    return 1 / mx.maximum(kept / sizes, 1e-3)


def trust_ratios(parameters: list[mx.array], updates: list[mx.array]) -> mx.array:
    """Of each tensor the norm of the parameter over that of the update.

    1 where either is 0. You et al., "Large batch optimization for deep learning",
    arXiv:1904.00962.
    """
    arrays = [*parameters, *updates]
    if all(x.dtype in FUSED_DTYPES for x in arrays):
        sums, *_ = kernels.sums_of_squares(arrays, mx.array(math.inf))
    else:
        sums = mx.stack([_sum(mx.square(_parts(x))) for x in arrays])
    squares = sums.astype(mx.float32)
    of_parameters, of_updates = squares[: len(updates)], squares[len(updates) :]
    has_both = (of_parameters > 0) & (of_updates > 0)
    return mx.where(has_both, mx.sqrt(of_parameters / of_updates), 1.0)


def _sum(x: mx.array) -> mx.array:
    # MLX may not return from the sum of an array without elements.
    return mx.sum(x) if x.size > 0 else mx.array(0.0)


def _parts(x: mx.array) -> mx.array:
    """Complex numbers as two real ones."""
    return mx.stack([mx.real(x), mx.imag(x)]) if x.dtype == mx.complex64 else x
