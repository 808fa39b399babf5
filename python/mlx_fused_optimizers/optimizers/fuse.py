"""``fuse``: the update of somebody's own optimizer as one kernel."""

from __future__ import annotations

import inspect
import linecache
from collections import Counter
from collections.abc import Collection
from copy import deepcopy
from functools import cache
from importlib import import_module
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx
import mlx.optimizers as stock
from mlx.utils import tree_flatten

from .._formats import AVERAGE, HALF_DTYPES, SUM, is_error, kind_of
from .._kernels import kernels
from ..schedulers import as_array
from .base import Clip, Optimizer, paths
from .fused import FusedOptimizer
from .options import FUSED_DTYPES, OPTIONS, warn_caller

# Methods that a class must not have of its own: the fused step has them.
STEP = ("apply_gradients", "init", "update")

State = dict[str, Any]


class RefusedError(Exception):
    """Says why an apply_single cannot be fused."""


class _Call(NamedTuple):
    """The stand-ins that apply_single was called with, and what it gave."""

    parameter: mx.array
    gradient: mx.array
    states: dict[str, mx.array]
    new_parameter: mx.array
    new: State


class Fused(FusedOptimizer):
    """What :func:`fuse` puts before a class: its ``apply_single``, fused."""

    original: ClassVar[type[stock.Optimizer]]
    rule = ""  # each step finds those of its tensors
    _reason: str | None = None  # why it is not fused
    # Whether apply_single changes more than the state, and is called for each tensor.
    _is_called_for_each: bool = False
    _never_negative: frozenset[str] | None = None
    _explained: tuple[Any, ...] = ()

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        options = {k: keywords.pop(k) for k in OPTIONS.keys() & keywords.keys()}
        self.original.__init__(self, *arguments, **keywords)
        self._set_options(**options)

    def __reduce__(self) -> Any:
        return (
            _rebuilt,
            (self.original.__module__, self.original.__qualname__),
            vars(self),
        )

    def __copy__(self) -> Any:
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def __deepcopy__(self, memo: Any) -> Any:
        made = object.__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(deepcopy(self.__dict__, memo))
        return made

    def init_single(self, parameter: mx.array, state: State) -> None:
        """Fill a parameter's state, as the original class does."""
        self.original.init_single(self, parameter, state)
        self._cast_all(state)

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: State
    ) -> mx.array:
        """Update one parameter and its state, as the original class does."""
        apply_single = self.original.apply_single
        updated: mx.array = apply_single(self, gradient, parameter, state)
        return updated

    def explain(self) -> None:
        """Print what the last step fused, what it left to MLX, and why."""
        name = self.original.__name__
        if self._reason is not None:
            print(f"{name} works as it is: {self._reason}")
        elif not self._explained:
            print(f"{name}: no step was taken yet")
        for count, rules, left, elements in self._explained:
            tensors = "1 tensor" if count == 1 else f"{count} tensors"
            print(f"{name}: {tensors} of {elements:,} elements")
            for number, rule in enumerate(rules, 1):
                text = kernels.program_text(rule)
                print(f"  kernel {number} of {len(rules)}:")
                print("".join(f"    {line}\n" for line in text.splitlines()), end="")
            if left:
                print(f"  left to MLX, as no functions of an element: {left}")

    def rules(self) -> list[str]:
        """The names of the rules that the last step made."""
        return sorted({rule for _, rules, _, _ in self._explained for rule in rules})

    def _hyperparameters(self) -> dict[str, Any]:
        decay = getattr(self, "weight_decay", None)
        return {} if decay is None else {"weight_decay": decay}

    def _state_names(self, state: State, parameter: mx.array) -> list[str]:
        plain = [
            key
            for key, value in state.items()
            if key not in (SUM, AVERAGE)
            and isinstance(value, mx.array)
            and value.shape == parameter.shape
            and value.dtype in FUSED_DTYPES
        ]
        held = [key.removesuffix("_scales") for key in state if key.endswith("_scales")]
        return plain + [key for key in held if kind_of(state, key)]

    def _non_negative(self) -> Collection[str]:
        return self._never_negative or ()

    def _hold(
        self, path: str, parameter: mx.array, state: State, is_new: bool = False
    ) -> None:
        if isinstance(self.state_dtype, str) and self._never_negative is None:
            self._never_negative = self._find_non_negative(parameter, state)
        super()._hold(path, parameter, state, is_new)

    def _find_non_negative(self, parameter: mx.array, state: State) -> frozenset[str]:
        """The states whose codes need no sign, by what apply_single does."""
        if not hasattr(kernels, "Trace") or parameter.dtype not in FUSED_DTYPES:
            return frozenset()
        before = {**vars(self)}
        found: list[str] = []

        def record() -> list[mx.array]:
            trace, *_ = self._trace_one(parameter, parameter, state, True)
            found.extend(trace.find_non_negative())
            return []

        try:
            mx.export_function(_ignore, record)
        except RefusedError:  # the step says it
            return frozenset()
        finally:
            vars(self).clear()
            vars(self).update(before)
        try:
            return frozenset(k for k in found if mx.all(state[k] >= 0).item())
        except ValueError:  # mx.compile evaluates nothing
            return frozenset()

    def _apply_leaves(self, leaves: Any, clip: Clip) -> Any:
        self._watch_precision(leaves)
        if self._reason is None and hasattr(kernels, "Trace"):
            dtypes = {x.dtype for x in [*leaves.gradients, *leaves.parameters]}
            if dtypes <= {*FUSED_DTYPES}:
                try:
                    return self._apply_fused(leaves, clip)
                except RefusedError as refused:
                    # What is wrong with the class itself is raised here, again.
                    updated = Optimizer._apply_leaves(self, leaves, clip)
                    self._reason = str(refused)
                    warn_caller(
                        f"fuse: {self.original.__name__} works as it is: {refused}"
                    )
                    return updated
        return Optimizer._apply_leaves(self, leaves, clip)

    def _apply_fused(self, leaves: Any, clip: Clip) -> Any:
        # Whether parameters and states keep their dtypes, whatever they meet.
        holds = self._plain_dtype() is not None or self.stochastic_rounding
        traces, trace_of, news = self._trace(leaves, holds or clip.keep_dtypes)

        def run(chosen: list[int], after: list[mx.array]) -> None:
            leaves.run(
                traces,
                chosen,
                [trace_of[i] for i in chosen],
                step=as_array(self.step),
                gradient_scale=clip.scale,
                skip=clip.skip,
                seed=self._seed(),
                state_dtype=self._plain_dtype(),
                after=after,
                numbers=self._numbers(leaves),
            )

        if not clip.chunks:
            run([*range(len(leaves))], [])
        previous: list[mx.array] = []
        for chosen, norm in clip.chunks:
            run(chosen, [norm, *previous])
            previous = [leaves.parameters[chosen[0]]]
        states = leaves.states
        parameters = leaves.parameters
        for i, trace in enumerate(trace_of):
            values, casts, _ = news[trace]
            for key, value in values.items():
                leaves.set_state(i, key, value)
            if "" in casts and parameters[i].dtype != casts[""]:
                leaves.set_parameter(i, parameters[i].astype(casts[""]))
        updated = leaves.commit()
        for i, trace in enumerate(trace_of):
            _, casts, gone = news[trace]
            for key in gone:
                del states[i][key]
            for key in casts.keys() & states[i].keys():
                if states[i][key].dtype != casts[key]:
                    states[i][key] = states[i][key].astype(casts[key])
        if isinstance(self.state_dtype, str):
            for path, parameter, state in zip(
                paths(leaves.tree), parameters, states, strict=True
            ):
                self._hold(path, parameter, state)  # what is new
        counts = Counter(trace_of)
        self._explained = tuple(
            (counts[i], trace.rules, ", ".join(trace.left_to_mlx), trace.elements)
            for i, trace in enumerate(traces)
        )
        return updated

    def _trace(
        self, leaves: Any, keeps: bool
    ) -> tuple[list[Any], list[int], list[Any]]:
        """What apply_single does with each leaf, recorded for those of a kind at once.

        Of a kind are the leaves of which Python sees the same: shapes, dtypes, what is
        no array in the state, and which group and filter takes them. Everything else
        that could take another branch is the same during a step, or apply_single
        itself changes it; then it is called for each leaf.
        """
        traces: list[Any] = []
        news: list[Any] = []
        trace_of: list[int] = []
        kinds: dict[Any, int] = {}
        decays = self.weight_decay_filter
        has_paths = decays is not None or self.groups
        names = paths(leaves.tree) if has_paths else [""] * len(leaves)

        def record() -> list[mx.array]:
            for path, gradient, parameter, state in zip(
                names, leaves.gradients, leaves.parameters, leaves.states, strict=True
            ):
                group = self._group_of(path, parameter) if self.groups else 0
                is_undecayed = decays is not None and not decays(path, parameter)
                kind = (group, is_undecayed, _kind(gradient, parameter, state))
                if self._is_called_for_each or kind not in kinds:
                    kinds[kind] = len(traces)
                    with self._as_group(group, is_undecayed):
                        leaf = (gradient, parameter, state)
                        trace, *new = self._trace_one(*leaf, keeps)
                    traces.append(trace)
                    news.append(new)
                trace_of.append(kinds[kind])
            return []

        mx.export_function(_ignore, record)
        return traces, trace_of, news

    def _trace_one(
        self, gradient: mx.array, parameter: mx.array, state: State, keeps: bool
    ) -> tuple[Any, State, Any, list[str]]:
        """A trace, and beside it new values, dtypes and the entries that are gone."""
        plain = _without_codes(state, parameter)
        before = _fingerprint(self)
        call = self._call(gradient, parameter, plain, is_wide=keeps)
        self._is_called_for_each |= not _is_same(before, _fingerprint(self))
        arrays = _arrays(call.new)
        dtypes = {"": call.new_parameter.dtype} | {
            k: x.dtype for k, x in arrays.items()
        }
        arrays_before = (gradient, parameter, *_arrays(plain).values())
        has_halves = any(x.dtype in HALF_DTYPES for x in arrays_before)
        if has_halves and not (keeps or self._is_called_for_each):
            # In float32, with numbers that no half precision has rounded.
            try:
                wide = self._call(gradient, parameter, plain, is_wide=True)
                if _arrays(wide.new).keys() == arrays.keys():
                    call, arrays = wide, _arrays(wide.new)
            except RefusedError:
                pass
        before_dtypes = {"": parameter.dtype} | {
            k: x.dtype for k, x in _arrays(plain).items()
        }
        if keeps:
            kept = [*before_dtypes]
            wanted = self._plain_dtype() or parameter.dtype
            dtypes = {k: wanted for k, x in dtypes.items() if x in FUSED_DTYPES}
            dtypes[""] = parameter.dtype
        else:
            kept = [
                k for k, x in before_dtypes.items() if k in dtypes and dtypes[k] == x
            ]
        made = {"": call.new_parameter} | arrays
        casts = {k: x for k, x in dtypes.items() if made[k].dtype != x}
        values = {
            k: x
            for k, x in call.new.items()
            if k not in arrays and (k not in state or x is not state[k])
        }
        gone = [k for k in plain if k not in call.new and k in state]
        try:
            trace = kernels.Trace(
                call.parameter,
                call.gradient,
                [*call.states.items()],
                call.new_parameter,
                [*arrays.items()],
                [x for x in before if isinstance(x, mx.array)],
                kept,
                [*self._non_negative()],
            )
        except ValueError as error:
            raise RefusedError(str(error)) from None
        is_held = keeps and not trace.keeps_parameter_in_slot
        if is_held and (self.master_weights or self.stochastic_rounding):
            raise RefusedError(
                "its parameter is read after it was written, which master_weights and "
                "stochastic_rounding do not allow"
            )
        return trace, values, casts, gone

    def _call(
        self, gradient: mx.array, parameter: mx.array, state: State, is_wide: bool
    ) -> _Call:
        """What apply_single makes of stand-ins."""

        def stand_in(array: mx.array) -> mx.array:
            is_half = array.dtype in FUSED_DTYPES
            dtype = mx.float32 if is_wide and is_half else array.dtype
            return kernels.stand_in(array.shape, dtype)

        old = {key: stand_in(value) for key, value in _arrays(state).items()}
        new: State = {**state, **old}
        old_gradient, old_parameter = stand_in(gradient), stand_in(parameter)
        try:
            updated = self.apply_single(old_gradient, old_parameter, new)
        except Exception as error:
            raise RefusedError(_why(error)) from error
        if not isinstance(updated, mx.array):
            raise RefusedError("apply_single returned no mx.array")
        for key, value in new.items():
            flat: Any = tree_flatten([value])
            if not isinstance(value, mx.array) and any(
                isinstance(x, mx.array) for _, x in flat
            ):
                raise RefusedError(
                    f"the state '{key}' is a {type(value).__name__} of arrays"
                )
        return _Call(old_parameter, old_gradient, old, updated, new)


