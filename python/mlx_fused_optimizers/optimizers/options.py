"""The keyword arguments that every optimizer takes beyond upstream's.

Their types, defaults, checks and texts stand here alone. :func:`documented` puts them
into the signature and the docstring of each class that takes them.
"""

from __future__ import annotations

import copyreg
import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypedDict, get_type_hints

import mlx.core as mx

from .._formats import BLOCKS, ERRORS, HALF_DTYPES

FUSED_DTYPES = (mx.float32, *HALF_DTYPES)

# Arguments of Adam and Lion that a run may begin with at a checkpoint.
VARIANTS = ("amsgrad", "cautious")

WeightDecayFilter = Callable[[str, mx.array], bool]
QuantizeFilter = Callable[[str, mx.array], bool]
Groups = Sequence[tuple[Callable[[str, mx.array], bool], dict[str, Any]]]


class StepOptions(TypedDict, total=False):
    """Of all optimizers."""

    max_grad_norm: float | None
    clip_by_last_norm: bool
    skip_nonfinite: bool
    accumulate: int | None
    accumulate_dtype: mx.Dtype | None
    ema: float | None


class FusedOptions(StepOptions, total=False):
    """Of the optimizers that have state of their own kind."""

    state_dtype: mx.Dtype | str | None
    quantize_filter: QuantizeFilter | None
    master_weights: str | None
    stochastic_rounding: bool
    groups: Groups | None


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


def check_numbers(optimizer: Any, **values: Any) -> None:
    """Refuse hyper-parameters that are no numbers, by their names."""
    for name, value in values.items():
        if not hasattr(value, "__float__") and not isinstance(value, mx.array):
            raise TypeError(
                f"[{type(optimizer).__name__}] {name} is of type "
                f"{type(value).__name__}; expected a number"
            )


