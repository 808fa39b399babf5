"""Whether training converges alike however weights and states are held.

``python -m bench.convergence`` trains a small GPT on the characters of a text and the
network of examples/train_digits.py on scikit-learn's digits with AdamW, once for each
mode and seed. A seed decides first weights, data and their order, the same in all
modes. The matrices are multiplied in float32 whatever the weights are held in, so that
only what is held differs; the gradients have the weights' dtype.

MLX's wheels for Linux multiply matrices by the reference BLAS, with which all of it
takes hours; a library with a faster ``cblas_sgemm`` in ``LD_PRELOAD`` makes it minutes.

Writes ``convergence.json``, ``convergence.md`` and ``convergence.png`` to
bench/results.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx_fused_optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_fused_optimizers._kernels import kernels
from tqdm import tqdm

from . import report
from .modes import FLOAT32, MODES, Mode
from .train_step import GPT, TEXT

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import train_digits  # noqa: E402

Batch = tuple[mx.array, mx.array]
Loss = Callable[[Any, mx.array, mx.array], mx.array]

LAST = 50  # steps whose mean is a run's training loss
WINDOW = 25  # steps whose mean is a point of a curve


class Data(NamedTuple):
    """The batch of a step, and the data that is held out."""

    batch: Callable[[int], Batch]
    held_out: Batch


class Task(NamedTuple):
    """What is trained, and how."""

    label: str
    seeds: int
    steps: int
    learning_rate: float  # at its peak, after a tenth of the steps; a tenth at the end
    weight_decay: float  # of matrices
    model: Callable[[], nn.Module]
    loss: Loss
    data: Callable[[int], Data]  # by seed

    def optimizer(self, mode: Mode) -> optim.AdamW:
        peak, warm_up = self.learning_rate, self.steps // 10
        schedule = optim.join_schedules(
            [
                # Not from 0: updates are reported in units of the learning rate.
                optim.linear_schedule(peak / 100, peak, warm_up),
                optim.cosine_decay(peak, self.steps - warm_up, peak / 10),
            ],
            [warm_up],
        )
        return optim.AdamW(
            schedule,
            weight_decay=self.weight_decay,
            bias_correction=True,
            max_grad_norm=1.0,
            weight_decay_filter=optim.decay_matrices_only,
            **mode.options,
        )


def cross_entropy(model: Any, tokens: mx.array, targets: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(tokens), targets, reduction="mean")


def text_task(options: argparse.Namespace) -> Task:
    """The next character of a text, of which the last tenth is held out."""
    text = options.text.read_text(encoding="utf-8")
    alphabet = sorted(set(text))
    encoded = np.array([alphabet.index(character) for character in text])
    context = options.context
    border = len(encoded) * 9 // 10
    if len(encoded) - border <= context:
        raise ValueError(f"{options.text} has {len(text)} characters; expected more")

    def windows(starts: Any) -> Batch:
        rows = mx.array(np.stack([encoded[s : s + context + 1] for s in starts]))
        return rows[:, :-1], rows[:, 1:]

    def data(seed: int) -> Data:
        def batch(step: int) -> Batch:
            random = np.random.default_rng([seed, step])
            return windows(random.integers(0, border - context, options.batch))

        return Data(batch, windows(range(border, len(encoded) - context, context)))

    return Task(
        "GPT",
        options.seeds or 3,
        options.steps or 1000,
        1e-3,
        0.1,
        lambda: GPT(len(alphabet), context, options.width, options.layers),
        cross_entropy,
        data,
    )


def digits_task(options: argparse.Namespace) -> Task:
    """Digits of 8 x 8 pixels."""

    def data(seed: int) -> Data:
        digits = train_digits.load_data(seed)

        def batch(step: int) -> Batch:
            epoch, i = divmod(step, digits.steps_per_epoch)
            run = train_digits.Run(seed=seed)
            chosen = mx.array(train_digits.batches(digits, run, epoch)[i])
            return digits.train_images[chosen], digits.train_labels[chosen]

        return Data(batch, (digits.test_images, digits.test_labels))

    return Task(
        "digits",
        options.seeds or 5,
        options.steps or 400,
        2e-3,
        0.05,
        train_digits.Network,
        train_digits.mean_loss,
        data,
    )


TASKS = {"text": text_task, "digits": digits_task}


def number(scalar: mx.array) -> float:
    return float(scalar.item().real)


def masters(parameters: dict[str, Any], state: dict[str, Any]) -> dict[str, mx.array]:
    """The weights in float32, with what their rounding took from them."""
    weights: Any = tree_flatten(parameters)
    entries: Any = tree_flatten(state)
    errors = {
        path.removesuffix(".error"): x for path, x in entries if path.endswith(".error")
    }
    return {
        path: kernels.join(x, errors[path]) if path in errors else x.astype(mx.float32)
        for path, x in weights
    }


def share_in_codes(parameters: dict[str, Any], state: dict[str, Any]) -> float:
    """The share of elements whose states are in codes."""
    entries: Any = dict(tree_flatten(state))
    weights: Any = tree_flatten(parameters)
    held = sum(x.size for path, x in weights if f"{path}.m_scales" in entries)
    return float(held / sum(x.size for _, x in weights))


def run(
    task: Task, data: Data, mode: Mode, seed: int, progress: Callable[[], Any]
) -> dict[str, Any]:
    """Train once."""
    mx.random.seed(seed)
    model = task.model()
    parameters: Any = tree_map(
        lambda x: x.astype(mode.dtype), model.trainable_parameters()
    )
    optimizer = task.optimizer(mode)
    optimizer.init(parameters)
    if mode.options.get("stochastic_rounding"):
        optimizer.state["rounding_seed"] = mx.array(seed, mx.uint32)

    def loss_of(weights: Any, inputs: mx.array, targets: mx.array) -> mx.array:
        model.update(tree_map(lambda x: x.astype(mx.float32), weights))
        return task.loss(model, inputs, targets)

    def step(inputs: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
        before = masters(parameters, optimizer.state)
        loss, gradients = mx.value_and_grad(loss_of)(parameters, inputs, targets)
        parameters.update(optimizer.apply_gradients(gradients, parameters))
        after = masters(parameters, optimizer.state)
        changes = [mx.abs(after[path] - before[path]).max() for path in after]
        return loss, mx.stack(changes).max() / optimizer.learning_rate

    state = [parameters, optimizer.state]
    mx.eval(state)
    train = mx.compile(step, inputs=state, outputs=state)
    losses: list[float] = []
    updates: list[float] = []
    held_out: list[float] = []
    for i in range(task.steps):
        loss, update = train(*data.batch(i))
        mx.eval(loss, update, state)
        losses.append(number(loss))
        updates.append(number(update))
        if (i + 1) % WINDOW == 0 or i + 1 == task.steps:
            held_out.append(number(loss_of(parameters, *data.held_out)))
        progress()
    count = task.steps // WINDOW * WINDOW
    curve = np.reshape(losses[:count], (-1, WINDOW)).mean(axis=1)
    largest = int(np.argmax(updates))
    weights: Any = tree_flatten(masters(parameters, optimizer.state))
    heaviest = max(number(mx.abs(x).max()) for _, x in weights if x.ndim > 1)
    return {
        "seed": seed,
        "training loss": statistics.fmean(losses[-LAST:]),
        "held-out loss": held_out[-1],
        "lowest held-out loss": min(held_out),
        "largest update": updates[largest],
        "at step": largest + 1,
        "share in codes": share_in_codes(parameters, optimizer.state),
        "parameters": sum(x.size for _, x in weights),
        "weight decay in the largest update, at most": task.weight_decay * heaviest,
        "curve": [round(float(x), 4) for x in curve],
        "held-out curve": [round(float(x), 4) for x in held_out],
    }


Runs = list[dict[str, Any]]


def spread(values: list[float]) -> str:
    return f"{min(values):.4f} to {max(values):.4f}"


def rows(runs: dict[str, Runs]) -> list[dict[str, Any]]:
    """A task's runs by mode: a row for each mode."""
    result = []
    usual = runs.get(FLOAT32)
    for mode, found in runs.items():
        losses = [one["training loss"] for one in found]
        held_out = [one["held-out loss"] for one in found]
        largest = max(one["largest update"] for one in found)
        row = {
            "held": mode,
            "in codes": f"{100 * found[0]['share in codes']:.1f} %",
            "training loss": round(statistics.fmean(losses), 4),
            "of the seeds": spread(losses),
            "held-out loss": round(statistics.fmean(held_out), 4),
            "held-out, of the seeds": spread(held_out),
            "largest update": round(largest, 2),
        }
        if usual:
            least, most = (
                limit(one["training loss"] for one in usual) for limit in (min, max)
            )
            of_usual = max(one["largest update"] for one in usual)
            within = least <= statistics.fmean(losses) <= most
            row["largest update / float32's"] = round(largest / of_usual, 2)
            row["within float32's seeds"] = "yes" if within else "no"
        result.append(row)
    return result


