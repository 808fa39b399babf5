"""The state of all ranks' pieces together, as one process has it, and back."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from typing import Any

import mlx.core as mx
import mlx.optimizers as stock
from mlx.utils import tree_flatten, tree_unflatten

from .._formats import BLOCKS, kind_of, plain_name, shapes_in
from ..checkpoint import DTYPE_NAMES, DTYPES
from .layout import Piece, Tensor
from .ranks import Ranks

# The state of each tensor by its path, of all tensors or of those that have any.
States = Mapping[str, dict[str, mx.array]]


def single_parts(optimizer: stock.Optimizer) -> list[stock.Optimizer]:
    """The optimizers that have parameters of their own, each once."""
    if not isinstance(optimizer, stock.MultiOptimizer):
        return [optimizer]
    found: list[stock.Optimizer] = []
    for part in optimizer.optimizers:
        found += [x for x in single_parts(part) if not any(x is y for y in found)]
    return found


def is_node(value: Any) -> bool:
    return isinstance(value, (dict, list, tuple))


def own_entries(state: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are no parameter's."""
    return {key: value for key, value in state.items() if not is_node(value)}


def gathered_states(
    parts: Sequence[stock.Optimizer],
    ranks: Ranks,
    tensors: Sequence[Tensor],
    mine: Iterable[Piece],
    keeps: bool = True,
) -> dict[str, dict[str, mx.array]]:
    """The whole states, on the ranks that keep them."""
    arrays: list[mx.array] = []
    described = []
    for piece in mine:
        state: Any = parts[tensors[piece.tensor].part].state.get(piece.key, {})
        entries: Any = tree_flatten(state)
        arrays += [x for _, x in entries]
        kinds = [(name, DTYPE_NAMES[x.dtype], x.shape) for name, x in entries]
        described.append((piece, kinds))
    text = json.dumps([sum(x.nbytes for x in arrays), described])
    all_described = [json.loads(x) for x in ranks.gather_bytes(text.encode())]
    sizes = [size for size, _ in all_described]
    data = ranks.gather_arrays(arrays, sizes, keeps)
    if not keeps:
        return {}
    found: dict[int, list[tuple[int, dict[str, mx.array]]]] = defaultdict(list)
    for (_, rank_described), taken in zip(all_described, data, strict=True):
        position = 0
        for (_, tensor, begin, _, _), kinds in rank_described:
            entries = {}
            for name, dtype_name, shape in kinds:
                dtype = DTYPES[dtype_name]
                size = mx.zeros(shape, dtype).nbytes
                part = mx.contiguous(taken[position : position + size])
                entries[name] = mx.view(part, dtype).reshape(shape)
                position += size
            found[tensor].append((begin, entries))
    return {
        tensor.path: _joined(tensor, sorted(found[number], key=lambda x: x[0]))
        for number, tensor in enumerate(tensors)
    }


def _joined(
    tensor: Tensor, parts: list[tuple[int, dict[str, mx.array]]]
) -> dict[str, mx.array]:
    if not tensor.is_elementwise or len(parts) == 0:
        return parts[0][1] if parts else {}
    first = parts[0][1]
    result = {}
    for name in first:
        flat = mx.concatenate([entries[name].reshape(-1) for _, entries in parts])
        kind = kind_of(first, plain_name(name))
        shape = tensor.shape
        if kind is not None:
            codes, scales = shapes_in(kind, shape)
            shape = scales if name.endswith("_scales") else codes
        result[name] = flat.reshape(shape)
    return result


def local_state(state: dict[str, mx.array], piece: Piece) -> Any:
    """A piece's part of a tensor's whole state."""
    if piece.is_whole:
        return tree_unflatten([*state.items()])
    result = {}
    for name, array in state.items():
        kind = kind_of(state, plain_name(name))
        each = 1  # elements of the tensor for one of the array
        if kind is not None and name.endswith("_scales"):
            each = BLOCKS[kind]
        elif kind == "int4":
            each = 2
        part = array.reshape(-1)[piece.begin // each : -(-piece.end // each)]
        result[name] = mx.contiguous(part)
    return result


def states_of(tree: Any, paths: Iterable[str]) -> dict[str, dict[str, mx.array]]:
    """The states of parameters, from the tree of one process."""
    known = {*paths}
    found: dict[str, dict[str, mx.array]] = defaultdict(dict)
    flat: Any = tree_flatten(tree)
    for name, array in flat:
        path, entry = name, ""
        while path and path not in known:
            path, _, last = path.rpartition(".")
            entry = f"{last}.{entry}" if entry else last
        if path:
            found[path][entry] = array
    return found


def whole_optimizer(
    optimizer: stock.Optimizer,
    parts: Sequence[stock.Optimizer],
    tensors: Sequence[Tensor],
    states: States,
) -> stock.Optimizer:
    """A copy that has these states, or none yet where there are none."""
    twin = copy(optimizer)
    vars(twin)["_initialized"] = False
    state: dict[str, Any] = {}
    if isinstance(optimizer, stock.MultiOptimizer):
        inner = [
            whole_optimizer(x, parts, tensors, states) for x in optimizer.optimizers
        ]
        vars(twin)["optimizers"] = inner
        nodes = {"states": [x.state for x in inner]}
    else:
        number = next(i for i, part in enumerate(parts) if part is optimizer)
        entries = [
            (f"{tensor.path}.{name}", array)
            for tensor in tensors
            if tensor.part == number
            for name, array in states.get(tensor.path, {}).items()
        ]
        nodes = dict(tree_unflatten(entries)) if entries else {}
    # In the order of one process: an entry may have come after the parameters'.
    for key, value in optimizer.state.items():
        if not is_node(value):
            state[key] = value
        else:
            state.update(nodes)
    vars(twin)["_state"] = {**state, **nodes}
    return twin
