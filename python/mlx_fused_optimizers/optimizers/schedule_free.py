"""Schedule-free SGD and AdamW: gradients at y, steps of z, evaluation of x."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from .._formats import HALF_DTYPES, is_error, master_of
from .._kernels import kernels
from ..schedulers import as_array
from ..shards import Shards
from .base import NO_SHARDS, Clip, LearningRate, check_tree
from .fused import Arguments, FusedOptimizer
from .options import check_numbers, check_ranges

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .._ext import Leaves
    from .options import DecayOptions

# The entry of the state that is there while the model has the average.
AVERAGED = "averaged"


class _ScheduleFree(FusedOptimizer):
    """The sequences, the weights of their average, and the switch between them."""

    takes_ema = False
    warmup_steps: int
    r: float
    weight_lr_power: float

    def _set_average(self, warmup_steps: int, r: float, weight_lr_power: float) -> None:
        check_numbers(self, r=r)
        self.warmup_steps = warmup_steps
        self.r = r
        self.weight_lr_power = weight_lr_power
        for name in ("weight_sum", "lr_max"):
            self.state[name] = mx.array(0.0)

    def _momentum(self) -> Any:
        """How far y is from z to x."""
        raise NotImplementedError

    def init_single(self, parameter: mx.array, state: dict[str, Any]) -> None:
        """Fill a parameter's state: ``z`` is the parameter, all else zeros."""
        super().init_single(parameter, state)
        state["z"] = self._cast(mx.array(parameter))

    def _initial(self, leaves: Leaves) -> Any:
        # Upstream initializes by the gradients; z begins as the parameter.
        return leaves.replace(leaves.parameters)

    def _coded_states(self, names: list[str]) -> list[str]:
        # A sequence of weights: codes would swallow its steps.
        return [key for key in names if key != "z"]

    # A step

    def _warmth(self) -> mx.array | float:
        """The part of the learning rate that a step takes."""
        if not self.warmup_steps:
            return 1.0
        return mx.minimum(as_array(self.step) / self.warmup_steps, 1.0)

    def _weight(self) -> mx.array:
        """The weight of this step's z in the average."""
        step = mx.maximum(as_array(self.step), 1).astype(mx.float32)
        weight = mx.power(self.state["lr_max"], self.weight_lr_power)
        return weight * mx.power(step, self.r) if self.r else weight

    def _coefficient(self, hyperparameters: dict[str, Any]) -> mx.array:
        total = self.state["weight_sum"]
        return mx.where(total > 0, self._weight() / mx.maximum(total, 1e-38), 0.0)

    def _arguments(self, leaves: Leaves, learning_rate: Any) -> Arguments:
        arguments = super()._arguments(leaves, learning_rate)
        return arguments._replace(rates=arguments.rates * self._warmth())

    def _step(
        self,
        gradients: Any,
        parameters: Any,
        clip: Clip | None,
        shards: Shards = NO_SHARDS,
    ) -> Any:
        if AVERAGED in self.state:
            raise RuntimeError(
                f"[{type(self).__name__}] the model has the average of its weights; "
                "call optimizer.train(model), or leave optimizer.averaged(model), "
                "before a step"
            )
        return super()._step(gradients, parameters, clip, shards)

    def _apply_leaves(self, leaves: Leaves, clip: Clip) -> Any:
        state = self.state
        rate = as_array(state["learning_rate"]).astype(mx.float32) * self._warmth()
        before = {name: state[name] for name in ("weight_sum", "lr_max")}
        state["lr_max"] = mx.maximum(before["lr_max"], mx.max(rate))
        state["weight_sum"] = before["weight_sum"] + self._weight()
        if clip.skip is not None:
            for name, value in before.items():
                state[name] = mx.where(clip.skip, value, state[name])
        return super()._apply_leaves(leaves, clip)

    # The switch

    def average(self, parameters: Any) -> Any:
        r"""The average of the weights, :math:`x`, of parameters that are :math:`y`.

        Args:
            parameters (dict): A Python tree of parameters. Those without a state, such
                as frozen ones, stay as they are.

        Returns:
            dict: The tree with the averages.
        """
        check_tree("parameters", parameters)
        return tree_map_with_path(self._averaged, parameters)

    def eval(self, model: nn.Module) -> None:
        r"""Give the model the average of its weights, :math:`x`.

        In the memory of the parameters, which :meth:`train` computes anew: in float32
        up to rounding, in half precision without a master up to its rounding.
        :meth:`averaged` puts the very weights back. Nothing if the model has the
        average already. A step then raises ``RuntimeError``, and so does tracing one
        with ``mx.compile``. A checkpoint keeps which of the two it has; to load that of
        an average, call this before.

        Args:
            model (mlx.nn.Module): The model.

        Raises:
            TypeError: If ``model`` is no module.
        """
        if not self._is_averaged(model):
            self._exchange(model, to_average=True)
            self.state[AVERAGED] = mx.array(True)

    def train(self, model: nn.Module) -> None:
        r"""Give the model the weights that it is trained with, :math:`y`.

        Nothing if it has them already.

        Args:
            model (mlx.nn.Module): The model.

        Raises:
            TypeError: If ``model`` is no module.
        """
        if self._is_averaged(model):
            self._exchange(model, to_average=False)
            del self.state[AVERAGED]

    @contextmanager
    def averaged(self, model: nn.Module) -> Iterator[None]:
        r"""Evaluate with the average of the weights, :math:`x`.

        Afterwards, also after an exception, the model has its own weights again, bit
        for bit. They are in memory meanwhile.

        Example:
            >>> model = nn.Linear(3, 2)
            >>> optimizer = optim.ScheduleFreeAdamW(learning_rate=1e-3)
            >>> with optimizer.averaged(model):
            ...     y = model(mx.ones((1, 3)))

        Args:
            model (mlx.nn.Module): The model.

        Raises:
            TypeError: If ``model`` is no module.
        """
        if self._is_averaged(model):
            yield
            return
        before = model.parameters()
        try:
            model.update(self.average(before))
            self.state[AVERAGED] = mx.array(True)
            yield
        finally:
            model.update(before)
            self.state.pop(AVERAGED, None)

    def _is_averaged(self, model: Any) -> bool:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model is of type {type(model).__name__}; expected an mlx.nn.Module"
            )
        return AVERAGED in self.state

    def _exchange(self, model: nn.Module, to_average: bool) -> None:
        undo = self._remember()
        before = model.parameters()
        try:
            exchange = self._averaged if to_average else self._trained
            changed: list[tuple[dict[str, Any], mx.array]] = []

            def one(path: str, parameter: mx.array) -> Any:
                return exchange(path, parameter, changed)

            model.update(tree_map_with_path(one, before))
            for state, error in changed:
                state["error"] = error
        except BaseException:
            undo()
            model.update(before)
            raise

    def _averaged(self, path: str, parameter: mx.array, changed: Any = None) -> Any:
        return self._between(path, parameter, changed, lambda beta: 1 - 1 / beta)

    def _trained(self, path: str, parameter: mx.array, changed: Any = None) -> Any:
        return self._between(path, parameter, changed, lambda beta: 1 - beta)

    def _between(self, path: str, parameter: Any, changed: Any, part_of: Any) -> Any:
        """A part of the way from the parameter to z; masters go it, too."""
        state = self._state_at(path)
        if not isinstance(state, dict) or "z" not in state:
            return parameter
        number = self._group_of(path, parameter)
        usual = {"betas": getattr(self, "betas", ()), "momentum": self._momentum()}
        values = {**usual, **self._group_values(number)}
        beta = values["betas"][0] if values["betas"] else values["momentum"]
        error: Any = state.get("error")
        z = state["z"]
        is_split = is_error(error) and parameter.dtype in HALF_DTYPES
        wide = kernels.join(parameter, error) if is_split else parameter
        if wide.dtype in HALF_DTYPES:
            wide, z = wide.astype(mx.float32), z.astype(mx.float32)
        wide = wide + part_of(beta) * (z - wide)
        if is_split:
            weight, error = kernels.split(wide, master_of(error), parameter.dtype)
            if changed is not None:
                changed.append((state, error))
            return weight
        return wide.astype(parameter.dtype)

    def _state_at(self, path: str) -> Any:
        node: Any = self.state
        for key in path.split("."):
            try:
                node = node[int(key)] if isinstance(node, (list, tuple)) else node[key]
            except (LookupError, TypeError, ValueError):
                return None
        return node


