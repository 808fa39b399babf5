"""How a parameter's state and weight are held in fewer bits than float32 has.

In the dict of its parameter a state ``m`` in codes stands as ``m_int8`` or ``m_int4``
and ``m_scales``, and what rounding took from a weight as ``error``. The formulas are in
metal/formats.h.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import mlx.core as mx

State = dict[str, Any]

BLOCKS = {"int8": 64, "int4": 32}  # elements that share a scale
ERRORS = {"24bit": mx.int8, "32bit": mx.int16}
HALF_DTYPES = (mx.float16, mx.bfloat16)
SUM = "gradient_sum"  # of gradients that wait for their step
AVERAGE = "weight_average"
# Entries of a parameter's state that no user's class has to do with.
HELD = (SUM, AVERAGE)


def master_of(error: mx.array) -> str:
    """The kind of master that a weight's error is of."""
    return next(kind for kind, dtype in ERRORS.items() if dtype == error.dtype)


def is_half(value: Any) -> bool:
    """Whether a value is an array of half precision."""
    return isinstance(value, mx.array) and value.dtype in HALF_DTYPES


def kind_of(state: State, key: str) -> str | None:
    """The kind of codes that a state is in, if it is."""
    return next((kind for kind in BLOCKS if f"{key}_{kind}" in state), None)


def plain_name(entry: str) -> str:
    """The state that an entry belongs to: ``m`` for ``m_int8`` and ``m_scales``."""
    for ending in (*BLOCKS, "scales"):
        entry = entry.removesuffix(f"_{ending}")
    return entry


def is_error(value: Any) -> bool:
    """Whether a value is a weight's error, and not a user's own entry."""
    return isinstance(value, mx.array) and value.dtype in ERRORS.values()


def shapes_in(
    kind: str, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of the codes and of the scales of a tensor of this shape."""
    size = math.prod(shape)
    codes = shape if kind == "int8" else (-(-size // 2),)
    return codes, (-(-size // BLOCKS[kind]),)


def has_shape(state: State, key: str, shape: Iterable[int]) -> bool:
    """Whether a state is that of a tensor of this shape."""
    shape = tuple(shape)
    kind = kind_of(state, key)
    if kind is None:
        return bool(getattr(state.get(key), "shape", None) == shape)
    codes, scales = shapes_in(kind, shape)
    expected = {f"{key}_{kind}": codes, f"{key}_scales": scales}
    return all(getattr(state.get(k), "shape", None) == x for k, x in expected.items())
