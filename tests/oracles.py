"""Optimizers that mlx.optimizers has none of, from MLX's operations."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import mlx.core as mx
import mlx.optimizers as stock


def correction(beta: float, step: mx.array) -> mx.array:
    """1 - beta^step, exactly."""
    return -mx.expm1(step * math.log(beta))


class Plain(stock.Optimizer):
    """States of zeros; arguments are attributes."""

    keys: ClassVar[tuple[str, ...]] = ("m", "v")
    defaults: ClassVar[dict[str, Any]] = {}

    def __init__(self, learning_rate: Any, **options: Any) -> None:
        super().__init__()
        self._maybe_schedule("learning_rate", learning_rate)
        usual = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
        for name, value in {**usual, **self.defaults, **options}.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:  # for mypy: arguments are set above
        raise AttributeError(name)

    def init_single(self, parameter: mx.array, state: dict[str, Any]) -> None:
        for key in self.keys:
            state[key] = mx.zeros_like(parameter)

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]
    ) -> mx.array:
        rate = self.learning_rate.astype(gradient.dtype)
        updated: mx.array = self.step_of(rate, gradient, parameter, state)
        return updated

    def step_of(self, rate: mx.array, g: mx.array, p: mx.array, state: Any) -> Any:
        """The updated parameter, of float arrays."""
        raise NotImplementedError

    def moments(self, g: mx.array, state: Any) -> tuple[mx.array, mx.array]:
        """Adam's, after the gradient."""
        beta1, beta2 = map(float, self.betas[:2])
        state["m"] = beta1 * state["m"] + (1 - beta1) * g
        state["v"] = beta2 * state["v"] + (1 - beta2) * mx.square(g)
        return state["m"], state["v"]

    def corrections(self, g: mx.array) -> list[mx.array]:
        return [correction(beta, self.step).astype(g.dtype) for beta in self.betas]

    def corrected(self, m: mx.array, v: mx.array, g: mx.array) -> mx.array:
        """Adam's update, with bias correction if that is on."""
        if not getattr(self, "bias_correction", True):
            second = mx.ones_like(m)
            first = second
        else:
            first, second = self.corrections(g)
        update: mx.array = m / first / (mx.sqrt(v) * mx.rsqrt(second) + self.eps)
        return update

    def decayed(self, rate: mx.array, p: mx.array) -> mx.array:
        kept: mx.array = p * (1 - rate * self.weight_decay)
        return kept


class AMSGrad(Plain):
    keys = ("m", "v", "v_max")
    defaults: ClassVar[dict[str, Any]] = {"bias_correction": False}

    def step_of(self, rate: mx.array, g: mx.array, p: mx.array, state: Any) -> Any:
        m, v = self.moments(g, state)
        state["v_max"] = mx.maximum(state["v_max"], v)
        return self.decayed(rate, p) - rate * self.corrected(m, state["v_max"], g)


class CautiousAdam(Plain):
    defaults: ClassVar[dict[str, Any]] = {"bias_correction": False}

    def step_of(self, rate: mx.array, g: mx.array, p: mx.array, state: Any) -> Any:
        m, v = self.moments(g, state)
        update = cautious(self.corrected(m, v, g), m, g)
        return self.decayed(rate, p) - rate * update


class CautiousLion(Plain):
    keys = ("m",)
    defaults: ClassVar[dict[str, Any]] = {"betas": (0.9, 0.99)}

    def step_of(self, rate: mx.array, g: mx.array, p: mx.array, state: Any) -> Any:
        beta1, beta2 = self.betas
        c = beta1 * state["m"] + (1 - beta1) * g
        state["m"] = beta2 * state["m"] + (1 - beta2) * g
        return self.decayed(rate, p) - rate * cautious(mx.sign(c), c, g)


def cautious(update: mx.array, sign: mx.array, g: mx.array) -> mx.array:
    if update.size == 0:
        return update
    mask = (mx.sign(sign) * mx.sign(g) > 0).astype(mx.float32)
    # Of float64 sums, as mx.mean counts in the dtype.
    scale = 1 / mx.maximum(mx.sum(mask != 0) / mask.size, 1e-3)
    return update * (mask * scale).astype(update.dtype)


class AdaBelief(Plain):
    defaults: ClassVar[dict[str, Any]] = {"eps": 1e-16}

    def step_of(self, rate: mx.array, g: mx.array, p: mx.array, state: Any) -> Any:
        beta1, beta2 = self.betas
        m = beta1 * state["m"] + (1 - beta1) * g
        v = beta2 * state["v"] + (1 - beta2) * mx.square(g - m) + self.eps
        state |= {"m": m, "v": v}
        return self.decayed(rate, p) - rate * self.corrected(m, v, g)


