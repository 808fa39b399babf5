"""The step that all share: trees in, one call of the extension, trees out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple
from zlib import crc32

import mlx.core as mx
import mlx.optimizers as stock
from mlx.utils import tree_flatten

from .._formats import (
    HALF_DTYPES,
    has_shape,
    is_error,
    is_half,
    kind_of,
    master_of,
    plain_name,
)
from .._kernels import kernels
from .held import hold, hold_error, hold_zeros, release
from .options import (
    FUSED_DTYPES,
    OPTIONS,
    QuantizeFilter,
    StepOptions,
    WeightDecayFilter,
    check_numbers,
    documented,
    warn_caller,
    warn_of_arguments,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .._ext import Leaves
    from .options import DecayOptions

INIT = "optimizer.init(model.trainable_parameters())"

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


def as_array(value: Any) -> Any:
    """An array of what upstream takes in its place: a number, or NumPy's arrays."""
    is_convertible = isinstance(value, (int, float)) or hasattr(value, "__array__")
    is_array = isinstance(value, mx.array)
    return mx.array(value) if is_convertible and not is_array else value


def check_tree(argument: str, tree: Any) -> None:
    """Refuse what is no dict: a state has entries of its own beside parameters'."""
    if not isinstance(tree, dict):
        raise TypeError(f"{argument} is of type {type(tree).__name__}; expected a dict")


def check_given(argument: str, tree: Any) -> None:
    if tree is None:
        raise TypeError(f"{argument} is None; expected an mlx.nn.Module or a dict")


def measure(
    gradients: list[mx.array], max_norm: float | mx.array
) -> tuple[mx.array, mx.array]:
    """The global norm of arrays of any dtypes, and the factor that clips it.

    That of complex numbers is the norm of their magnitudes. Beside a float64 gradient
    both are float64: its range is not float32's.
    """
    if any(g.dtype == mx.float64 for g in gradients):
        return _measure_double(gradients, max_norm)
    if any(g.dtype not in FUSED_DTYPES for g in gradients):
        gradients = [mx.abs(g).astype(mx.float32) for g in gradients]
    limit = mx.array(max_norm, mx.float32).reshape(())
    _, norm, factor = kernels.sums_of_squares(gradients, limit)
    return norm, factor