def _ignore(message: Any) -> None:
    """Takes what mx.export_function tells: the graph is read without it."""


def _rebuilt(module: str, qualname: str) -> Any:
    """A fused optimizer without its attributes, for pickle."""
    found: Any = import_module(module)
    for name in qualname.split("."):
        found = getattr(found, name)
    return object.__new__(found if issubclass(found, Fused) else _fused_class(found))


def _without_codes(state: State, parameter: mx.array) -> State:
    """A parameter's state as apply_single knows it; of codes nothing but the shape."""
    plain = {}
    for key, value in state.items():
        if key in (SUM, AVERAGE):
            continue
        name = key.removesuffix("_scales")
        if name != key and kind_of(state, name):
            plain[name] = kernels.stand_in(parameter.shape, mx.float32)
        elif not any(
            key == f"{x}_{kind_of(state, x)}"
            for x in (key.removesuffix("_int8"), key.removesuffix("_int4"))
            if x != key and kind_of(state, x)
        ) and not (
            key == "error" and is_error(value) and parameter.dtype in HALF_DTYPES
        ):
            plain[key] = value
    return plain


def _arrays(state: State) -> dict[str, mx.array]:
    return {key: x for key, x in state.items() if isinstance(x, mx.array)}


def _why(error: Exception) -> str:
    """What failed, and in which line of the user's source."""
    where = None
    traceback = error.__traceback__
    ours = __name__.partition(".")[0]
    while traceback is not None:
        frame = traceback.tb_frame
        module = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if module not in (ours, "mlx"):
            where = (frame.f_code.co_filename, traceback.tb_lineno)
        traceback = traceback.tb_next
    if where is None:
        return str(error)
    line = linecache.getline(*where).strip()
    return f"`{line}` ({where[0]}:{where[1]}) cannot be traced: {error}"


