"""The memory of training: ``python -m bench.memory --help``.

For each optimizer, and each way to hold weights and states, beside mlx.optimizers: the
bytes that a parameter's weight, gradient and states take, from the arrays; the peak
memory of a training step, that is forward pass, backward pass and update in one
evaluation; and what an optimizer's step alone takes beyond weights, gradients and
states. The model is a small decoder over a few tokens, so that hardly anything is
activations.

Writes ``memory.json``, ``memory.md`` and ``memory.png`` to bench/results.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as stock
import mlx_fused_optimizers as optim
from mlx.utils import tree_flatten
from tqdm import tqdm

from . import models, peers, report
from .modes import INT4, INT8, MODES, Mode
from .parts import peak_of

Row = dict[str, Any]

OPTIMIZERS = ["AdamW", "SGD momentum", "Lion"]

# Bytes a parameter, its gradient among them, that are promised.
PROMISED = {
    ("AdamW", INT8): 7.2,
    ("AdamW", INT4): 6.3,
    ("SGD momentum", INT8): 6.1,
    ("Lion", INT8): 6.1,
}


class Way(NamedTuple):
    """A library, and how weights and states are held."""

    module: Any
    mode: Mode

    def optimizer(self, label: str) -> Any:
        name, usual = peers.OPTIMIZERS[label]
        return getattr(self.module, name)(1e-4, **usual, **self.mode.options)


WAYS = {
    "MLX float32": Way(stock, Mode(mx.float32, {})),
    "MLX bf16": Way(stock, Mode(mx.bfloat16, {})),
    **{label: Way(optim, mode) for label, mode in MODES.items()},
}


class Training:
    """A decoder, an optimizer and a batch."""

    def __init__(self, way: Way, label: str, sizes: dict[str, int]) -> None:
        mx.random.seed(0)
        self.model = models.Decoder(**sizes)
        self.model.set_dtype(way.mode.dtype)
        self.optimizer = way.optimizer(label)
        self.optimizer.init(self.model.trainable_parameters())
        vocabulary = self.model.head.weight.shape[0]
        self.tokens = mx.random.randint(0, vocabulary, (1, 33))
        self.state = [self.model.state, self.optimizer.state]
        mx.eval(self.state, self.tokens)
        self.loss_and_grad = nn.value_and_grad(self.model, self.loss)

    @staticmethod
    def loss(model: Any, tokens: mx.array) -> mx.array:
        logits = model(tokens[:, :-1]).astype(mx.float32)
        return nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="mean")

    def gradients(self) -> dict[str, mx.array]:
        _, gradients = self.loss_and_grad(self.model, self.tokens)
        flat: Any = dict(tree_flatten(gradients))
        mx.eval(flat)
        return flat  # type: ignore[no-any-return]

    def step(self, tokens: mx.array) -> mx.array:
        loss, gradients = self.loss_and_grad(self.model, tokens)
        self.optimizer.update(self.model, gradients)
        return loss  # type: ignore[no-any-return]


def held(training: Training, gradients: dict[str, mx.array]) -> dict[str, float]:
    """Bytes a parameter, by what they are for."""
    weights: Any = dict(tree_flatten(training.model.trainable_parameters()))
    states: Any = dict(tree_flatten(training.optimizer.state))
    errors = {path: x for path, x in states.items() if path.endswith(".error")}
    others = {path: x for path, x in states.items() if path not in errors}
    count = sum(x.size for x in weights.values())
    kinds = {
        "weight": weights,
        "correction": errors,
        "states": others,
        "gradient": gradients,
    }
    return {
        kind: round(sum(x.nbytes for x in arrays.values()) / count, 3)
        for kind, arrays in kinds.items()
    }


def training_peak(way: Way, label: str, sizes: dict[str, int], compiled: bool) -> float:
    """MB at the peak of a training step, with all that the training holds."""
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    training = Training(way, label, sizes)
    state, train = training.state, training.step
    if compiled:
        train = mx.compile(train, inputs=state, outputs=state)

    def step() -> None:
        mx.eval(train(training.tokens), state)

    step()
    holds = mx.get_active_memory() - before
    return round(holds / 1e6 + peak_of(step), 1)


def row(label: str, name: str, sizes: dict[str, int]) -> Row:
    """All of one optimizer and one way."""
    way = WAYS[name]
    training = Training(way, label, sizes)
    gradients = training.gradients()
    count = sum(x.size for x in gradients.values())
    parts = held(training, gradients)
    del training
    total = sum(parts.values())
    promised = PROMISED.get((label, name))
    kinds = {"eager": False, "compiled": True}
    extra = {}
    for kind, compiled in kinds.items():
        step = peers.mlx_step(
            way.module, label, way.mode.dtype, gradients, compiled, way.mode.options
        )
        step()
        step()
        extra[kind] = peak_of(step)
        del step
        gc.collect()
    del gradients
    return {
        "optimizer": label,
        "held": name,
        "parameters": count,
        "bytes": parts,
        "all": round(total, 3),
        "without gradient": round(total - parts["gradient"], 3),
        "promised": promised,
        "peak MB": {
            kind: training_peak(way, label, sizes, compiled)
            for kind, compiled in kinds.items()
        },
        "extra MB": extra,
    }


NOTES = """\
Bytes a parameter of a decoder of {count:,} parameters, from its arrays. Promised: the
most that all of them may be, with and without the gradient. Peak: of forward pass,
backward pass and update in one evaluation over 32 tokens, with all that is held before.
Extra: what a step of the optimizer alone takes beyond weights, gradients and states.
"""


def columns(found: Row) -> Row:
    """A row as the table shows it."""
    result = {"optimizer": found["optimizer"], "held": found["held"], **found["bytes"]}
    for key in ("all", "without gradient"):
        result[key] = found[key]
    promised = found["promised"]
    result["promised"] = f"{promised} / {promised - 2:.1f}" if promised else ""
    for key in ("peak MB", "extra MB"):
        result |= {f"{key}, {kind}": x for kind, x in found[key].items()}
    return result


def markdown(result: dict[str, Any]) -> str:
    named = report.named(result["machine"])
    notes = NOTES.format(count=result["rows"][0]["parameters"])
    table = report.table([columns(found) for found in result["rows"]])
    return f"# Memory\n\n{named}.\n\n{notes}\n{table}"


COLOURS = {
    "weight": "#4575b4",
    "correction": "#91bfdb",
    "states": "#1a9850",
    "gradient": "#cccccc",
}


def chart(rows: list[Row], path: Path) -> None:
    """Bytes a parameter and peaks, a line for each optimizer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = list(dict.fromkeys(found["optimizer"] for found in rows))
    names = list(dict.fromkeys(found["held"] for found in rows))
    figure, grid = pyplot.subplots(
        len(labels),
        2,
        figsize=(12, (0.32 * len(names) + 0.8) * len(labels)),
        squeeze=False,
        sharey=True,
        sharex="col",
    )
    for label, (left, right) in zip(labels, grid, strict=True):
        chosen = [found for found in rows if found["optimizer"] == label]
        for i, found in enumerate(chosen):
            start = 0.0
            for kind, size in found["bytes"].items():
                left.barh(i, size, 0.75, start, color=COLOURS[kind])
                start += size
            left.text(start, i, f" {found['all']:.2f}", va="center", fontsize=7)
            peaks = found["peak MB"]
            for kind, place, colour in (
                ("eager", -0.19, "#1a9850"),
                ("compiled", 0.19, "#91cf60"),
            ):
                right.barh(i + place, peaks[kind], 0.37, color=colour)
                text = f" {peaks[kind]:.0f}"
                right.text(peaks[kind], i + place, text, va="center", fontsize=6)
        left.set_yticks(
            range(len(chosen)), [found["held"] for found in chosen], fontsize=7
        )
        left.set_title(f"{label}: bytes a parameter", fontsize=9)
        right.set_title(f"{label}: peak of a training step, MB", fontsize=9)
        left.margins(x=0.1)
        right.margins(x=0.1)
    grid[0][0].invert_yaxis()
    for kind, colour in COLOURS.items():
        grid[0][0].barh(0, 0, color=colour, label=kind)
    for kind, colour in (("eager", "#1a9850"), ("compiled", "#91cf60")):
        grid[0][1].barh(0, 0, color=colour, label=kind)
    for axis in grid[0]:
        axis.legend(fontsize=7, loc="lower right")
    count = rows[0]["parameters"] / 1e6
    figure.suptitle(f"Training a decoder of {count:.0f}M parameters", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.memory",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--optimizers", nargs="+", choices=peers.OPTIMIZERS, default=OPTIMIZERS)
    names = "of: " + "; ".join(WAYS)
    add("--ways", nargs="+", choices=WAYS, default=[*WAYS], metavar="WAY", help=names)
    add("--width", type=int, default=512, help="of the decoder")
    add("--layers", type=int, default=8, help="of the decoder")
    add("--vocabulary", type=int, default=4096, help="of the decoder")
    add("--device", choices=["cpu", "gpu"], help="MLX's own if none is given")
    add("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.device == "gpu" and not mx.is_available(mx.gpu):
        parser.error("--device gpu: MLX has no GPU here")
    if options.device:
        mx.set_default_device(mx.gpu if options.device == "gpu" else mx.cpu)
    sizes = {key: getattr(options, key) for key in ("width", "layers", "vocabulary")}
    units = [(label, name) for label in options.optimizers for name in options.ways]
    rows = []
    progress = tqdm(units, unit="row", disable=None)
    for label, name in progress:
        progress.set_description(f"{label}, {name}")
        rows.append(row(label, name, sizes))
    device = "gpu" if mx.default_device() == mx.gpu else "cpu"
    machine = report.machine(device, 1)
    for key in ("rounds", "torch"):
        machine.pop(key)
    result = {"machine": machine, "settings": sizes, "rows": rows}
    path = options.output / "memory.json"
    report.save(path, result, markdown(result))
    chart(rows, path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
