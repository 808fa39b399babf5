"""Schedules of the learning rate: mlx.optimizers' five, and four more.

A schedule is a function of the step, a number or an array, and gives an array of the
step's shape. It can be copied and pickled, and so can an optimizer that has one.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, ParamSpec

import mlx.core as mx
import mlx.optimizers as stock

__all__ = [
    "constant",
    "cosine_decay",
    "exponential_decay",
    "inverse_sqrt",
    "join_schedules",
    "linear_schedule",
    "polynomial_decay",
    "step_decay",
    "warmup_stable_decay",
]

Schedule = Callable[[Any], mx.array]
P = ParamSpec("P")


def is_number_or_array(value: Any) -> bool:
    """Whether it is one, of Python, MLX, NumPy or others."""
    # MLX's own arrays have no __array__ before 0.32.
    is_known = isinstance(value, (int, float, mx.array))
    return is_known or hasattr(value, "__array__")


def as_array(value: Any) -> Any:
    """An array of what upstream takes in its place: a number, or NumPy's arrays."""
    is_array = isinstance(value, mx.array)
    return mx.array(value) if is_number_or_array(value) and not is_array else value


class _Schedule:
    """A schedule, and how it was made, which is what a copy is made from."""

    def __init__(self, schedule: Callable[[Any], Any], again: Callable[[], Schedule]):
        self._schedule = schedule
        self._again = again

    def __call__(self, step: Any) -> Any:
        if not is_number_or_array(step):
            raise TypeError(
                f"step is of type {type(step).__name__}; expected a number or an array"
            )
        steps = as_array(step)
        if steps.dtype == mx.complex64:
            raise TypeError("step is complex; expected a real number or array")
        return self._schedule(steps)

    def __reduce__(self) -> Any:
        return self._again, ()


def _copyable(make: Callable[P, Callable[[Any], Any]]) -> Callable[P, Schedule]:
    """A function of this module that makes schedules that can be copied."""

    @wraps(make)
    def made(*arguments: P.args, **named: P.kwargs) -> Schedule:
        return _Schedule(make(*arguments, **named), partial(made, *arguments, **named))

    made.__module__ = __name__  # where pickle finds it
    return made


cosine_decay = _copyable(stock.cosine_decay)
exponential_decay = _copyable(stock.exponential_decay)
linear_schedule = _copyable(stock.linear_schedule)
step_decay = _copyable(stock.step_decay)


@_copyable
@wraps(stock.join_schedules)
def join_schedules(schedules: list[Any], boundaries: list[int]) -> Any:
    for number, schedule in enumerate(schedules):
        if not callable(schedule):
            raise TypeError(
                f"schedules[{number}] is of type {type(schedule).__name__}; expected a "
                "callable that takes the step"
            )
    return stock.join_schedules(schedules, boundaries)


def _check_steps(name: str, steps: int, least: int = 1) -> None:
    if steps < least:
        raise ValueError(f"{name} must be at least {least}, but got {steps}.")


@_copyable
def constant(value: float) -> Schedule:
    r"""Make a schedule that does not change: :math:`\lambda_t = \lambda`.

    For :func:`join_schedules`.

    Example:
        >>> warmup = optim.linear_schedule(0.0, 1e-1, 10)
        >>> schedule = optim.join_schedules([warmup, optim.constant(1e-1)], [10])
        >>> print(f"{schedule(mx.array(50)).item():.3f}")
        0.100

    Args:
        value (float): The value :math:`\lambda`.

    Returns:
        Callable: The schedule; it gives a float32 scalar.
    """

    def schedule(step: mx.array) -> mx.array:
        return mx.array(value, mx.float32)

    return schedule


