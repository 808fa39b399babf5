"""A Metal simulator: runs unchanged Metal kernels on Linux and reports faults.

`run` runs one kernel on numpy arrays. Host code that was written for MLX's
Metal back end runs with the CMake target `metal_simulator`; both record their
launches here, see `counters`.

    p = np.ones(8, np.float32)
    run(source, "scale", [Out(p), np.float32(2)], grid=8, group=8)
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .compile_kernels import CompileError, compile_kernels
from .macos_wheels import macos_wheels

__all__ = [
    "CompileError",
    "Launch",
    "MetalError",
    "Out",
    "barriers",
    "compile_kernels",
    "counters",
    "library",
    "library_path",
    "macos_wheels",
    "max_threads",
    "reset",
    "run",
    "set_max_threads",
    "set_seed",
    "set_unkind",
    "take_errors",
    "unkind",
]


class MetalError(RuntimeError):
    """A launch did what Metal would not forgive."""


@dataclass(frozen=True)
class Out:
    """An array that a kernel may write."""

    array: np.ndarray[Any, Any]


@dataclass(frozen=True)
class Launch:
    """What a launch did.

    Bytes count every access, unique bytes each address once. Line bytes count whole
    cache lines of 128 bytes, and each line once for every instruction of a simdgroup
    that touches it.
    """

    kernel: str
    bytes_read: int  # through `device` pointers
    bytes_written: int
    unique_bytes_read: int
    unique_bytes_written: int
    constant_bytes_read: int
    accesses: int
    line_bytes_read: int  # through `device` pointers
    line_bytes_written: int
    barriers: int  # of host code, before it since the last reset


def library_path() -> Path:
    """Where `cmake -S . -B build/simulator -DMLX_FUSED_SIMULATOR=ON` builds it."""
    root = Path(__file__).resolve().parents[2]
    default = root / "build/simulator/tests/metal_simulator/libmetal_simulator.so"
    return Path(os.environ.get("MLX_FUSED_SIMULATOR_LIBRARY") or default)


@cache
def library() -> ctypes.CDLL:
    """The loaded simulator, which from now on compiles with this Python."""
    os.environ.setdefault("MLX_FUSED_SIMULATOR_PYTHON", sys.executable)
    import mlx.core  # noqa: F401  loads libmlx.so, which the simulator needs

    loaded = ctypes.CDLL(str(library_path()))
    size, pointer, text = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_char_p
    for name, result, arguments in (
        ("error", text, []),
        ("library", pointer, [text]),
        ("set_kernel", ctypes.c_bool, [pointer, text]),
        ("bind", ctypes.c_bool, [ctypes.c_int, pointer, size, size, ctypes.c_bool]),
        ("set_bytes", ctypes.c_bool, [text, size, ctypes.c_int]),
        ("set_threadgroup_memory", ctypes.c_bool, [size, ctypes.c_int]),
        ("dispatch", ctypes.c_bool, [pointer, pointer, ctypes.c_uint64]),
        ("set_seed", None, [ctypes.c_uint64]),
        ("max_threads", size, []),
        ("set_max_threads", ctypes.c_bool, [size]),
        ("is_unkind", ctypes.c_bool, []),
        ("set_unkind", None, [ctypes.c_bool]),
        ("record", text, [size, pointer]),
        ("barriers", ctypes.c_uint64, []),
        ("clear_records", None, []),
        ("take_errors", text, []),
    ):
        function = getattr(loaded, f"metal_simulator_{name}")
        function.restype, function.argtypes = result, arguments
    return loaded


@cache
def _kernels(path: Path) -> int:
    handle = library().metal_simulator_library(str(path).encode())
    _check(handle is not None)
    return int(handle)


def _check(succeeded: bool) -> None:
    if not succeeded:
        raise MetalError(library().metal_simulator_error().decode())


def run(
    source: str,
    kernel: str,
    buffers: Sequence[Any] | Sequence[tuple[int, Any]],
    *,
    grid: int | tuple[int, ...],
    group: int | tuple[int, ...],
    seed: int = 0,
    threadgroup_memory: Mapping[int, int] | None = None,
    include: tuple[str, ...] = (),
    name: str = "kernel",
) -> Launch:
    """Compiles `source` and runs one launch of `kernel`.

    Args:
        source: Metal Shading Language.
        kernel: its host name.
        buffers: by index, or as (index, buffer): a contiguous numpy array (an
            input), `Out(array)`, or bytes or a numpy scalar (as by `set_bytes`).
            A view is judged misaligned by its offset in the array it views.
        grid: threads, as many as three dimensions.
        group: threads in a threadgroup.
        seed: the order of threads and threadgroups; 0 is the natural one.
        threadgroup_memory: bytes by index, for `[[threadgroup(i)]]` parameters.
        include: folders for ``#include``.
        name: names the source's lines: ``name.metal:12``.

    Raises:
        CompileError: with the compiler's message.
        MetalError: what is wrong, with kernel, buffer, thread and line.
    """
    simulator = library()
    path = compile_kernels(source, name, include, simulator.metal_simulator_is_unkind())
    _check(simulator.metal_simulator_set_kernel(_kernels(path), kernel.encode()))
    for position, entry in enumerate(buffers):
        index, buffer = entry if isinstance(entry, tuple) else (position, entry)
        if isinstance(buffer, (bytes, np.generic)):
            data = buffer if isinstance(buffer, bytes) else buffer.tobytes()
            _check(simulator.metal_simulator_set_bytes(data, len(data), index))
            continue
        array = buffer.array if isinstance(buffer, Out) else buffer
        if not array.flags.c_contiguous:
            raise ValueError(f"buffer {index} is not contiguous")
        whole = array if array.base is None else array.base
        offset = array.ctypes.data - np.asarray(whole).ctypes.data
        writable = isinstance(buffer, Out)
        _check(
            simulator.metal_simulator_bind(
                index, array.ctypes.data, array.nbytes, offset, writable
            )
        )
    for index, size in (threadgroup_memory or {}).items():
        _check(simulator.metal_simulator_set_threadgroup_memory(size, index))
    _check(simulator.metal_simulator_dispatch(_size(grid), _size(group), seed))
    return counters()[-1]


def _size(size: int | tuple[int, ...]) -> ctypes.Array[ctypes.c_uint64]:
    sizes = (size,) if isinstance(size, int) else size
    return (ctypes.c_uint64 * 3)(*sizes, *[1] * (3 - len(sizes)))


def counters() -> list[Launch]:
    """All launches that succeeded since the last `reset`, in order."""
    launches: list[Launch] = []
    numbers = (ctypes.c_uint64 * 9)()
    while kernel := library().metal_simulator_record(len(launches), numbers):
        launches.append(Launch(kernel.decode(), *numbers))
    return launches


def reset() -> None:
    """Forgets the launches and barriers.

    What is encoded from now on has no launch before it to wait for, as in MLX at the
    beginning of each ``mx.eval``.
    """
    library().metal_simulator_clear_records()


def barriers() -> int:
    """Barriers between launches of host code since the last `reset`.

    They are where MLX would place them, were there no operations of its own between.
    """
    return int(library().metal_simulator_barriers())


def take_errors() -> list[str]:
    """The errors of host code's launches since the last call.

    ``mx.eval`` raises them too, but ``np.array(x)``, for one, does not: a test
    that runs host code ends with ``assert take_errors() == []``.
    """
    return str(library().metal_simulator_take_errors().decode()).splitlines()


def set_seed(seed: int) -> None:
    """The order of threads in launches of host code; the default is the
    environment's MLX_FUSED_SIMULATOR_SEED, or 0, the natural one."""
    library().metal_simulator_set_seed(seed)


