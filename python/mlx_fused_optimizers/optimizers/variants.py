"""Adam's relatives that stock has none of: AdaBelief, Adan, LAMB, NAdam, RAdam."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..schedulers import as_array
from .base import LearningRate
from .directions import trust_ratios
from .fused import FusedOptimizer
from .options import check_flags, check_numbers, check_ranges

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import DecayOptions

Betas = tuple[float, float] | list[float]


class _Relative(FusedOptimizer):
    """One whose arguments begin with Adam's."""

    betas: Any
    eps: float
    weight_decay: float

    def _set_numbers(
        self,
        betas: Any,
        eps: float,
        weight_decay: float,
        count: int = 2,
        **least_zero: float,
    ) -> None:
        check_ranges(self, betas, count, eps=eps, **least_zero)
        check_numbers(self, weight_decay=weight_decay)
        values = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
        for name, value in {**values, **least_zero}.items():
            setattr(self, name, value)

    def _hyperparameters(self) -> dict[str, Any]:
        betas = {f"beta{number}": beta for number, beta in enumerate(self.betas, 1)}
        return {**betas, "eps": self.eps, "weight_decay": self.weight_decay}


class AdaBelief(_Relative):
    r"""The AdaBelief optimizer: long steps where gradients are as expected.

    .. math::

        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) (g_t - m_t)^2 + \epsilon \\
        w_t &= w_{t-1} - \lambda \left(\frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t /
        (1 - \beta_2^t)} + \epsilon} + \eta w_{t-1}\right)

    Source: Zhuang et al., "AdaBelief optimizer: adapting stepsizes by the belief in
    observed gradients", arXiv:2010.07468, algorithm 2, with decoupled weight decay and
    without the rectification that the authors' code has as an option.

    State of a parameter: ``m`` and ``v``, of the parameter's shape and dtype. A step
    moves 28 bytes a float32 parameter.

    Args:
        learning_rate (float or callable): The learning rate :math:`\lambda`.
        betas (Tuple[float, float], optional): The coefficients
            :math:`(\beta_1, \beta_2)` of the running averages of the gradient and of
            its squared difference from that. Default: ``(0.9, 0.999)``
        eps (float, optional): The term :math:`\epsilon`. Default: ``1e-16``
        weight_decay (float, optional): The weight decay :math:`\eta`.
            Default: ``0.0``
        {options}

    Raises:
        TypeError: If a beta, ``eps`` or ``weight_decay`` is no number.
        ValueError: If a beta is not in [0, 1) or ``eps`` is negative.
    """

    rule = "AdaBelief"

    def __init__(
        self,
        learning_rate: LearningRate,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 0.0,
        **options: Unpack[DecayOptions],
    ) -> None:
        self._set_numbers(betas, eps, weight_decay)
        super().__init__(learning_rate, **options)


