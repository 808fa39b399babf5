"""The optimizers whose update is a rule: one call of the extension for all leaves."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple
from zlib import crc32

import mlx.core as mx
import mlx.optimizers as stock

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
from ..schedulers import as_array
from .base import EXPLAINED, INIT, Clip, LearningRate, Optimizer, paths
from .directions import DIRECTIONS, batches, cautious_sizes
from .held import hold, hold_error, hold_zeros, release
from .options import (
    FUSED_DTYPES,
    OPTIONS,
    Groups,
    QuantizeFilter,
    StepOptions,
    WeightDecayFilter,
    check_numbers,
    warn_caller,
    warn_of_arguments,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .._ext import Leaves
    from .options import DecayOptions


def _is_large(path: str, parameter: mx.array) -> bool:
    """Whether codes are worth it; norms and biases matter most, and cost little."""
    return parameter.size >= 4096


def _sums(arrays: list[mx.array]) -> list[Any]:
    """Sums that tell the upper byte from the lower, without another array."""
    dtypes = (mx.uint16, mx.uint8)
    return [mx.sum(x.view(dtype)).item() for x in arrays for dtype in dtypes]


class Arguments(NamedTuple):
    """The arguments of a step's leaves, which groups and filters may set apart.

    Attributes:
        sets: Sets of hyper-parameters.
        set_of: The set of each leaf; None if all have the first.
        rates: The learning rate, or that of each leaf.
        per_tensor: Whether it is that of each leaf.
        coefficient: The rule's own number, or that of each leaf, if it reads one.
    """

    sets: list[dict[str, Any]]
    set_of: list[int] | None
    rates: mx.array
    per_tensor: bool = False
    coefficient: mx.array | None = None

    def sets_of(self, chosen: list[int] | None) -> list[int] | None:
        """The sets of some leaves, or of all."""
        if self.set_of is None or chosen is None:
            return self.set_of
        return [self.set_of[i] for i in chosen]

    def rates_of(self, chosen: list[int] | None) -> mx.array:
        """The learning rates of some leaves, or of all."""
        return self._entries(self.rates, chosen)

    def coefficients_of(self, chosen: list[int] | None) -> mx.array | None:
        """The coefficients of some leaves, or of all."""
        if self.coefficient is None:
            return None
        return self._entries(self.coefficient, chosen)

    def _entries(self, scalar: mx.array, chosen: list[int] | None) -> mx.array:
        if not self.per_tensor or chosen is None:
            return scalar
        return scalar[mx.array(chosen)]


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
    groups: Groups | None = None
    weight_decay_filter: WeightDecayFilter | None = None
    _part: int = 0  # its number among the parts of a MultiOptimizer
    _calls: int = 0  # of steps, for _watch_precision
    _watched: list[Any] | None = None
    _suspects: bool = False

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
        groups: Groups | None = None,
        weight_decay_filter: WeightDecayFilter | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        self.state_dtype = state_dtype
        self.quantize_filter = quantize_filter
        self.master_weights = master_weights
        self.stochastic_rounding = stochastic_rounding
        self.groups = groups
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
        for key in self._added_states():
            state[key] = mx.zeros_like(parameter)
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
        if holds:
            return leaves.replace(leaves.parameters)
        return super()._initial(leaves)

    def _averages_in_pass(self) -> bool:
        apply_single = getattr(self.apply_single, "__func__", None)
        return apply_single is FusedOptimizer.apply_single

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
        for key in self._added_states():
            if key not in state and kind_of(state, key) is None:
                state[key] = self._cast(mx.zeros_like(parameter))
        kind = self.state_dtype if isinstance(self.state_dtype, str) else None
        if parameter.dtype not in FUSED_DTYPES:
            kind = None
        elif kind is not None:
            decides = self.quantize_filter or _is_large
            kind = kind if decides(*self._asked(path, parameter)) else None
        if self.takes_codes:
            non_negative = self._non_negative()
            names = self._state_names(state, parameter)
            was_held = is_error(state.get("error"))
            others = [k for k in self._coded_states(names) if kind_of(state, k) != kind]
            for key in others:
                was_held |= kind_of(state, key) is not None
                release(state, key, parameter.shape, non_negative)
            init_single = getattr(self.init_single, "__func__", None)
            if kind and is_new and init_single is FusedOptimizer.init_single:
                hold_zeros(state, others, non_negative, kind)
            else:
                hold(state, others, non_negative, kind)
            if was_held and self._plain_dtype() is None:
                # A float32 state beside a weight of half precision would widen it.
                for key in names:
                    state[key] = state[key].astype(parameter.dtype)
        hold_error(state, parameter, self.master_weights)
        super()._hold(path, parameter, state, is_new)

    def _coded_states(self, names: list[str]) -> list[str]:
        """Of the states those that ``state_dtype`` may bring into codes."""
        return names

    def _cast(self, value: Any) -> Any:
        is_moment = isinstance(value, mx.array) and value.dtype in FUSED_DTYPES
        dtype = self._plain_dtype()
        return value if dtype is None or not is_moment else value.astype(dtype)

    def _cast_all(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            state[key] = self._cast(value)

    def _state_names(self, state: dict[str, Any], parameter: mx.array) -> list[str]:
        """The names of a parameter's states, of its shape."""
        return kernels.states(self._rule())

    def _non_negative(self) -> Collection[str]:
        """The names of the states that never are negative."""
        names: list[str] = kernels.non_negative(self._rule())
        return names

    def _rule(self) -> str:
        """The rule's name, which may depend on arguments."""
        return self.rule

    def _hyperparameters(self) -> dict[str, Any]:
        """The values of the rule's hyper-parameters."""
        names = kernels.hyperparameters(self._rule())
        return {name: getattr(self, name) for name in names}

    def _coefficient(self, hyperparameters: dict[str, Any]) -> mx.array | None:
        """The rule's own number of this step, a scalar, if it reads one."""
        return None

    @property
    def takes_whole(self) -> bool:
        """Whether it needs whole parameters, for the size of a whole update."""
        return self._rule() in DIRECTIONS

    def _sizes(
        self, parameters: list[mx.array], directions: list[mx.array]
    ) -> mx.array:
        """What multiplies each update of a rule of ``DIRECTIONS``."""
        return cautious_sizes(directions)

    def _group_arguments(self) -> set[str]:
        """What a group may set: the arguments of the rule."""
        public = {name for name in vars(self) if not name.startswith("_")}
        return (public - OPTIONS.keys()) | {"learning_rate"}

    def _group_of(self, path: str, parameter: Any) -> int:
        """The number of the group that takes a parameter; 0 if none does."""
        for number, (takes, _) in enumerate(self.groups or (), 1):
            if takes(path, parameter):
                return number
        return 0

    def _group_values(self, number: int) -> dict[str, Any]:
        """The arguments that a group sets, those of this step."""
        if number == 0:
            return {}
        _, values = (self.groups or ())[number - 1]
        # As the optimizer's own schedules, before the step was counted.
        step = mx.maximum(as_array(self.step), 1) - 1
        return {
            name: self._scheduled(name, value(step)) if callable(value) else value
            for name, value in values.items()
        }

    @contextmanager
    def _as_group(self, group: int, is_undecayed: bool) -> Iterator[None]:
        """Have a group's arguments, for code that reads attributes and state."""
        values = self._group_values(group)
        if is_undecayed:
            values["weight_decay"] = 0.0
        rate = self.state.get("learning_rate")
        before = {k: getattr(self, k) for k in values.keys() - {"learning_rate"}}
        try:
            for name, value in values.items():
                if name == "learning_rate":
                    self.state[name] = as_array(value)
                else:
                    setattr(self, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)
            if rate is not None:
                self.state["learning_rate"] = rate

    def _arguments(self, leaves: Leaves, learning_rate: Any) -> Arguments:
        """What the groups and filters give each leaf; each of them is asked once."""
        usual = self._hyperparameters()
        rate = as_array(learning_rate)
        decays = self.weight_decay_filter if "weight_decay" in usual else None
        is_single = isinstance(leaves.tree, mx.array)  # apply_single's only one
        if is_single or not leaves or (not self.groups and decays is None):
            return Arguments([usual], None, rate, False, self._coefficient(usual))
        named = [*map(self._asked, paths(leaves.tree), leaves.parameters)]
        set_of = [self._group_of(*leaf) for leaf in named]
        sets, rates = [usual], [rate]
        for number in range(1, len(self.groups or ()) + 1):
            values = self._group_values(number)
            rates.append(as_array(values.pop("learning_rate", rate)))
            view = copy(self)
            for name, value in values.items():
                setattr(view, name, value)
            if view._rule() != self._rule():
                raise ValueError(
                    f"[{type(self).__name__}] group {number} would need another "
                    "kernel; use MultiOptimizer"
                )
            sets.append(view._hyperparameters())
        if self.groups:
            rate = mx.stack([x.astype(mx.float32) for x in rates])[mx.array(set_of)]
        if decays is not None:
            undecayed = [{**values, "weight_decay": 0.0} for values in sets]
            set_of = [
                number if decays(*leaf) else number + len(sets)
                for number, leaf in zip(set_of, named, strict=True)
            ]
            sets += undecayed
        own = self._coefficient(usual)
        if self.groups and own is not None:
            each = [self._coefficient(values) for values in sets]
            own = mx.stack([x for x in each if x is not None])[mx.array(set_of)]
        return Arguments(sets, set_of, rate, bool(self.groups), own)

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
        keys = self._state_names(state, parameter) if self.takes_codes else []
        kinds = {key: kind for key in keys if (kind := kind_of(state, key))}
        for key in kinds:
            release(state, key, parameter.shape, self._non_negative())
        dtype = parameter.dtype
        master = None
        if is_error(state.get("error")) and dtype in HALF_DTYPES:
            error = state.pop("error")
            master = master_of(error)
            parameter = kernels.join(parameter, error)
        elif self.stochastic_rounding and dtype in HALF_DTYPES:
            parameter = parameter.astype(mx.float32)
        self._cast_all(state)
        group = self._group_of(path, parameter)
        decays = self.weight_decay_filter
        is_undecayed = decays is not None and not decays(path, parameter)
        with self._as_group(group, is_undecayed):
            updated = super()._apply_one(path, gradient, parameter, state, clip)
        if self._plain_dtype() is None and not self.stochastic_rounding:
            return updated
        self._cast_all(state)
        for key, kind in kinds.items():
            hold(state, [key], self._non_negative(), kind)
        if master is not None:
            updated, state["error"] = kernels.split(updated, master, dtype)
        elif self.stochastic_rounding and dtype in HALF_DTYPES:
            updated = kernels.round_stochastically(
                updated.astype(mx.float32),
                dtype,
                as_array(self._seed()),
                self.step,
                crc32(path.encode()),
            )
        return updated.astype(dtype)

    def _update_leaves(self, leaves: Leaves, clip: Clip) -> None:
        """Compute what becomes of the leaves; nothing is changed yet."""
        arguments = self._arguments(leaves, self.state.get("learning_rate"))
        if self._rule() in DIRECTIONS:
            self._descend(leaves, clip, arguments)
            return

        def run(
            chosen: list[int] | None = None, after: Sequence[mx.array] = ()
        ) -> None:
            self._run(
                leaves,
                self._rule(),
                arguments.sets,
                sets=arguments.sets_of(chosen),
                learning_rate=arguments.rates_of(chosen),
                per_tensor=arguments.per_tensor,
                coefficient=arguments.coefficients_of(chosen),
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

    def _descend(self, leaves: Leaves, clip: Clip, arguments: Arguments) -> None:
        """The step whose update takes the gradient's place until its size is known."""
        if arguments.rates.ndim > 0 and not arguments.per_tensor:
            raise ValueError(
                f"[{type(self).__name__}] learning_rate has shape "
                f"{arguments.rates.shape}; expected a scalar"
            )
        rule = self._rule()
        names = kernels.hyperparameters(rule)
        # LAMB's decay is part of its update, and counts in its size.
        is_coupled = arguments.sets[0].get("cautious") == 0
        directions = [{name: x[name] for name in names} for x in arguments.sets]
        decays = [{"weight_decay": x["weight_decay"]} for x in arguments.sets]
        for values in decays if is_coupled else directions:
            if "weight_decay" in values:
                values["weight_decay"] = 0.0
        after = [] if clip.norm is None else [clip.norm]
        for batch in batches(leaves.gradients):
            given = {
                "sets": arguments.sets_of(batch),
                "skip": clip.skip,
                "indices": batch,
            }
            self._run(
                leaves,
                rule,
                directions,
                gradient_scale=clip.scale,
                after=after,
                **given,
            )
            parameters, updates = leaves.parameters, leaves.gradients
            sizes = self._sizes(
                [parameters[i] for i in batch], [updates[i] for i in batch]
            )
            self._run(
                leaves,
                "Descent",
                decays,
                learning_rate=arguments.rates_of(batch),
                coefficient=sizes,
                per_tensor=True,
                **given,
            )
            after = [leaves.parameters[batch[-1]]]

    def _seed(self) -> mx.array | None:
        """The seed of random rounding; parts of a MultiOptimizer differ in theirs."""
        seed: mx.array | None = self.state.get("rounding_seed")
        return seed if seed is None or self._part == 0 else seed + self._part

    def _numbers(self, leaves: Leaves) -> Sequence[tuple[int, int]]:
        """What random bits depend on, where it is not that of the leaves."""
        if self._known is None or not self.stochastic_rounding:
            return ()
        return self._known.numbers(paths(leaves.tree))

    def _run(
        self, leaves: Leaves, rule: str, hyperparameters: Any, **rest: Any
    ) -> None:
        """Update leaves by a rule."""

        def run() -> bool:
            return leaves.update(
                rule,
                hyperparameters,
                step=as_array(self.step),
                seed=self._seed(),
                numbers=self._numbers(leaves),
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
        nothing but what the step before has made. It looks at a few weights, and at
        all when those have not changed.
        """
        self._calls += 1
        before, self._watched = self._watched, None
        is_due = self._calls & (self._calls - 1) == 0 and self._calls <= 1 << 12
        if self.master_weights or self.stochastic_rounding or not (before or is_due):
            return
        pairs = zip(leaves.parameters, leaves.gradients, strict=True)
        # MLX may not return from the sum of an array without elements.
        watched = [(p, g) for p, g in pairs if is_half(p) and p.ndim > 0 and p.size > 0]
        if not watched:
            return
        halves = [p for p, _ in watched]
        few = sorted(halves, key=lambda p: p.size)[:4]
        few = [p for p in few if p.size <= 1 << 16] or few[:1]
        try:
            now = _sums(halves if self._suspects else few)
            rate = self.state.get("learning_rate")
            moves = rate is not None and bool(mx.any(as_array(rate) != 0).item())
            is_same = before == now
            if is_same and any(mx.any(g != 0).item() for _, g in watched):
                if self._suspects:
                    warn_caller(
                        f"{type(self).__name__}: a step changed no parameter of "
                        f"{halves[0].dtype}, as it is below their precision. Use "
                        'master_weights="24bit" or stochastic_rounding=True'
                    )
                    self._calls = 1 << 12
                    return
                self._suspects = True  # and looks at all, from a step that is due
                now = _sums(halves) if is_due else []
            else:
                self._suspects = self._suspects and (is_same or before is None)
        except ValueError:  # MLX evaluates nothing inside of transformations
            return
        if now and moves and (is_due or self._suspects):
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
