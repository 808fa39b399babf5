"""Adafactor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.optimizers as stock

from .base import Clip, LearningRate
from .fused import FusedOptimizer
from .matrices import refuse_complex
from .options import check_numbers

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .._ext import Leaves
    from .options import DecayOptions


class Adafactor(FusedOptimizer, stock.Adafactor):
    r"""The Adafactor optimizer.

    With :math:`\rho_t` the relative step size, :math:`\alpha_t = \max(\epsilon_2,
    \text{RMS}(w_t)) \rho_t` and :math:`\hat\beta_t = 1 - t^{c}`, a matrix is updated as

    .. math::

        s_t &= g_t^2 + \epsilon_1 \\
        r_t &= \hat\beta_t r_{t-1} + (1 - \hat\beta_t) \text{mean}_j(s_t) \\
        c_t &= \hat\beta_t c_{t-1} + (1 - \hat\beta_t) \text{mean}_i(s_t) \\
        u_t &= g_t / \sqrt{r_t c_t / \text{mean}(r_t)} \\
        w_t &= w_{t-1} - \alpha_t u_t / \max(1, \text{RMS}(u_t) / d)

    A vector's :math:`s_t` is averaged as it is. Three passes, each over several
    tensors, do it in place: the means, the root mean square of :math:`u_t`, which is
    not stored, and the write. All is computed in float32 and rounded once; float16
    means of squares stay at most 65504. Source: Shazeer and Stern, "Adafactor: Adaptive
    learning rates with sublinear memory cost", ICML 2018.

    State of a parameter: ``exp_avg_sq_row`` and ``exp_avg_sq_col`` of the parameter's
    shape without its last and last but one dimension, or ``exp_avg_sq`` for fewer than
    two dimensions; ``exp_avg`` of its shape if ``beta_1`` is given. Of its dtype.

    Args:
        learning_rate (float or callable, optional): The learning rate.
            Default: ``None``
        eps (tuple(float, float), optional): :math:`\epsilon_1`, added to squared
            gradients, and :math:`\epsilon_2`, the least scale of a parameter.
            Default: ``(1e-30, 1e-3)``
        clip_threshold (float, optional): The root mean square :math:`d` at which the
            update is clipped. Default: ``1.0``
        decay_rate (float, optional): The exponent :math:`c` of the running averages.
            Default: ``-0.8``
        beta_1 (float, optional): The coefficient of the first moment, if one is
            wanted. Default: ``None``
        weight_decay (float, optional): The weight decay. Default: ``0.0``
        scale_parameter (bool, optional): Scale the step by the parameter's root mean
            square. Default: ``True``
        relative_step (bool, optional): Take a step size from the step count, and
            ignore ``learning_rate``. Default: ``True``
        warmup_init (bool, optional): Let the relative step size grow from zero.
            Default: ``False``
        {options}

    Raises:
        ValueError: If ``max_grad_norm`` is negative.
        TypeError: In a step, if a parameter or gradient is complex.
    """

    takes_codes = False
    takes_whole = True

    def __init__(
        self,
        learning_rate: LearningRate | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta_1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
        **options: Unpack[DecayOptions],
    ) -> None:
        check_numbers(
            self,
            clip_threshold=clip_threshold,
            decay_rate=decay_rate,
            beta_1=0.0 if beta_1 is None else beta_1,
            weight_decay=weight_decay,
        )
        stock.Adafactor.__init__(
            self,
            learning_rate,
            eps,
            clip_threshold,
            decay_rate,
            beta_1,
            weight_decay,
            scale_parameter,
            relative_step,
            warmup_init,
        )
        self._set_options(**options)

    def _averages_in_pass(self) -> bool:
        return False

    def _rule(self) -> str:
        return "Adafactor" if self.beta_1 is None else "AdafactorWithMoment"

    def _hyperparameters(self) -> dict[str, Any]:
        eps, least_scale = self.eps
        return {
            "eps": eps,
            "least_scale": least_scale,
            "clip_threshold": self.clip_threshold,
            "decay_rate": self.decay_rate,
            "beta1": 0.0 if self.beta_1 is None else self.beta_1,
            "weight_decay": self.weight_decay,
            "scale_parameter": float(self.scale_parameter),
            "relative_step": float(self.relative_step),
            "warmup_init": float(self.warmup_init),
        }

    def _update_leaves(self, leaves: Leaves, clip: Clip) -> None:
        parameters = leaves.parameters
        refuse_complex(type(self).__name__, leaves.tree, parameters, leaves.gradients)
        # MLX 0.32.4 may not return from reductions of arrays without elements.
        chosen = [i for i, p in enumerate(parameters) if getattr(p, "size", 1) > 0]
        is_matrix = [getattr(p, "ndim", 0) >= 2 for p in parameters]
        rate = mx.array(0.0) if self.relative_step else self.learning_rate
        arguments = self._arguments(leaves, rate)
        for kind in ("Matrix", "Vector"):
            indices = [i for i in chosen if is_matrix[i] == (kind == "Matrix")]
            if indices:
                self._run(
                    leaves,
                    f"Adafactor{kind}{'' if self.beta_1 is None else 'WithMoment'}",
                    arguments.sets,
                    sets=arguments.sets_of(indices),
                    learning_rate=arguments.rates_of(indices),
                    per_tensor=arguments.per_tensor,
                    gradient_scale=clip.scale,
                    skip=clip.skip,
                    indices=indices,
                )
