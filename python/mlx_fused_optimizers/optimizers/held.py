"""Brings the states of parameters into codes, and out of them; see _formats.py."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import mlx.core as mx

from .._formats import (
    AVERAGE,
    ERRORS,
    HALF_DTYPES,
    SUM,
    State,
    is_error,
    kind_of,
    shapes_in,
)
from .._kernels import kernels
from .options import FUSED_DTYPES


def release(
    state: State, key: str, shape: Iterable[int], non_negative: Collection[str]
) -> None:
    """Make a state in codes float32."""
    kind = kind_of(state, key)
    if kind is not None:
        codes = state.pop(f"{key}_{kind}")
        scales = state.pop(f"{key}_scales")
        is_positive = key in non_negative
        state[key] = kernels.decode(codes, scales, [*shape], kind, is_positive)


def hold(
    state: State, keys: Iterable[str], non_negative: Collection[str], kind: str | None
) -> None:
    """Bring the states that are in no codes into those of a kind."""
    for key in keys:
        if kind is not None and key in state:
            is_positive = key in non_negative
            codes, scales = kernels.encode(state.pop(key), kind, is_positive)
            state |= {f"{key}_{kind}": codes, f"{key}_scales": scales}


def hold_zeros(
    state: State, keys: Iterable[str], non_negative: Collection[str], kind: str
) -> None:
    """Make states of zeros such ones in codes, without computing them."""
    for key in keys:
        codes, scales = shapes_in(kind, state.pop(key).shape)
        is_unsigned = kind == "int4" or key in non_negative
        state[f"{key}_{kind}"] = mx.zeros(codes, mx.uint8 if is_unsigned else mx.int8)
        state[f"{key}_scales"] = mx.zeros(scales, mx.float32)


def hold_sum(state: State, parameter: mx.array, dtype: mx.Dtype | None) -> None:
    """Give the state the sum of the gradients that wait for their step."""
    total = state.get(SUM)
    if total is None or tuple(total.shape) != tuple(parameter.shape):
        total = mx.zeros(parameter.shape, parameter.dtype)
    # There is no half a complex number.
    if dtype is not None and total.dtype in FUSED_DTYPES:
        total = total.astype(dtype)
    state[SUM] = total


def hold_average(state: State, parameter: mx.array) -> None:
    """Give the state an average of the weights, which starts as they are.

    At least float32: at 0.999 an average of bfloat16 would never move.
    """
    average = state.get(AVERAGE)
    if average is not None and tuple(average.shape) == tuple(parameter.shape):
        return
    if is_error(state.get("error")) and parameter.dtype in HALF_DTYPES:
        parameter = kernels.join(parameter, state["error"])
    is_wide = parameter.dtype in (mx.float32, mx.float64, mx.complex64)
    # Times one, for memory of its own.
    state[AVERAGE] = parameter * 1 if is_wide else parameter.astype(mx.float32)


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
