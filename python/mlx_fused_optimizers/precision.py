"""Models in half precision, and out of it again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as stock
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

from ._formats import HALF_DTYPES, HELD, is_error, is_half, plain_name
from ._kernels import kernels
from .optimizers.base import OPTION_ENTRIES, rebuilt
from .optimizers.fused import FusedOptimizer
from .optimizers.held import release


def _is_vector(path: str, array: mx.array) -> bool:
    return array.ndim < 2


def cast_model(
    model: nn.Module,
    dtype: mx.Dtype,
    keep: Callable[[str, mx.array], bool] = _is_vector,
) -> None:
    """Cast the floating point parameters of a model, but for those that are kept.

    Call it before the optimizer is initialized. What it rounds is gone: a master
    (``master_weights``) begins at the rounded weights.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        >>> cast_model(model, mx.bfloat16)
        >>> [layer.weight.dtype for layer in model.layers]
        [mlx.core.bfloat16, mlx.core.float32]

    Args:
        model (mlx.nn.Module): The model, of which all parameters are cast, frozen ones
            too.
        dtype (Dtype): float32, float16 or bfloat16.
        keep (callable, optional): ``(path, array) -> bool``, whether a parameter keeps
            its dtype. Default: those of fewer than two dimensions, which are biases and
            norms

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If ``dtype`` is another.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is of type {type(model).__name__}; expected an mlx.nn.Module"
        )
    if not isinstance(dtype, mx.Dtype):
        raise TypeError(f"dtype is of type {type(dtype).__name__}; expected a Dtype")
    if dtype not in (mx.float32, *HALF_DTYPES):
        raise ValueError(
            f"dtype should be float32, float16 or bfloat16, {dtype} was provided "
            "instead"
        )
    if not callable(keep):
        raise TypeError(
            f"keep is of type {type(keep).__name__}; expected a callable that takes a "
            "path and an array"
        )

    def cast(path: str, array: mx.array) -> mx.array:
        is_kept = not mx.issubdtype(array.dtype, mx.floating) or keep(path, array)
        return array if is_kept else array.astype(dtype)

    model.update(tree_map_with_path(cast, model.parameters()))


def full_precision(
    model: nn.Module | dict[str, Any], optimizer: stock.Optimizer
) -> tuple[Any, Any]:
    """What a model and its optimizer hold, as float32.

    A weight with a master becomes that, one of half precision its value, and a state
    in codes what they stand for; ``mlx.optimizers`` can go on with both. What it has
    no use for, such as gradients that wait for their step, is left out. Model and
    optimizer stay as they are.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> cast_model(model, mx.bfloat16)
        >>> optimizer = optim.SGD(0.1, momentum=0.9, master_weights="24bit")
        >>> optimizer.init(model.trainable_parameters())
        >>> parameters, state = optim.full_precision(model, optimizer)
        >>> parameters["weight"].dtype, sorted(state["weight"])
        (mlx.core.float32, ['v'])

    Args:
        model (mlx.nn.Module or dict): The model, or its tree of parameters.
        optimizer (mlx.optimizers.Optimizer): Its optimizer.

    Returns:
        tuple(dict, dict): The parameters and the optimizer's state, in trees of the
        structure that they have; the state is one for ``optimizer.state`` of
        ``mlx.optimizers``.

    Raises:
        TypeError: If an argument is of the wrong type.
    """
    if not isinstance(model, (nn.Module, dict)):
        raise TypeError(
            f"model is of type {type(model).__name__}; expected an mlx.nn.Module or a "
            "dict"
        )
    if not isinstance(optimizer, stock.Optimizer):
        raise TypeError(
            f"optimizer is of type {type(optimizer).__name__}; expected an "
            "mlx.optimizers.Optimizer"
        )
    tree = model.parameters() if isinstance(model, nn.Module) else model
    flat: Any = tree_flatten(tree)
    parameters: dict[str, mx.array] = dict(flat)
    exact: dict[str, mx.array] = {}
    state = _plain_state(optimizer, parameters, exact)
    wide = {
        path: exact.get(path, x.astype(mx.float32) if x.dtype in HALF_DTYPES else x)
        for path, x in parameters.items()
    }
    return tree_unflatten([*wide.items()]), state


def _plain_state(
    optimizer: stock.Optimizer,
    parameters: dict[str, mx.array],
    exact: dict[str, mx.array],
) -> Any:
    """The state without codes and errors; the masters go to ``exact``."""
    if isinstance(optimizer, stock.MultiOptimizer):
        states = [_plain_state(x, parameters, exact) for x in optimizer.optimizers]
        return {**_own_entries(optimizer), "states": states}

    def walk(node: Any, path: str) -> Any:
        start = f"{path}." if path else ""
        if path in parameters and isinstance(node, dict):
            return single(dict(node), path)
        if isinstance(node, dict):
            return {key: walk(child, f"{start}{key}") for key, child in node.items()}
        if isinstance(node, (list, tuple)):
            values = [walk(child, f"{start}{i}") for i, child in enumerate(node)]
            return rebuilt(node, values)
        return node

    def single(state: dict[str, Any], path: str) -> Any:
        parameter = parameters[path]
        if is_error(state.get("error")) and parameter.dtype in HALF_DTYPES:
            exact[path] = kernels.join(parameter, state.pop("error"))
        if isinstance(optimizer, FusedOptimizer) and optimizer.takes_codes:
            for key in {plain_name(entry) for entry in state}:
                release(state, key, parameter.shape, optimizer._non_negative())
        return {
            key: x.astype(mx.float32) if is_half(x) else x
            for key, x in state.items()
            if key not in HELD
        }

    nodes = {
        k: v for k, v in optimizer.state.items() if isinstance(v, (dict, list, tuple))
    }
    return {**_own_entries(optimizer), **walk(nodes, "")}


def _own_entries(optimizer: stock.Optimizer) -> dict[str, Any]:
    """Those of ``mlx.optimizers``: no option's."""
    return {
        key: value
        for key, value in optimizer.state.items()
        if not isinstance(value, (dict, list, tuple)) and key not in OPTION_ENTRIES
    }
