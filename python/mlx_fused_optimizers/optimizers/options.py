"""The keyword arguments that every optimizer takes beyond upstream's.

Their types, defaults and texts stand here alone. :func:`documented` puts them into the
signature and the docstring of each class that takes them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict, get_type_hints

import mlx.core as mx

WeightDecayFilter = Callable[[str, mx.array], bool]


class StepOptions(TypedDict, total=False):
    """Of all optimizers."""

    max_grad_norm: float | None
    skip_nonfinite: bool


class FusedOptions(StepOptions, total=False):
    """Of the optimizers that have state of their own kind."""

    state_dtype: mx.Dtype | None


class DecayOptions(FusedOptions, total=False):
    """Of the optimizers that have weight decay."""

    weight_decay_filter: WeightDecayFilter | None


class Option(NamedTuple):
    """An option's default, and its entry in a docstring."""

    default: Any
    entry: str


OPTIONS = {
    "max_grad_norm": Option(
        None,
        """\
max_grad_norm (float, optional): Scale the gradients so that their global norm
    does not exceed this, as :func:`clip_grad_norm` does. Default: ``None``""",
    ),
    "skip_nonfinite": Option(
        False,
        """\
skip_nonfinite (bool, optional): A step whose gradients' global norm is not
    finite changes no parameter, no state and no step count, which is decided
    on the device. Default: ``False``""",
    ),
    "state_dtype": Option(
        None,
        """\
state_dtype (Dtype, optional): The dtype of the state: float32, float16 or
    bfloat16; parameters then keep theirs. Default: that of the parameters""",
    ),
    "weight_decay_filter": Option(
        None,
        """\
weight_decay_filter (callable, optional): ``(path, array) -> bool``, whether a
    parameter decays; see :func:`decay_matrices_only`. Default: all do""",
    ),
}


def documented(cls: type) -> None:
    """Name the options of a class in the signature and docstring that it shows.

    Its ``__init__`` ends with ``**options: Unpack[...]`` of one of the types above, and
    the ``Args:`` of its docstring with a line ``{options}``.
    """
    init = cls.__dict__.get("__init__")
    if init is None:
        return
    signature = inspect.signature(init)
    *parameters, last = signature.parameters.values()
    kinds = {
        f"Unpack[{kind.__name__}]": kind
        for kind in (StepOptions, FusedOptions, DecayOptions)
    }
    if last.kind is not last.VAR_KEYWORD or last.annotation not in kinds:
        return
    hints = get_type_hints(kinds[last.annotation])
    init.__signature__ = signature.replace(
        parameters=parameters
        + [
            last.replace(
                name=name,
                kind=last.KEYWORD_ONLY,
                default=OPTIONS[name].default,
                annotation=hints[name],
            )
            for name in hints
        ]
    )
    if cls.__doc__ and "{options}" in cls.__doc__:
        before, after = cls.__doc__.split("{options}")
        indent = " " * (len(before) - len(before.rstrip(" ")))
        entries = "\n".join(OPTIONS[name].entry for name in hints)
        cls.__doc__ = before + entries.replace("\n", "\n" + indent) + after
