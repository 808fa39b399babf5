"""The keyword arguments that every optimizer takes beyond upstream's.

Their types, defaults, checks and texts stand here alone. :func:`documented` puts them
into the signature and the docstring of each class that takes them.
"""

from __future__ import annotations

import copyreg
import inspect
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict, get_type_hints

import mlx.core as mx

FUSED_DTYPES = (mx.float32, mx.float16, mx.bfloat16)

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


def check_limit(name: str, value: Any) -> None:
    """Refuse what is no number of at least 0, or an array with one such element."""
    is_number = hasattr(value, "__float__") and getattr(value, "ndim", 0) == 0
    if not is_number and not isinstance(value, mx.array):
        raise TypeError(
            f"{name} is of type {type(value).__name__}; expected a number of at least 0"
        )
    if isinstance(value, mx.array) and value.size != 1:
        raise ValueError(f"{name} has shape {value.shape}; expected a scalar")
    if not value >= 0:
        raise ValueError(f"{name} should be >=0, {value} was provided instead")


def _check_max_grad_norm(optimizer: Any, value: Any) -> None:
    if value is not None:
        check_limit("max_grad_norm", value)


def _check_state_dtype(optimizer: Any, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, mx.Dtype):
        raise TypeError(
            f"state_dtype is of type {type(value).__name__}; expected a dtype such as "
            "mlx.core.float32"
        )
    if value not in FUSED_DTYPES:
        raise ValueError(
            f"state_dtype should be float32, float16 or bfloat16, {value} was provided "
            "instead"
        )


def _check_weight_decay_filter(optimizer: Any, value: Any) -> None:
    if value is None:
        return
    if not hasattr(optimizer, "weight_decay"):
        raise TypeError(
            f"{type(optimizer).__name__} takes no weight decay, and so no "
            "weight_decay_filter"
        )
    if not callable(value):
        raise TypeError(
            f"weight_decay_filter is of type {type(value).__name__}; expected a "
            "callable that takes a path and an array"
        )


class Option(NamedTuple):
    """An option's default, its entry in a docstring, and what refuses a value."""

    default: Any
    entry: str
    check: Callable[[Any, Any], None] = lambda optimizer, value: None


OPTIONS = {
    "max_grad_norm": Option(
        None,
        """\
max_grad_norm (float, optional): Scale the gradients so that their global norm
    does not exceed this, as :func:`clip_grad_norm` does. Default: ``None``""",
        _check_max_grad_norm,
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
    bfloat16; parameters then keep theirs. Complex state stays complex64.
    Default: that of the parameters""",
        _check_state_dtype,
    ),
    "weight_decay_filter": Option(
        None,
        """\
weight_decay_filter (callable, optional): ``(path, array) -> bool``, whether a
    parameter decays; see :func:`decay_matrices_only`. Default: all do""",
        _check_weight_decay_filter,
    ),
}


# Arguments without effect: what an optimizer's attributes are then, and what to say.
WITHOUT_EFFECT: list[tuple[Callable[[Any], Any], str]] = [
    (
        lambda o: getattr(o, "relative_step", False) and "learning_rate" in o.state,
        "learning_rate has no effect with relative_step=True, which is the default; "
        "pass relative_step=False to use it",
    ),
    (
        lambda o: getattr(o, "warmup_init", False) and not o.relative_step,
        "warmup_init has no effect with relative_step=False",
    ),
    (
        lambda o: getattr(o, "dampening", 0) > 0 and getattr(o, "momentum", 1) <= 0,
        "dampening has no effect without momentum",
    ),
    (
        # Of SGD: Muon's state is used without momentum too.
        lambda o: (
            o.state_dtype is not None
            and hasattr(o, "dampening")
            and getattr(o, "momentum", 1) <= 0
        ),
        "state_dtype has no effect without momentum",
    ),
    (
        lambda o: o.weight_decay_filter is not None and not o.weight_decay,
        "weight_decay_filter has no effect with a weight_decay of 0",
    ),
]


def warn_of_arguments(optimizer: Any) -> None:
    """Warn of the arguments of a constructor that have no effect."""
    for is_so, text in WITHOUT_EFFECT:
        if is_so(optimizer):
            warn_caller(f"{type(optimizer).__name__}: {text}")


def warn_caller(text: str, category: type[Warning] = UserWarning) -> None:
    """Warn as if from the line outside of this package that called it."""
    package = __name__.partition(".")[0]
    level = 1
    while sys._getframe(level).f_globals["__name__"].partition(".")[0] == package:
        level += 1
    warnings.warn(text, category, stacklevel=level + 1)


def _dtype_named(name: str) -> Any:
    return getattr(mx, name)


# MLX's dtypes cannot be copied or pickled, and so no optimizer that has one could.
copyreg.pickle(mx.Dtype, lambda dtype: (_dtype_named, (str(dtype).rpartition(".")[2],)))


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
