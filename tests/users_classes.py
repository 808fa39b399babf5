"""Optimizers as users write them: nothing of this package's gets into their states."""

from typing import Any

import mlx.core as mx
import mlx_fused_optimizers as optim

OURS = {"gradient_sum", "weight_average"}


class Plain(optim.Optimizer):
    """A user's own."""

    def init_single(self, parameter: mx.array, state: dict[str, Any]) -> None:
        state["v"] = mx.zeros_like(parameter)

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]
    ) -> mx.array:
        assert state.keys() == {"v"}
        state["v"] = 0.9 * state["v"] + gradient
        updated: mx.array = parameter - 0.1 * state["v"]
        return updated


class Shrinking(optim.AdamW):
    """A fused class of which apply_single is overridden."""

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]
    ) -> mx.array:
        assert not OURS & state.keys()
        updated: mx.array = super().apply_single(gradient, parameter, state) * 0.99
        return updated
