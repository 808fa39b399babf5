"""What several test files use: random trees, layouts, comparisons."""

import math
import re
from collections.abc import Callable
from importlib import metadata
from typing import Any

import mlx.core as mx
import mlx.optimizers as stock
import numpy as np
import numpy.typing as npt
import oracles
import pytest
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map

# For what an older MLX does otherwise.
MLX_VERSION = tuple(map(int, re.findall(r"\d+", metadata.version("mlx"))[:3]))
# Before, an error on a stream of the CPU ends the process, or is lost.
HAS_STREAM_ERRORS = MLX_VERSION >= (0, 32, 1)
HAS_FLAT_ADAFACTOR = MLX_VERSION < (0, 32, 0)
ONLY_FLAT = "MLX's Adafactor takes at most 2 dimensions"
more_dimensions_in_adafactor = pytest.mark.skipif(HAS_FLAT_ADAFACTOR, reason=ONLY_FLAT)


def skip_more_dimensions(name: str) -> None:
    """Skip a test of Adafactor beside one of MLX that takes fewer dimensions."""
    if name == "Adafactor" and HAS_FLAT_ADAFACTOR:
        pytest.skip(ONLY_FLAT)


FLOATS = (mx.float32, mx.float16, mx.bfloat16)

# Each optimizer with the options that change its arithmetic.
OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {}),
    ("SGD", {"weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1}),
    ("SGD", {"momentum": 0.8, "nesterov": True, "weight_decay": 0.01}),
    ("Adam", {}),
    ("Adam", {"betas": (0.8, 0.95), "eps": 1e-6, "bias_correction": True}),
    ("AdamW", {}),
    ("AdamW", {"weight_decay": 0.3, "bias_correction": True}),
    ("Lion", {}),
    ("Lion", {"betas": (0.95, 0.98), "weight_decay": 0.1}),
    ("RMSprop", {"alpha": 0.9}),
    ("Adagrad", {}),
    ("AdaDelta", {"rho": 0.8}),
    ("Adamax", {}),
    ("AdEMAMix", {}),
    ("AdEMAMix", {"weight_decay": 0.1, "warmup": 20, "alpha": 3.0}),
    ("AdamW", {"amsgrad": True, "bias_correction": True}),
    ("AdaBelief", {"weight_decay": 0.1}),
    ("Adan", {"weight_decay": 0.1}),
    ("NAdam", {"weight_decay": 0.1, "momentum_decay": 0.1}),
    ("RAdam", {"betas": (0.9, 0.99)}),
    ("ScheduleFreeSGD", {"weight_decay": 0.1, "r": 1.0}),
    ("ScheduleFreeAdamW", {"weight_decay": 0.1, "warmup_steps": 3}),
]
# Those of which parts are MLX's own operations.
PARTLY_FUSED: list[tuple[str, dict[str, Any]]] = [
    ("Adafactor", {}),
    ("Adafactor", {"beta_1": 0.9, "weight_decay": 0.1, "warmup_init": True}),
    ("Adafactor", {"relative_step": False, "scale_parameter": False}),
    ("Muon", {}),
    ("Muon", {"nesterov": False, "weight_decay": 0.0}),
    ("LAMB", {}),
    ("AdamW", {"cautious": True, "weight_decay": 0.1}),
    ("Lion", {"cautious": True, "weight_decay": 0.1}),
]
ALL_OPTIMIZERS = [*OPTIMIZERS, *PARTLY_FUSED]
# With weight decay left to the test.
DECAYING_OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {}),
    ("SGD", {"momentum": 0.9}),
    ("AdamW", {"bias_correction": True}),
    ("Lion", {}),
    ("Adafactor", {"beta_1": 0.9}),
    ("Muon", {}),
]


class PlainAdEMAMix(stock.Optimizer):
    """AdEMAMix from MLX's operations."""

    def __init__(
        self,
        learning_rate: Any,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        warmup: int = 0,
    ) -> None:
        super().__init__()
        self._maybe_schedule("learning_rate", learning_rate)
        self.betas, self.alpha, self.eps = betas, alpha, eps
        self.weight_decay, self.warmup = weight_decay, warmup

    def init_single(self, parameter: mx.array, state: dict[str, Any]) -> None:
        for key in ("m1", "m2", "v"):
            state[key] = mx.zeros_like(parameter)

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]
    ) -> mx.array:
        rate = self.learning_rate.astype(gradient.dtype)
        logs = [math.log(beta) for beta in self.betas]
        correction1, correction2 = (-mx.expm1(self.step * x) for x in logs[:2])
        slow, alpha = mx.array(1 - self.betas[2]), mx.array(self.alpha)
        if self.warmup:
            done = mx.minimum(self.step / self.warmup, 1)
            log = logs[0] * logs[2] / ((1 - done) * logs[2] + done * logs[0])
            slow, alpha = -mx.expm1(log), self.alpha * done
        slow = slow.astype(gradient.dtype)
        beta1, beta2, _ = self.betas
        state["m1"] = beta1 * state["m1"] + (1 - beta1) * gradient
        state["m2"] = (1 - slow) * state["m2"] + slow * gradient
        state["v"] = beta2 * state["v"] + (1 - beta2) * mx.square(gradient)
        fast = state["m1"] / correction1.astype(gradient.dtype)
        inverse = mx.rsqrt(correction2).astype(gradient.dtype)
        step = (fast + alpha.astype(gradient.dtype) * state["m2"]) / (
            mx.sqrt(state["v"]) * inverse + self.eps
        )
        updated: mx.array = parameter * (1 - rate * self.weight_decay) - rate * step
        return updated


