"""Muon."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.optimizers as stock

from .base import (
    DecayOptions,
    FusedOptimizer,
    FusedRule,
    LearningRate,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .. import _ext


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
        max_grad_norm (float, optional): Scale the gradients so that their global norm
            does not exceed this. Default: ``None``
        skip_nonfinite (bool, optional): Skip steps whose gradients' norm is not
            finite. Default: ``False``
        state_dtype (Dtype, optional): The dtype of the state: float32, float16 or
            bfloat16; parameters then keep theirs. Default: that of the parameters
        weight_decay_filter (callable, optional): ``(path, array) -> bool``, whether a
            parameter decays; see :func:`decay_matrices_only`. Default: all do

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

    def _update_leaves(
        self,
        leaves: _ext.Leaves,
        indices: list[int] | None,
        scale: mx.array | None,
        weight_decay: Any,
    ) -> None:
        gradients, parameters, states = (
            leaves.gradients,
            leaves.parameters,
            leaves.states,
        )
        chosen = list(range(len(leaves))) if indices is None else indices
        moment = FusedRule(
            "muon_moment",
            (self.momentum, 1 - self.momentum, weight_decay, self.nesterov),
            ("v",),
        )
        if not all(
            self._has_kernel(moment, gradients[i], parameters[i], states[i])
            for i in chosen
        ):
            self._compose(leaves, indices, scale, weight_decay)
            return
        skip = None if scale is None else mx.where(scale < 0, -1.0, 1.0)
        moments: dict[int, mx.array] = {}
        # The iterations need many times a matrix' memory: one begins when those
        # before it have ended. Gradients are ready from the last layer to the first.
        after: list[mx.array] = []
        rates: dict[float, mx.array] = {}
        for stretch, together in _launches(parameters, chosen):
            directions = []
            for i in together:
                # In this rule the gradient is what changes, and the parameter is read.
                (direction,), ((moments[i],),) = self._fused(
                    moment,
                    [gradients[i]],
                    [parameters[i]],
                    [states[i]],
                    scale,
                    self.learning_rate,
                    after,
                )
                directions.append(self._orthogonalized(direction))
                after = directions[-1:]
            results, _ = self._fused(
                FusedRule("sgd", (0.0,), ()),
                [parameters[i] for i in together],
                directions,
                [],
                skip,
                rates.setdefault(stretch, self.learning_rate * stretch),
            )
            for i, result in zip(together, results, strict=True):
                leaves.set(i, result, {"v": moments[i]})
            after = results[-1:]

    def _orthogonalized(self, direction: mx.array) -> mx.array:
        if direction.ndim < 2 or direction.size == 0:
            return direction
        matrix = direction
        if direction.ndim > 2:
            matrix = direction.reshape(direction.shape[0], -1)
        matrix = self._zeropower_via_newtonschulz5(matrix, steps=self.ns_steps)
        return mx.reshape(matrix, direction.shape)


def _launches(
    parameters: list[Any], indices: list[int]
) -> Iterator[tuple[float, list[int]]]:
    """Parameters that are written together, and the factor of their learning rate.

    Few, because their directions are kept until then, and of one aspect ratio.
    """
    groups: dict[float, list[int]] = {}
    for i in reversed(indices):
        shape = parameters[i].shape
        is_matrix = len(shape) >= 2 and parameters[i].size > 0
        stretch = max(1.0, shape[-2] / shape[-1]) ** 0.5 if is_matrix else 1.0
        group = groups.setdefault(stretch, [])
        group.append(i)
        elements = sum(parameters[j].size for j in group)
        if elements >= _LARGE or len(group) == 4:
            yield stretch, groups.pop(stretch)
    yield from groups.items()
