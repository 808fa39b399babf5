"""What an optimizer that has pieces asks of the whole."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import mlx.core as mx

from .._kernels import kernels
from ..optimizers.base import clip_factor
from ..optimizers.options import FUSED_DTYPES

if TYPE_CHECKING:
    from .optimizer import ShardedOptimizer

# Of which a norm is taken at a time.
ELEMENTS = 1 << 20


class Known:
    """Of a step or of ``init``: the whole tensors, and the ranks that have the rest."""

    def __init__(
        self,
        sharded: ShardedOptimizer,
        numbers: Sequence[int],
        arrays: Sequence[mx.array],
        is_double: bool,
    ) -> None:
        self._ranks = sharded._ranks
        self._is_double = is_double
        array_of = dict(zip(numbers, arrays, strict=True))
        tensors = sharded._tensors
        self._whole = {}
        self._numbers = {}
        # As one process numbers the leaves of each part.
        count: Counter[int] = Counter()
        number_of = {}
        for tensor in numbers:
            number_of[tensor] = count[tensors[tensor].part]
            count[tensors[tensor].part] += 1
        for piece in sharded._mine:
            number = piece.tensor
            if number in array_of:
                self._whole[piece.key] = tensors[number].path, array_of[number]
                self._numbers[piece.key] = number_of[number], piece.begin

    def whole(self, key: str) -> tuple[str, mx.array]:
        """Path and whole array of the tensor that a piece is of, for filters."""
        return self._whole[key]

    def numbers(self, keys: Sequence[str]) -> list[tuple[int, int]]:
        """A tensor's number among those of its optimizer; a piece's first element."""
        return [self._numbers[key] for key in keys]

    def measure(
        self, gradients: list[mx.array], max_norm: float | mx.array
    ) -> tuple[mx.array, mx.array]:
        """The norm over all ranks, and the factor that clips it."""
        own = _norm_on_gpu if mx.default_device() == mx.gpu else _norm_on_cpu
        # MLX has no double precision on a GPU.
        with mx.stream(mx.cpu):
            norms = self._ranks.gather_number(own(gradients))
            norm = _root_of_squares(norms)
            if not self._is_double:
                norm = norm.astype(mx.float32)
            limit = mx.array(max_norm, norm.dtype).reshape(())
            return norm, clip_factor(limit, norm)


def _root_of_squares(x: mx.array) -> mx.array:
    """The norm, also where squares would leave the range."""
    largest = mx.max(mx.abs(x)) if x.size > 0 else mx.array(0.0, x.dtype)
    unit = mx.where(mx.isfinite(largest) & (largest > 0), largest, 1.0)
    return unit * mx.sqrt(mx.sum(mx.square(x / unit)))


def _norm_on_gpu(gradients: list[mx.array]) -> mx.array:
    with mx.stream(mx.gpu):
        gradients = [
            mx.abs(x).astype(mx.float32) if x.dtype not in FUSED_DTYPES else x
            for x in gradients
        ]
        _, norm, *_ = kernels.sums_of_squares(gradients, mx.array(math.inf))
    return norm.astype(mx.float64)


def _norm_on_cpu(gradients: list[mx.array]) -> mx.array:
    """In double precision, as one process has it: no cut changes the norm's bits."""
    total = mx.array(0.0, mx.float64)
    for gradient in gradients:
        flat = gradient.reshape(-1)
        for start in range(0, flat.size, ELEMENTS):
            # One after the other: of each there is a copy in double precision.
            (part,) = mx.depends([flat[start : start + ELEMENTS]], [total])
            if part.dtype == mx.complex64:
                part = mx.abs(part)
            norm = _root_of_squares(part.astype(mx.float64))
            total = _root_of_squares(mx.stack([total, norm]))
    return total
