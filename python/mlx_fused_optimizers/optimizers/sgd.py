"""Stochastic gradient descent."""

import mlx.optimizers as stock

from .base import FusedOptimizer, FusedRule


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

    Raises:
        ValueError: If ``nesterov`` is set with no momentum or with dampening.
    """

    def _rule(self) -> FusedRule:
        if self.momentum <= 0:
            return FusedRule("sgd", (self.weight_decay,), ())
        gradient_weight = 1 - self.dampening if self.dampening > 0 else 1.0
        return FusedRule(
            "momentum",
            (self.momentum, gradient_weight, self.weight_decay, self.nesterov),
            ("v",),
        )