class ScheduleFreeSGD(_ScheduleFree):
    r"""Schedule-free SGD: no schedule, and no end of the training to know of.

    .. math::

        z_{t+1} &= z_t - \lambda_t (g_t + \eta y_t) \\
        x_{t+1} &= (1 - c_{t+1}) x_t + c_{t+1} z_{t+1} \\
        y_{t+1} &= (1 - \beta) z_{t+1} + \beta x_{t+1}

    Gradients :math:`g_t` are those at :math:`y_t`, which is what the model has while it
    is trained; evaluate it with the average :math:`x`, see :meth:`averaged` and
    :meth:`eval`. The weight :math:`c_t` is :math:`w_t / \sum_{i \le t} w_i` with
    :math:`w_t = t^r (\max_{i \le t} \lambda_i)^p`. Over ``warmup_steps`` the learning
    rate grows linearly. Source: Defazio et al., "The road less scheduled",
    arXiv:2405.15682; the code of https://github.com/facebookresearch/schedule_free.

    State of a parameter: ``z``, of the parameter's shape and dtype. It is a sequence of
    weights: never in codes, and beside parameters of half precision better float32
    (``state_dtype=mlx.core.float32``, or ``master_weights``). A step moves 20 bytes a
    float32 parameter. The optimizer's state has ``weight_sum`` and ``lr_max``, float32
    scalars, those of ``learning_rate`` also where groups have rates of their own.

    Args:
        learning_rate (float or callable): The learning rate :math:`\lambda`.
        momentum (float, optional): The part :math:`\beta` of the average in what the
            model is trained with. Default: ``0.9``
        weight_decay (float, optional): The weight decay :math:`\eta`, at :math:`y`.
            Default: ``0``
        warmup_steps (int, optional): Steps over which the learning rate grows.
            Default: ``0``
        r (float, optional): The power of the step in the weights of the average.
            Default: ``0.0``
        weight_lr_power (float, optional): The power :math:`p` of the learning rate
            there. Default: ``2.0``
        {options}

    Raises:
        TypeError: If an argument is no number.
        ValueError: If ``momentum`` is not between 0 and 1, or ``warmup_steps`` or
            ``weight_lr_power`` is negative.
    """

    rule = "ScheduleFreeSGD"

    def __init__(
        self,
        learning_rate: LearningRate,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        **options: Unpack[DecayOptions],
    ) -> None:
        check_numbers(self, momentum=momentum, weight_decay=weight_decay)
        check_ranges(
            self, (), 0, warmup_steps=warmup_steps, weight_lr_power=weight_lr_power
        )
        if not 0 < momentum < 1:
            raise ValueError(
                f"momentum should be in (0, 1), {momentum} was provided instead"
            )
        self.momentum = momentum
        self.weight_decay = weight_decay
        super().__init__(learning_rate, **options)
        self._set_average(warmup_steps, r, weight_lr_power)

    def _momentum(self) -> Any:
        return self.momentum