class Adan(Plain):
    keys = ("m", "d", "v", "previous")
    defaults: ClassVar[dict[str, Any]] = {
        "betas": (0.98, 0.92, 0.99),
        "no_prox": False,
    }

    def step_of(self, rate: mx.array, g: mx.array, p: mx.array, state: Any) -> Any:
        beta1, beta2, beta3 = self.betas
        first, second, third = self.corrections(g)
        diff = mx.where(self.step == 1, 0.0, g - state["previous"]).astype(g.dtype)
        state["m"] = beta1 * state["m"] + (1 - beta1) * g
        state["d"] = beta2 * state["d"] + (1 - beta2) * diff
        ahead = mx.square(g + beta2 * diff)
        state["v"] = beta3 * state["v"] + (1 - beta3) * ahead
        state["previous"] = mx.zeros_like(state["previous"]) + g
        update = state["m"] / first + beta2 * state["d"] / second
        update = update / (mx.sqrt(state["v"]) * mx.rsqrt(third) + self.eps)
        if self.no_prox:
            return self.decayed(rate, p) - rate * update
        return (p - rate * update) / (1 + rate * self.weight_decay)


class LAMB(Plain):
    defaults: ClassVar[dict[str, Any]] = {
        "eps": 1e-6,
        "weight_decay": 0.01,
        "bias_correction": True,
    }

    def step_of(self, rate: mx.array, g: mx.array, p: mx.array, state: Any) -> Any:
        m, v = self.moments(g, state)
        update = self.corrected(m, v, g) + self.weight_decay * p
        if p.size == 0:
            return p
        norms = [mx.linalg.norm(x.astype(mx.float32).reshape(-1)) for x in (p, update)]
        is_usual = (norms[0] > 0) & (norms[1] > 0)
        ratio = mx.where(is_usual, norms[0] / norms[1], 1.0).astype(g.dtype)
        return p - rate * ratio * update


class NAdam(Plain):
    defaults: ClassVar[dict[str, Any]] = {
        "momentum_decay": 0.004,
        "decoupled_weight_decay": False,
    }

    def step_of(self, rate: mx.array, g: mx.array, p: mx.array, state: Any) -> Any:
        beta1, beta2 = self.betas
        numbers = mx.arange(1, 500)
        power = mx.power(0.96, numbers * self.momentum_decay)
        momenta = beta1 * (1 - 0.5 * power)
        now, ahead = (
            mx.prod(mx.where(numbers <= self.step + i, momenta, 1.0)) for i in (0, 1)
        )
        mu, after = (momenta[self.step.astype(mx.int32) + i] for i in (-1, 0))
        p, g = coupled(self, rate, p, g)
        m, v = self.moments(g, state)
        share, rest = after / (1 - ahead), (1 - mu) / (1 - now)
        update = share.astype(g.dtype) * m + rest.astype(g.dtype) * g
        second = correction(beta2, self.step).astype(g.dtype)
        return p - rate * update / (mx.sqrt(v) * mx.rsqrt(second) + self.eps)


class RAdam(Plain):
    defaults: ClassVar[dict[str, Any]] = {"decoupled_weight_decay": False}

    def step_of(self, rate: mx.array, g: mx.array, p: mx.array, state: Any) -> Any:
        beta2 = self.betas[1]
        p, g = coupled(self, rate, p, g)
        m, v = self.moments(g, state)
        first, second = self.corrections(g)
        with mx.stream(mx.cpu):
            t = self.step.astype(mx.float64)
            most = mx.array(2 / (1 - beta2) - 1, mx.float64)
            power = mx.power(mx.array(beta2, mx.float64), t)
            rho = most - 2 * t * power / (1 - power)
            rest = (most - 4) * (most - 2) * rho
            r = mx.sqrt((rho - 4) * (rho - 2) * most / rest)
            is_rectified = rho > 5
            r = r.astype(mx.float32)
        scaled = r.astype(g.dtype) * mx.sqrt(second) / (mx.sqrt(v) + self.eps)
        return p - rate * m / first * mx.where(is_rectified, scaled, 1.0)


def coupled(
    optimizer: Any, rate: mx.array, p: mx.array, g: mx.array
) -> tuple[mx.array, mx.array]:
    """Parameter and gradient with their decay."""
    if optimizer.decoupled_weight_decay:
        return p * (1 - rate * optimizer.weight_decay), g
    return p, g + optimizer.weight_decay * p if optimizer.weight_decay else g


