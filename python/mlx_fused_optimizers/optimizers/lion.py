"""Lion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import mlx.optimizers as stock

from .base import LearningRate
from .fused import FusedOptimizer
from .options import check_betas, check_flags, check_numbers

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import DecayOptions


class Lion(FusedOptimizer, stock.Lion):
    r"""The Lion optimizer.

    .. math::

        c_{t + 1} &= \beta_1 m_t + (1 - \beta_1) g_t \\
        m_{t + 1} &= \beta_2 m_t + (1 - \beta_2) g_t \\
        w_{t + 1} &= w_t - \eta (\text{sign}(c_{t + 1}) + \lambda w_t)

    Its updates have a larger norm than Adam's: a learning rate 3 to 10 times smaller,
    with a weight decay larger by as much, is a good start. Source: Chen et al.,
    "Symbolic discovery of optimization algorithms", arXiv:2302.06675.

    State of a parameter: ``m``, of the parameter's shape and dtype.

    Args:
        learning_rate (float or callable): The learning rate :math:`\eta`.
        betas (Tuple[float, float], optional): The coefficients
            :math:`(\beta_1, \beta_2)` of the update direction and of the momentum.
            Default: ``(0.9, 0.99)``
        weight_decay (float, optional): The weight decay :math:`\lambda`; one that is
            not positive is none. Default: ``0.0``
        cautious (bool, optional): Leave out the elements of an update whose sign is
            not the gradient's, and multiply the others by the number of all over
            theirs, at most 1000. Liang et al., "Cautious optimizers",
            arXiv:2411.16085. The update takes the gradient's place until its elements
            are counted: 36 bytes moved a float32 parameter instead of 20.
            Default: ``False``
        {options}

    Raises:
        ValueError: If a beta is not in [0, 1).
    """

    cautious: bool = False

    def __init__(
        self,
        learning_rate: LearningRate,
        betas: tuple[float, float] | list[float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        cautious: bool = False,
        **options: Unpack[DecayOptions],
    ) -> None:
        check_betas(self, betas)
        check_numbers(self, weight_decay=weight_decay)
        check_flags(self, cautious=cautious)
        stock.Lion.__init__(self, learning_rate, cast(Any, betas), weight_decay)
        if cautious:  # so that checkpoints stay those of mlx.optimizers by default
            self.cautious = True
        self._set_options(**options)

    def _rule(self) -> str:
        return "LionDirection" if self.cautious else "Lion"

    def _hyperparameters(self) -> dict[str, Any]:
        beta1, beta2 = self.betas
        decay = self.weight_decay if self.weight_decay > 0 else 0.0
        return {"beta1": beta1, "beta2": beta2, "weight_decay": decay}
