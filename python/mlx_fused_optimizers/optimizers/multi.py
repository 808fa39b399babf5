"""MultiOptimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.optimizers as stock
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from . import base
from .base import Clip, Optimizer, StepOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


class MultiOptimizer(Optimizer, stock.MultiOptimizer):
    """Several optimizers, each for some of the parameters.

    A parameter goes to the first optimizer whose filter takes its path and the array;
    the last optimizer has no filter and takes the rest.

    Args:
        optimizers (list[Optimizer]): The optimizers.
        filters (list[Callable[[str, array], bool]]): One fewer than the optimizers.
        max_grad_norm (float, optional): Scale the gradients so that their global norm,
            one over all parts, does not exceed this. Default: ``None``
        skip_nonfinite (bool, optional): Skip steps of all parts when that norm is not
            finite. Needs optimizers of this package. Default: ``False``

    Raises:
        ValueError: If the number of filters does not fit, ``max_grad_norm`` is
            negative, or ``skip_nonfinite`` is set with an optimizer that is not of
            this package.
    """

    def __init__(
        self,
        optimizers: Sequence[stock.Optimizer],
        filters: Sequence[Callable[[str, mx.array], bool]] = (),
        **options: Unpack[StepOptions],
    ) -> None:
        stock.MultiOptimizer.__init__(self, optimizers, list(filters))
        self._set_step_options(**options)
        foreign = [o for o in optimizers if not isinstance(o, Optimizer)]
        if self.skip_nonfinite and foreign:
            raise ValueError(
                "skip_nonfinite needs optimizers of mlx_fused_optimizers, "
                f"{type(foreign[0]).__module__}.{type(foreign[0]).__name__} was "
                "provided"
            )

    # One dict for as long as the optimizer lives: mx.compile captures it.
    @property
    def state(self) -> Any:
        """The state: ``states``, a list of those of the optimizers."""
        state: Any = self._state
        state["states"] = [o.state for o in self.optimizers]
        return state

    @state.setter
    def state(self, state: Any) -> None:
        if "states" not in state or len(state["states"]) != len(self.optimizers):
            raise ValueError("Invalid state provided")
        for optimizer, part in zip(self.optimizers, state["states"], strict=True):
            optimizer.state = part
        self._state = {k: v for k, v in state.items() if k != "states"}
        self._add_option_state()

    def init(self, parameters: Any) -> None:
        """Initialize the state of each optimizer for its parameters.

        Args:
            parameters (dict): A Python tree of parameters.
        """
        parts = self._split_dictionary(parameters)
        for optimizer, part in zip(self.optimizers, parts, strict=True):
            optimizer.init(part)
        self._add_option_state()

    def _remember(self) -> Callable[[], None]:
        undo_own = super()._remember()
        initialized = [o._initialized for o in self.optimizers]

        def undo() -> None:
            undo_own()
            for optimizer, was in zip(self.optimizers, initialized, strict=True):
                optimizer._initialized = was

        return undo

    def _split_dictionary(self, gradients: Any) -> list[Any]:
        # Before MLX 0.32.4 a part of nothing is a list, which fits no other tree.
        return [part or {} for part in super()._split_dictionary(gradients)]

    def _step(self, gradients: Any, parameters: Any, clip: Clip | None) -> Any:
        if clip is None:
            clip = self._measure(base._ext.Leaves(gradients))
            self._record(clip)
        # Not by tree_merge, which before MLX 0.32.1 takes no two empty containers in
        # one place, such as the leaves of a layer without parameters.
        updated: dict[str, Any] = {}
        parts = self._split_dictionary(gradients)
        for optimizer, part in zip(self.optimizers, parts, strict=True):
            updated.update(tree_flatten(self._part(optimizer, part, parameters, clip)))
        return tree_map_with_path(lambda path, _: updated[path], gradients)

    def _part(
        self, optimizer: stock.Optimizer, gradients: Any, parameters: Any, clip: Clip
    ) -> Any:
        if clip.norm is None:
            return optimizer.apply_gradients(gradients, parameters)
        if isinstance(optimizer, Optimizer):
            return optimizer._step(gradients, parameters, clip)
        scaled = tree_map(lambda g: (g * clip.scale).astype(g.dtype), gradients)
        return optimizer.apply_gradients(scaled, parameters)