def _kind(gradient: mx.array, parameter: mx.array, state: State) -> Any:
    """What Python can see of a leaf."""
    parts: list[Any] = [
        gradient.shape,
        gradient.dtype,
        parameter.shape,
        parameter.dtype,
    ]
    for key, value in state.items():
        if isinstance(value, mx.array):
            parts += (key, value.shape, value.dtype)
        elif value is None or isinstance(value, (bool, int, float, str)):
            parts += (key, type(value).__name__, repr(value))
        else:
            parts += (key, None, id(value))
    return tuple(parts)


def _fingerprint(optimizer: Fused) -> list[Any]:
    """Everything that a call of apply_single could change beside a tensor's state."""
    found: list[Any] = []

    def visit(value: Any) -> None:
        if isinstance(value, dict):
            for key, entry in value.items():
                found.append(key)
                visit(entry)
        elif isinstance(value, (list, tuple)):
            found.append(len(value))
            for entry in value:
                visit(entry)
        else:
            found.append(value)

    for name, value in vars(optimizer).items():
        if name == "_state":  # without the states of parameters
            visit({k: x for k, x in value.items() if isinstance(x, mx.array)})
        elif name not in ("_is_called_for_each", "_explained"):
            visit(value)
    state: Any = mx.random.state
    found.extend(state)
    return found