def check_flags(optimizer: Any, **values: Any) -> None:
    """Refuse arguments that are not True or False, by their names."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(
                f"[{type(optimizer).__name__}] {name} is of type "
                f"{type(value).__name__}; expected True or False"
            )


def check_ranges(optimizer: Any, betas: Any, count: int = 2, **least_zero: Any) -> None:
    """Refuse coefficients outside of [0, 1), and negative numbers, by their names."""
    check_betas(optimizer, betas, count)
    check_numbers(optimizer, **least_zero)
    for number, beta in enumerate(betas, 1):
        if not 0 <= beta < 1:
            raise ValueError(
                f"beta{number} should be in [0, 1), {beta} was provided instead"
            )
    for name, value in least_zero.items():
        if not value >= 0:
            raise ValueError(f"{name} should be >=0, {value} was provided instead")


def check_betas(optimizer: Any, betas: Any, count: int = 2) -> None:
    """Refuse coefficients of running averages that are not as many numbers."""
    title = f"[{type(optimizer).__name__}] betas"
    if not hasattr(betas, "__len__") or isinstance(betas, str):
        kind = type(betas).__name__
        raise TypeError(f"{title} is of type {kind}; expected {count} numbers")
    if len(betas) != count:
        raise ValueError(f"{title} has length {len(betas)}; expected {count} numbers")
    values = {f"beta{number}": beta for number, beta in enumerate(betas, 1)}
    check_numbers(optimizer, **values)


def _check_max_grad_norm(optimizer: Any, value: Any) -> None:
    if value is not None:
        check_limit("max_grad_norm", value)


def _check_clip_by_last_norm(optimizer: Any, value: Any) -> None:
    _check_one_norm(value, getattr(optimizer, "skip_nonfinite", False))


def _check_skip_nonfinite(optimizer: Any, value: Any) -> None:
    _check_one_norm(getattr(optimizer, "clip_by_last_norm", False), value)


def _check_one_norm(clip_by_last_norm: Any, skip_nonfinite: Any) -> None:
    if clip_by_last_norm and skip_nonfinite:
        raise ValueError(
            "clip_by_last_norm and skip_nonfinite exclude each other: whether a step "
            "is skipped depends on its own norm"
        )


def _check_accumulate(optimizer: Any, value: Any) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise TypeError(
            f"accumulate is of type {type(value).__name__}; expected how many "
            "gradients make a step, an int"
        )
    if value is not None and value < 1:
        raise ValueError(f"accumulate should be >=1, {value} was provided instead")
    if (value or 1) > 1:
        return
    count = getattr(optimizer, "_state", {}).get("micro_step", 0)
    try:
        waiting = int(count)
    except ValueError:  # within a transformation
        return
    if waiting > 0:
        raise ValueError(
            f"accumulate is set to {value} while {waiting} gradients wait for their "
            "step; complete it before, or drop them by "
            'optimizer.state["micro_step"] = mx.array(0, mx.uint32)'
        )


def _check_accumulate_dtype(optimizer: Any, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, mx.Dtype):
        raise TypeError(
            f"accumulate_dtype is of type {type(value).__name__}; expected a dtype "
            "such as mlx.core.float32"
        )
    if value not in FUSED_DTYPES:
        raise ValueError(
            f"accumulate_dtype should be float32, float16 or bfloat16, {value} was "
            "provided instead"
        )


def _check_ema(optimizer: Any, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(
            f"ema is of type {type(value).__name__}; expected a number in [0, 1), such "
            "as 0.999"
        )
    if not optimizer.takes_ema:
        raise ValueError(
            f"{type(optimizer).__name__} keeps an average of its own, which its "
            f"averaged() gives; found ema={value}"
        )
    if not 0 <= value < 1:
        raise ValueError(f"ema should be in [0, 1), {value} was provided instead")


def _check_state_dtype(optimizer: Any, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, (mx.Dtype, str)):
        raise TypeError(
            f"state_dtype is of type {type(value).__name__}; expected a dtype such as "
            'mlx.core.float32, "int8" or "int4"'
        )
    # Dtypes and strings do not compare.
    if value not in (BLOCKS if isinstance(value, str) else FUSED_DTYPES):
        raise ValueError(
            'state_dtype should be float32, float16, bfloat16, "int8" or "int4", '
            f"{value!r} was provided instead"
        )
    if isinstance(value, str) and not optimizer.takes_codes:
        raise ValueError(
            f"{type(optimizer).__name__} has no states in codes: it holds means of "
            f"rows and columns, which are small; found state_dtype={value!r}"
        )


def _check_master_weights(optimizer: Any, value: Any) -> None:
    if value is not None and not isinstance(value, str):
        raise TypeError(
            f"master_weights is of type {type(value).__name__}; expected "
            f"{' or '.join(map(repr, ERRORS))}"
        )
    if value is not None and value not in ERRORS:
        raise ValueError(
            f"master_weights should be {' or '.join(map(repr, ERRORS))}, {value!r} was "
            "provided instead"
        )
    _check_one_rounding(value, getattr(optimizer, "stochastic_rounding", False))


def _check_stochastic_rounding(optimizer: Any, value: Any) -> None:
    _check_one_rounding(getattr(optimizer, "master_weights", None), value)


def _check_one_rounding(master_weights: Any, stochastic_rounding: Any) -> None:
    if master_weights is not None and stochastic_rounding:
        raise ValueError(
            "master_weights and stochastic_rounding exclude each other: a weight with "
            "a master loses nothing when it is rounded"
        )


def _check_groups(optimizer: Any, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(
            f"groups is of type {type(value).__name__}; expected a list of pairs of a "
            "filter and a dict"
        )
    for group in value:
        is_pair = isinstance(group, Sequence) and len(group) == 2
        if not (is_pair and callable(group[0]) and isinstance(group[1], dict)):
            raise TypeError(
                f"groups has {group!r}; expected pairs of a filter, which takes a path "
                "and an array, and a dict of arguments"
            )
        unknown = group[1].keys() - optimizer._group_arguments()
        if unknown:
            raise ValueError(
                f"groups sets {', '.join(sorted(unknown))}; {type(optimizer).__name__} "
                f"has {', '.join(sorted(optimizer._group_arguments()))}"
            )


def _check_quantize_filter(optimizer: Any, value: Any) -> None:
    if value is not None and not callable(value):
        raise TypeError(
            f"quantize_filter is of type {type(value).__name__}; expected a callable "
            "that takes a path and an array"
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
    "clip_by_last_norm": Option(
        False,
        """\
