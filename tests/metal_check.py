"""All that can be known of the Metal path without a Mac: ``make metal-check``.

Runs the tests of the simulator and of the Metal code on it; runs every kernel, for
every mixture of dtypes, in the simulator against plain MLX operations; cross-compiles
the extension for macOS and resolves its symbols. The last line counts all three.
"""

import argparse
import itertools
import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import metal_simulator
import mlx.core as mx
from cross_compile.cross_compile import CrossCompileError, cross_compile
from metal_simulator.extension import extension
from mlx_fused_optimizers._kernels import using
from mlx_fused_optimizers.selfcheck import every_rule, held_kernels
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
TESTS = ["tests/test_metal_simulator.py", "tests/test_metal.py"]


def start() -> None:
    """What a process needs before it runs kernels."""
    mx.set_default_device(mx.cpu)
    metal_simulator.reset()


def built_extension() -> Any:
    kernels = extension()
    assert kernels is not None, "the simulator is not built; run: make simulator"
    return kernels


def ran() -> set[str]:
    return {launch.kernel for launch in metal_simulator.counters()}


def mixtures(pairs: bool) -> list[tuple[mx.Dtype, ...]]:
    """Of parameter, gradient and state: all, or so many that each pair is in one."""
    numbers = itertools.product(range(len(DTYPES)), repeat=3)
    return [
        tuple(DTYPES[i] for i in mixture)
        for mixture in numbers
        if not pairs or sum(mixture) % len(DTYPES) == 0
    ]


def run_rule(name: str, pairs: bool) -> tuple[set[str], list[str]]:
    """The names of the kernels of a rule that ran, and what was wrong with them."""
    kernels = built_extension()
    with using(kernels):
        rule = every_rule()[name]
        held = held_kernels(rule)
    failures = []
    for mixture in mixtures(pairs):
        arrays = [mx.zeros((1,), dtype) for dtype in mixture]
        if failure := kernels.check_update(rule, *arrays):
            dtypes = ", ".join(str(dtype) for dtype in mixture)
            failures.append(f"{rule} ({dtypes}): {failure}")
    state = mx.zeros((1,))
    for dtype, *storages in held:
        like = mx.zeros((1,), getattr(mx, dtype))
        if failure := kernels.check_update(rule, like, like, state, *storages):
            failures.append(f"{rule} ({dtype}, {storages}): {failure}")
    return ran(), failures


def run_sums() -> tuple[set[str], list[str]]:
    """The same of the sums of squares, and of the numbers that are not 0."""
    kernels = built_extension()
    failures = [
        f"sums ({dtype}, {counts=}): {failure}"
        for dtype, counts in itertools.product(DTYPES, (False, True))
        if (failure := kernels.check_sums(mx.zeros((1,), dtype), counts))
    ]
    return ran(), failures


def run_every_kernel(pairs: bool) -> tuple[set[str], list[str]]:
    """Each rule in a process of its own, as many at once as there are processors."""
    with using(built_extension()):
        names = [*every_rule()]
    names_run: set[str] = set()
    failures: list[str] = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(mp_context=spawn, initializer=start) as pool:
        jobs = [pool.submit(run_rule, name, pairs) for name in names]
        jobs.append(pool.submit(run_sums))
        for job in tqdm(as_completed(jobs), total=len(jobs), unit="rule", disable=None):
            kernels, wrong = job.result()
            names_run |= kernels
            failures += wrong
    return names_run, failures


def main() -> int:
    """Run everything; returns the exit code."""
    parser = argparse.ArgumentParser(prog="make metal-check", description=__doc__)
    parser.add_argument(
        "--without-tests", action="store_true", help="where they have run already"
    )
    parser.add_argument(
        "--pairs",
        action="store_true",
        help="each pair of dtypes in one mixture, in place of all 27 mixtures",
    )
    options = parser.parse_args()
    if not options.without_tests:
        pytest = [sys.executable, "-m", "pytest", *TESTS]
        if subprocess.run(pytest, cwd=ROOT).returncode:
            return 1
    kernels, failures = run_every_kernel(options.pairs)
    if failures:
        print("\n".join(failures), file=sys.stderr)
        return 1
    try:
        built = cross_compile(ROOT / "build" / "cross")
    except CrossCompileError as error:
        print(f"cross-compile failed: {error}", file=sys.stderr)
        return 1
    print(built)
    print(
        f"metal-check: {len(kernels)} kernels run in the simulator, "
        f"{len(built.sources)} files compiled for arm64 macOS 14, "
        f"{sum(built.symbols.values())} symbols resolved"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