def _is_same(before: list[Any], after: list[Any]) -> bool:
    return len(before) == len(after) and all(map(_is, before, after))


def _is(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, (int, str)) and a == b)


def fuse(optimizer: Any = None, /, **options: Any) -> Any:
    """Make the update of somebody's own optimizer one fused kernel, in place.

    The optimizer is a class with ``init_single`` and ``apply_single`` as
    ``mlx.optimizers`` documents them, or an instance of one. What comes back has the
    same constructor, state, schedules and numbers. Its ``apply_single`` is recorded
    with MLX's own tracing in each step, once for the tensors of the same shapes and
    dtypes, and what it does to each element becomes a kernel for many tensors a launch
    on Metal, and vectorised loops on the CPU. What is no function of an element, such
    as a norm, a mean or a product of matrices, is left to MLX and enters the kernel.

    Arithmetic is in float32, and rounded once where it is stored. A class that cannot
    be fused works as it is, with one warning that says why; ``explain()`` prints what
    was fused.

    Args:
        optimizer (Optimizer or type): The optimizer, or its class, so that ``fuse`` is
            a decorator. An optimizer of this package that is fused already comes back
            as it is.
        **options: For an instance, those of the optimizers of this package, such as
            ``max_grad_norm``, ``skip_nonfinite``, ``weight_decay_filter``, ``groups``,
            ``state_dtype``, ``master_weights`` and ``stochastic_rounding``. The
            constructor of a fused class takes them, too.

    Returns:
        Optimizer or type: The fused optimizer, which takes over the instance's state,
        or the fused class, a subclass of the original.

    Raises:
        TypeError: If ``optimizer`` is no optimizer, or is a ``MultiOptimizer``, whose
            optimizers are to be fused one by one; or if an option is unknown.

    Example:

        >>> @optim.fuse
        ... class SignMomentum(optim.Optimizer):
        ...     def init_single(self, parameter, state):
        ...         state["m"] = mx.zeros_like(parameter)
        ...
        ...     def apply_single(self, gradient, parameter, state):
        ...         state["m"] = 0.9 * state["m"] + 0.1 * gradient
        ...         return parameter - 1e-3 * mx.sign(state["m"])
        >>> optimizer = SignMomentum(max_grad_norm=1.0)
        >>> optimizer.apply_gradients({"w": mx.ones(2)}, {"w": mx.ones(2)})
        {'w': array([0.999, 0.999], dtype=float32)}
    """
    is_class = isinstance(optimizer, type)
    kind: Any = optimizer if is_class else type(optimizer)
    if not issubclass(kind, stock.Optimizer):
        raise TypeError(
            f"optimizer is of type {kind.__name__}; expected an optimizer or its class"
        )
    if issubclass(kind, stock.MultiOptimizer):
        raise TypeError(
            "optimizer is a MultiOptimizer; fuse the optimizers that it has"
        )
    if is_class and options:
        raise TypeError("options are for an instance; give them to the constructor")
    why = _refusal(kind, {} if is_class else vars(optimizer))
    if why is not None:
        if why:
            warn_caller(f"fuse: {kind.__name__} works as it is: {why}")
        for name, value in options.items():
            if name not in OPTIONS:
                raise TypeError(f"fuse() got an unexpected keyword argument '{name}'")
            setattr(optimizer, name, value)
        return optimizer
    if is_class:
        return _fused_class(kind)
    made: Any = object.__new__(_fused_class(kind))
    made.__dict__.update(vars(optimizer))
    given = {k: x for k, x in vars(optimizer).items() if k in OPTIONS}
    made._set_options(**{**given, **options})
    return made


def _refusal(kind: type, attributes: Collection[str]) -> str | None:
    """Why a class stays what it is; without words if it is fused already."""
    if issubclass(kind, Fused):
        return ""
    if issubclass(kind, FusedOptimizer):
        if kind.__module__.partition(".")[0] == __name__.partition(".")[0]:
            return ""
        return "it is derived from a fused optimizer; derive it from mlx.optimizers"
    for name in STEP:
        known = (getattr(stock.Optimizer, name), getattr(Optimizer, name))
        if getattr(kind, name) not in known:
            return f"it has {name} of its own"
    arguments = inspect.signature(kind.__init__).parameters
    taken = OPTIONS.keys() & {*arguments, *attributes}
    if taken and not issubclass(kind, Optimizer):
        return f"its {min(taken)} has the name of an option"
    return None


@cache
def _fused_class(original: type) -> type:
    return type(
        original.__name__,
        (Fused, original),
        {
            "original": original,
            "__doc__": original.__doc__,
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__wrapped__": original,
        },
    )