def set_unkind(value: bool) -> None:
    """Whether launches from now on do the arithmetic that a GPU may do.

    Products and sums are contracted to fused multiply-adds where the source has no
    ``#pragma METAL fp contract(off)``; functions with a fast form (``pow``, ``exp``,
    ``log``, ``sqrt``...) are off by a relative error of 2^-22 unless they are called
    as ``precise::``; subnormal numbers are flushed to zero. The default is the
    environment's MLX_FUSED_SIMULATOR_UNKIND.
    """
    library().metal_simulator_set_unkind(value)


@contextmanager
def unkind() -> Iterator[None]:
    """`set_unkind` for a block, also for the host code that is encoded in it."""
    before = library().metal_simulator_is_unkind()
    set_unkind(True)
    try:
        yield
    finally:
        set_unkind(before)


def set_max_threads(threads: int) -> None:
    """How many threads a threadgroup may have: 1,024 by default, at least 32.

    A GPU allows fewer where a kernel needs many registers. It is what
    ``maxTotalThreadsPerThreadgroup`` says to host code; more are refused.
    """
    _check(library().metal_simulator_set_max_threads(threads))


@contextmanager
def max_threads(threads: int) -> Iterator[None]:
    """`set_max_threads` for a block."""
    before = library().metal_simulator_max_threads()
    set_max_threads(threads)
    try:
        yield
    finally:
        set_max_threads(before)
