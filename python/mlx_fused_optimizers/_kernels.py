"""The extension that all of the package calls, in one place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ._extension import _ext


class _Kernels:
    """Passes every name on to the extension in use."""

    extension: ModuleType = _ext

    def __getattr__(self, name: str) -> Any:
        return getattr(self.extension, name)


if TYPE_CHECKING:
    kernels = _ext
else:
    kernels = _Kernels()


@contextmanager
def using(extension: ModuleType) -> Iterator[None]:
    """Another build of the extension in its place, such as the simulated one."""
    usual = _Kernels.extension
    _Kernels.extension = extension
    try:
        yield
    finally:
        _Kernels.extension = usual
