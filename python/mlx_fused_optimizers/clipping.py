"""Gradient clipping."""

from typing import Any

import mlx.core as mx
import mlx.optimizers as stock

from ._kernels import kernels
from .optimizers.base import measure
from .optimizers.options import FUSED_DTYPES, check_limit
from .shards import Sharded, shards_of_arguments


def clip_grad_norm(
    grads: Any,
    max_norm: float | mx.array,
    group: mx.distributed.Group | None = None,
    sharded: Sharded | None = None,
) -> tuple[Any, mx.array]:
    r"""Clips the global norm of the gradients.

    .. math::

        g \leftarrow g \cdot \min\left(\frac{c}{\|g\|_2 + 10^{-6}}, 1\right)

    The norm is that of all gradients as one vector, and is accumulated in float32
    or better. Source: Pascanu et al., "On the difficulty of training recurrent
    neural networks", ICML 2013.

    Example:
        >>> grads = {"w1": mx.array([2.0, 3.0]), "w2": mx.array([1.0])}
        >>> clipped, norm = clip_grad_norm(grads, max_norm=2.0)

    Args:
        grads (dict): A Python tree of gradients of any shapes. float32, float16 and
            bfloat16 are fused; trees with integers take the path of
            ``mlx.optimizers``.
        max_norm (float): The largest norm :math:`c` that passes unscaled.
        group (mx.distributed.Group, optional): The ranks of which each has a shard of
            the gradients; the norm is then that of all. Default: all ranks, if
            ``sharded`` is given
        sharded (collection or callable, optional): The paths of the shards, or
            ``(path, array) -> bool``; the other gradients are whole on each rank.
            Default: all, if ``group`` is given

    Returns:
        (dict, array): The gradients, scaled if their norm exceeds ``max_norm``, in
        their own dtypes; and the norm before scaling, a scalar. Its dtype is float32,
        or bfloat16 if all gradients are.

    Raises:
        TypeError: If ``max_norm`` is no number, or a leaf of ``grads`` no array.
        ValueError: If ``max_norm`` is negative, not a number or no scalar.
    """
    check_limit("max_norm", max_norm)
    if not isinstance(grads, (dict, list, tuple, mx.array)):
        raise TypeError(
            f"grads is of type {type(grads).__name__}; expected a tree of arrays"
        )
    leaves = kernels.Leaves(grads)
    dtypes = leaves.dtypes()
    if not dtypes or any(x not in (*FUSED_DTYPES, mx.complex64) for x in dtypes):
        clipped, norm = stock.clip_grad_norm(grads, max_norm)
        return clipped, norm
    shards = shards_of_arguments(leaves.tree, group, sharded)
    norm, factor = measure(leaves.gradients, max_norm, leaves.tree, shards)
    if dtypes == [mx.bfloat16]:
        norm = norm.astype(mx.bfloat16)
    return leaves.replace(kernels.scale(leaves.gradients, factor)), norm
