"""Trees of arrays as lists of leaves, and back."""

from collections.abc import Iterator
from typing import Any


def collect_leaves(leaves: tuple[list[Any], ...], tree: Any, *rest: Any) -> None:
    """Append the leaves of ``tree`` and of each of ``rest`` to a list of ``leaves``.

    As in ``mlx.utils.tree_map``, each of ``rest`` may be a superset of ``tree``, and
    dicts, lists and tuples are nodes.
    """
    if isinstance(tree, dict):
        for key, child in tree.items():
            collect_leaves(leaves, child, *[other[key] for other in rest])
    elif isinstance(tree, (list, tuple)):
        for i, child in enumerate(tree):
            collect_leaves(leaves, child, *[other[i] for other in rest])
    else:
        for collected, leaf in zip(leaves, (tree, *rest), strict=True):
            collected.append(leaf)


def replace_leaves(tree: Any, leaves: Iterator[Any]) -> Any:
    """A tree of ``tree``'s structure with ``leaves`` in the order of collect_leaves."""
    if isinstance(tree, dict):
        return {key: replace_leaves(child, leaves) for key, child in tree.items()}
    if isinstance(tree, (list, tuple)):
        children = [replace_leaves(child, leaves) for child in tree]
        kind = type(tree)
        # A named tuple takes its fields one by one.
        return kind(*children) if hasattr(tree, "_fields") else kind(children)
    return next(leaves)


class Snapshot:
    """What a tree's dicts and lists hold now, to be given back to the same objects."""

    def __init__(self, tree: Any) -> None:
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._lists: list[tuple[list[Any], list[Any]]] = []
        self._record(tree)

    def _record(self, tree: Any) -> None:
        children: Any
        if isinstance(tree, dict):
            self._dicts.append((tree, dict(tree)))
            children = tree.values()
        elif isinstance(tree, list):
            self._lists.append((tree, list(tree)))
            children = tree
        elif isinstance(tree, tuple):
            children = tree
        else:
            return
        for child in children:
            if isinstance(child, (dict, list, tuple)):
                self._record(child)

    def restore(self) -> None:
        """Undo every change since."""
        for node, before in self._dicts:
            node.clear()
            node.update(before)
        for items, contents in self._lists:
            items[:] = contents
