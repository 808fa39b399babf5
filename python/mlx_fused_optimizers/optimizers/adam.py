"""Adam, AdamW and Adamax."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import mlx.optimizers as stock

from .base import LearningRate
from .fused import FusedOptimizer
from .options import check_betas, check_flags, check_numbers

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import DecayOptions, FusedOptions


class Adam(FusedOptimizer, stock.Adam):
    r"""The Adam optimizer.

    .. math::

        m_{t+1} &= \beta_1 m_t + (1 - \beta_1) g_t \\
        v_{t+1} &= \beta_2 v_t + (1 - \beta_2) g_t^2 \\
        w_{t+1} &= w_t - \lambda \frac{m_{t+1}}{\sqrt{v_{t+1}} + \epsilon}

    With bias correction, :math:`m_{t+1}` is divided by :math:`1 - \beta_1^{t+1}` and
    :math:`v_{t+1}` by :math:`1 - \beta_2^{t+1}` in the last line. Source: Kingma and
    Ba, "Adam: A method for stochastic optimization", ICLR 2015.

    State of a parameter: ``m`` and ``v``, of the parameter's shape and dtype.

    Args:
        learning_rate (float or callable): The learning rate :math:`\lambda`.
        betas (Tuple[float, float], optional): The coefficients
            :math:`(\beta_1, \beta_2)` of the running averages of the gradient and
            its square. Default: ``(0.9, 0.999)``
        eps (float, optional): The term :math:`\epsilon` added to the denominator.
            Default: ``1e-8``
        bias_correction (bool, optional): If set to ``True``, bias correction is
            applied. Default: ``False``
        amsgrad (bool, optional): Divide by the largest :math:`v` so far instead of
            the last, kept as a third state ``v_max``: 36 bytes moved a float32
            parameter instead of 28. Reddi, Kale and Kumar, "On the convergence of
            Adam and beyond", ICLR 2018. Default: ``False``
        cautious (bool, optional): Leave out the elements of an update whose sign is
            not the gradient's, and multiply the others by the number of all over
            theirs, at most 1000. Liang et al., "Cautious optimizers",
            arXiv:2411.16085. The update takes the gradient's place until its elements
            are counted: 44 bytes moved a float32 parameter instead of 28.
            Default: ``False``
        {options}

    Raises:
        TypeError: If a beta or ``eps`` is no number.
        ValueError: If a beta is not in [0, 1), ``eps`` is negative, or ``amsgrad`` and
            ``cautious`` are both set.
    """

    amsgrad: bool = False
    cautious: bool = False

    def __init__(
        self,
        learning_rate: LearningRate,
        betas: tuple[float, float] | list[float] = (0.9, 0.999),
        eps: float = 1e-8,
        bias_correction: bool = False,
        *,
        amsgrad: bool = False,
        cautious: bool = False,
        **options: Unpack[FusedOptions],
    ) -> None:
        check_betas(self, betas)
        check_numbers(self, eps=eps)
        stock.Adam.__init__(self, learning_rate, cast(Any, betas), eps, bias_correction)
        self._set_variant(amsgrad, cautious)
        self._set_options(**options)

    def _set_variant(self, amsgrad: bool, cautious: bool) -> None:
        check_flags(self, amsgrad=amsgrad, cautious=cautious)
        if amsgrad and cautious:
            raise ValueError(
                f"[{type(self).__name__}] amsgrad and cautious exclude each other"
            )
        # Only then, so that checkpoints stay those of mlx.optimizers by default.
        if amsgrad:
            self.amsgrad = True
        if cautious:
            self.cautious = True

    def _rule(self) -> str:
        if self.amsgrad or self.cautious:
            return "AMSGrad" if self.amsgrad else "AdamDirection"
        return "AdamBiasCorrected" if self.bias_correction else "Adam"

    def _added_states(self) -> tuple[str, ...]:
        return ("v_max",) if self.amsgrad else ()

    def _hyperparameters(self) -> dict[str, Any]:
        beta1, beta2 = self.betas
        decay = getattr(self, "weight_decay", 0.0)
        values = {"beta1": beta1, "beta2": beta2, "eps": self.eps}
        values["weight_decay"] = decay
        if self.amsgrad or self.cautious:
            values["bias_correction"] = float(self.bias_correction)
        return {**values, "cautious": 1.0} if self.cautious else values


class AdamW(Adam, stock.AdamW):
    r"""The AdamW optimizer: Adam with decoupled weight decay.

    .. math::

        m_{t+1} &= \beta_1 m_t + (1 - \beta_1) g_t \\
        v_{t+1} &= \beta_2 v_t + (1 - \beta_2) g_t^2 \\
        w_{t+1} &= w_t - \alpha \left(\frac{m_{t+1}}{\sqrt{v_{t+1}} + \epsilon}
        + \lambda w_t\right)

    Bias correction is that of :class:`Adam`. Source: Loshchilov and Hutter, "Decoupled
    weight decay regularization", ICLR 2019.

    State of a parameter: ``m`` and ``v``, of the parameter's shape and dtype.

    Args:
        learning_rate (float or callable): The learning rate :math:`\alpha`.
        betas (Tuple[float, float], optional): The coefficients
            :math:`(\beta_1, \beta_2)` of the running averages of the gradient and
            its square. Default: ``(0.9, 0.999)``
        eps (float, optional): The term :math:`\epsilon` added to the denominator.
            Default: ``1e-8``
        weight_decay (float, optional): The weight decay :math:`\lambda`.
            Default: ``0.01``
        bias_correction (bool, optional): If set to ``True``, bias correction is
            applied. Default: ``False``
        amsgrad (bool, optional): Divide by the largest :math:`v` so far instead of
            the last, kept as a third state ``v_max``: 36 bytes moved a float32
            parameter instead of 28. Reddi, Kale and Kumar, "On the convergence of
            Adam and beyond", ICLR 2018. Default: ``False``
        cautious (bool, optional): Leave out the elements of an update whose sign is
            not the gradient's, and multiply the others by the number of all over
            theirs, at most 1000. Liang et al., "Cautious optimizers",
            arXiv:2411.16085. The update takes the gradient's place until its elements
            are counted: 44 bytes moved a float32 parameter instead of 28.
            Default: ``False``
        {options}

    Raises:
        TypeError: If a beta or ``eps`` is no number.
        ValueError: As of :class:`Adam`.
    """

    def __init__(
        self,
        learning_rate: LearningRate,
        betas: tuple[float, float] | list[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        bias_correction: bool = False,
        *,
        amsgrad: bool = False,
        cautious: bool = False,
        **options: Unpack[DecayOptions],
    ) -> None:
        check_betas(self, betas)
        check_numbers(self, eps=eps, weight_decay=weight_decay)
        stock.AdamW.__init__(
            self, learning_rate, cast(Any, betas), eps, weight_decay, bias_correction
        )
        self._set_variant(amsgrad, cautious)
        self._set_options(**options)


class Adamax(Adam, stock.Adamax):
    r"""The Adamax optimizer: Adam with the infinity norm.

    .. math::

        m_{t+1} &= \beta_1 m_t + (1 - \beta_1) g_t \\
        v_{t+1} &= \max(\beta_2 v_t, |g_t|) \\
        w_{t+1} &= w_t - \lambda \frac{m_{t+1}}{v_{t+1} + \epsilon}

    There is no bias correction. Source: Kingma and Ba, "Adam: A method for stochastic
    optimization", ICLR 2015, section 7.1.

    State of a parameter: ``m`` and ``v``, of the parameter's shape and dtype.

    Args:
        learning_rate (float or callable): The learning rate :math:`\lambda`.
        betas (Tuple[float, float], optional): The coefficients
            :math:`(\beta_1, \beta_2)` of the running average of the gradient and of
            the exponentially weighted infinity norm. Default: ``(0.9, 0.999)``
        eps (float, optional): The term :math:`\epsilon` added to the denominator.
            Default: ``1e-8``
        {options}

    Raises:
        TypeError: If a beta or ``eps`` is no number.
        ValueError: If a beta is not in [0, 1) or ``eps`` is negative.
    """

    def __init__(
        self,
        learning_rate: LearningRate,
        betas: tuple[float, float] | list[float] = (0.9, 0.999),
        eps: float = 1e-8,
        **options: Unpack[FusedOptions],
    ) -> None:
        check_betas(self, betas)
        check_numbers(self, eps=eps)
        stock.Adamax.__init__(self, learning_rate, cast(Any, betas), eps)
        self._set_options(**options)

    def _rule(self) -> str:
        return "Adamax"

    def _hyperparameters(self) -> dict[str, Any]:
        beta1, beta2 = self.betas
        return {"beta1": beta1, "beta2": beta2, "eps": self.eps}
