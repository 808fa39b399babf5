"""MultiOptimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.optimizers as stock
from mlx.utils import tree_map

from .._formats import SUM
from .._kernels import kernels
from ..shards import Shards
from .base import (
    NO_SHARDS,
    Clip,
    Optimizer,
    check_tree,
    parts_of,
    paths,
    rebuilt,
)
from .fused import FusedOptimizer
from .held import hold_sum
from .options import OPTIONS

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .._ext import Leaves
    from .options import StepOptions

# The entry of the state that has the sums of ``accumulate``, a tree like the model's.
SUMS = "gradient_sums"

Filter = Callable[[str, mx.array], bool]


def _takes_the_rest(path: str, array: mx.array) -> bool:
    return True


class MultiOptimizer(Optimizer, stock.MultiOptimizer):
    """Several optimizers, each for some of the parameters.

    A parameter goes to the first optimizer whose filter takes its path and the array;
    the last optimizer has no filter and takes the rest.

    The options are those of all gradients together. The options of a part apply to its
    own, after that: the gradients that it clips are those that the whole has scaled. A
    step that the whole skips changes no part.

    Args:
        optimizers (list[Optimizer]): The optimizers.
        filters (list[Callable[[str, array], bool]]): One fewer than the optimizers.
        {options}

    Raises:
        TypeError: If something is no optimizer or no filter.
        ValueError: If there is no optimizer, the number of filters does not fit,
            ``max_grad_norm`` is negative, or ``skip_nonfinite`` is set with an
            optimizer that is not of this package.
    """

    def __init__(
        self,
        optimizers: Sequence[stock.Optimizer],
        filters: Sequence[Filter] = (),
        **options: Unpack[StepOptions],
    ) -> None:
        _check_list("optimizers", optimizers, lambda o: isinstance(o, stock.Optimizer))
        _check_list("filters", filters, callable)
        if any(hasattr(part, "_ranks") for part in optimizers):
            raise TypeError(
                "optimizers has a ShardedOptimizer; shard the MultiOptimizer in its "
                "place"
            )
        if not optimizers:
            raise ValueError("optimizers is empty; expected at least one")
        stock.MultiOptimizer.__init__(self, optimizers, list(filters))
        self.filters = [*filters, _takes_the_rest]  # upstream's cannot be pickled
        self._set_step_options(**options)
        parts = [o for o in parts_of(self) if isinstance(o, FusedOptimizer)]
        for number, part in enumerate(parts):
            part._part = number  # random bits of its own
        foreign = [o for o in optimizers if not isinstance(o, Optimizer)]
        if (self.skip_nonfinite or self._accumulates()) and foreign:
            option = "skip_nonfinite" if self.skip_nonfinite else "accumulate"
            raise ValueError(
                f"{option} needs optimizers of mlx_fused_optimizers, "
                f"{type(foreign[0]).__module__}.{type(foreign[0]).__name__} was "
                "provided"
            )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "ema" and (value is not None or self.ema is not None):
            OPTIONS[name].check(self, value)
            self._give_ema(value)
        super().__setattr__(name, value)

    def _give_ema(self, value: float | None) -> None:
        """The averages are the parts': the kernels of their steps write them."""
        for part in self.optimizers:
            if not isinstance(part, Optimizer):
                raise ValueError(
                    "ema needs optimizers of mlx_fused_optimizers, "
                    f"{type(part).__module__}.{type(part).__name__} was provided"
                )
            if self.ema is None and part.ema is not None:
                raise ValueError(
                    f"ema is set to {value} and that of a part to {part.ema}; set one "
                    "of them"
                )
        for part in self.optimizers:
            part.ema = value

    # One dict for as long as the optimizer lives: mx.compile captures it.
    @property
    def state(self) -> Any:
        """The state: ``states``, a list of those of the optimizers."""
        state: Any = self._state
        state["states"] = [o.state for o in self.optimizers]
        return state

    @state.setter
    def state(self, state: Any) -> None:
        check_tree("state", state)
        if "states" not in state or len(state["states"]) != len(self.optimizers):
            raise ValueError("Invalid state provided")
        for optimizer, part in zip(self.optimizers, state["states"], strict=True):
            optimizer.state = part
        self._state = {k: v for k, v in state.items() if k != "states"}
        self._initialized = False
        self._set_option_state()

    @property
    def step(self) -> Any:
        """The step count of the first optimizer."""
        return self.optimizers[0].step

    @property
    def learning_rate(self) -> Any:
        """The learning rate of the first optimizer; assigned to all."""
        return self.optimizers[0].learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        for optimizer in self.optimizers:
            optimizer.learning_rate = learning_rate

    def init(self, parameters: Any) -> None:
        """Initialize the state of each optimizer for its parameters.

        Again when the model has changed, as :meth:`Optimizer.init`.

        Args:
            parameters (dict): A Python tree of parameters.

        Raises:
            TypeError: If ``parameters`` is no dict or a leaf is no array.
            ValueError: If a parameter has the name of an entry of the state.
        """
        check_tree("parameters", parameters)
        chosen = self._chosen(kernels.Leaves(parameters, what="value"))
        # One that is there twice gets all of its parameters at once: init drops others.
        first = [self.optimizers.index(optimizer) for optimizer in self.optimizers]
        parts = self._split(parameters, [first[i] for i in chosen])
        for i in sorted({*first}):
            self.optimizers[i].init(parts[i])
        self._init_sums(parameters)
        self._set_option_state()

    def _init_sums(self, parameters: Any) -> None:
        """Sums of gradients beside the parts' states: no part need know of them."""
        if self._accumulates():
            state: Any = self._state
            state[SUMS] = self._state_of(parameters, state.get(SUMS), "")
        else:
            self._state.pop(SUMS, None)
        self._initialized = True

    def init_single(self, parameter: mx.array, state: dict[str, Any]) -> None:
        """The parts have the parameters' states."""

    def _hold(
        self,
        path: str,
        parameter: mx.array,
        state: dict[str, Any],
        is_new: bool = False,
    ) -> None:
        # Averages are the parts'.
        if self._accumulates():
            hold_sum(state, parameter, self.accumulate_dtype)
        else:
            state.pop(SUM, None)

    def _chosen(self, leaves: Leaves) -> list[int]:
        """Which optimizer each leaf goes to."""
        if len(self.optimizers) == 1:
            return [0] * len(leaves)
        return [
            next(i for i, takes in enumerate(self.filters) if takes(*leaf))
            for leaf in map(self._asked, paths(leaves.tree), leaves.gradients)
        ]

    def _split(self, tree: Any, chosen: Iterable[int]) -> list[Any]:
        """A tree for each optimizer, in containers of the tree's own kinds.

        Gaps of lists and tuples are empty dicts, so that positions stay.
        """
        numbers = range(len(self.optimizers))
        next_chosen = iter(chosen)

        def split(node: Any) -> list[Any]:
            if isinstance(node, dict):
                children = {key: split(child) for key, child in node.items()}
                return [
                    {k: x[i] for k, x in children.items() if x[i] is not None} or None
                    for i in numbers
                ]
            if isinstance(node, (list, tuple)):
                items = [split(child) for child in node]
                return [_part_of(node, [item[i] for item in items]) for i in numbers]
            number = next(next_chosen)
            return [node if i == number else None for i in numbers]

        return [part or {} for part in split(tree)]

    def _split_dictionary(self, gradients: Any) -> list[Any]:
        return self._split(gradients, self._chosen(kernels.Leaves(gradients)))

    def _step(
        self,
        gradients: Any,
        parameters: Any,
        clip: Clip | None,
        shards: Shards = NO_SHARDS,
    ) -> Any:
        self._refuse_averaged("a step")
        leaves = kernels.Leaves(gradients)
        records = clip is None or self._accumulates()
        self._set_option_state()
        if not self._initialized:
            self._init_sums(gradients)
        if self._accumulates():
            leaves = kernels.Leaves(gradients, parameters, self._state[SUMS])
            summed = self._add(leaves, clip)
            if summed is None and not shards:
                return leaves.replace(leaves.parameters)
            leaves = kernels.Leaves(summed)
            clip = self._clip_of_mean(leaves, clip, shards)
        elif clip is None:
            clip = self._measure(leaves, shards)
        # Parts have chunks of their own.
        clip = clip._replace(chunks=())
        gradients = leaves.replace(leaves.gradients)  # scaled, if in float64
        chosen = self._chosen(leaves)
        parts = self._split(gradients, chosen)
        for optimizer in self.optimizers:
            if self.optimizers.count(optimizer) > 1 and not optimizer._initialized:
                # Its first step would know the first of its parts alone.
                self.init(_initial(optimizer, gradients, parameters))
        results = []
        for optimizer, part in zip(self.optimizers, parts, strict=True):
            updated = self._part(optimizer, part, parameters, clip, shards)
            # In the gradients' order, whatever order a user's class returns.
            results.append(iter(kernels.Leaves(part, updated).parameters))
        if records:
            self._record(clip)
        return leaves.replace([next(results[i]) for i in chosen])

    def _part(
        self,
        optimizer: stock.Optimizer,
        gradients: Any,
        parameters: Any,
        clip: Clip,
        shards: Shards,
    ) -> Any:
        """A part's step, of gradients that the whole scales and may skip."""
        own = getattr(optimizer.apply_gradients, "__func__", None)

        def apply(gradients: Any) -> Any:
            if isinstance(optimizer, Optimizer) and own is Optimizer.apply_gradients:
                return optimizer._step(gradients, parameters, None, shards)
            return optimizer.apply_gradients(gradients, parameters)

        if clip.scale is None and clip.skip is None:
            return apply(gradients)
        if (
            isinstance(optimizer, Optimizer)
            and own is Optimizer.apply_gradients
            and not optimizer._needs_norm()
        ):
            return optimizer._step(gradients, parameters, clip, shards)
        if clip.scale is not None:
            leaves = kernels.Leaves(gradients, parameters)
            pairs = zip(leaves.gradients, leaves.parameters, strict=True)
            gradients = leaves.replace(
                [
                    (g * clip.scale).astype(p.dtype if clip.keep_dtypes else g.dtype)
                    for g, p in pairs
                ]
            )
        if clip.skip is None:
            return apply(gradients)
        if not optimizer._initialized:
            optimizer.init(_initial(optimizer, gradients, parameters))
        before = tree_map(lambda x: x, optimizer.state)  # in containers of its own
        updated = apply(gradients)
        _keep_where(clip.skip, before, optimizer.state)
        leaves = kernels.Leaves(updated, parameters)
        pairs = zip(leaves.parameters, leaves.gradients, strict=True)
        return leaves.replace([mx.where(clip.skip, *pair) for pair in pairs])


