"""Optimizers as people write them for MLX, from their papers, for ``fuse``.

None of them knows of this package: each is a class with ``init_single`` and
``apply_single``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as stock

State = dict[str, Any]


class AdaBelief(stock.Optimizer):
    """Zhuang et al., "AdaBelief optimizer", NeurIPS 2020, algorithm 2."""

    def __init__(
        self,
        learning_rate: float | Callable[[mx.array], mx.array],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__()
        self._maybe_schedule("learning_rate", learning_rate)
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay

    def init_single(self, parameter: mx.array, state: State) -> None:
        state["m"] = mx.zeros_like(parameter)
        state["s"] = mx.zeros_like(parameter)

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: State
    ) -> mx.array:
        rate = self.learning_rate.astype(gradient.dtype)
        beta1, beta2 = self.betas
        if self.weight_decay:
            parameter = parameter * (1 - rate * self.weight_decay)
        m = beta1 * state["m"] + (1 - beta1) * gradient
        surprise = mx.square(gradient - m)
        s = beta2 * state["s"] + (1 - beta2) * surprise + self.eps
        state["m"] = m
        state["s"] = s
        step = self.step.astype(gradient.dtype)
        m_hat = m / (1 - beta1**step)
        s_hat = s / (1 - beta2**step)
        updated: mx.array = parameter - rate * m_hat / (mx.sqrt(s_hat) + self.eps)
        return updated


class Adan(stock.Optimizer):
    """Xie et al., "Adan: adaptive Nesterov momentum", arXiv:2208.06677, algorithm 1.

    The previous gradient is a state that is set to the gradient, and that appears with
    the first step.
    """

    def __init__(
        self,
        learning_rate: float,
        betas: tuple[float, float, float] = (0.02, 0.08, 0.01),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__()
        self._maybe_schedule("learning_rate", learning_rate)
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay

    def init_single(self, parameter: mx.array, state: State) -> None:
        for name in ("m", "v", "n"):
            state[name] = mx.zeros_like(parameter)

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: State
    ) -> mx.array:
        rate = self.learning_rate.astype(gradient.dtype)
        beta1, beta2, beta3 = self.betas
        previous = state.get("previous")
        if previous is None:
            difference = mx.zeros_like(gradient)
        else:
            difference = gradient - previous
        state["previous"] = gradient
        m = (1 - beta1) * state["m"] + beta1 * gradient
        v = (1 - beta2) * state["v"] + beta2 * difference
        moved = gradient + (1 - beta2) * difference
        n = (1 - beta3) * state["n"] + beta3 * mx.square(moved)
        state["m"], state["v"], state["n"] = m, v, n
        update = rate / (mx.sqrt(n) + self.eps) * (m + (1 - beta2) * v)
        updated: mx.array = (parameter - update) / (1 + rate * self.weight_decay)
        return updated


class NAdam(stock.Optimizer):
    """Dozat, "Incorporating Nesterov momentum into Adam", 2016; as in PyTorch.

    The product of the momentum's schedule is a scalar of each parameter's state.
    """

    def __init__(
        self,
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        decay: float = 4e-3,
    ) -> None:
        super().__init__()
        self._maybe_schedule("learning_rate", learning_rate)
        self.betas = betas
        self.eps = eps
        self.decay = decay

    def init_single(self, parameter: mx.array, state: State) -> None:
        state["m"] = mx.zeros_like(parameter)
        state["v"] = mx.zeros_like(parameter)
        state["mu_product"] = mx.array(1.0)

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: State
    ) -> mx.array:
        dtype = gradient.dtype
        rate = self.learning_rate
        beta1, beta2 = self.betas
        step = self.step.astype(mx.float32)
        mu = beta1 * (1 - 0.5 * 0.96 ** (step * self.decay))
        next_mu = beta1 * (1 - 0.5 * 0.96 ** ((step + 1) * self.decay))
        product = state["mu_product"] * mu
        state["mu_product"] = product
        m = beta1 * state["m"] + (1 - beta1) * gradient
        v = beta2 * state["v"] + (1 - beta2) * mx.square(gradient)
        state["m"], state["v"] = m, v
        root = mx.sqrt(v / (1 - beta2**step).astype(dtype)) + self.eps
        of_gradient = (rate * (1 - mu) / (1 - product)).astype(dtype)
        of_moment = (rate * next_mu / (1 - product * next_mu)).astype(dtype)
        update = of_gradient * gradient / root + of_moment * m / root
        updated: mx.array = parameter - update
        return updated


class QHAdam(stock.Optimizer):
    """Ma and Yarats, "Quasi-hyperbolic momentum and Adam", ICLR 2019, section 4.

    The step is a Python number in the state, as beginners write it.
    """

    def __init__(
        self,
        learning_rate: float,
        nus: tuple[float, float] = (0.7, 1.0),
        betas: tuple[float, float] = (0.995, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        self._maybe_schedule("learning_rate", learning_rate)
        self.nus = nus
        self.betas = betas
        self.eps = eps

    def init_single(self, parameter: mx.array, state: State) -> None:
        state["t"] = 0
        state["m"] = mx.zeros_like(parameter)
        state["v"] = mx.zeros_like(parameter)

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: State
    ) -> mx.array:
        state["t"] += 1
        (nu1, nu2), (beta1, beta2) = self.nus, self.betas
        m = beta1 * state["m"] + (1 - beta1) * gradient
        v = beta2 * state["v"] + (1 - beta2) * gradient * gradient
        state["m"], state["v"] = m, v
        m_hat = m / (1 - beta1 ** state["t"])
        v_hat = v / (1 - beta2 ** state["t"])
        above = (1 - nu1) * gradient + nu1 * m_hat
        below = mx.sqrt((1 - nu2) * gradient * gradient + nu2 * v_hat)
        rate = self.learning_rate.astype(gradient.dtype)
        updated: mx.array = parameter - rate * above / (below + self.eps)
        return updated


class Tiger(stock.Optimizer):
    """Su, "Tiger: a tight-fisted optimizer", 2023: the sign of a moving average."""

    def __init__(
        self, learning_rate: float, beta: float = 0.965, weight_decay: float = 0.01
    ) -> None:
        super().__init__()
        self._maybe_schedule("learning_rate", learning_rate)
        self.beta = beta
        self.weight_decay = weight_decay

    def init_single(self, parameter: mx.array, state: State) -> None:
        state["m"] = mx.zeros_like(parameter)

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: State
    ) -> mx.array:
        rate = self.learning_rate.astype(gradient.dtype)
        m = self.beta * state["m"] + (1 - self.beta) * gradient
        state["m"] = m
        update = mx.sign(m) + self.weight_decay * parameter
        updated: mx.array = parameter - rate * update
        return updated


class LAMB(stock.Optimizer):
    """You et al., "Large batch optimization for deep learning", ICLR 2020."""

    def __init__(
        self,
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__()
        self._maybe_schedule("learning_rate", learning_rate)
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay

    def init_single(self, parameter: mx.array, state: State) -> None:
        state["m"] = mx.zeros_like(parameter)
        state["v"] = mx.zeros_like(parameter)

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: State
    ) -> mx.array:
        rate = self.learning_rate.astype(gradient.dtype)
        beta1, beta2 = self.betas
        step = self.step.astype(gradient.dtype)
        m = beta1 * state["m"] + (1 - beta1) * gradient
        v = beta2 * state["v"] + (1 - beta2) * mx.square(gradient)
        state["m"], state["v"] = m, v
        m_hat = m / (1 - beta1**step)
        v_hat = v / (1 - beta2**step)
        update = m_hat / (mx.sqrt(v_hat) + self.eps) + self.weight_decay * parameter
        size = mx.linalg.norm(parameter)
        of_update = mx.linalg.norm(update)
        trust = mx.where((size > 0) & (of_update > 0), size / of_update, 1.0)
        updated: mx.array = parameter - rate * trust.astype(gradient.dtype) * update
        return updated


PUBLISHED: dict[str, Callable[[], stock.Optimizer]] = {
    "AdaBelief": lambda: AdaBelief(1e-2, weight_decay=0.01),
    "Adan": lambda: Adan(1e-2, weight_decay=0.02),
    "NAdam": lambda: NAdam(1e-2),
    "QHAdam": lambda: QHAdam(1e-2),
    "Tiger": lambda: Tiger(1e-2),
    "LAMB": lambda: LAMB(1e-2),
}
