"""What memory gives at most: plain streaming loops, or a chip's data sheet."""

import ctypes
import functools
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_fused_optimizers import _ext

# Memory bandwidth of Apple's chips in GB/s, from their data sheets.
CHIPS = {
    "Apple M1 Ultra": 800,
    "Apple M1 Max": 400,
    "Apple M1 Pro": 200,
    "Apple M1": 68,
    "Apple M2 Ultra": 800,
    "Apple M2 Max": 400,
    "Apple M2 Pro": 200,
    "Apple M2": 100,
    "Apple M3 Ultra": 819,
    "Apple M3 Max": 400,
    "Apple M3 Pro": 150,
    "Apple M3": 100,
    "Apple M4 Max": 546,
    "Apple M4 Pro": 273,
    "Apple M4": 120,
}


def chip_bandwidth() -> float | None:
    """GB/s of this Mac's chip, or None if it is not known."""
    name = str(mx.device_info().get("device_name", ""))
    return next((gb for chip, gb in CHIPS.items() if name.startswith(chip)), None)


@functools.cache
def compiled_loops() -> ctypes.CDLL:
    """``streaming.cpp``, compiled for this machine."""
    source = Path(__file__).with_suffix(".cpp")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "streaming.so"
        native = [] if sys.platform == "darwin" else ["-march=native"]
        command = ["c++", "-std=c++17", "-O3", *native, "-shared", "-fPIC", "-pthread"]
        subprocess.run([*command, str(source), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))


LONGEST = 1 << 26  # elements


@functools.cache
def memory() -> list[np.ndarray[tuple[int], np.dtype[np.float32]]]:
    """Four arrays for all loops: what is allocated late may lie in small pages."""
    return [np.full(LONGEST, 1e-3, np.float32) for _ in range(4)]


def update_loop(elements: int, states: int) -> Callable[[], None]:
    """A loop with the memory traffic of a step with so many states, in float32.

    At most ``LONGEST`` elements. A parameter, its gradient and its states are read, and
    all but the gradient are written: ``4 * (3 + 2 * states)`` bytes an element.
    """
    library = compiled_loops()
    threads = _ext.num_threads()
    pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in memory()]

    def run() -> None:
        library.stream_update(*pointers, ctypes.c_size_t(elements), threads, states)

    return run


def reading_loop(elements: int) -> Callable[[], None]:
    """A loop that reads so many float32 elements, of at most four times ``LONGEST``."""
    library = compiled_loops()
    threads = _ext.num_threads()
    pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in memory()]

    def run() -> None:
        starts = range(0, elements, LONGEST)
        for pointer, start in zip(pointers, starts, strict=False):
            part = min(elements - start, LONGEST)
            library.stream_read(pointer, ctypes.c_size_t(part), threads)

    return run
