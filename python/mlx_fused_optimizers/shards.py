"""Parameters of which each rank of ``mx.distributed`` holds a part."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn.layers.distributed as layers
from mlx.utils import tree_flatten

# By the paths of the gradients that are shards, the group that has the others.
Shards = Mapping[str, mx.distributed.Group]
# Paths, or which paths and arrays.
Sharded = Collection[str] | Callable[[str, mx.array], bool]

_SHARDED = (
    layers.AllToShardedLinear,
    layers.ShardedToAllLinear,
    *filter(None, [getattr(layers, "FullyShardedModule", None)]),  # not in 0.31.2
)


def shards_of_model(model: Any, gradients: Any) -> dict[str, mx.distributed.Group]:
    """Those of the gradients whose parameters are shards, by the types of modules."""
    found: dict[str, mx.distributed.Group] = {}

    def walk(node: Any, gradient: Any, path: list[Any], group: Any) -> None:
        whole: Any = ()
        if isinstance(node, _SHARDED):
            # A module of fully_shard does not tell its group: that of all ranks is
            # the usual one.
            group = getattr(node, "group", None) or mx.distributed.init()
            if isinstance(node, layers.ShardedToAllLinear):
                whole = ("bias",)
        is_dict = isinstance(gradient, dict)
        pairs: Any = gradient.items() if is_dict else enumerate(gradient)
        for key, child in pairs:
            if isinstance(child, (dict, list, tuple)):
                walk(_child(node, key), child, [*path, key], group)
            elif group is not None and group.size() > 1 and key not in whole:
                found[".".join(map(str, [*path, key]))] = group

    walk(model, gradients, [], None)
    return found


def _child(node: Any, key: Any) -> Any:
    try:
        return node[key]
    except (LookupError, TypeError):
        return None


def shards_of_arguments(
    gradients: Any,
    group: mx.distributed.Group | None,
    sharded: Sharded | None,
) -> dict[str, mx.distributed.Group]:
    """Those of a tree that a caller names: of all arrays if only a group is given."""
    if group is None and sharded is None:
        return {}
    if group is not None and not isinstance(group, mx.distributed.Group):
        raise TypeError(
            f"group is of type {type(group).__name__}; expected an mx.distributed.Group"
        )
    named: Any = tree_flatten(gradients)
    if sharded is None:
        chosen = [path for path, _ in named]
    elif callable(sharded):
        chosen = [path for path, array in named if sharded(path, array)]
    elif isinstance(sharded, str) or not isinstance(sharded, Collection):
        raise TypeError(
            f"sharded is of type {type(sharded).__name__}; expected paths, or a "
            "callable that takes a path and an array"
        )
    else:
        chosen = [*sharded]
        unknown = {*chosen} - {path for path, _ in named}
        if unknown:
            raise ValueError(
                f"sharded names {', '.join(sorted(unknown))}; expected paths of the "
                "gradients"
            )
    group = group or mx.distributed.init()
    return dict.fromkeys(chosen, group) if group.size() > 1 else {}


def by_group(
    paths: Sequence[str], shards: Shards
) -> tuple[list[int], list[tuple[mx.distributed.Group, list[int]]]]:
    """Which gradients are whole, and which each group has shards of."""
    whole: list[int] = []
    parts: dict[Any, tuple[mx.distributed.Group, list[int]]] = {}
    for i, path in enumerate(paths):
        group = shards.get(path)
        if group is None:
            whole.append(i)
            continue
        # Each call of init gives another object for the group of all ranks.
        is_world = group.size() == mx.distributed.init().size()
        parts.setdefault("world" if is_world else id(group), (group, []))[1].append(i)
    return whole, [*parts.values()]


def joint_norms(
    norms: Sequence[tuple[mx.distributed.Group, mx.array]], after: mx.array
) -> list[mx.array]:
    """Of each group, the norms of all its ranks, the same array on every rank.

    Collectives that are swapped between ranks give wrong numbers without a word: each
    waits for the one before, and all for ``after``.
    """
    gathered = []
    for group, norm in norms:
        (mine,) = mx.depends([norm.reshape(1)], [after])
        # Not all_sum: ranks may add in another order each, and all_max drops NaN.
        after = mx.distributed.all_gather(mine, group=group)
        gathered.append(after)
    return gathered
