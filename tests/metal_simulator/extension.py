"""The package's extension with its Metal code over the simulator."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

from . import library, library_path


@contextmanager
def simulated() -> Iterator[None]:
    """The package on the simulated extension, in place of its own."""
    from mlx_fused_optimizers._kernels import using

    kernels = extension()
    if kernels is None:
        raise RuntimeError("the simulator is not built; run: make simulator")
    with using(kernels):
        yield


@cache
def extension() -> ModuleType | None:
    """The extension that `make simulator` builds, or None where it is not built."""
    build = library_path().parents[2]
    path = next(iter(build.glob("_ext_simulated*.so")), None)
    if path is None:
        return None
    library()  # tells the simulator which Python compiles kernels
    spec = importlib.util.spec_from_file_location("_ext_simulated", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