def _measure_double(
    gradients: list[mx.array], max_norm: float | mx.array
) -> tuple[mx.array, mx.array]:
    magnitudes = [mx.abs(g).astype(mx.float64) for g in gradients if g.size > 0]
    largest = mx.max(mx.stack([mx.max(x) for x in magnitudes]))
    # No square overflows then; an infinite gradient still gives an infinite norm.
    unit = mx.where(mx.isfinite(largest) & (largest > 0), largest, 1.0)
    squares = [mx.square(x / unit).sum() for x in magnitudes]
    norm = unit * mx.sqrt(mx.stack(squares).sum())
    limit = mx.array(max_norm, mx.float64).reshape(())
    return norm, mx.minimum(limit / (norm + 1e-6), 1.0)


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
        **unknown: Any,
    ) -> None:
        for name in unknown:
            raise TypeError(
                f"{type(self).__name__}() got an unexpected keyword argument '{name}'"
            )
        self.max_grad_norm = max_grad_norm
        self.clip_by_last_norm = clip_by_last_norm
        self.skip_nonfinite = skip_nonfinite
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

    def _option_state(self) -> dict[str, mx.Dtype]:
        """The entries of the state that the options need."""
        norm = {"grad_norm": mx.float32} if self._needs_norm() else {}
        return {**norm, "skipped_steps": mx.uint64} if self.skip_nonfinite else norm

    def _is_taken(self, name: str) -> ValueError:
        return ValueError(
            f"[{type(self).__name__}] the parameter '{name}' has the name of an entry "
            "of the optimizer's state; rename it"
        )

    def _needs_norm(self) -> bool:
        return self.max_grad_norm is not None or self.skip_nonfinite

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
        is_number = isinstance(value, (int, float, list, tuple, mx.array))
        if not is_number and not hasattr(value, "__array__"):
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
        is_new = not state
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
        with self._restored_on_error(model, gradients):
            model.update(self._step(gradients, model, None))

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        """Apply the gradients to the parameters and return the updated parameters.

        Args:
            gradients (dict): A Python tree of gradients.
            parameters (dict): A Python tree of parameters. It can be a superset of
                the gradients.

        Returns:
            dict: The updated parameters, in a tree of the gradients' structure.

        Raises:
            KeyError: If a gradient has no parameter or no state.
            TypeError: If ``gradients`` is no dict, or a gradient or parameter no array.
            ValueError: If shapes do not fit, or a schedule gives no scalar.
            RuntimeError: As in :meth:`update`.
        """
        check_given("parameters", parameters)
        check_tree("gradients", gradients)
        undo = self._remember()
        try:
            # Returned from here, so that no interrupt falls behind the guard.
            return self._step(gradients, parameters, None)
        except BaseException:
            undo()
            raise

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

    def _step(self, gradients: Any, parameters: Any, clip: Clip | None) -> Any:
        """One step; clip is given where it was measured over more than these."""
        if not self._initialized:
            self.init(self._initial(kernels.Leaves(gradients, parameters)))
        self._set_option_state()
        leaves = kernels.Leaves(gradients, parameters, self.state)
        if "step" not in self.state:
            raise KeyError(
                f"[{type(self).__name__}] the state has no 'step'; was a part of a "
                "state assigned?"
            )
        self.state["step"] = self._step_count(self.step)
        for name, schedule in self._schedulers.items():
            self.state[name] = self._scheduled(name, schedule(self.step))
        if clip is None:
            clip = self._measure(leaves)
            self._record(clip)
        step = self.step + 1
        if clip.skip is not None:
            step = mx.where(clip.skip, self.step, step)
        self.state["step"] = step
        return self._apply_leaves(leaves, clip)

    def _initial(self, leaves: Leaves) -> Any:
        """The tree for which a first step initializes the state."""
        return leaves.tree

    def _step_count(self, step: Any) -> Any:
        """The count, in a dtype that can go on counting: float16 ends at 2048."""
        if isinstance(step, mx.array) and step.dtype in (mx.float16, mx.bfloat16):
            return step.astype(mx.uint64)
        if isinstance(step, (int, float)) or hasattr(step, "__array__"):
            return step
        raise TypeError(
            f"[{type(self).__name__}] step is of type {type(step).__name__}; expected "
            "a scalar"
        )

    def _record(self, clip: Clip) -> None:
        state = self.state
        if clip.norm is not None:
            state["grad_norm"] = clip.norm
        if clip.skip is not None:
            state["skipped_steps"] = state["skipped_steps"] + clip.skip

    def _measure(self, leaves: Leaves) -> Clip:
        if not self._needs_norm():
            return Clip()
        limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
        if self.clip_by_last_norm:
            return self._measure_in_chunks(leaves, limit)
        norm, factor = measure(leaves.gradients, limit)
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

    def _measure_in_chunks(self, leaves: Leaves, limit: float) -> Clip:
        """The last norm's factor, and the norm in parts that need no other's."""
        gradients = leaves.gradients
        total = mx.array(0.0)
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
            total, _ = measure([*(gradients[i] for i in chosen), total], limit)
            chunks.append((chosen, total))
        factor = mx.minimum(limit / (self.state["grad_norm"] + 1e-6), 1.0)
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
        return leaves.replace([self._apply_one(*leaf, clip) for leaf in named])

    def _apply_one(
        self, path: str, gradient: Any, parameter: Any, state: Any, clip: Clip
    ) -> Any:
        """The updated parameter, by the user's apply_single."""
        if clip.scale is not None:
            gradient = (gradient * clip.scale).astype(gradient.dtype)
        if clip.skip is None:
            return self.apply_single(gradient, parameter, state)
        before = dict(state)
        updated = self.apply_single(gradient, parameter, state)
        for key, value in before.items():
            state[key] = mx.where(clip.skip, value, state[key])
        return mx.where(clip.skip, parameter, updated)


documented(Optimizer)


def _is_large(path: str, parameter: mx.array) -> bool:
    """Whether codes are worth it; norms and biases matter most, and cost little."""
    return parameter.size >= 4096