class Adan(_Relative):
    r"""The Adan optimizer: Nesterov momentum by the differences of gradients.

    .. math::

        d_t &= g_t - g_{t-1} \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        u_t &= \beta_2 u_{t-1} + (1 - \beta_2) d_t \\
        v_t &= \beta_3 v_{t-1} + (1 - \beta_3) (g_t + \beta_2 d_t)^2 \\
        w_t &= \frac{1}{1 + \lambda \eta} \left(w_{t-1} - \lambda \frac{m_t /
        (1 - \beta_1^t) + \beta_2 u_t / (1 - \beta_2^t)}{\sqrt{v_t / (1 - \beta_3^t)} +
        \epsilon}\right)

    In the first step :math:`d_1` is 0. Source: Xie et al., "Adan: adaptive Nesterov
    momentum algorithm for faster optimizing deep models", arXiv:2208.06677, algorithm
    1, with the bias correction and the coefficients of the authors' code: the paper
    writes :math:`1 - \beta` for them.

    State of a parameter: ``m``, ``d`` (:math:`u_t`), ``v`` and ``previous``, the last
    gradient, of the parameter's shape and dtype. A step moves 44 bytes a float32
    parameter. A parameter that joins after the first step takes its first gradient for
    a difference.

    Args:
        learning_rate (float or callable): The learning rate :math:`\lambda`; the
            authors take 5 to 10 times that of Adam.
        betas (Tuple[float, float, float], optional): The coefficients
            :math:`(\beta_1, \beta_2, \beta_3)` of the running averages of the
            gradient, of its differences and of the square.
            Default: ``(0.98, 0.92, 0.99)``
        eps (float, optional): The term :math:`\epsilon` added to the denominator.
            Default: ``1e-8``
        weight_decay (float, optional): The weight decay :math:`\eta`.
            Default: ``0.0``
        no_prox (bool, optional): Decay as AdamW does, by :math:`1 - \lambda \eta`
            before the update. Default: ``False``
        {options}

    Raises:
        TypeError: If a beta, ``eps`` or ``weight_decay`` is no number, or ``no_prox``
            no bool.
        ValueError: If a beta is not in [0, 1) or ``eps`` is negative.
    """

    rule = "Adan"

    def __init__(
        self,
        learning_rate: LearningRate,
        betas: tuple[float, float, float] | list[float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        no_prox: bool = False,
        **options: Unpack[DecayOptions],
    ) -> None:
        check_flags(self, no_prox=no_prox)
        self._set_numbers(betas, eps, weight_decay, 3)
        self.no_prox = no_prox
        super().__init__(learning_rate, **options)

    def _hyperparameters(self) -> dict[str, Any]:
        return {**super()._hyperparameters(), "no_prox": float(self.no_prox)}


class LAMB(_Relative):
    r"""The LAMB optimizer: Adam's update in proportion to each parameter's norm.

    .. math::

        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        u_t &= \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} +
        \eta w_{t-1} \\
        w_t &= w_{t-1} - \lambda \frac{\lVert w_{t-1} \rVert}{\lVert u_t \rVert} u_t

    The ratio of the norms, of each tensor, is 1 where either is 0. Source: You et al.,
    "Large batch optimization for deep learning: training BERT in 76 minutes",
    arXiv:1904.00962, algorithm 2.

    The update takes the gradient's place, in the gradient's dtype, until its norm is
    known: a step moves 48 bytes a float32 parameter. Biases and the weights of
    normalizations are better left to another optimizer, see :class:`MultiOptimizer`.
    Shards of parameters are refused: a norm is that of the whole.

    State of a parameter: ``m`` and ``v``, of the parameter's shape and dtype.

    Args:
        learning_rate (float or callable): The learning rate :math:`\lambda`.
        betas (Tuple[float, float], optional): The coefficients
            :math:`(\beta_1, \beta_2)` of the running averages of the gradient and
            its square. Default: ``(0.9, 0.999)``
        eps (float, optional): The term :math:`\epsilon` added to the denominator.
            Default: ``1e-6``
        weight_decay (float, optional): The weight decay :math:`\eta`.
            Default: ``0.01``
        bias_correction (bool, optional): If set to ``False``, :math:`m_t` and
            :math:`v_t` are taken as they are. Default: ``True``
        {options}

    Raises:
        TypeError: If a beta, ``eps`` or ``weight_decay`` is no number, or
            ``bias_correction`` no bool.
        ValueError: If a beta is not in [0, 1) or ``eps`` is negative; in a step, if
            the learning rate is no scalar.
    """

    rule = "AdamDirection"

    def __init__(
        self,
        learning_rate: LearningRate,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        bias_correction: bool = True,
        **options: Unpack[DecayOptions],
    ) -> None:
        check_flags(self, bias_correction=bias_correction)
        self._set_numbers(betas, eps, weight_decay)
        self.bias_correction = bias_correction
        super().__init__(learning_rate, **options)

    def _hyperparameters(self) -> dict[str, Any]:
        flags = {"bias_correction": float(self.bias_correction), "cautious": 0.0}
        return {**super()._hyperparameters(), **flags}

    def _sizes(
        self, parameters: list[mx.array], directions: list[mx.array]
    ) -> mx.array:
        return trust_ratios(parameters, directions)


class NAdam(_Relative):
    r"""The NAdam optimizer: Adam with Nesterov momentum, as ``torch.optim.NAdam``.

    .. math::

        \mu_t &= \beta_1 (1 - \tfrac{1}{2} 0.96^{t \psi}) \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \hat m_t &= \frac{\mu_{t+1} m_t}{1 - \prod_{i=1}^{t+1} \mu_i} +
        \frac{(1 - \mu_t) g_t}{1 - \prod_{i=1}^{t} \mu_i} \\
        w_t &= w_{t-1} - \lambda \frac{\hat m_t}{\sqrt{v_t / (1 - \beta_2^t)} +
        \epsilon}

    Source: Dozat, "Incorporating Nesterov momentum into Adam", ICLR workshop 2016. The
    product follows from the step alone, and is in no state.

    State of a parameter: ``m`` and ``v``, of the parameter's shape and dtype. A step
    moves 28 bytes a float32 parameter.

    Args:
        learning_rate (float or callable): The learning rate :math:`\lambda`.
        betas (Tuple[float, float], optional): The coefficients
            :math:`(\beta_1, \beta_2)` of the running averages of the gradient and
            its square. Default: ``(0.9, 0.999)``
        eps (float, optional): The term :math:`\epsilon` added to the denominator.
            Default: ``1e-8``
        weight_decay (float, optional): The weight decay, added to the gradient times
            the parameter. Default: ``0.0``
        momentum_decay (float, optional): How fast the momentum grows, :math:`\psi`.
            Default: ``0.004``
        decoupled_weight_decay (bool, optional): Decay as AdamW does instead.
            Default: ``False``
        {options}

    Raises:
        TypeError: If a beta, ``eps``, ``weight_decay`` or ``momentum_decay`` is no
            number, or ``decoupled_weight_decay`` no bool.
        ValueError: If a beta is not in [0, 1), or ``eps`` or ``momentum_decay`` is
            negative.
    """

    rule = "NAdam"
    momentum_decay: float

    def __init__(
        self,
        learning_rate: LearningRate,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum_decay: float = 0.004,
        decoupled_weight_decay: bool = False,
        **options: Unpack[DecayOptions],
    ) -> None:
        check_flags(self, decoupled_weight_decay=decoupled_weight_decay)
        self._set_numbers(betas, eps, weight_decay, momentum_decay=momentum_decay)
        self.decoupled_weight_decay = decoupled_weight_decay
        super().__init__(learning_rate, **options)

    def _hyperparameters(self) -> dict[str, Any]:
        return {
            **super()._hyperparameters(),
            "momentum_decay": self.momentum_decay,
            "decoupled_weight_decay": float(self.decoupled_weight_decay),
        }

    def _coefficient(self, hyperparameters: dict[str, Any]) -> mx.array:
        r"""One less the product of the momenta.

        With :math:`q = 0.96^\psi`, the logarithms of :math:`1 - q^i / 2` are sums of
        :math:`-(q^i / 2)^k / k`; summed over i first, they are geometric.
        """
        step = as_array(self.step).astype(mx.float32)
        k = mx.arange(1, 33).astype(mx.float32)
        x = k * (hyperparameters["momentum_decay"] * math.log(0.96))
        sums = mx.exp(x) * mx.expm1(step * x) / mx.where(x == 0, 1.0, mx.expm1(x))
        sums = mx.where(x == 0, step, sums)
        logarithm = step * _log(hyperparameters["beta1"])
        return -mx.expm1(logarithm - mx.sum(mx.power(0.5, k) / k * sums))


class RAdam(_Relative):
    r"""The RAdam optimizer: Adam, rectified at first, as ``torch.optim.RAdam``.

    .. math::

        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \rho_t &= \rho_\infty - 2 t \beta_2^t / (1 - \beta_2^t) \quad \text{with} \quad
        \rho_\infty = 2 / (1 - \beta_2) - 1 \\
        r_t &= \sqrt{\frac{(\rho_t - 4)(\rho_t - 2) \rho_\infty}{(\rho_\infty - 4)
        (\rho_\infty - 2) \rho_t}} \\
        w_t &= w_{t-1} - \lambda \frac{m_t}{1 - \beta_1^t} \cdot \frac{r_t \sqrt{1 -
        \beta_2^t}}{\sqrt{v_t} + \epsilon}

    While :math:`\rho_t` is at most 5, in the first steps, the last factor is 1.
    Source: Liu et al., "On the variance of the adaptive learning rate and beyond",
    arXiv:1908.03265, algorithm 2, with torch's limit of 5 and its place of
    :math:`\epsilon`.

    State of a parameter: ``m`` and ``v``, of the parameter's shape and dtype. A step
    moves 28 bytes a float32 parameter.

    Args:
        learning_rate (float or callable): The learning rate :math:`\lambda`.
        betas (Tuple[float, float], optional): The coefficients
            :math:`(\beta_1, \beta_2)` of the running averages of the gradient and
            its square. Default: ``(0.9, 0.999)``
        eps (float, optional): The term :math:`\epsilon` added to the denominator.
            Default: ``1e-8``
        weight_decay (float, optional): The weight decay, added to the gradient times
            the parameter. Default: ``0.0``
        decoupled_weight_decay (bool, optional): Decay as AdamW does instead.
            Default: ``False``
        {options}

    Raises:
        TypeError: If a beta, ``eps`` or ``weight_decay`` is no number, or
            ``decoupled_weight_decay`` no bool.
        ValueError: If a beta is not in [0, 1) or ``eps`` is negative.
    """

    rule = "RAdam"

    def __init__(
        self,
        learning_rate: LearningRate,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        **options: Unpack[DecayOptions],
    ) -> None:
        check_flags(self, decoupled_weight_decay=decoupled_weight_decay)
        self._set_numbers(betas, eps, weight_decay)
        self.decoupled_weight_decay = decoupled_weight_decay
        super().__init__(learning_rate, **options)

    def _hyperparameters(self) -> dict[str, Any]:
        decoupled = float(self.decoupled_weight_decay)
        return {**super()._hyperparameters(), "decoupled_weight_decay": decoupled}

    def _coefficient(self, hyperparameters: dict[str, Any]) -> mx.array:
        """The rectification, or 0 where there is none.

        Small steps take a series, as what grows is the difference of large numbers:
        2 / (1 - beta2) and 2 t / (e^u - 1) by those of x / (e^x - 1).
        """
        beta2 = hyperparameters["beta2"]
        t = as_array(self.step).astype(mx.float32)
        x = -_log(beta2)
        u = t * x
        last = (1 + beta2) / (1 - beta2)
        terms = 1 - u**2 / 60 + u**4 / 2520 - u**6 / 100800
        small = t + x / 6 - x**3 / 360 - t * u / 6 * terms
        now = mx.where(u < 1, small, last - 2 * t / mx.expm1(u))
        ratio = (now - 4) * (now - 2) * last / ((last - 4) * (last - 2) * now)
        return mx.where(now > 5, mx.sqrt(ratio), 0.0)


def _log(beta: Any) -> Any:
    """Of a number in double precision."""
    if isinstance(beta, mx.array):
        return mx.log(beta)
    return math.log(beta) if beta > 0 else -math.inf