clip_by_last_norm (bool, optional): Let ``max_grad_norm`` scale the gradients by
    the norm of the step before, the first not at all. Then no update waits for
    all gradients, and each is freed when it has been used. Default: ``False``""",
        _check_clip_by_last_norm,
    ),
    "skip_nonfinite": Option(
        False,
        """\
skip_nonfinite (bool, optional): A step whose gradients' global norm is not
    finite changes no parameter, no state and no step count, which is decided
    on the device. Default: ``False``""",
        _check_skip_nonfinite,
    ),
    "accumulate": Option(
        None,
        """\
accumulate (int, optional): Take a step at each call of this number alone, with the
    mean of the gradients since the last one; the other calls add them to a
    buffer ``gradient_sum`` in place. It costs 4 bytes a parameter, and 12 to
    be moved a call, in float32. Default: ``None``, a step at each call""",
        _check_accumulate,
    ),
    "accumulate_dtype": Option(
        None,
        """\
accumulate_dtype (Dtype, optional): The dtype of that buffer: float32, float16 or
    bfloat16. Parameters and state keep theirs. Default: that of the gradients""",
        _check_accumulate_dtype,
    ),
    "ema": Option(
        None,
        """\
ema (float, optional): Keep an average of the weights, of which a step retains this
    much, as 0.999; see :meth:`Optimizer.averaged`. It is a state ``weight_average`` in
    float32 and costs 4 bytes a parameter, and 8 to be moved a step.
    Default: ``None``""",
        _check_ema,
    ),
    "state_dtype": Option(
        None,
        """\
state_dtype (Dtype or str, optional): The dtype of the state: float32, float16 or
    bfloat16; or ``"int8"`` or ``"int4"``, codes of which 64 or 32 share a float32
    scale. Parameters then keep theirs. Complex state stays complex64.
    Default: that of the parameters, float32 with ``master_weights``""",
        _check_state_dtype,
    ),
    "quantize_filter": Option(
        None,
        """\
quantize_filter (callable, optional): ``(path, array) -> bool``, whether a
    parameter's state is held in codes if ``state_dtype`` is one of those; the
    others' is float32. Default: that of 4,096 elements or more""",
        _check_quantize_filter,
    ),
    "master_weights": Option(
        None,
        """\
master_weights (str, optional): ``"24bit"`` or ``"32bit"``: parameters of half
    precision get a state ``error`` of 8 or 16 bits, what rounding took from
    their float32 master. Default: ``None``""",
        _check_master_weights,
    ),
    "stochastic_rounding": Option(
        False,
        """\
stochastic_rounding (bool, optional): Round parameters of half precision up or
    down at random, so that small updates are not lost. The random bits follow
    from the entry ``rounding_seed`` of the state and the step.
    Default: ``False``""",
        _check_stochastic_rounding,
    ),
    "groups": Option(
        None,
        """\
groups (list, optional): Pairs of a filter ``(path, array) -> bool`` and a dict of
    arguments such as ``learning_rate``, ``weight_decay`` or ``betas`` that
    hold for the parameters it takes; the first that takes one counts. A value
    may be a schedule. It costs no launch. Default: ``None``""",
        _check_groups,
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
        lambda o: hasattr(o, "dampening") and getattr(o, "momentum", 0) < 0,
        "a negative momentum has no effect",
    ),
    (
        lambda o: getattr(o, "decoupled_weight_decay", False) and not o.weight_decay,
        "decoupled_weight_decay has no effect with a weight_decay of 0",
    ),
    (
        lambda o: getattr(o, "ns_steps", 1) < 1 and "ns_coefficients" in vars(o),
        "ns_coefficients has no effect with ns_steps=0",
    ),
    (
        lambda o: getattr(o, "warmup", 0) > 0 and not getattr(o, "alpha", 1),
        "warmup has no effect with an alpha of 0",
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
    (
        lambda o: o.clip_by_last_norm and o.max_grad_norm is None,
        "clip_by_last_norm has no effect without max_grad_norm",
    ),
    (
        lambda o: o.accumulate_dtype is not None and not o._accumulates(),
        "accumulate_dtype has no effect without accumulate",
    ),
    (
        lambda o: o.quantize_filter is not None and not isinstance(o.state_dtype, str),
        'quantize_filter has no effect without state_dtype="int8" or "int4"',
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
    return getattr(mx, "bool_" if name == "bool" else name)


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