@_copyable
def inverse_sqrt(init: float, warmup_steps: int) -> Schedule:
    r"""Make a schedule with linear warm-up, then decay with the step's square root.

    .. math::

        \lambda_t = \lambda \min\left(\frac{t + 1}{w}, \sqrt{\frac{w}{t + 1}}\right)

    Source: Vaswani et al., "Attention is all you need", NeurIPS 2017, section 5.3,
    with the peak in place of the factor :math:`d^{-1/2} w^{-1/2}`.

    Example:
        >>> schedule = optim.inverse_sqrt(1e-1, warmup_steps=100)
        >>> [f"{schedule(mx.array(step)).item():.3f}" for step in (0, 99, 399)]
        ['0.001', '0.100', '0.050']

    Args:
        init (float): The peak :math:`\lambda`, reached after the warm-up.
        warmup_steps (int): The steps :math:`w` of the warm-up, at least 1.

    Returns:
        Callable: The schedule; it gives a float32 scalar.

    Raises:
        ValueError: If ``warmup_steps`` is less than 1.
    """
    _check_steps("warmup_steps", warmup_steps)

    def schedule(step: mx.array) -> mx.array:
        t = step.astype(mx.float32) + 1
        return init * mx.minimum(t / warmup_steps, mx.sqrt(warmup_steps / t))

    return schedule


@_copyable
def polynomial_decay(
    init: float, end: float, decay_steps: int, power: float = 1.0
) -> Schedule:
    r"""Make a polynomial decay schedule.

    .. math::

        \lambda_t = (\lambda_0 - \lambda_1)
        \left(1 - \frac{\min(t, n)}{n}\right)^p + \lambda_1

    Source: Chen et al., "DeepLab", arXiv:1606.00915, section 4.1 (the "poly" policy).

    Example:
        >>> schedule = optim.polynomial_decay(1.0, 0.0, decay_steps=10, power=2.0)
        >>> [f"{schedule(mx.array(step)).item():.2f}" for step in (0, 5, 20)]
        ['1.00', '0.25', '0.00']

    Args:
        init (float): The first value :math:`\lambda_0`.
        end (float): The last value :math:`\lambda_1`, kept beyond ``decay_steps``.
        decay_steps (int): The steps :math:`n` of the decay, at least 1.
        power (float, optional): The exponent :math:`p`. Default: ``1.0``

    Returns:
        Callable: The schedule; it gives a float32 scalar.

    Raises:
        ValueError: If ``decay_steps`` is less than 1 or ``power`` is not positive.
    """
    _check_steps("decay_steps", decay_steps)
    if not power > 0:
        raise ValueError(f"power must be greater than 0, but got {power}.")

    def schedule(step: mx.array) -> mx.array:
        rest = 1 - mx.minimum(step, decay_steps).astype(mx.float32) / decay_steps
        return (init - end) * rest**power + end

    return schedule


@_copyable
def warmup_stable_decay(
    peak: float,
    warmup_steps: int,
    stable_steps: int,
    decay_steps: int,
    end: float = 0.0,
) -> Schedule:
    r"""Make a schedule of linear warm-up, a constant, and linear decay.

    With :math:`w`, :math:`s` and :math:`d` steps of each,

    .. math::

        \lambda_t = \begin{cases}
        \lambda \frac{t}{w} & t < w \\
        \lambda & w \le t < w + s \\
        \lambda + (\lambda_1 - \lambda) \frac{\min(t - w - s, d)}{d} & t \ge w + s
        \end{cases}

    Source: Hu et al., "MiniCPM", arXiv:2404.06395, section 4 (the WSD scheduler, here
    with its linear form of decay).

    Example:
        >>> schedule = optim.warmup_stable_decay(1.0, 10, 80, 10)
        >>> [f"{schedule(mx.array(step)).item():.1f}" for step in (5, 50, 95, 200)]
        ['0.5', '1.0', '0.5', '0.0']

    Args:
        peak (float): The constant :math:`\lambda`.
        warmup_steps (int): The steps of the warm-up, may be 0.
        stable_steps (int): The steps at the peak, may be 0.
        decay_steps (int): The steps of the decay, at least 1.
        end (float, optional): The last value :math:`\lambda_1`. Default: ``0.0``

    Returns:
        Callable: The schedule; it gives a float32 scalar.

    Raises:
        ValueError: If a number of steps is too small.
    """
    _check_steps("warmup_steps", warmup_steps, least=0)
    _check_steps("stable_steps", stable_steps, least=0)
    _check_steps("decay_steps", decay_steps)

    def schedule(step: mx.array) -> mx.array:
        t = step.astype(mx.float32)
        rise = mx.minimum(t / max(warmup_steps, 1), 1) if warmup_steps else 1.0
        fall = mx.clip((t - warmup_steps - stable_steps) / decay_steps, 0, 1)
        return peak * rise + (end - peak) * fall

    return schedule
