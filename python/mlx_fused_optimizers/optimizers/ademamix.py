"""AdEMAMix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .base import LearningRate
from .fused import FusedOptimizer
from .options import check_numbers, check_ranges

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import DecayOptions


class AdEMAMix(FusedOptimizer):
    r"""The AdEMAMix optimizer: AdamW with a second, slow average of the gradient.

    .. math::

        m_{1,t} &= \beta_1 m_{1,t-1} + (1 - \beta_1) g_t \\
        m_{2,t} &= \beta_{3,t} m_{2,t-1} + (1 - \beta_{3,t}) g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        w_t &= w_{t-1} - \eta \left(\frac{m_{1,t} / (1 - \beta_1^t) + \alpha_t
        m_{2,t}}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} + \lambda w_{t-1}\right)

    The slow average remembers gradients of many thousand steps. Over the ``warmup``
    steps :math:`\alpha_t` grows linearly from 0 to :math:`\alpha`, and
    :math:`\beta_{3,t}` from :math:`\beta_1` to :math:`\beta_3` such that the half-life
    of its average grows linearly; the paper takes the length of the training for it.
    Source: Pagliardini, Ablin and Grangier, "The AdEMAMix optimizer: better, faster,
    older", arXiv:2409.03137, algorithm 1.

    State of a parameter: ``m1``, ``m2`` and ``v``, of the parameter's shape and dtype.

    Args:
        learning_rate (float or callable): The learning rate :math:`\eta`.
        betas (Tuple[float, float, float], optional): The coefficients
            :math:`(\beta_1, \beta_2, \beta_3)` of the fast average of the gradient,
            of its square and of the slow average. Default: ``(0.9, 0.999, 0.9999)``
        alpha (float, optional): The weight :math:`\alpha` of the slow average.
            Default: ``5.0``
        eps (float, optional): The term :math:`\epsilon` added to the denominator.
            Default: ``1e-8``
        weight_decay (float, optional): The weight decay :math:`\lambda`.
            Default: ``0.01``
        warmup (int, optional): Steps over which :math:`\alpha_t` and
            :math:`\beta_{3,t}` grow; 0 is none. Default: ``0``
        {options}

    Raises:
        ValueError: If a beta is not in [0, 1), or ``eps``, ``alpha`` or ``warmup`` is
            negative.
    """

    rule = "AdEMAMix"

    def __init__(
        self,
        learning_rate: LearningRate,
        betas: tuple[float, float, float] | list[float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        warmup: int = 0,
        **options: Unpack[DecayOptions],
    ) -> None:
        check_ranges(self, betas, 3, alpha=alpha, eps=eps, warmup=warmup)
        check_numbers(self, weight_decay=weight_decay)
        self.betas = betas
        self.alpha = alpha
        self.eps = eps
        self.weight_decay = weight_decay
        self.warmup = warmup
        super().__init__(learning_rate, **options)

    def _hyperparameters(self) -> dict[str, Any]:
        names = ("alpha", "eps", "weight_decay", "warmup")
        betas = {f"beta{number}": beta for number, beta in enumerate(self.betas, 1)}
        return {**betas, **{name: getattr(self, name) for name in names}}
