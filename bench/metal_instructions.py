"""What our Metal kernels consist of: ``python -m bench.metal_instructions``.

Compiles the kernels of float32, and those that hold codes or masters or round at
random, for an AMD GPU with clang: another compiler for another machine than Apple's,
but it tells how much arithmetic an element takes, and whether a thread's variables fit
into registers. Writes ``metal_instructions.md`` to bench/results. Exit code 1 if a
kernel spills.
"""

import argparse
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from metal_simulator.extension import extension, simulated  # noqa: E402
from metal_simulator.instructions import (  # noqa: E402
    KernelInstructions,
    count,
    table,
)
from mlx_fused_optimizers.selfcheck import every_rule, held_kernels  # noqa: E402


def sources(rules: list[str] | None = None) -> dict[str, str]:
    """The text of every kernel by its library's name, as the host code generates it.

    Of those that this process has not built before.
    """
    kernels = extension()
    if kernels is None:
        raise RuntimeError("the simulator is not built; run: make simulator")
    before = os.environ.get("MLX_FUSED_SIMULATOR_SOURCES")
    with tempfile.TemporaryDirectory() as folder, simulated():
        os.environ["MLX_FUSED_SIMULATOR_SOURCES"] = folder
        try:
            single = mx.zeros(1)
            known = every_rule()
            for rule in [known[name] for name in rules or known]:
                kernels.check_update(rule, single, single, single)
                for dtype, *storages in held_kernels(rule):
                    like = mx.zeros(1, getattr(mx, dtype))
                    kernels.check_update(rule, like, like, single, *storages)
            kernels.check_sums(single)
        finally:
            if before is None:
                del os.environ["MLX_FUSED_SIMULATOR_SOURCES"]
            else:
                os.environ["MLX_FUSED_SIMULATOR_SOURCES"] = before
        files = sorted(Path(folder).glob("*.metal"))
        return {file.stem: file.read_text() for file in files}


def counts(texts: dict[str, str]) -> list[KernelInstructions]:
    """Of each kernel, in the order of their names."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(lambda pair: count(pair[1], pair[0]), texts.items())
        progress = tqdm(done, total=len(texts), unit="kernel", disable=None)
        # The norm's last kernel is in several libraries.
        return sorted({x for found in progress for x in found}, key=lambda x: x.kernel)


def main() -> int:
    """Count, write, print; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.metal_instructions", description=__doc__
    )
    parser.add_argument("--rules", nargs="+", help="default: all")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results")
    options = parser.parse_args()
    mx.set_default_device(mx.cpu)
    try:
        kernels = counts(sources(options.rules))
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    text = table(kernels)
    (options.output / "metal_instructions.md").write_text(text)
    print(text, end="")
    spilling = [x.kernel for x in kernels if x.spills]
    if spilling:
        print(f"error: these spill registers: {', '.join(spilling)}", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
