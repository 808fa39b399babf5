"""The step that all share: trees in, one call of the extension, trees out."""

from typing import Any, NamedTuple

import mlx.core as mx
import mlx.optimizers as stock

from .. import _ext
from .._trees import collect_leaves, copy_containers, replace_leaves


class Optimizer(stock.Optimizer):
    """The base class for optimizers, as ``mlx.optimizers.Optimizer``.

    A subclass defines ``init_single(parameter, state)``, which fills a parameter's
    state dict, and ``apply_single(gradient, parameter, state)``, which returns the
    new parameter and changes that dict.

    In addition to upstream's contract: when a step raises, the state tree, the
    scheduled values and the step count are what they were before it.
    """

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        """Apply the gradients to the parameters and return the updated parameters.

        Args:
            gradients (dict): A Python tree of gradients.
            parameters (dict): A Python tree of parameters. It can be a superset of
                the gradients.

        Returns:
            dict: The updated parameters, in a tree of the gradients' structure.

        Raises:
            KeyError, IndexError: If a gradient has no parameter or no state.
            ValueError: If shapes do not fit.
        """
        was_initialized = self._initialized
        tree_before = None if was_initialized else copy_containers(self.state)
        state_before = dict(self.state)
        leaf_states: list[Any] = []
        leaves_before: list[Any] = []
        try:
            if not was_initialized:
                self.init(gradients)
            flat_gradients: list[Any] = []
            flat_parameters: list[Any] = []
            collect_leaves(
                (flat_gradients, flat_parameters, leaf_states),
                gradients,
                parameters,
                self.state,
            )
            leaves_before = [
                dict(leaf) if isinstance(leaf, dict) else leaf for leaf in leaf_states
            ]
            scheduled = {
                name: schedule(self.step) for name, schedule in self._schedulers.items()
            }
            self.state.update(scheduled)
            self.state["step"] = self.step + 1
            updated = self._apply_leaves(flat_gradients, flat_parameters, leaf_states)
            return replace_leaves(gradients, iter(updated))
        except BaseException:
            for leaf, before in zip(leaf_states, leaves_before, strict=False):
                if isinstance(leaf, dict):
                    leaf.clear()
                    leaf.update(before)
            self.state.clear()
            self.state.update(state_before if was_initialized else tree_before)
            self._initialized = was_initialized
            raise

    def _apply_leaves(
        self, gradients: list[Any], parameters: list[Any], states: list[Any]
    ) -> list[Any]:
        """The updated parameters; ``states`` are changed in place."""
        return [
            self.apply_single(gradient, parameter, state)
            for gradient, parameter, state in zip(
                gradients, parameters, states, strict=True
            )
        ]


class FusedRule(NamedTuple):
    """What an optimizer is to the extension."""

    name: str  # in csrc/rules.h
    hyperparameters: tuple[Any, ...]  # in the order of the rule's prepare()
    state_keys: tuple[str, ...]  # in the order of the rule's states


class FusedOptimizer(Optimizer):
    """An optimizer whose update is a rule of ``metal/update_rules.h``.

    A class lists ``mlx.optimizers``' own class as its second base. That one gives
    the constructor with its checks, ``init_single``, and the update by plain MLX
    operations for what no kernel covers.
    """

    def _rule(self) -> FusedRule:
        raise NotImplementedError

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
        updated: mx.array = self._apply_fused([gradient], [parameter], [state])[0]
        return updated

    def _apply_leaves(
        self, gradients: list[Any], parameters: list[Any], states: list[Any]
    ) -> list[Any]:
        if type(self).apply_single is not FusedOptimizer.apply_single:
            return super()._apply_leaves(gradients, parameters, states)
        return self._apply_fused(gradients, parameters, states)

    def _apply_fused(
        self, gradients: list[Any], parameters: list[Any], states: list[Any]
    ) -> list[Any]:
        rule = self._rule()
        learning_rate = self.learning_rate
        if learning_rate.size != 1 or any(
            isinstance(h, mx.array) for h in rule.hyperparameters
        ):
            composed = super().apply_single
            return [
                composed(*leaf)
                for leaf in zip(gradients, parameters, states, strict=True)
            ]
        updated, new_states = _ext.fused_update(
            rule.name,
            rule.hyperparameters,
            parameters,
            gradients,
            [[state[key] for state in states] for key in rule.state_keys],
            learning_rate,
            self.step,
        )
        for key, arrays in zip(rule.state_keys, new_states, strict=True):
            for state, array in zip(states, arrays, strict=True):
                state[key] = array
        return updated
