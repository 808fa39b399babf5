"""The memory of gradient accumulation: ``python -m bench.accumulate --help``.

The peak memory of training with k micro-batches a step, with ``accumulate=k``, beside
``mlx.optimizers`` with a sum of gradients kept by ``tree_map``, evaluated after each
micro-batch, and as one evaluation of all k. Peaks are of forward pass, backward pass,
sum and update, beyond weights and moments. AdamW, float32, a small decoder over few
tokens, so that hardly anything is activations.

Writes ``accumulate.json``, ``accumulate.md`` and ``accumulate.png`` to bench/results.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as stock
import mlx_fused_optimizers as optim
from mlx.utils import tree_flatten, tree_map
from tqdm import tqdm

from . import models, report

Step = Callable[[], None]

OURS, OURS_COMPILED = "accumulate=k", "accumulate=k, compiled"
SUMMED, AT_ONCE = "MLX, tree_map", "MLX, tree_map, one evaluation"
COLOURS = {
    OURS: "#1a9850",
    OURS_COMPILED: "#91cf60",
    SUMMED: "#4575b4",
    AT_ONCE: "#91bfdb",
}


class Training:
    """A decoder and a micro-batch."""

    def __init__(self, sizes: dict[str, int]) -> None:
        mx.random.seed(0)
        self.model = models.Decoder(**sizes)
        vocabulary = self.model.head.weight.shape[0]
        self.tokens = mx.random.randint(0, vocabulary, (1, 33))
        self.loss_and_grad = nn.value_and_grad(self.model, self.loss)

    @staticmethod
    def loss(model: Any, tokens: mx.array) -> mx.array:
        logits = model(tokens[:, :-1])
        return nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="mean")

    def start(self, optimizer: Any) -> list[Any]:
        optimizer.init(self.model.trainable_parameters())
        state = [self.model.state, optimizer.state]
        mx.eval(state, self.tokens)
        return state


def ours(training: Training, k: int, compiled: bool) -> Step:
    optimizer = optim.AdamW(1e-4, accumulate=k)
    state = training.start(optimizer)

    def call(tokens: mx.array) -> mx.array:
        loss, gradients = training.loss_and_grad(training.model, tokens)
        optimizer.update(training.model, gradients)
        return loss  # type: ignore[no-any-return]

    if compiled:
        call = mx.compile(call, inputs=state, outputs=state)

    def step() -> None:
        for _ in range(k):
            mx.eval(call(training.tokens), state)

    return step


def by_tree_map(training: Training, k: int, at_once: bool) -> Step:
    optimizer = stock.AdamW(1e-4)
    state = training.start(optimizer)

    def step() -> None:
        total: Any = None
        for _ in range(k):
            loss, gradients = training.loss_and_grad(training.model, training.tokens)
            if total is None:
                total = gradients
            else:
                total = tree_map(lambda a, b: a + b, total, gradients)
            del gradients
            if not at_once:
                mx.eval(loss, total)
        total = tree_map(lambda x: x / k, total)
        optimizer.update(training.model, total)
        del total
        mx.eval(loss, state)

    return step


WAYS: dict[str, Callable[[Training, int], Step]] = {
    OURS: lambda training, k: ours(training, k, compiled=False),
    OURS_COMPILED: lambda training, k: ours(training, k, compiled=True),
    SUMMED: lambda training, k: by_tree_map(training, k, at_once=False),
    AT_ONCE: lambda training, k: by_tree_map(training, k, at_once=True),
}


def peak(way: str, k: int, sizes: dict[str, int]) -> tuple[float, int]:
    """Bytes at the peak a parameter, with ours' buffer; and how many parameters."""
    gc.collect()
    mx.clear_cache()
    training = Training(sizes)
    step = WAYS[way](training, k)
    step()  # what tracing holds does not count
    flat: Any = tree_flatten(training.model.trainable_parameters())
    count = sum(x.size for _, x in flat)
    del flat  # an array that is held is not written in place
    gc.collect()
    mx.synchronize()
    holds = mx.get_active_memory()
    mx.reset_peak_memory()
    step()
    buffer = 4 * count if k > 1 and way in (OURS, OURS_COMPILED) else 0
    return (mx.get_peak_memory() - holds + buffer) / count, count


NOTES = """\
Bytes a parameter at the peak of a step of k micro-batches, beyond weights and moments:
the buffer of `accumulate`, sums, gradients, activations and copies of an update. AdamW,
float32, a decoder of {count:,} parameters, 32 tokens a micro-batch.
"""


def chart(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.figure(figsize=(7, 4))
    for way in WAYS:
        points = [(row["k"], row["bytes a parameter"][way]) for row in rows]
        pyplot.plot(*zip(*points, strict=True), "o-", color=COLOURS[way], label=way)
    pyplot.xscale("log", base=2)
    pyplot.ylim(bottom=0)
    pyplot.xlabel("micro-batches a step, k")
    pyplot.ylabel("bytes a parameter")
    pyplot.title("Peak of a step, beyond weights and moments", fontsize=10)
    pyplot.legend(fontsize=8)
    pyplot.tight_layout()
    pyplot.savefig(path, dpi=120)
    pyplot.close()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.accumulate",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--k", type=int, nargs="+", default=[1, 2, 4, 8], help="micro-batches")
    add("--width", type=int, default=256, help="of the decoder")
    add("--layers", type=int, default=4, help="of the decoder")
    add("--vocabulary", type=int, default=2048, help="of the decoder")
    add("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if min(options.k) < 1:
        parser.error("--k: expected numbers of at least 1")
    mx.set_default_device(mx.cpu)
    sizes = {key: getattr(options, key) for key in ("width", "layers", "vocabulary")}
    rows = []
    count = 0
    for k in tqdm(options.k, unit="k", disable=None):
        peaks = {}
        for way in WAYS:
            found, count = peak(way, k, sizes)
            peaks[way] = round(found, 2)
        rows.append({"k": k, "bytes a parameter": peaks})
    machine = report.machine("cpu", 1)
    for key in ("rounds", "torch"):
        machine.pop(key)
    result = {"machine": machine, "settings": sizes, "rows": rows}
    table = report.table([{"k": row["k"], **row["bytes a parameter"]} for row in rows])
    notes = NOTES.format(count=count)
    text = f"# Gradient accumulation\n\n{report.named(machine)}.\n\n{notes}\n{table}"
    path = options.output / "accumulate.json"
    report.save(path, result, text)
    chart(rows, path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
