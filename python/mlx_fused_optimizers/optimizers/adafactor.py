"""Adafactor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.optimizers as stock

from .._kernels import kernels
from .base import FUSED_DTYPES, Clip, FusedOptimizer, LearningRate

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
        {options}

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

    def _rule(self) -> str:
        return "Adafactor" if self.beta_1 is None else "AdafactorWithMoment"

    def _hyperparameters(self) -> dict[str, Any]:
        decay = {"weight_decay": self.weight_decay}
        return decay if self.beta_1 is None else {"beta1": self.beta_1, **decay}

    def _update_leaves(self, leaves: Leaves, clip: Clip) -> None:
        sets, set_of = self._sets(leaves)
        # MLX 0.32.4 may not return from reductions of arrays without elements.
        chosen = [i for i, p in enumerate(leaves.parameters) if p.size > 0]
        for i in reversed(chosen):
            state_dtype = self._promote(leaves, i)
            rms = _root_mean_square(leaves.parameters[i])
            learning_rate = self._compute_learning_rate(self.step, rms)
            direction = self._direction(leaves, i, clip, state_dtype)
            leaves.set_gradient(i, direction)
            step_size = learning_rate / mx.maximum(
                1.0, _root_mean_square(direction) / self.clip_threshold
            )
            self._run(
                leaves,
                self._rule(),
                sets,
                sets=None if set_of is None else [set_of[i]],
                learning_rate=learning_rate,
                gradient_scale=step_size,
                skip=clip.skip,
                indices=[i],
                state_dtype=state_dtype,
            )

    def _promote(self, leaves: Leaves, i: int) -> mx.Dtype | None:
        """The dtype that a leaf's state takes, after its parameter is widened.

        None, and nothing done, where upstream's promotions are to happen by themselves.
        """
        parameter, state = leaves.parameters[i], leaves.states[i]
        dtypes = {x.dtype for x in (leaves.gradients[i], parameter, *state.values())}
        if not dtypes <= {*FUSED_DTYPES}:
            return None
        if self.state_dtype is not None:
            return self.state_dtype
        dtype = dtypes.pop() if len(dtypes) == 1 else mx.float32
        if parameter.dtype != dtype:
            leaves.set_parameter(i, parameter.astype(dtype))
        return dtype

    def _direction(
        self, leaves: Leaves, i: int, clip: Clip, state_dtype: mx.Dtype | None
    ) -> mx.array:
        """The gradient over the root of its running mean square.

        The means of the scaled gradient become the leaf's state.
        """
        gradient, state = leaves.gradients[i], leaves.states[i]
        if clip.scale is not None:
            gradient = gradient * clip.scale
        beta_2 = 1.0 - self.step**self.decay_rate
        square = mx.square(gradient.astype(mx.float32)) + self.eps[0]

        def running(key: str, mean: mx.array) -> mx.array:
            before = self._cast(state[key])
            mean = beta_2 * before + (1 - beta_2) * mean
            after = mean if state_dtype is None else mean.astype(state_dtype)
            if clip.skip is not None:
                after = mx.where(clip.skip, before, after)
            leaves.set_state(i, key, after)
            return mean

        if gradient.ndim < 2:
            inverse_root = mx.rsqrt(running("exp_avg_sq", square))
        else:
            rows = running("exp_avg_sq_row", mx.mean(square, axis=-1))
            columns = running("exp_avg_sq_col", mx.mean(square, axis=-2))
            inverse_root = self._approximate_exp_moving_avg(rows, columns)
        direction: mx.array = inverse_root * gradient
        return direction


def _root_mean_square(x: mx.array) -> mx.array:
    if x.dtype not in FUSED_DTYPES:
        return mx.sqrt(mx.mean(mx.square(x)))
    # Without an array of squares.
    sums, _, _ = kernels.sums_of_squares([x], mx.array(1.0))
    return mx.sqrt(sums.squeeze() / x.size)