NOTES = """\
Training loss is the mean of the last {last} steps, held-out loss that after the last
step. Each is a mean over seeds; beside it are the least and the largest of the seeds.
Within float32's seeds: whether the mean training loss is between float32's least and
largest.

The largest update is the largest change of a single weight in a single step, over all
steps and seeds, in units of that step's learning rate. It is measured on the weights in
float32, with their corrections; weight decay's part in it is at most {decay:.2f}. bf16
weights without a correction change by their rounding intervals: their largest update is
a rounding, the larger the smaller the learning rate is, and no figure of the states.
"""


def markdown(report_: dict[str, Any]) -> str:
    named = report.named(report_["machine"])
    every = [
        one
        for task in report_["tasks"].values()
        for runs in task["runs"].values()
        for one in runs
    ]
    decay = max(one["weight decay in the largest update, at most"] for one in every)
    parts = [f"# Convergence\n\n{named}.\n", NOTES.format(last=LAST, decay=decay)]
    for task in report_["tasks"].values():
        parts.append(f"## {task['title']}\n\n{report.table(rows(task['runs']))}")
    return "\n".join(parts)


def chart(tasks: dict[str, Any], path: Path) -> None:
    """Loss curves, final losses and the largest updates; a line for each task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(
        len(tasks),
        3,
        figsize=(14, 4 * len(tasks)),
        squeeze=False,
        width_ratios=[3, 2, 2],
    )
    for line, task in zip(grid, tasks.values(), strict=True):
        curves, finals, updates = line
        colours = [pyplot.get_cmap("tab10")(i) for i in range(len(task["runs"]))]
        for i, (mode, found) in enumerate(task["runs"].items()):
            curve = np.mean([one["curve"] for one in found], axis=0)
            steps = WINDOW * np.arange(1, len(curve) + 1)
            curves.plot(steps, curve, label=mode, color=colours[i], linewidth=1.2)
            losses = [one["training loss"] for one in found]
            finals.barh(i, statistics.fmean(losses), 0.7, color=colours[i], alpha=0.5)
            finals.plot(losses, [i] * len(losses), "k|", markersize=9)
            largest = max(one["largest update"] for one in found)
            held = MODES[mode]
            rounds = held.dtype != mx.float32 and "master_weights" not in held.options
            bars = updates.barh(
                i,
                largest,
                0.7,
                color=colours[i],
                alpha=0.5,
                hatch="//" if rounds else "",
            )
            text = f"{largest:.3g}" + (", a rounding" if rounds else "")
            updates.bar_label(bars, [text], fontsize=7, padding=2)
        every = [one["training loss"] for f in task["runs"].values() for one in f]
        margin = (max(every) - min(every)) * 0.2 + 1e-6
        finals.set_xlim(min(every) - margin, max(every) + margin)
        curves.set_title(f"{task['title']}: training loss", fontsize=9)
        curves.set_xlabel("step")
        curves.legend(fontsize=7)
        finals.set_title("last training loss; a mark for each seed", fontsize=9)
        updates.set_title("largest update / learning rate (log scale)", fontsize=9)
        updates.set_xscale("log")
        updates.margins(x=0.45)
        for axis in (finals, updates):
            axis.set_yticks([])
            axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.convergence",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=[*TASKS])
    names = "of: " + "; ".join(MODES)
    add(
        "--modes",
        nargs="+",
        choices=MODES,
        default=[*MODES],
        metavar="MODE",
        help=names,
    )
    add("--text", type=Path, default=TEXT)
    add("--width", type=int, default=128, help="of the GPT")
    add("--layers", type=int, default=3, help="of the GPT")
    add("--context", type=int, default=64, help="of the GPT")
    add("--batch", type=int, default=2, help="of the GPT, in windows of the text")
    usual = "those of each task if none are given"
    add("--steps", type=int, help=usual)
    add("--seeds", type=int, help=usual)
    add("--device", choices=["cpu", "gpu"], help="MLX's own if none is given")
    add("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.steps is not None and options.steps < max(LAST, WINDOW):
        parser.error(f"--steps is {options.steps}; expected at least {LAST}")
    if options.seeds is not None and options.seeds < 1:
        parser.error(f"--seeds is {options.seeds}; expected at least 1")
    if options.device == "gpu" and not mx.is_available(mx.gpu):
        parser.error("--device gpu: MLX has no GPU here")
    return options


def main() -> int:
    options = arguments()
    if options.device:
        mx.set_default_device(mx.gpu if options.device == "gpu" else mx.cpu)
    tasks = {name: TASKS[name](options) for name in options.tasks}
    total = sum(t.seeds * t.steps for t in tasks.values()) * len(options.modes)
    results: dict[str, Any] = {}
    with tqdm(total=total, unit="step", disable=None) as progress:
        for name, task in tasks.items():
            runs: dict[str, Runs] = {mode: [] for mode in options.modes}
            for seed in range(task.seeds):
                data = task.data(seed)
                for mode in options.modes:
                    progress.set_description(f"{name}, seed {seed}, {mode}")
                    one = run(task, data, MODES[mode], seed, progress.update)
                    runs[mode].append(one)
            count = one["parameters"]
            title = f"{task.label} of {count:,} parameters, {task.steps} steps"
            results[name] = {
                "title": f"{title}, {task.seeds} seeds",
                "runs": runs,
            }
    device = "gpu" if mx.default_device() == mx.gpu else "cpu"
    machine = report.machine(device, 1)
    machine.pop("rounds")
    settings = {
        key: getattr(options, key) for key in ("width", "layers", "context", "batch")
    }
    settings["text"] = options.text.name
    result = {"machine": machine, "settings": settings, "tasks": results}
    path = options.output / "convergence.json"
    report.save(path, result, markdown(result))
    chart(results, path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
