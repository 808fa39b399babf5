"""What ``fuse`` makes of optimizers that others published: ``python -m bench.fuse``.

A step of each on the real gradients of a decoder of 30M parameters: the class as it is,
the same under ``mx.compile``, fused, and beside them our built-in Adam. Times are
medians of rounds in which all take turns, ratios the medians of the rounds' ratios.
Writes ``fuse.json`` and ``fuse.md`` to bench/results.

To reach: at least 3 times as fast as the class compiled, and at most 2.5 times our Adam
for each array that is read or written.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_fused_optimizers as optim
from mlx_fused_optimizers._kernels import kernels
from tqdm import tqdm

from . import models, report
from .published import PUBLISHED
from .timing import interleave

RESULTS = Path(__file__).parent / "results"
ADAM_MOVES = 7  # parameter, two moments and gradient; all but the last are written


def stepper(
    optimizer: Any, gradients: models.Gradients, compiled: bool
) -> Callable[[], None]:
    """A step that keeps its parameters; its first calls warm up."""
    parameters = {key: mx.random.normal(x.shape) * 0.02 for key, x in gradients.items()}
    optimizer.init(parameters)
    mx.eval(parameters, optimizer.state)
    trees: list[Any] = [parameters, optimizer.state]

    def update(parameters: Any, state: Any, gradients: Any) -> Any:
        optimizer.state = state
        return optimizer.apply_gradients(gradients, parameters), optimizer.state

    if compiled:
        # What appears at the first step is there before it is compiled.
        trees = [*update(trees[0], trees[1], gradients)]
        mx.eval(trees)
        compiled_update: Any = mx.compile(update)

        def step() -> None:
            trees[:] = compiled_update(trees[0], trees[1], gradients)
            mx.eval(trees)

        return step

    def eager() -> None:
        trees[0] = optimizer.apply_gradients(gradients, trees[0])
        mx.eval(trees[0], optimizer.state)

    return eager


def moves(optimizer: Any) -> int:
    """The arrays of a parameter's shape that kernels read and write a step."""
    _, rules, _, _ = max(optimizer._explained, key=lambda x: x[0] * x[3])
    moved = 0
    for rule in rules:
        slots, written = kernels.written_slots(rule)
        unread = kernels.program_text(rule).count(" unread")
        moved += slots - unread + len(written)
    return moved


def measure(name: str, gradients: models.Gradients, rounds: int) -> dict[str, Any]:
    """The times of a published optimizer, and what they are multiples of."""
    make = PUBLISHED[name]
    fused = optim.fuse(make())
    # A Python number in the state is baked into what mx.compile traces: it traces again
    # at each step.
    may_compile = name != "QHAdam"
    steps = {
        "fused": stepper(fused, gradients, compiled=False),
        "class": stepper(make(), gradients, compiled=False),
        "class compiled": stepper(make(), gradients, compiled=may_compile),
        "Adam": stepper(optim.Adam(1e-3), gradients, compiled=False),
    }
    if may_compile:
        steps["fused compiled"] = stepper(optim.fuse(make()), gradients, compiled=True)
    times = interleave(steps, rounds)
    moved = moves(fused)
    return {
        "optimizer": name,
        **{f"{label} ms": round(1e3 * times.median(label), 1) for label in steps},
        "arrays moved": moved,
        "times as fast as the class": round(times.ratio("class", "fused"), 2),
        "times as fast as the class compiled": round(
            times.ratio("class compiled", "fused"), 2
        ),
        "times Adam for each array": round(
            times.ratio("fused", "Adam") * ADAM_MOVES / moved, 2
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.fuse", description=__doc__)
    parser.add_argument("--optimizers", nargs="+", choices=PUBLISHED, default=PUBLISHED)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--output", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    mx.set_default_device(mx.cpu)
    mx.random.seed(0)
    gradients = models.decoder(mx.float32, layers=chosen.layers)
    count = sum(x.size for x in gradients.values())
    rows = []
    for name in tqdm(chosen.optimizers, unit="optimizer", disable=None):
        rows.append(measure(name, gradients, chosen.rounds))
        gc.collect()
        mx.clear_cache()
    machine = report.machine("cpu", chosen.rounds)
    text = (
        f"# Optimizers of others, fused\n\n{report.named(machine)}.\n\nA decoder of "
        f"{count:,} parameters, with its own gradients.\n\n{report.table(rows)}"
    )
    result = {"machine": machine, "parameters": count, "rows": rows}
    report.save(chosen.output / "fuse.json", result, text)


if __name__ == "__main__":
    main()
