"""Adafactor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.optimizers as stock

from . import base
from .base import (
    FUSED_DTYPES,
    DecayOptions,
    FusedOptimizer,
    FusedRule,
    LearningRate,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .. import _ext


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

    The reductions are MLX's; scaling, first moment, decay and the write of the
    parameter are one kernel, in place. Source: Shazeer and Stern, "Adafactor: Adaptive
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

    def _compute_rms(self, inputs: mx.array) -> mx.array:
        if inputs.dtype not in FUSED_DTYPES:
            rms: mx.array = super()._compute_rms(inputs)
            return rms
        # Without an array of squares.
        norm, _ = base._ext.global_norm([inputs], mx.array(1.0))
        root: mx.array = norm / max(inputs.size, 1) ** 0.5
        return root.astype(inputs.dtype)

    def _update_leaves(
        self,
        leaves: _ext.Leaves,
        indices: list[int] | None,
        scale: mx.array | None,
        weight_decay: Any,
    ) -> None:
        if self.beta_1 is None:
            rule = FusedRule("adafactor", (weight_decay,), ())
        else:
            rule = FusedRule(
                "adafactor_with_moment",
                (self.beta_1, 1 - self.beta_1, weight_decay),
                ("exp_avg",),
            )
        trees = leaves.gradients, leaves.parameters, leaves.states
        for i in range(len(leaves)) if indices is None else indices:
            gradient, parameter, state = (tree[i] for tree in trees)
            if not self._has_kernel(rule, gradient, parameter, state):
                self._compose(leaves, [i], scale, weight_decay)
                continue
            if parameter.size == 0:  # MLX 0.32.4 may not return from its reductions
                leaves.set(i, parameter, {})
                continue
            state = {key: self._cast(value) for key, value in state.items()}
            rms = self._compute_rms(parameter)
            learning_rate = self._compute_learning_rate(self.step, rms)
            direction, change = self._direction(gradient, state, rms.dtype, scale)
            direction_rms = self._compute_rms(direction)
            step_size = learning_rate
            if scale is not None:  # it is folded in where the direction is used
                direction_rms = direction_rms * mx.abs(scale)
                step_size = step_size * mx.abs(scale)
            step_size = step_size / mx.maximum(1.0, direction_rms / self.clip_threshold)
            if scale is not None:
                skip = scale < 0
                step_size = mx.where(skip, -1.0, step_size)
                change = {k: mx.where(skip, state[k], x) for k, x in change.items()}
            (result,), moments = self._fused(
                rule, [parameter], [direction], [state], step_size, learning_rate
            )
            if moments:
                change["exp_avg"] = moments[0][0]
            leaves.set(i, result, change)

    def _direction(
        self,
        gradient: mx.array,
        state: dict[str, mx.array],
        dtype: mx.Dtype,
        scale: mx.array | None,
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """The gradient over the root of its running mean square, and those means.

        The means are those of the scaled gradient; the gradient itself is not scaled.
        """
        beta_2 = 1.0 - (self.step**self.decay_rate).astype(dtype)

        square = mx.square(gradient) + self.eps[0]

        def running(key: str, mean: mx.array) -> mx.array:
            if scale is not None:
                mean = mean * mx.square(scale)
            mean = beta_2 * state[key] + (1 - beta_2) * mean
            return mean if scale is None else mean.astype(state[key].dtype)

        if gradient.ndim < 2:
            mean = running("exp_avg_sq", square)
            return mx.rsqrt(mean) * gradient, {"exp_avg_sq": mean}
        means = {
            "exp_avg_sq_row": running("exp_avg_sq_row", mx.mean(square, axis=-1)),
            "exp_avg_sq_col": running("exp_avg_sq_col", mx.mean(square, axis=-2)),
        }
        return self._approximate_exp_moving_avg(*means.values()) * gradient, means
