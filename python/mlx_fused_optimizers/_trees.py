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


def copy_containers(tree: Any) -> Any:
    """The same leaves in new dicts, lists and tuples."""
    if isinstance(tree, dict):
        return {key: copy_containers(child) for key, child in tree.items()}
    if isinstance(tree, (list, tuple)):
        children = [copy_containers(child) for child in tree]
        kind = type(tree)
        return kind(*children) if hasattr(tree, "_fields") else kind(children)
    return tree
