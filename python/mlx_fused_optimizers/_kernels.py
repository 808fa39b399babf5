"""What all of the package calls: the extension, or plain MLX operations."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import mlx.core as mx

from . import _extension, _plain
from ._extension import REQUIRE, _ext


class _Kernels:
    """Passes every name on to what is in use."""

    extension: ModuleType = _ext or _plain
    has_warned = False  # of a GPU without kernels

    def __getattr__(self, name: str) -> Any:
        if _lacks_kernels():
            _warn_once()
            return getattr(_plain, name)
        return getattr(self.extension, name)


if TYPE_CHECKING:
    kernels = _ext
else:
    kernels = _Kernels()


def backend() -> Literal["cpu", "metal", "plain"]:
    """What computes the steps of optimizers on the default device.

    Returns:
        str: ``"cpu"`` or ``"metal"`` for the kernels of this package, that update in
        place. ``"plain"`` for plain MLX operations, with the same results but slower
        and with more memory: for an MLX that the package has no kernels for, and on a
        GPU without Metal.
    """
    if reason() is not None:
        return "plain"
    return "metal" if _is_gpu() else "cpu"


def reason() -> str | None:
    """Why plain operations are in use on the default device; None if kernels are."""
    if _Kernels.extension is _plain:
        return _extension.reason() or "they were chosen"
    return "it has no kernels for this GPU" if _lacks_kernels() else None


def _is_gpu() -> bool:
    return mx.default_device().type == mx.DeviceType.gpu


def _lacks_kernels() -> bool:
    """Whether the default device is a GPU of another kind than Metal's."""
    return _is_gpu() and not mx.metal.is_available()


def _warn_once() -> None:
    if _Kernels.has_warned or _Kernels.extension is _plain:
        return
    message = (
        "mlx_fused_optimizers uses plain MLX operations, slower and with more memory: "
        "it has no kernels for this GPU. It has kernels for the CPU and for Metal."
    )
    if os.environ.get(REQUIRE, "0") not in ("", "0"):
        raise RuntimeError(f"{message} ({REQUIRE} is set.)")
    _Kernels.has_warned = True
    from .optimizers.options import warn_caller  # which imports this module

    warn_caller(message, RuntimeWarning)


@contextmanager
def using(extension: ModuleType) -> Iterator[None]:
    """Another build of the extension in its place, such as the simulated one."""
    usual = _Kernels.extension
    _Kernels.extension = extension
    try:
        yield
    finally:
        _Kernels.extension = usual