class FusedOptimizer(Optimizer):
    """An optimizer whose update is a rule of ``metal/update_rules.h``.

    A class names its rule in ``rule``; the rule's hyper-parameters are attributes of
    its instances, or what ``_hyperparameters`` returns, and the rule's states are the
    entries of a parameter's state. One of ``mlx.optimizers`` lists upstream's class as
    its second base, which gives the constructor's checks and ``init_single``.

    Args:
        learning_rate (float or callable): The learning rate.
        **options: As of the optimizers of this package.
    """

    rule: ClassVar[str]
    takes_codes: ClassVar[bool] = True
    state_dtype: mx.Dtype | str | None = None
    quantize_filter: QuantizeFilter | None = None
    master_weights: str | None = None
    stochastic_rounding: bool = False
    weight_decay_filter: WeightDecayFilter | None = None
    _calls: int = 0  # of steps, for _watch_precision
    _watched: list[Any] | None = None

    def __init__(
        self, learning_rate: LearningRate, **options: Unpack[DecayOptions]
    ) -> None:
        stock.Optimizer.__init__(self)
        self._maybe_schedule("learning_rate", learning_rate)
        self._set_options(**options)

    def _set_options(
        self,
        state_dtype: mx.Dtype | str | None = None,
        quantize_filter: QuantizeFilter | None = None,
        master_weights: str | None = None,
        stochastic_rounding: bool = False,
        weight_decay_filter: WeightDecayFilter | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        self.state_dtype = state_dtype
        self.quantize_filter = quantize_filter
        self.master_weights = master_weights
        self.stochastic_rounding = stochastic_rounding
        self.weight_decay_filter = weight_decay_filter
        self._set_step_options(**options)
        warn_of_arguments(self)

    def init_single(self, parameter: mx.array, state: dict[str, Any]) -> None:
        """Fill a parameter's state.

        Args:
            parameter (array): The parameter.
            state (dict): Gets arrays of the parameter's shape, and of its dtype or
                ``state_dtype``; :meth:`init` brings them into codes.
        """
        inherited = super().init_single
        if getattr(inherited, "__func__", None) is stock.Optimizer.init_single:
            for key in kernels.states(self._rule()):
                state[key] = mx.zeros_like(parameter)
        else:
            inherited(parameter, state)
        self._cast_all(state)

    def _shapes(self, parameter: mx.array) -> dict[str, Any]:
        # What a subclass adds to this class's entries, or gives another shape, is its
        # own.
        own: dict[str, Any] = {}
        given: dict[str, Any] = {}
        FusedOptimizer.init_single(self, parameter, own)
        self.init_single(parameter, given)
        shapes = {key: x.shape for key, x in own.items() if key in given}
        return {key: x for key, x in shapes.items() if given[key].shape == x}

    def _option_state(self) -> dict[str, mx.Dtype]:
        random = {"rounding_seed": mx.uint32} if self.stochastic_rounding else {}
        return {**super()._option_state(), **random}

    def _initial(self, leaves: Leaves) -> Any:
        # What is in codes or has an error is of the parameters' dtypes.
        holds = isinstance(self.state_dtype, str) or self.master_weights is not None
        return leaves.replace(leaves.parameters) if holds else leaves.tree

    def _plain_dtype(self) -> mx.Dtype | None:
        """The dtype of states that are in no codes; None for the parameters'."""
        if isinstance(self.state_dtype, mx.Dtype):
            return self.state_dtype
        holds = self.state_dtype is not None or self.master_weights is not None
        return mx.float32 if holds else None

    def _hold(
        self,
        path: str,
        parameter: mx.array,
        state: dict[str, Any],
        is_new: bool = False,
    ) -> None:
        kind = self.state_dtype if isinstance(self.state_dtype, str) else None
        if parameter.dtype not in FUSED_DTYPES:
            kind = None
        elif kind is not None:
            decides = self.quantize_filter or _is_large
            kind = kind if decides(path, parameter) else None
        if self.takes_codes:
            rule = self._rule()
            was_held = is_error(state.get("error"))
            others = [k for k in kernels.states(rule) if kind_of(state, k) != kind]
            for key in others:
                was_held |= kind_of(state, key) is not None
                release(state, key, parameter.shape, rule)
            init_single = getattr(self.init_single, "__func__", None)
            if kind and is_new and init_single is FusedOptimizer.init_single:
                hold_zeros(state, others, rule, kind, parameter.size)
            else:
                hold(state, others, rule, kind)
            if was_held and self._plain_dtype() is None:
                # A float32 state beside a weight of half precision would widen it.
                for key in kernels.states(rule):
                    state[key] = state[key].astype(parameter.dtype)
        hold_error(state, parameter, self.master_weights)

    def _cast(self, value: Any) -> Any:
        is_moment = isinstance(value, mx.array) and value.dtype in FUSED_DTYPES
        dtype = self._plain_dtype()
        return value if dtype is None or not is_moment else value.astype(dtype)

    def _cast_all(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            state[key] = self._cast(value)

    def _rule(self) -> str:
        """The rule's name, which may depend on arguments."""
        return self.rule

    def _hyperparameters(self) -> dict[str, Any]:
        """The values of the rule's hyper-parameters."""
        names = kernels.hyperparameters(self._rule())
        return {name: getattr(self, name) for name in names}

    def _sets(self, leaves: Leaves) -> tuple[list[dict[str, Any]], list[int] | None]:
        """Sets of hyper-parameters, and which each leaf has; None if all the first."""
        usual = self._hyperparameters()
        if self.weight_decay_filter is None or "weight_decay" not in usual:
            return [usual], None
        if isinstance(leaves.tree, mx.array):  # apply_single's only one
            return [usual], None
        named = zip(paths(leaves.tree), leaves.parameters, strict=True)
        decays = [bool(self.weight_decay_filter(*leaf)) for leaf in named]
        undecayed = {**usual, "weight_decay": 0.0}
        return [usual, undecayed], [0 if x else 1 for x in decays]

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]
    ) -> mx.array:
        """Update one parameter and its state.

        Args:
            gradient (array): The gradient.
            parameter (array): The parameter, of the gradient's shape.
            state (dict): The parameter's state; gets the new arrays.

        Returns:
            array: The updated parameter.
        """
        leaves = kernels.Leaves(gradient, parameter, state)
        self._update_leaves(leaves, Clip())
        updated: mx.array = leaves.commit()
        return updated

    def _apply_leaves(self, leaves: Leaves, clip: Clip) -> Any:
        self._watch_precision(leaves)
        apply_single = getattr(self.apply_single, "__func__", None)
        try:
            if apply_single is not FusedOptimizer.apply_single:  # a user's own
                self._check_states(leaves)
                return super()._apply_leaves(leaves, clip)
            if type(self)._update_leaves is not FusedOptimizer._update_leaves:
                self._check_states(leaves)
            self._update_leaves(leaves, clip)
        except EXPLAINED as error:
            self._explain(error, leaves)
            raise
        return leaves.commit()

    def _check_states(self, leaves: Leaves) -> None:
        """Find states of another shape; where a kernel reads them, it does this."""
        shapes_of = cache(lambda shape: self._shapes(mx.zeros(shape)))
        for gradient, parameter, state in zip(
            leaves.gradients, leaves.parameters, leaves.states, strict=True
        ):
            # Gradients that broadcast make a state of their shape.
            wanted, other = shapes_of(parameter.shape), shapes_of(gradient.shape)
            for key, shape in wanted.items():
                fits = (has_shape(state, key, x) for x in (shape, other[key]))
                if not any(fits):
                    raise ValueError(f"the state {key} has another shape than {shape}")

    def _apply_one(
        self, path: str, gradient: Any, parameter: Any, state: Any, clip: Clip
    ) -> Any:
        """As of all optimizers, for code that knows nothing of the options."""
        keys = kernels.states(self._rule()) if self.takes_codes else []
        kinds = {key: kind for key in keys if (kind := kind_of(state, key))}
        for key in kinds:
            release(state, key, parameter.shape, self._rule())
        dtype = parameter.dtype
        master = None
        if is_error(state.get("error")) and dtype in HALF_DTYPES:
            error = state.pop("error")
            master = master_of(error)
            parameter = kernels.join(parameter, error)
        elif self.stochastic_rounding and dtype in HALF_DTYPES:
            parameter = parameter.astype(mx.float32)
        self._cast_all(state)
        usual = getattr(self, "weight_decay", None)
        decays = self.weight_decay_filter
        try:
            if decays is not None and not decays(path, parameter):
                self.weight_decay = 0.0
            updated = super()._apply_one(path, gradient, parameter, state, clip)
        finally:
            if usual is not None:
                self.weight_decay = usual
        if self._plain_dtype() is None and not self.stochastic_rounding:
            return updated
        self._cast_all(state)
        for key, kind in kinds.items():
            hold(state, [key], self._rule(), kind)
        if master is not None:
            updated, state["error"] = kernels.split(updated, master, dtype)
        elif self.stochastic_rounding and dtype in HALF_DTYPES:
            updated = kernels.round_stochastically(
                updated.astype(mx.float32),
                dtype,
                self.state["rounding_seed"],
                self.step,
                crc32(path.encode()),
            )
        return updated.astype(dtype)

    def _update_leaves(self, leaves: Leaves, clip: Clip) -> None:
        """Compute what becomes of the leaves; nothing is changed yet."""
        sets, set_of = self._sets(leaves)

        def run(
            chosen: list[int] | None = None, after: Sequence[mx.array] = ()
        ) -> None:
            self._run(
                leaves,
                self._rule(),
                sets,
                sets=set_of
                if chosen is None
                else set_of and [set_of[i] for i in chosen],
                learning_rate=as_array(self.state.get("learning_rate")),
                gradient_scale=clip.scale,
                skip=clip.skip,
                indices=chosen,
                after=after,
            )

        if not clip.chunks:
            run()
        previous: list[mx.array] = []
        for chosen, norm in clip.chunks:
            run(chosen, [norm, *previous])
            previous = [leaves.parameters[chosen[0]]]

    def _run(
        self, leaves: Leaves, rule: str, hyperparameters: Any, **rest: Any
    ) -> None:
        """Update leaves by a rule."""

        def run() -> bool:
            return leaves.update(
                rule,
                hyperparameters,
                step=as_array(self.step),
                seed=self.state.get("rounding_seed"),
                **{"state_dtype": self._plain_dtype(), **rest},
            )

        if run():
            return
        for i, (parameter, state) in enumerate(
            zip(leaves.parameters, leaves.states, strict=True)
        ):
            leaves.set_parameter(i, as_array(parameter))
            for key in kernels.states(rule):
                if key in state:
                    state[key] = as_array(state[key])
        if not run():
            raise TypeError(f"[{type(self).__name__}] expected trees of arrays")

    def _watch_precision(self, leaves: Leaves) -> None:
        """Warn, once, of weights of half precision that a step does not change.

        Looks at a few steps of the run, after them: that holds no array, and evaluates
        nothing but what the step before has made.
        """
        self._calls += 1
        before, self._watched = self._watched, None
        is_due = self._calls & (self._calls - 1) == 0 and self._calls <= 1 << 12
        if self.master_weights or self.stochastic_rounding or not (before or is_due):
            return
        halves = [p for p in leaves.parameters if is_half(p)]
        if not halves or len(halves) < len(leaves):
            return
        try:
            # Sums that tell the upper byte from the lower, without another array.
            now = [
                mx.sum(p.view(dtype)).item()
                for p in halves
                if p.ndim > 0
                for dtype in (mx.uint16, mx.uint8)
            ]
            rate = self.state.get("learning_rate")
            moves = rate is not None and bool(mx.any(as_array(rate) != 0).item())
            if before == now and any(mx.any(g != 0).item() for g in leaves.gradients):
                warn_caller(
                    f"{type(self).__name__}: a step changed no parameter, as it is "
                    f"below the precision of {halves[0].dtype}. Use "
                    'master_weights="24bit" or stochastic_rounding=True'
                )
                self._calls = 1 << 12
                return
        except ValueError:  # MLX evaluates nothing inside of transformations
            return
        if is_due and moves:
            self._watched = now

    def _explain(self, error: Exception, leaves: Leaves) -> None:
        """Raise a clearer error, if the leaves tell what is wrong."""
        name = type(self).__name__
        if "learning_rate" in self.state:
            self._number("learning_rate", self.state["learning_rate"])
        elif "learning_rate" in str(error) and not isinstance(error, AttributeError):
            raise KeyError(f"[{name}] the state has no 'learning_rate'") from error
        try:
            check_numbers(self, **self._hyperparameters())
        except (AttributeError, TypeError, ValueError) as cause:
            raise cause from error
        for path, gradient, parameter, state in zip(
            paths(leaves.tree),
            leaves.gradients,
            leaves.parameters,
            leaves.states,
            strict=True,
        ):
            expected: dict[str, Any] = {}
            if isinstance(parameter, mx.array):
                self.init_single(parameter, expected)
            if not {*map(plain_name, state)} >= expected.keys():
                raise KeyError(
                    f"[{name}] the state of '{path}' has {', '.join(state)}; expected "
                    f"{', '.join(expected)}. Is it another optimizer's? Otherwise call "
                    f"{INIT}"
                ) from error
            arrays = {
                "parameter": parameter,
                "gradient": gradient,
                **{key: state[key] for key in expected if key in state},
            }
            for kind, array in arrays.items():
                if not isinstance(array, mx.array):
                    raise TypeError(
                        f"[{name}] the {kind} of '{path}' is of type "
                        f"{type(array).__name__}; expected an mx.array"
                    ) from error
            try:
                mx.broadcast_shapes(gradient.shape, parameter.shape)
            except ValueError:
                raise ValueError(
                    f"[{name}] the gradient of '{path}' has shape {gradient.shape}; "
                    f"expected {parameter.shape}"
                ) from error
            for key, like in expected.items():
                if not has_shape(state, key, like.shape):
                    shape = getattr(state.get(key), "shape", "another")
                    raise ValueError(
                        f"[{name}] the {key} of '{path}' has shape {shape}; expected "
                        f"{like.shape}. When a model has changed, call {INIT}"
                    ) from error
