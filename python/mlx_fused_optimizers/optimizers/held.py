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

from .._kernels import kernels

State = dict[str, Any]

BLOCKS = {"int8": 64, "int4": 32}  # elements that share a scale
ERRORS = {"24bit": mx.int8, "32bit": mx.int16}
HALF_DTYPES = (mx.float16, mx.bfloat16)


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


def has_shape(state: State, key: str, shape: Iterable[int]) -> bool:
    """Whether a state is that of a tensor of this shape."""
    shape = tuple(shape)
    kind = kind_of(state, key)
    if kind is None:
        return bool(getattr(state.get(key), "shape", None) == shape)
    size = math.prod(shape)
    codes = shape if kind == "int8" else (-(-size // 2),)
    expected = {f"{key}_{kind}": codes, f"{key}_scales": (-(-size // BLOCKS[kind]),)}
    return all(getattr(state.get(k), "shape", None) == x for k, x in expected.items())


def release(state: State, key: str, shape: Iterable[int], rule: str) -> None:
    """Make a state in codes float32."""
    kind = kind_of(state, key)
    if kind is not None:
        codes = state.pop(f"{key}_{kind}")
        scales = state.pop(f"{key}_scales")
        is_positive = key in kernels.non_negative(rule)
        state[key] = kernels.decode(codes, scales, [*shape], kind, is_positive)


def hold(state: State, keys: Iterable[str], rule: str, kind: str | None) -> None:
    """Bring the states that are in no codes into those of a kind."""
    for key in keys:
        if kind is not None and key in state:
            is_positive = key in kernels.non_negative(rule)
            codes, scales = kernels.encode(state.pop(key), kind, is_positive)
            state |= {f"{key}_{kind}": codes, f"{key}_scales": scales}


def hold_error(state: State, parameter: mx.array, master: str | None) -> None:
    """Give the state the error that a weight of half precision has, or take it."""
    error = state.get("error")
    if error is not None and not is_error(error):
        return
    if master is None or parameter.dtype not in HALF_DTYPES:
        state.pop("error", None)
    elif error is None:
        state["error"] = mx.zeros(parameter.shape, ERRORS[master])
    elif error.dtype != ERRORS[master]:
        exact = kernels.join(parameter, error)
        state["error"] = kernels.split(exact, master, parameter.dtype)[1]
