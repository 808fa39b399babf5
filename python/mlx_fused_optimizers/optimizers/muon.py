"""Muon."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.optimizers as stock

from .base import Clip, FusedOptimizer, LearningRate, as_array

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .._ext import Leaves
    from .options import DecayOptions


_LARGE = 1 << 18  # elements


class Muon(FusedOptimizer, stock.Muon):
    r"""The Muon optimizer: momentum, made orthogonal by Newton-Schulz iterations.

    .. math::

        g_t &\leftarrow g_t + \eta w_t \\
        v_{t+1} &= \mu v_t + (1 - \mu) g_t \\
        u_{t+1} &= \text{NS}((1 - \mu) g_t + \mu v_{t+1}) \\
        w_{t+1} &= w_t - \lambda \sqrt{\max(1, \text{rows} / \text{columns})}\, u_{t+1}

    Without Nesterov momentum, NS takes :math:`v_{t+1}`. The matrix products are MLX's;
    the moment update and the write of the parameter are a kernel each, in place.
    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks",
    2024, https://kellerjordan.github.io/posts/muon/.

    Embeddings, the last layer and parameters of fewer than two dimensions are better
    left to another optimizer, see :class:`MultiOptimizer`. A convolution's filters are
    flattened to matrices.

    State of a parameter: ``v``, of the parameter's shape and dtype.

    Args:
        learning_rate (float or callable): The learning rate :math:`\lambda`.
        momentum (float, optional): The momentum strength :math:`\mu`.
            Default: ``0.95``
        weight_decay (float, optional): The weight decay :math:`\eta` (L2 penalty).
            Default: ``0.01``
        nesterov (bool, optional): Enables Nesterov momentum. Default: ``True``
        ns_steps (int, optional): Newton-Schulz iterations. Default: ``5``
        {options}

    Raises:
        ValueError: If ``max_grad_norm`` is negative.
    """

    def __init__(
        self,
        learning_rate: LearningRate,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        nesterov: bool = True,
        ns_steps: int = 5,
        **options: Unpack[DecayOptions],
    ) -> None:
        stock.Muon.__init__(
            self, learning_rate, momentum, weight_decay, nesterov, ns_steps
        )
        self._set_options(**options)

    rule = "MuonMoment"

    def _update_leaves(self, leaves: Leaves, clip: Clip) -> None:
        sets, set_of = self._sets(leaves)
        rate = as_array(self.state["learning_rate"])
        # The iterations need many times a matrix' memory: one begins when the one
        # before has ended. Gradients are ready from the last layer to the first.
        after: list[mx.array] = []
        for together in _launches(leaves.parameters):
            for i in together:
                # This rule turns the gradient into the direction.
                self._run(
                    leaves,
                    self.rule,
                    sets,
                    sets=None if set_of is None else [set_of[i]],
                    gradient_scale=clip.scale,
                    skip=clip.skip,
                    indices=[i],
                    after=after,
                )
                direction = self._orthogonalized(leaves.gradients[i])
                leaves.set_gradient(i, direction)
                after = [direction]
            stretches = [_stretch(leaves.parameters[i]) for i in together]
            self._run(
                leaves,
                "SGD",
                [{"weight_decay": 0.0}],
                learning_rate=rate * mx.array(stretches),
                per_tensor=True,
                skip=clip.skip,
                indices=together,
            )
            after = [leaves.parameters[together[0]]]

    def _orthogonalized(self, direction: mx.array) -> mx.array:
        if direction.ndim < 2 or direction.size == 0:
            return direction
        matrix = direction
        if direction.ndim > 2:
            matrix = direction.reshape(direction.shape[0], -1)
        matrix = self._zeropower_via_newtonschulz5(matrix, steps=self.ns_steps)
        return mx.reshape(matrix, direction.shape)


def _stretch(parameter: mx.array) -> float:
    """The factor of the learning rate, by the aspect ratio."""
    if parameter.ndim < 2 or parameter.size == 0:
        return 1.0
    rows, columns = parameter.shape[-2:]
    return float(max(1.0, rows / columns) ** 0.5)


def _launches(parameters: list[mx.array]) -> Iterator[list[int]]:
    """Parameters that are written together: few, as their directions wait for it."""
    group: list[int] = []
    for i in reversed(range(len(parameters))):
        group.append(i)
        elements = sum(parameters[j].size for j in group)
        if elements >= _LARGE or len(group) == 4:
            yield group
            group = []
    if group:
        yield group