class _Oracle:
    """mlx.optimizers, and plain classes for what it does not have."""

    AdEMAMix = PlainAdEMAMix

    def __getattr__(self, name: str) -> Any:
        return getattr(oracles if hasattr(oracles, name) else stock, name)


oracle: Any = _Oracle()


def is_stocks(name: str, options: dict[str, Any]) -> bool:
    """Whether mlx.optimizers has such a class, with these arguments."""
    ours = {"amsgrad", "cautious"}
    return hasattr(stock, name) and not ours & options.keys()


def for_each(optimizers: list[tuple[str, dict[str, Any]]]) -> pytest.MarkDecorator:
    """Parametrizes a test over ``name`` and ``options``."""
    ids = [f"{name}-{'-'.join(options)}" for name, options in optimizers]
    return pytest.mark.parametrize(("name", "options"), optimizers, ids=ids)


every_fused_optimizer = for_each(OPTIMIZERS)
every_optimizer = for_each(ALL_OPTIMIZERS)


def random_array(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: mx.Dtype
) -> mx.array:
    return mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype)


def _transposed(x: mx.array) -> mx.array:
    return mx.contiguous(x.T).T


def _strided(x: mx.array) -> mx.array:
    # Every second element of a larger array, walked backwards along the last axis.
    if x.ndim == 0:
        return x
    repeated = mx.contiguous(mx.repeat(x[..., ::-1], 2, axis=-1))
    return repeated[..., ::-2]


def _broadcast(x: mx.array) -> mx.array:
    if x.ndim == 0 or x.size == 0:
        return x
    return mx.broadcast_to(x[:1], x.shape)


def _offset(x: mx.array) -> mx.array:
    # Contiguous, but not at the start of its buffer.
    flat = mx.concatenate([mx.zeros((3,), x.dtype), x.reshape(-1)])
    return flat[3:].reshape(x.shape)


LAYOUTS: dict[str, Callable[[mx.array], mx.array]] = {
    "contiguous": lambda x: x,
    "transposed": _transposed,
    "strided": _strided,
    "broadcast": _broadcast,
    "offset": _offset,
}

shapes = st.one_of(
    st.just(()),
    st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple),
    st.tuples(st.integers(1, 3000)),
)


def trees(max_leaves: int = 10) -> st.SearchStrategy[Any]:
    """Parameter trees of nested dicts, lists and tuples whose leaves are shapes."""
    keys = st.text("abcdefg", min_size=1, max_size=3)
    node = st.recursive(
        shapes.map(Shape),
        lambda child: st.one_of(
            st.dictionaries(keys, child, min_size=1, max_size=5),
            st.lists(child, min_size=1, max_size=4),
            st.lists(child, min_size=1, max_size=3).map(tuple),
        ),
        max_leaves=max_leaves,
    )
    return st.dictionaries(keys, node, min_size=1, max_size=5)


class Shape:
    """A leaf: a tuple alone would be taken for a node of the tree."""

    def __init__(self, dimensions: tuple[int, ...]) -> None:
        self.dimensions = dimensions

    def __repr__(self) -> str:
        return f"Shape{self.dimensions}"


def fill(
    tree: Any, rng: np.random.Generator, dtype: mx.Dtype, layout: str = "contiguous"
) -> Any:
    """Random arrays in place of shapes, or of arrays."""

    def leaf(like: Any) -> mx.array:
        shape = like.dimensions if isinstance(like, Shape) else like.shape
        return LAYOUTS[layout](random_array(rng, shape, dtype))

    return tree_map(leaf, tree)


def copy_tree(tree: Any) -> Any:
    """The same values in memory of their own."""
    copied = tree_map(lambda x: mx.array(np.array(x)) if is_numpy(x) else x + 0, tree)
    mx.eval(copied)
    return copied


def is_numpy(x: mx.array) -> bool:
    """Whether NumPy has this dtype (it has no bfloat16)."""
    return x.dtype != mx.bfloat16


def to_numpy(x: mx.array) -> npt.NDArray[Any]:
    return np.array(x if is_numpy(x) else x.astype(mx.float32))


def leaves_of(tree: Any) -> dict[str, mx.array]:
    """The arrays of a tree by their paths."""
    flat: list[tuple[str, mx.array]] = tree_flatten(tree)  # type: ignore[assignment]
    return dict(flat)


def snapshot(tree: Any) -> dict[str, bytes]:
    """Every leaf's dtype, shape and bits, by its path."""
    return {
        path: f"{x.dtype}{x.shape}".encode() + to_numpy(x).tobytes()
        for path, x in leaves_of(tree).items()
    }


def assert_trees_match(
    actual: Any, expected: Any, relative: float, absolute: float = 0.0
) -> None:
    """Same paths, dtypes and shapes; values within the tolerance."""
    flat, wanted = leaves_of(actual), leaves_of(expected)
    assert flat.keys() == wanted.keys()
    for path, x in flat.items():
        y = wanted[path]
        assert (x.dtype, x.shape) == (y.dtype, y.shape), path
        np.testing.assert_allclose(
            to_numpy(x), to_numpy(y), rtol=relative, atol=absolute, err_msg=path
        )