class ScheduleFreeAdamW(_ScheduleFree):
    r"""Schedule-free AdamW: no schedule, and no end of the training to know of.

    .. math::

        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        u_t &= \frac{g_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} + \eta y_t \\
        z_{t+1} &= z_t - \lambda_t u_t \\
        x_{t+1} &= (1 - c_{t+1}) x_t + c_{t+1} z_{t+1} \\
        y_{t+1} &= (1 - \beta_1) z_{t+1} + \beta_1 x_{t+1}

    Sequences, weights, warm-up and source are those of :class:`ScheduleFreeSGD`: train
    with :math:`y`, evaluate with :math:`x`, by the same methods.

    State of a parameter: ``z``, as there, and ``v``, of the parameter's shape and
    dtype. A step moves 28 bytes a float32 parameter, as AdamW's.

    Args:
        learning_rate (float or callable): The learning rate :math:`\lambda`; the
            authors take 1 to 10 times that of AdamW with a schedule.
        betas (Tuple[float, float], optional): The part :math:`\beta_1` of the average
            in what the model is trained with, and the coefficient :math:`\beta_2` of
            the running average of the gradient's square. Default: ``(0.9, 0.999)``
        eps (float, optional): The term :math:`\epsilon` added to the denominator.
            Default: ``1e-8``
        weight_decay (float, optional): The weight decay :math:`\eta`, at :math:`y`.
            Default: ``0.0``
        warmup_steps (int, optional): Steps over which the learning rate grows.
            Default: ``0``
        r (float, optional): The power of the step in the weights of the average.
            Default: ``0.0``
        weight_lr_power (float, optional): The power :math:`p` of the learning rate
            there. Default: ``2.0``
        {options}

    Raises:
        TypeError: If an argument is no number.
        ValueError: If a beta is not in [0, 1) or the first is 0, or ``eps``,
            ``warmup_steps`` or ``weight_lr_power`` is negative.
    """

    rule = "ScheduleFreeAdamW"

    def __init__(
        self,
        learning_rate: LearningRate,
        betas: tuple[float, float] | list[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        **options: Unpack[DecayOptions],
    ) -> None:
        check_numbers(self, weight_decay=weight_decay)
        check_ranges(
            self,
            betas,
            eps=eps,
            warmup_steps=warmup_steps,
            weight_lr_power=weight_lr_power,
        )
        if not betas[0] > 0:
            raise ValueError(
                f"beta1 should be in (0, 1), {betas[0]} was provided instead"
            )
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        super().__init__(learning_rate, **options)
        self._set_average(warmup_steps, r, weight_lr_power)

    def _momentum(self) -> Any:
        return self.betas[0]

    def _hyperparameters(self) -> dict[str, Any]:
        beta1, beta2 = self.betas
        values = {"beta1": beta1, "beta2": beta2, "eps": self.eps}
        return {**values, "weight_decay": self.weight_decay}
