"""Stochastic gradient descent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.optimizers as stock

from .base import LearningRate
from .fused import FusedOptimizer
from .options import check_numbers

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import DecayOptions


class SGD(FusedOptimizer, stock.SGD):
    r"""The stochastic gradient descent optimizer.

    With weight decay :math:`\eta`, a parameter :math:`w` is updated with a gradient
    :math:`g` as

    .. math::

        g_t &\leftarrow g_t + \eta w_t \\
        v_{t+1} &= \mu v_t + (1 - \tau) g_t \\
        w_{t+1} &= w_t - \lambda v_{t+1}

    and with Nesterov momentum as
    :math:`w_{t+1} = w_t - \lambda (g_t + \mu v_{t+1})`. Source: Sutskever et al.,
    "On the importance of initialization and momentum in deep learning", ICML 2013.

    State of a parameter: ``v``, of the parameter's shape and dtype.

    Args:
        learning_rate (float or callable): The learning rate :math:`\lambda`.
        momentum (float, optional): The momentum strength :math:`\mu`. Default: ``0``
        weight_decay (float, optional): The weight decay :math:`\eta` (L2 penalty).
            Default: ``0``
        dampening (float, optional): Dampening for momentum :math:`\tau`.
            Default: ``0``
        nesterov (bool, optional): Enables Nesterov momentum. Default: ``False``
        {options}

    Raises:
        ValueError: If ``nesterov`` is set with no momentum or with dampening.
    """

    def __init__(
        self,
        learning_rate: LearningRate,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        **options: Unpack[DecayOptions],
    ) -> None:
        check_numbers(
            self, momentum=momentum, weight_decay=weight_decay, dampening=dampening
        )
        stock.SGD.__init__(
            self, learning_rate, momentum, weight_decay, dampening, nesterov
        )
        self._set_options(**options)

    def _rule(self) -> str:
        return "Momentum" if self.momentum > 0 else "SGD"

    def _hyperparameters(self) -> dict[str, Any]:
        values = super()._hyperparameters()
        if self.momentum > 0:
            values["dampening"] = max(self.dampening, 0.0)
        return values