class ScheduleFree(Plain):
    """Of x, y and z, as the paper has them: the parameter is y."""

    defaults: ClassVar[dict[str, Any]] = {
        "warmup_steps": 0,
        "r": 0.0,
        "weight_lr_power": 2.0,
    }

    def __init__(self, learning_rate: Any, **options: Any) -> None:
        super().__init__(learning_rate, **options)
        self.state |= {"weight_sum": mx.array(0.0), "lr_max": mx.array(0.0)}

    def init_single(self, parameter: mx.array, state: dict[str, Any]) -> None:
        state["z"] = parameter + 0
        super().init_single(parameter, state)

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        has_states = any(isinstance(x, (dict, list)) for x in self.state.values())
        if not self._initialized and not has_states:
            self.init(gradients)
            self.state |= ScheduleFree.z_of(self.state, parameters)
        step = self.step + 1
        schedule = self._schedulers.get("learning_rate")
        rate = schedule(self.step) if schedule else self.learning_rate
        if self.warmup_steps:
            rate = rate * mx.minimum(step / self.warmup_steps, 1)
        self._rate = rate
        most = mx.maximum(self.state["lr_max"], rate)
        weight = mx.power(step, self.r) * mx.power(most, self.weight_lr_power)
        total = self.state["weight_sum"] + weight
        self.state["lr_max"] = most.astype(mx.float32)
        self.state["weight_sum"] = total.astype(mx.float32)
        self._share = mx.where(total > 0, weight / total, 0.0)
        return super().apply_gradients(gradients, parameters)

    @staticmethod
    def z_of(state: Any, parameters: Any) -> Any:
        """States of which z is the parameter."""
        if isinstance(state, (list, tuple)):
            pairs = zip(state, parameters, strict=False)
            return type(state)([ScheduleFree.z_of(*pair) for pair in pairs])
        if not isinstance(state, dict):
            return state
        if isinstance(parameters, mx.array):
            return {**state, "z": parameters + 0}
        return {
            key: ScheduleFree.z_of(x, parameters[key]) if key in parameters else x
            for key, x in state.items()
        }

    def step_of(self, rate: mx.array, g: mx.array, p: mx.array, state: Any) -> Any:
        rate, share = self._rate.astype(g.dtype), self._share.astype(g.dtype)
        update = self.update_of(g, p, state) + self.weight_decay * p
        beta, z = self.beta(), state["z"]
        x = p + (1 - 1 / beta) * (z - p)
        z = state["z"] = z - rate * update
        x = x + share * (z - x)
        return beta * x + (1 - beta) * z

    def beta(self) -> float:
        raise NotImplementedError

    def update_of(self, g: mx.array, p: mx.array, state: Any) -> mx.array:
        raise NotImplementedError


class ScheduleFreeSGD(ScheduleFree):
    keys = ()
    defaults: ClassVar[dict[str, Any]] = {**ScheduleFree.defaults, "momentum": 0.9}

    def beta(self) -> float:
        return float(self.momentum)

    def update_of(self, g: mx.array, p: mx.array, state: Any) -> mx.array:
        return g


class ScheduleFreeAdamW(ScheduleFree):
    keys = ("v",)

    def beta(self) -> float:
        return float(self.betas[0])

    def update_of(self, g: mx.array, p: mx.array, state: Any) -> mx.array:
        beta2 = self.betas[1]
        state["v"] = beta2 * state["v"] + (1 - beta2) * mx.square(g)
        second = correction(beta2, self.step).astype(g.dtype)
        update: mx.array = g / (mx.sqrt(state["v"]) * mx.rsqrt(second) + self.eps)
        return update


def variant(usual: Any, **others: Callable[..., Any]) -> Callable[..., Any]:
    """Stock's class, or another where an argument that it has not is on."""

    def make(*arguments: Any, **options: Any) -> Any:
        chosen = usual
        for name, kind in others.items():
            chosen = kind if options.pop(name, False) else chosen
        return chosen(*arguments, **options)

    return make


Adam = variant(stock.Adam, amsgrad=AMSGrad, cautious=CautiousAdam)
AdamW = variant(
    stock.AdamW,
    amsgrad=partial(AMSGrad, weight_decay=0.01),
    cautious=partial(CautiousAdam, weight_decay=0.01),
)
Lion = variant(stock.Lion, cautious=CautiousLion)
