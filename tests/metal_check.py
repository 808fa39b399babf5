"""All that can be known of the Metal path without a Mac: ``make metal-check``.

Runs the tests of the simulator and of the Metal code on it; runs every kernel, for
every mixture of dtypes, in the simulator against plain MLX operations; cross-compiles
the extension for macOS and resolves its symbols. The last line counts all three.
"""

import argparse
import itertools
import subprocess
import sys
from pathlib import Path

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


def run_every_kernel() -> tuple[set[str], list[str]]:
    """The names of the kernels that ran, and what was wrong with them."""
    kernels = extension()
    assert kernels is not None, "the simulator is not built; run: make simulator"
    mx.set_default_device(mx.cpu)
    metal_simulator.reset()
    failures = []
    arrays = [mx.zeros((1,), dtype) for dtype in DTYPES]
    mixtures = list(itertools.product(arrays, repeat=3))
    with using(kernels):
        rules = [*every_rule().values()]
    for rule in tqdm(rules, unit="rule", disable=None):
        for mixture in mixtures:
            if failure := kernels.check_update(rule, *mixture):
                dtypes = ", ".join(str(x.dtype) for x in mixture)
                failures.append(f"{rule} ({dtypes}): {failure}")
        with using(kernels):
            held = held_kernels(rule)
        for dtype, *storages in held:
            like = mx.zeros((1,), getattr(mx, dtype))
            failure = kernels.check_update(rule, like, like, arrays[0], *storages)
            if failure:
                failures.append(f"{rule} ({dtype}, {storages}): {failure}")
    for array in arrays:
        for counts in (False, True):
            if failure := kernels.check_sums(array, counts):
                failures.append(f"sums ({array.dtype}, {counts=}): {failure}")
    return {launch.kernel for launch in metal_simulator.counters()}, failures


def main() -> int:
    """Run everything; returns the exit code."""
    parser = argparse.ArgumentParser(prog="make metal-check", description=__doc__)
    parser.add_argument(
        "--without-tests", action="store_true", help="where they have run already"
    )
    options = parser.parse_args()
    if not options.without_tests:
        pytest = [sys.executable, "-m", "pytest", *TESTS]
        if subprocess.run(pytest, cwd=ROOT).returncode:
            return 1
    kernels, failures = run_every_kernel()
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
