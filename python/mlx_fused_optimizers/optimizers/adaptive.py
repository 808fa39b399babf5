"""RMSprop, Adagrad and AdaDelta."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.optimizers as stock

from .base import LearningRate
from .fused import FusedOptimizer
from .options import check_numbers

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import FusedOptions


class RMSprop(FusedOptimizer, stock.RMSprop):
    r"""The RMSprop optimizer.

    .. math::

        v_{t+1} &= \alpha v_t + (1 - \alpha) g_t^2 \\
        w_{t+1} &= w_t - \lambda \frac{g_t}{\sqrt{v_{t+1}} + \epsilon}

    Source: Tieleman and Hinton, "Lecture 6.5: rmsprop", Neural networks for machine
    learning, 2012.

    State of a parameter: ``v``, of the parameter's shape and dtype.

    Args:
        learning_rate (float or callable): The learning rate :math:`\lambda`.
        alpha (float, optional): The smoothing constant :math:`\alpha`.
            Default: ``0.99``
        eps (float, optional): The term :math:`\epsilon` added to the denominator.
            Default: ``1e-8``
        {options}

    Raises:
        ValueError: If ``alpha`` is negative or ``eps`` is not positive.
    """

    rule = "RMSprop"

    def __init__(
        self,
        learning_rate: LearningRate,
        alpha: float = 0.99,
        eps: float = 1e-8,
        **options: Unpack[FusedOptions],
    ) -> None:
        check_numbers(self, alpha=alpha, eps=eps)
        stock.RMSprop.__init__(self, learning_rate, alpha, eps)
        self._set_options(**options)


class Adagrad(FusedOptimizer, stock.Adagrad):
    r"""The Adagrad optimizer.

    .. math::

        v_{t+1} &= v_t + g_t^2 \\
        w_{t+1} &= w_t - \lambda \frac{g_t}{\sqrt{v_{t+1}} + \epsilon}

    Source: Duchi, Hazan and Singer, "Adaptive subgradient methods for online learning
    and stochastic optimization", JMLR 2011.

    State of a parameter: ``v``, of the parameter's shape and dtype.

    Args:
        learning_rate (float or callable): The learning rate :math:`\lambda`.
        eps (float, optional): The term :math:`\epsilon` added to the denominator.
            Default: ``1e-8``
        {options}

    Raises:
        ValueError: If ``eps`` is not positive.
    """

    rule = "Adagrad"

    def __init__(
        self,
        learning_rate: LearningRate,
        eps: float = 1e-8,
        **options: Unpack[FusedOptions],
    ) -> None:
        check_numbers(self, eps=eps)
        stock.Adagrad.__init__(self, learning_rate, eps)
        self._set_options(**options)


class AdaDelta(FusedOptimizer, stock.AdaDelta):
    r"""The AdaDelta optimizer, with a learning rate.

    .. math::

        v_{t+1} &= \rho v_t + (1 - \rho) g_t^2 \\
        \Delta w_{t+1} &= \frac{\sqrt{u_t + \epsilon}}{\sqrt{v_{t+1} + \epsilon}} g_t \\
        u_{t+1} &= \rho u_t + (1 - \rho) \Delta w_{t+1}^2 \\
        w_{t+1} &= w_t - \lambda \Delta w_{t+1}

    Source: Zeiler, "ADADELTA: an adaptive learning rate method", arXiv:1212.5701.

    State of a parameter: ``v`` and ``u``, of the parameter's shape and dtype.

    Args:
        learning_rate (float or callable): The learning rate :math:`\lambda`.
        rho (float, optional): The coefficient :math:`\rho` of the running averages.
            Default: ``0.9``
        eps (float, optional): The term :math:`\epsilon` that keeps the square roots
            from zero. Default: ``1e-6``
        {options}

    Raises:
        ValueError: If ``rho`` is negative or ``eps`` is not positive.
    """

    rule = "AdaDelta"

    def __init__(
        self,
        learning_rate: LearningRate,
        rho: float = 0.9,
        eps: float = 1e-6,
        **options: Unpack[FusedOptions],
    ) -> None:
        check_numbers(self, rho=rho, eps=eps)
        stock.AdaDelta.__init__(self, learning_rate, rho, eps)
        self._set_options(**options)
