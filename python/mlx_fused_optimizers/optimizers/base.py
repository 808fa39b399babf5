"""What all optimizers share: the step, its options, its errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as stock
from mlx.utils import tree_flatten

from .._formats import AVERAGE, HALF_DTYPES, HELD, SUM, has_shape, is_error
from .._kernels import kernels
from ..schedulers import as_array, is_number_or_array
from ..shards import (
    Sharded,
    Shards,
    by_group,
    joint_norms,
    shards_of_arguments,
    shards_of_model,
)
from .held import hold_average, hold_sum
from .options import FUSED_DTYPES, OPTIONS, StepOptions, documented, warn_caller

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .._ext import Leaves
    from ..sharded.known import Known

INIT = "optimizer.init(model.trainable_parameters())"

# Entries of the state that come and go with an option.
OPTION_ENTRIES = ("grad_norm", "skipped_steps", "rounding_seed", "micro_step")

NO_SHARDS: Shards = MappingProxyType({})

# Leaves and elements that are measured together where updates wait for no others.
CHUNK, FULL = 6, 1 << 16

# Errors of a step that may have a cause which can be named. nanobind's for a value
# that is no number is a RuntimeError.
EXPLAINED = (AttributeError, KeyError, RuntimeError, TypeError, ValueError)

LearningRate = float | Callable[[mx.array], mx.array]


class Clip(NamedTuple):
    """What the norm of the gradients makes of a step; all on the device."""

    norm: mx.array | None = None
    scale: mx.array | None = None  # multiplies every gradient
    skip: mx.array | None = None  # a bool: nothing changes
    # Leaves, and the norm so far, where no update need wait for that of all.
    chunks: Sequence[tuple[list[int], mx.array]] = ()
    waits: mx.array | None = None  # a bool: gradients have been added up, and no more
    keep_dtypes: bool = False  # of parameters and state beside wider gradients


def paths(tree: Any) -> list[str]:
    """The paths of a tree's leaves, as in ``mlx.utils.tree_flatten``."""
    flat: Any = tree_flatten(tree)
    return [path for path, _ in flat]


def rebuilt(node: Any, values: list[Any]) -> Any:
    """A list or tuple of the node's type."""
    kind = type(node)
    return kind(*values) if hasattr(node, "_fields") else kind(values)


def parts_of(optimizer: stock.Optimizer) -> list[stock.Optimizer]:
    """An optimizer, and those that a MultiOptimizer has, at any depth."""
    inner = getattr(optimizer, "optimizers", ())
    return [optimizer, *chain.from_iterable(map(parts_of, inner))]


def check_tree(argument: str, tree: Any) -> None:
    """Refuse what is no dict: a state has entries of its own beside parameters'."""
    if not isinstance(tree, dict):
        raise TypeError(f"{argument} is of type {type(tree).__name__}; expected a dict")


def check_given(argument: str, tree: Any) -> None:
    if tree is None:
        raise TypeError(f"{argument} is None; expected an mlx.nn.Module or a dict")


def measure(
    gradients: list[mx.array],
    max_norm: float | mx.array,
    tree: Any = None,
    shards: Shards = NO_SHARDS,
) -> tuple[mx.array, mx.array]:
    """The global norm of arrays of any dtypes, and the factor that clips it.

    That of complex numbers is the norm of their magnitudes. Beside a float64 gradient
    both are float64: its range is not float32's. Of what is a shard all ranks' parts
    count, of the rest one rank's; the gradients' tree gives their paths.
    """
    if shards:
        whole, parts = by_group(paths(tree), shards)
        ours, _ = measure([gradients[i] for i in whole], max_norm)
        norms = [(x, measure([gradients[i] for i in y], max_norm)[0]) for x, y in parts]
        return measure([ours, *joint_norms(norms, ours)], max_norm)
    norm, factor, _ = _measure_on(gradients, max_norm)
    return norm, factor


