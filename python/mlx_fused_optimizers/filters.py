"""Ready weight decay filters."""

import re

import mlx.core as mx


def decay_matrices_only(path: str, array: mx.array) -> bool:
    """Whether a parameter is one that usually decays, for ``weight_decay_filter``.

    Biases and the parameters of normalisation layers, all of fewer than two
    dimensions, are left alone, and so are embeddings: a path with a part that begins
    with ``embed``, or is ``wte`` or ``wpe``.

    Example:
        >>> decay_matrices_only("layers.0.linear.weight", mx.zeros((4, 4)))
        True
        >>> decay_matrices_only("layers.0.linear.bias", mx.zeros((4,)))
        False
        >>> decay_matrices_only("embed_tokens.weight", mx.zeros((4, 4)))
        False

    Args:
        path (str): The parameter's path, as in ``mlx.utils.tree_flatten``.
        array (array): The parameter.

    Returns:
        bool: True if it decays.
    """
    is_embedding = re.search(r"(^|[._])(embed\w*|wte|wpe)([._]|$)", path, re.IGNORECASE)
    return array.ndim >= 2 and is_embedding is None