def _initial(optimizer: stock.Optimizer, gradients: Any, parameters: Any) -> Any:
    """The tree for which the first step of an optimizer initializes its state."""
    if not isinstance(optimizer, Optimizer):
        return gradients
    return optimizer._initial(kernels.Leaves(gradients, parameters))


def _check_list(name: str, values: Any, is_one: Callable[[Any], bool]) -> None:
    is_list = isinstance(values, Sequence)
    wrong = [x for x in values if not is_one(x)] if is_list else [values]
    if wrong:
        raise TypeError(
            f"{name}: found {type(wrong[0]).__name__}; expected a list of {name}"
        )


def _part_of(node: Any, values: list[Any]) -> Any:
    """The node with these values, or None if there are none."""
    if isinstance(node, list):  # upstream's init wants none longer than the gradients'
        while values and values[-1] is None:
            values.pop()
    if all(value is None for value in values):
        return None
    return rebuilt(node, [{} if value is None else value for value in values])


def _keep_where(skip: mx.array, before: Any, after: Any) -> Any:
    """In the containers of ``after``, what was there before where ``skip`` is true."""
    if isinstance(after, dict):
        for key in after.keys() & before.keys():
            after[key] = _keep_where(skip, before[key], after[key])
    elif isinstance(after, (list, tuple)):
        pairs = zip(before, after, strict=False)
        kept = [_keep_where(skip, *pair) for pair in pairs] + [*after[len(before) :]]
        if isinstance(after, tuple):
            return rebuilt(after, kept)
        after[:] = kept
    elif after is not before:
        return mx.where(skip, before, after)
    return after