def _measure_on(
    gradients: list[mx.array], max_norm: float | mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """The same of whole arrays, and an array with which a later call goes on."""
    if any(g.dtype == mx.float64 for g in gradients):
        norm, factor = _measure_double(gradients, max_norm)
        return norm, factor, norm
    if any(g.dtype not in FUSED_DTYPES for g in gradients):
        gradients = [mx.abs(g).astype(mx.float32) for g in gradients]
    limit = mx.array(max_norm, mx.float32).reshape(())
    return kernels.sums_of_squares(gradients, limit)[1:]


def clip_factor(max_norm: Any, norm: mx.array) -> mx.array:
    """What multiplies gradients of this norm."""
    return mx.minimum(max_norm / (norm + 1e-6), 1.0)


def _measure_double(
    gradients: list[mx.array], max_norm: float | mx.array
) -> tuple[mx.array, mx.array]:
    magnitudes = [mx.abs(g).astype(mx.float64) for g in gradients if g.size > 0]
    magnitudes.append(mx.zeros((1,), mx.float64))  # perhaps all are empty
    largest = mx.max(mx.stack([mx.max(x) for x in magnitudes]))
    # No square overflows then; an infinite gradient still gives an infinite norm.
    unit = mx.where(mx.isfinite(largest) & (largest > 0), largest, 1.0)
    squares = [mx.square(x / unit).sum() for x in magnitudes]
    norm = unit * mx.sqrt(mx.stack(squares).sum())
    limit = mx.array(max_norm, mx.float64).reshape(())
    return norm, clip_factor(limit, norm)


def _is_zero(step: Any) -> bool:
    try:
        return step is not None and int(step) == 0
    except ValueError:  # within a transformation
        return False


def _drop(node: Any, key: str) -> None:
    """Take the arrays of that name out of a state's dicts."""
    if isinstance(node, dict):
        if not isinstance(node.get(key), (dict, list, tuple)):
            node.pop(key, None)
        node = node.values()
    elif not isinstance(node, (list, tuple)):
        return
    for child in node:
        _drop(child, key)


def _averages(parameters: Any, states: Sequence[Any]) -> Any:
    """The averages of parameters that have one, in a tree of theirs; None without.

    As copies of the array objects: the model may change its own.
    """
    if isinstance(parameters, dict):
        pairs = {k: [_child(s, k) for s in states] for k in parameters}
        found = {k: _averages(parameters[k], inner) for k, inner in pairs.items()}
        return {k: x for k, x in found.items() if x is not None} or None
    if isinstance(parameters, (list, tuple)):
        values = [
            _averages(x, [_child(s, i) for s in states])
            for i, x in enumerate(parameters)
        ]
        if all(value is None for value in values):
            return None
        return rebuilt(parameters, [{} if x is None else x for x in values])
    for state in states:
        if isinstance(state, dict) and AVERAGE in state:
            average = as_array(state[AVERAGE])
            if average.dtype == parameters.dtype:
                return copy(average)
            return average.astype(parameters.dtype)
    return None


def _child(state: Any, key: Any) -> Any:
    try:
        return state[key]
    except (LookupError, TypeError):
        return None


class Optimizer(stock.Optimizer):
    """The base class for optimizers, as ``mlx.optimizers.Optimizer``.

    A subclass defines ``init_single(parameter, state)``, which fills a parameter's
    state dict, and ``apply_single(gradient, parameter, state)``, which returns the
    new parameter and changes that dict.

    When a step raises, the state tree, the scheduled values and the step count are
    what they were before it. This does not hold for what ``mx.compile`` does: when a
    function that it compiles raises while it is traced, the arrays that it captured
    stay placeholders. The next step outside of ``mx.compile`` says so, and so does
    :func:`save`; restore model and state then, for example with :func:`load`.

    Args:
        schedulers (dict, optional): Callables that take the step and give the value
            of the state entry of their name.
        {options}

    The options are attributes too, and may be set between steps. As of every attribute,
    a function that ``mx.compile`` has traced keeps the values that it was traced with.

    Raises:
        TypeError, ValueError: If an option is of the wrong type or out of range.
    """

    max_grad_norm: float | None = None
    clip_by_last_norm: bool = False
    skip_nonfinite: bool = False
    accumulate: int | None = None
    accumulate_dtype: mx.Dtype | None = None
    ema: float | None = None
    takes_ema: bool = True  # else the class keeps an average of its own
    _lends_averages = False  # whether a model has the averages' weights now
    # While it has pieces of the parameters, as part of a ShardedOptimizer.
    _known: Known | None = None

    def __init__(
        self,
        schedulers: dict[str, Callable[[mx.array], mx.array]] | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        super().__init__(schedulers)
        self._set_step_options(**options)

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        documented(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in OPTIONS:
            super().__setattr__(name, value)
            return
        OPTIONS[name].check(self, value)
        before = self._option_state()
        super().__setattr__(name, value)
        self._initialized = False  # the next step brings the state into its form
        for entry in before.keys() - self._option_state():
            self.state.pop(entry, None)

    def _set_step_options(
        self,
        max_grad_norm: float | None = None,
        clip_by_last_norm: bool = False,
        skip_nonfinite: bool = False,
        accumulate: int | None = None,
        accumulate_dtype: mx.Dtype | None = None,
        ema: float | None = None,
        **unknown: Any,
    ) -> None:
        for name in unknown:
            raise TypeError(
                f"{type(self).__name__}() got an unexpected keyword argument '{name}'"
            )
        self.max_grad_norm = max_grad_norm
        self.clip_by_last_norm = clip_by_last_norm
        self.skip_nonfinite = skip_nonfinite
        self.accumulate = accumulate
        self.accumulate_dtype = accumulate_dtype
        self.ema = ema
        self._set_option_state()

    def _set_option_state(self) -> None:
        """Give the state the entries of the options that are on.

        Only then, so that a checkpoint is that of mlx.optimizers by default.
        """
        state = self.state
        for name, dtype in self._option_state().items():
            if name not in state:
                state[name] = mx.array(0, dtype)
            elif isinstance(state[name], (dict, list, tuple)):
                raise self._is_taken(name)

    @property
    def takes_whole(self) -> bool:
        """Whether it needs whole parameters, and not the shards that a rank has."""
        return False

    def _option_state(self) -> dict[str, mx.Dtype]:
        """The entries of the state that the options need."""
        wanted = {
            "grad_norm": (self._needs_norm(), mx.float32),
            "skipped_steps": (self.skip_nonfinite, mx.uint64),
            "micro_step": (self._accumulates(), mx.uint32),
        }
        return {name: dtype for name, (is_on, dtype) in wanted.items() if is_on}

    def _is_taken(self, name: str) -> ValueError:
        return ValueError(
            f"[{type(self).__name__}] the parameter '{name}' has the name of an entry "
            "of the optimizer's state; rename it"
        )

    def _needs_norm(self) -> bool:
        return self.max_grad_norm is not None or self.skip_nonfinite

    def _accumulates(self) -> bool:
        return self.accumulate is not None and self.accumulate > 1

    @property
    def state(self) -> Any:
        """The state: a dict of the optimizer's own entries and the parameters' states.

        A function that ``mx.compile`` has compiled with the state among its inputs
        holds this very dict. When another is assigned it goes on with the old one; to
        change what it sees, change the dict, as in ``optimizer.state.update(...)`` or
        with :func:`load`.
        """
        return self._state

    @state.setter
    def state(self, state: Any) -> None:
        check_tree("state", state)
        self._initialized = False
        self._state = state

    @property
    def learning_rate(self) -> Any:
        """The learning rate, an array: the last step's if there is a schedule."""
        if "learning_rate" not in self.state:
            reason = {
                True: ": relative_step is on",
                False: "; with relative_step=False it has to be given",
                None: "",
            }[getattr(self, "relative_step", None)]
            raise AttributeError(f"{type(self).__name__} has no learning_rate{reason}")
        return self.state["learning_rate"]

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        if "learning_rate" in self._schedulers:
            warn_caller("learning_rate is set without effect: there is a schedule")
        elif getattr(self, "relative_step", False):
            warn_caller("learning_rate is set without effect: relative_step is on")
        self.state["learning_rate"] = self._number("learning_rate", learning_rate)

    def _maybe_schedule(self, name: str, parameter: Any) -> None:
        if callable(parameter):
            self._schedulers[name] = parameter
            self.state[name] = self._scheduled(name, parameter(self.step))
        else:
            self.state[name] = self._number(name, parameter)

    def _number(self, name: str, value: Any) -> mx.array:
        """An array of its own; one element is a scalar."""
        if not is_number_or_array(value) and not isinstance(value, (list, tuple)):
            raise TypeError(
                f"[{type(self).__name__}] {name} is of type {type(value).__name__}; "
                "expected a scalar"
            )
        array = mx.array(value)
        if array.dtype == mx.complex64:
            raise TypeError(
                f"[{type(self).__name__}] {name} is complex; expected a real scalar"
            )
        return array.reshape(()) if array.size == 1 else array

    def _scheduled(self, name: str, value: Any) -> mx.array:
        array = self._number(f"what the schedule of {name} gave", value)
        if array.ndim > 0:
            raise ValueError(
                f"[{type(self).__name__}] the schedule of {name} gave an array of "
                f"shape {array.shape}; expected a scalar"
            )
        # NumPy's numbers and Python's; an mx.array keeps its dtype, as upstream.
        return array if isinstance(value, mx.array) else array.astype(mx.float32)

    @property
    def grad_norm(self) -> mx.array | None:
        """The global norm of the last step's gradients before scaling.

        A float32 scalar, float64 if a gradient was; ``None`` without
        ``max_grad_norm`` and ``skip_nonfinite``.
        """
        norm: mx.array | None = self.state.get("grad_norm")
        return norm

    @property
    def skipped_steps(self) -> mx.array | None:
        """Steps skipped, a uint64; ``None`` without ``skip_nonfinite``."""
        skipped: mx.array | None = self.state.get("skipped_steps")
        return skipped

    def init(self, parameters: Any) -> None:
        """Initialize the optimizer's state.

        Optional: the first step does it. It is useful for access to :attr:`state`
        before that, and needed before ``mx.compile`` captures the state.

        Needed again when the model has changed: what is new, or has another shape,
        gets a fresh state, and what is gone loses its. The first call after
        :attr:`state` was assigned or loaded only adds what is missing. Entries that are
        no parameter's, such as the step count, stay.

        Args:
            parameters (dict): A Python tree of parameters.

        Raises:
            TypeError: If ``parameters`` is no dict or a leaf is no array.
            ValueError: If a parameter has the name of an entry of the state.
        """
        check_tree("parameters", parameters)
        kernels.Leaves(parameters, what="value")  # names what is no array
        self._set_option_state()
        state = self.state
        if self.ema is not None and _is_zero(state.get("step")):
            _drop(state, AVERAGE)  # weights may have been loaded since
        for name in parameters:
            if name in state and not isinstance(state[name], (dict, list, tuple)):
                raise self._is_taken(name)
        if self._initialized:
            for name, value in [*state.items()]:
                if name not in parameters and isinstance(value, (dict, list, tuple)):
                    del state[name]
        for name, parameter in parameters.items():
            state[name] = self._state_of(parameter, state.get(name), name)
        self._initialized = True

    def _state_of(self, node: Any, state: Any, path: str) -> Any:
        """The state of a node of the parameters, made of what it was."""
        if isinstance(node, dict):
            state = state if isinstance(state, dict) else {}
            if self._initialized:
                for name in state.keys() - node.keys():
                    del state[name]
            for name, child in node.items():
                state[name] = self._state_of(child, state.get(name), f"{path}.{name}")
            return state
        if isinstance(node, (list, tuple)):
            was = state if isinstance(state, (list, tuple)) else ()
            states = [
                self._state_of(child, was[i] if i < len(was) else None, f"{path}.{i}")
                for i, child in enumerate(node)
            ]
            if not self._initialized:
                states.extend(was[len(states) :])
            if isinstance(state, list):
                state[:] = states
                return state
            return rebuilt(node, states)
        state = state if isinstance(state, dict) else {}
        if self._initialized and state:
            shapes = self._shapes(node)
            if not all(has_shape(state, k, x) for k, x in shapes.items()):
                state.clear()
        is_new = not state.keys() - HELD
        if is_new:
            self.init_single(node, state)
        self._hold(path, node, state, is_new)
        return state

    def _hold(
        self,
        path: str,
        parameter: mx.array,
        state: dict[str, Any],
        is_new: bool = False,
    ) -> None:
        """Bring a parameter's state into the form that the options ask for."""
        if self._accumulates():
            hold_sum(state, parameter, self.accumulate_dtype)
        if self.ema is not None:
            hold_average(state, parameter)
        is_on = {SUM: self._accumulates(), AVERAGE: self.ema is not None}
        if off := [key for key in HELD if key in state and not is_on[key]]:
            own: dict[str, Any] = {}
            self.init_single(parameter, own)
            for key in off:
                if key not in own:  # as a user's class may have it
                    del state[key]

    def _added_states(self) -> tuple[str, ...]:
        """The states that an argument adds, and a checkpoint may be without."""
        return ()

    def _shapes(self, parameter: mx.array) -> dict[str, Any]:
        """The shapes that the entries of a parameter's state must have.

        Only those of the parameter's shape: others may be a user's, and change.
        """
        state: dict[str, Any] = {}
        self.init_single(parameter, state)
        shapes = {key: getattr(x, "shape", None) for key, x in state.items()}
        return {key: x for key, x in shapes.items() if x == parameter.shape}

    def update(self, model: Any, gradients: Any) -> None:
        """Apply the gradients to the parameters of the model and update the model.

        Args:
            model (mlx.nn.Module): The model.
            gradients (dict): A Python tree of gradients, as of
                ``mlx.nn.value_and_grad``.

        Raises:
            KeyError: If a gradient has no parameter or no state.
            TypeError: If ``gradients`` is no dict, or a gradient or parameter no array.
            ValueError: If shapes do not fit, or a schedule gives no scalar.
            RuntimeError: If a function that ``mx.compile`` compiled has raised, and
                left its placeholders in model and state; restore them then.
        """
        check_given("model", model)
        check_tree("gradients", gradients)
        apply_gradients = getattr(self.apply_gradients, "__func__", None)
        if apply_gradients is not Optimizer.apply_gradients:  # a user's own
            model.update(self.apply_gradients(gradients, model))
            return
        shards = self._shards_of_model(model, gradients)
        with self._restored_on_error(model, gradients):
            model.update(self._step(gradients, model, None, shards))

    def apply_gradients(
        self,
        gradients: Any,
        parameters: Any,
        group: mx.distributed.Group | None = None,
        sharded: Sharded | None = None,
    ) -> Any:
        """Apply the gradients to the parameters and return the updated parameters.

        Args:
            gradients (dict): A Python tree of gradients.
            parameters (dict): A Python tree of parameters. It can be a superset of
                the gradients.
            group (mx.distributed.Group, optional): The ranks of which each has a shard
                of the parameters, so that norms and skips are those of all of them.
                :meth:`update` finds it by the model's modules. Default: all ranks, if
                ``sharded`` is given
            sharded (collection or callable, optional): The paths of the shards, or
                ``(path, array) -> bool``; the other parameters are whole on each rank.
                Default: all, if ``group`` is given

        Returns:
            dict: The updated parameters, in a tree of the gradients' structure.

        Raises:
            KeyError: If a gradient has no parameter or no state.
            TypeError: If ``gradients`` is no dict, or a gradient or parameter no array.
            ValueError: If shapes do not fit, a schedule gives no scalar, or the rule
                needs whole matrices and gets shards.
            RuntimeError: As in :meth:`update`.
        """
        check_given("parameters", parameters)
        check_tree("gradients", gradients)
        shards = shards_of_arguments(gradients, group, sharded)
        undo = self._remember()
        try:
            # Returned from here, so that no interrupt falls behind the guard.
            return self._step(gradients, parameters, None, shards)
        except BaseException:
            undo()
            raise

    @contextmanager
    def averaged(self, model: Any) -> Iterator[Any]:
        """Give a model the averages of its weights for as long as the context lasts.

        The average of a weight :math:`w` with ``ema=`` :math:`\\beta` is

        .. math:: a_{t+1} = \\beta a_t + (1 - \\beta) w_{t+1}

        and begins as the weights of :meth:`init` or of the first step. Parameters
        without one, such as those that were frozen, keep their weights. Afterwards, and
        after an exception too, the model has the very arrays that it had before.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> optimizer = optim.SGD(0.1, ema=0.9)
            >>> optimizer.update(model, model.trainable_parameters())
            >>> weight = model.weight
            >>> with optimizer.averaged(model):
            ...     print(mx.array_equal(model.weight, weight).item())
            False
            >>> model.weight is weight
            True

        Args:
            model (mlx.nn.Module): The model that the optimizer updates.

        Yields:
            mlx.nn.Module: The model.

        Raises:
            RuntimeError: If it has been entered already. Inside, a step of the
                optimizer, :func:`save` and :func:`load` raise it.
            TypeError: If ``model`` is no module.
            ValueError: If the option ``ema`` is off, or there is no average yet.
        """
        name = type(self).__name__
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model is of type {type(model).__name__}; expected an mlx.nn.Module"
            )
        parts = [part for part in parts_of(self) if isinstance(part, Optimizer)]
        others = [part for part in parts if not part.takes_ema]  # averages of their own
        if all(part.ema is None for part in parts) and not others:
            raise ValueError(f"[{name}] averaged() needs averages: pass ema=0.999")
        self._refuse_averaged("averaged()")
        before = model.parameters()
        states = [part.state for part in parts if part.ema is not None]
        found = _averages(before, states)
        if not found and not others:
            raise ValueError(
                f"[{name}] there are no averages of this model's weights; call {INIT}"
            )
        with ExitStack() as stack:
            stack.callback(model.update, before)
            for part in parts:
                part._lends_averages = True
                stack.callback(setattr, part, "_lends_averages", False)
            for part in others:
                stack.enter_context(part.averaged(model))
            model.update(found or {})
            yield model

    def _refuse_averaged(self, what: str) -> None:
        if self._lends_averages:
            raise RuntimeError(
                f"[{type(self).__name__}] {what} within averaged(): the model has the "
                "averages in place of its weights; leave the context before"
            )

    @contextmanager
    def _restored_on_error(self, model: Any, gradients: Any) -> Iterator[None]:
        undo = self._remember()
        before = kernels.Snapshot(model, gradients)
        try:
            yield
        except BaseException:
            undo()
            before.restore()
            raise

    def _remember(self) -> Callable[[], None]:
        """What undoes every change of the optimizer's state from now on."""
        flags = [(part, part._initialized) for part in parts_of(self)]
        before = kernels.Snapshot(self.state)

        def undo() -> None:
            before.restore()
            for part, flag in flags:
                part._initialized = flag

        return undo

    def _shards_of_model(self, model: Any, gradients: Any) -> Shards:
        """The model's shards, if a part of this optimizer has to know of them."""
        is_needed = any(
            isinstance(part, Optimizer) and (part.takes_whole or part._needs_norm())
            for part in parts_of(self)
        )
        return shards_of_model(model, gradients) if is_needed else {}

    def _check_shards(self, leaves: Leaves, shards: Shards) -> None:
        """Refuse shards of what must be whole: others would compute something else."""
        if not self.takes_whole or not shards:
            return
        for path in paths(leaves.tree):
            if path in shards:
                raise ValueError(
                    f"[{type(self).__name__}] '{path}' is a shard, of which "
                    f"{shards[path].size()} ranks have one each; expected whole "
                    "parameters. Leave it to another optimizer, as with MultiOptimizer"
                )

    def _step(
        self,
        gradients: Any,
        parameters: Any,
        clip: Clip | None,
        shards: Shards = NO_SHARDS,
    ) -> Any:
        """One step; clip is given where it was measured over more than these."""
        self._refuse_averaged("a step")
        if not self._initialized:
            self.init(self._initial(kernels.Leaves(gradients, parameters)))
        self._set_option_state()
        leaves = kernels.Leaves(gradients, parameters, self.state)
        self._check_shards(leaves, shards)
        if "step" not in self.state:
            raise KeyError(
                f"[{type(self).__name__}] the state has no 'step'; was a part of a "
                "state assigned?"
            )
        self.state["step"] = self._step_count(self.step)
        for name, schedule in self._schedulers.items():
            self.state[name] = self._scheduled(name, schedule(self.step))
        if self._accumulates():
            summed = self._add(leaves, clip)
            if summed is None and not shards:
                return leaves.replace(leaves.parameters)
            leaves = kernels.Leaves(summed, parameters, self.state)
            clip = self._clip_of_mean(leaves, clip, shards)
            self._record(clip)
        elif clip is None:
            clip = self._measure(leaves, shards)
            self._record(clip)
        leaves.keep_dtypes = clip.keep_dtypes
        step = self.step + 1
        if clip.skip is not None:
            step = mx.where(clip.skip, self.step, step)
        self.state["step"] = step
        leaves.ema = self.ema
        updated = self._apply_leaves(leaves, clip)
        if self.ema is not None and not self._averages_in_pass():
            self._average(updated, self.ema, clip)
        return updated

    def _averages_in_pass(self) -> bool:
        """Whether the kernels that write the parameters write their averages too."""
        return False

    def _average(self, parameters: Any, ema: float, clip: Clip) -> None:
        """Take the new parameters into their averages."""
        leaves = kernels.Leaves(parameters, None, self.state)
        for i, (parameter, state) in enumerate(
            zip(leaves.gradients, leaves.states, strict=True)
        ):
            state[AVERAGE] = as_array(state.get(AVERAGE))
            if is_error(state.get("error")) and parameter.dtype in HALF_DTYPES:
                leaves.set_gradient(i, kernels.join(parameter, state["error"]))
        leaves.update("WeightAverage", [{"ema": ema}], skip=clip.skip)
        leaves.commit()

    def _initial(self, leaves: Leaves) -> Any:
        """The tree for which a first step initializes the state."""
        averages = self.ema is not None
        return leaves.replace(leaves.parameters) if averages else leaves.tree

    def _step_count(self, step: Any) -> Any:
        """The count, in a dtype that can go on counting: float16 ends at 2048."""
        if isinstance(step, mx.array) and step.dtype in (mx.float16, mx.bfloat16):
            return step.astype(mx.uint64)
        if is_number_or_array(step):
            return step
        raise TypeError(
            f"[{type(self).__name__}] step is of type {type(step).__name__}; expected "
            "a scalar"
        )

    def _record(self, clip: Clip) -> None:
        state = self.state
        norm, skip = clip.norm, clip.skip
        if clip.waits is not None:
            skip = None if skip is None else skip & ~clip.waits
            if norm is not None:
                norm = mx.where(clip.waits, state["grad_norm"], norm)
        if norm is not None:
            state["grad_norm"] = norm
        if skip is not None and self.skip_nonfinite:
            state["skipped_steps"] = state["skipped_steps"] + skip

    def _add(self, leaves: Leaves, whole: Clip | None) -> Any:
        """Add the gradients to their sums, and return the sums' tree.

        None if the step is known to be a later call's: then nothing else need be done.
        What the whole that this is a part of has measured holds for each gradient.
        """
        whole = whole or Clip()
        state = self.state
        count = as_array(state["micro_step"]).astype(mx.uint32)
        known = kernels.known(count)
        self._check_sums(leaves)
        done = leaves.update(
            "GradientSum",
            [{}],
            step=count,
            gradient_scale=whole.scale,
            skip=whole.skip,
            state_dtype=self.accumulate_dtype,
        )
        assert done
        leaves.commit()
        added = count + 1
        if whole.skip is not None:
            added = mx.where(whole.skip, count, added)
        state["micro_step"] = added
        if known is not None and known + 1 < (self.accumulate or 1):
            return None
        return leaves.replace([state[SUM] for state in leaves.states])

    def _check_sums(self, leaves: Leaves) -> None:
        """Refuse what does not fit at each call: the k-th would find it too late."""
        for i, (gradient, parameter, state) in enumerate(
            zip(leaves.gradients, leaves.parameters, leaves.states, strict=True)
        ):
            shape = gradient.shape
            total = state[SUM] = as_array(state.get(SUM))
            if getattr(total, "shape", None) == shape == parameter.shape:
                continue
            title = f"[{type(self).__name__}] the %s of '{paths(leaves.tree)[i]}'"
            try:
                mx.broadcast_shapes(shape, parameter.shape)
            except ValueError as error:
                raise ValueError(
                    f"{title % 'gradient'} has shape {shape}; expected "
                    f"{parameter.shape}"
                ) from error
            if getattr(total, "shape", None) not in (shape, parameter.shape):
                raise ValueError(
                    f"{title % SUM} has shape {getattr(total, 'shape', None)}; "
                    f"expected {parameter.shape}. When a model has changed, call "
                    f"{INIT}"
                )

    def _clip_of_mean(self, leaves: Leaves, whole: Clip | None, shards: Shards) -> Clip:
        """What makes a step of sums of gradients, or waits for more of them."""
        count = self.state["micro_step"]
        waits = count < (self.accumulate or 1)
        if whole is not None and whole.skip is not None:
            waits = waits | whole.skip
        self.state["micro_step"] = mx.where(waits, count, 0).astype(mx.uint32)
        # As many as there are, should k have changed. There is one at least, or none
        # is used.
        number = mx.maximum(count, 1).astype(mx.float32)
        if mx.float64 in (leaves.dtypes() or ()):
            for i, total in enumerate(leaves.gradients):
                leaves.set_gradient(i, (total / number).astype(total.dtype))
            number = mx.array(1.0)
        clip = self._measure(leaves, shards, number)
        keeps = self.accumulate_dtype is not None or (whole or Clip()).keep_dtypes
        return clip._replace(
            scale=1 / number if clip.scale is None else clip.scale,
            skip=waits if clip.skip is None else waits | clip.skip,
            waits=waits,
            keep_dtypes=keeps,
        )

    def _asked(self, path: str, array: Any) -> tuple[str, Any]:
        """What filters are asked about: the whole, also where this has a piece."""
        return (path, array) if self._known is None else self._known.whole(path)

    def _measure(
        self, leaves: Leaves, shards: Shards, number: mx.array | None = None
    ) -> Clip:
        """The norm of the gradients, or of their mean if they are sums of a number."""
        if not self._needs_norm():
            return Clip()
        limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
        if self._known is not None:
            norm, factor = self._known.measure(leaves.gradients, limit)
        elif self.clip_by_last_norm and not shards:
            return self._measure_in_chunks(leaves, limit, number)
        else:
            norm, factor = measure(leaves.gradients, limit, leaves.tree, shards)
        if number is not None:
            norm = norm / number
            factor = clip_factor(limit, norm)
        if self.clip_by_last_norm:
            factor = clip_factor(limit, self.state["grad_norm"])
        if number is not None:
            factor = factor / number
        if factor.dtype == mx.float64:
            # The kernels' factor is a float32, whose range may not hold it.
            for i, gradient in enumerate(leaves.gradients):
                leaves.set_gradient(i, (gradient * factor).astype(gradient.dtype))
            factor = mx.array(1.0)
        return Clip(
            norm,
            None if self.max_grad_norm is None else factor,
            ~mx.isfinite(norm) if self.skip_nonfinite else None,
        )

    def _measure_in_chunks(
        self, leaves: Leaves, limit: float, number: mx.array | None
    ) -> Clip:
        """The last norm's factor, and the norm in parts that need no other's."""
        gradients = leaves.gradients
        total = carry = mx.array(0.0)
        chunks = []
        end = len(gradients)
        while end > 0:  # from the last, as they become ready
            start, elements = end, 0
            while start > 0 and elements < FULL and end - start < CHUNK:
                start -= 1
                elements += gradients[start].size
            chosen = [*range(start, end)]
            end = start
            # In a chain, as the updates: MLX would compute what all of the norms need
            # before the first update.
            parts = [*(gradients[i] for i in chosen), carry]
            total, _, carry = _measure_on(parts, limit)
            chunks.append((chosen, total))
        factor = clip_factor(limit, self.state["grad_norm"])
        if number is not None:
            total, factor = total / number, factor / number
        return Clip(total, factor, None, chunks)

    def _apply_leaves(self, leaves: Leaves, clip: Clip) -> Any:
        """The updated parameters' tree; states get their new entries."""
        named = zip(
            paths(leaves.tree),
            leaves.gradients,
            leaves.parameters,
            leaves.states,
            strict=True,
        )
        updated = []
        for path, gradient, parameter, state in named:
            held = {key: state.pop(key) for key in HELD if key in state}
            updated.append(self._apply_one(path, gradient, parameter, state, clip))
            state.update(held)
        return leaves.replace(updated)

    def _apply_one(
        self, path: str, gradient: Any, parameter: Any, state: Any, clip: Clip
    ) -> Any:
        """The updated parameter, by the user's apply_single."""
        if clip.scale is not None:
            dtype = parameter.dtype if clip.keep_dtypes else gradient.dtype
            gradient = (gradient * clip.scale).astype(dtype)
        if clip.skip is None:
            return self.apply_single(gradient, parameter, state)
        before = dict(state)
        updated = self.apply_single(gradient, parameter, state)
        for key, value in before.items():
            state[key] = mx.where(clip.skip, value, state[key])
        return mx.where(clip.skip, parameter, updated)


documented(Optimizer)
