"""Trains a network on digits with `mlx_fused_optimizers`, then with stock MLX.

The run is saved half-way and resumed from that file; the resumed run must end in the
same bits as the uninterrupted one. A table then compares the two libraries. The data
comes with scikit-learn; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import mlx_fused_optimizers
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from tqdm import tqdm

BATCH_SIZE = 64
# The number goes up when a change below makes older checkpoints end in other bits.
CHECKPOINT_FORMAT = "mlx_fused_optimizers/train_digits/1"
RANGES = {"epochs": (2, 1000), "seed": (0, 2**32 - 1)}  # one epoch has no half-way
TIMING_ROUNDS = 200
Arrays = dict[str, mx.array]  # flat: "model.output.weight", "optimizer.step"

# --optimizer: class, peak learning rate, other arguments
RECIPES: dict[str, tuple[str, float, dict[str, Any]]] = {
    "sgd": ("SGD", 1e-1, {"momentum": 0.9, "weight_decay": 1e-4}),
    "adam": ("Adam", 2e-3, {}),
    "adamw": ("AdamW", 2e-3, {"weight_decay": 0.05}),
    "lion": ("Lion", 1e-3, {"weight_decay": 1.0, "betas": (0.95, 0.98)}),
}


class CheckpointError(Exception):
    """A checkpoint that cannot be read, used or written; the message is one line."""


class Run(NamedTuple):
    """What decides every bit of a training, given the optimizer library."""

    optimizer: str = "adamw"
    epochs: int = 16
    seed: int = 0


class Data(NamedTuple):
    train_images: mx.array  # float32, (images, 64), standardised
    train_labels: mx.array
    test_images: mx.array
    test_labels: mx.array
    steps_per_epoch: int


class Trained(NamedTuple):
    arrays: Arrays  # of model and optimizer
    accuracy: float  # on the test images
    peak_bytes: int  # of the training steps, above what was allocated before


class Network(nn.Module):  # type: ignore[misc, unused-ignore]
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3, stride=2, padding=1)
        self.hidden = nn.Linear(32 * 4 * 4, 128)
        self.output = nn.Linear(128, 10)

    def __call__(self, images: mx.array) -> mx.array:
        x = nn.relu(self.conv1(images.reshape(-1, 8, 8, 1)))
        x = nn.relu(self.conv2(x)).reshape(images.shape[0], -1)
        return self.output(nn.relu(self.hidden(x)))


def load_data(seed: int) -> Data:
    # Imported here because it takes a second, in which Ctrl-C should already work.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    train, test, train_labels, test_labels = train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=seed
    )
    train, test = ((x - train.mean()) / train.std() for x in (train, test))
    return Data(
        train_images=mx.array(train, mx.float32),
        train_labels=mx.array(train_labels),
        test_images=mx.array(test, mx.float32),
        test_labels=mx.array(test_labels),
        steps_per_epoch=len(train) // BATCH_SIZE,
    )


def batches(data: Data, run: Run, epoch: int) -> np.ndarray[Any, Any]:
    """The images of each step; from seed and epoch, so a resumed run repeats it."""
    random = np.random.default_rng([run.seed, epoch])
    order = random.permutation(data.train_images.shape[0])
    return order[: data.steps_per_epoch * BATCH_SIZE].reshape(-1, BATCH_SIZE)


def build(optim: ModuleType, run: Run, data: Data) -> tuple[Network, Any]:
    mx.random.seed(run.seed)
    model = Network()
    name, peak, options = RECIPES[run.optimizer]
    steps = run.epochs * data.steps_per_epoch
    warm_up = steps // 10
    schedule = optim.join_schedules(
        [
            optim.linear_schedule(0.0, peak, warm_up),
            optim.cosine_decay(peak, steps - warm_up),
        ],
        [warm_up],
    )
    optimizer = getattr(optim, name)(learning_rate=schedule, **options)
    optimizer.init(model.trainable_parameters())
    mx.eval(model.state, optimizer.state)
    return model, optimizer


def flat_arrays(model: Network, optimizer: Any) -> Arrays:
    return dict(
        tree_flatten({"model": model.parameters(), "optimizer": optimizer.state})
    )


def mean_loss(model: Network, images: mx.array, labels: mx.array) -> mx.array:
    return nn.losses.cross_entropy(
        model(images), labels, reduction="mean", label_smoothing=0.1
    )


def test_accuracy(model: Network, data: Data) -> float:
    hits = mx.argmax(model(data.test_images), axis=1) == data.test_labels
    return float(np.mean(np.array(hits)))


def train(
    optim: ModuleType,
    run: Run,
    data: Data,
    *,
    start: tuple[int, Arrays] | None = None,
    save: Path | None = None,
    report: bool = False,
) -> Trained:
    """Trains from `start` (epoch, arrays) to the end; saves half-way to `save`."""
    gc.collect()
    mx.clear_cache()
    allocated = mx.get_active_memory()
    model, optimizer = build(optim, run, data)
    first_epoch = 0
    if start is not None:
        first_epoch, arrays = start
        tree = tree_unflatten(list(arrays.items()))
        model.update(tree["model"])
        optimizer.state = tree["optimizer"]
        optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]
    loss_and_gradients = nn.value_and_grad(model, partial(mean_loss, model))

    @partial(mx.compile, inputs=state, outputs=state)
    def step(images: mx.array, labels: mx.array) -> mx.array:
        loss: mx.array
        loss, gradients = loss_and_gradients(images, labels)
        gradients, _ = optim.clip_grad_norm(gradients, max_norm=1.0)
        optimizer.update(model, gradients)
        return loss

    if report:
        print("epoch    loss   test accuracy")
    peak = 0
    total = (run.epochs - first_epoch) * data.steps_per_epoch
    # Without a terminal there is no bar, only the line of each epoch.
    bar = tqdm(total=total, desc=optim.__name__, unit="step", leave=False, disable=None)
    with bar:
        for epoch in range(first_epoch, run.epochs):
            mx.reset_peak_memory()
            losses = []
            for indices in batches(data, run, epoch):
                chosen = mx.array(indices)
                loss = step(data.train_images[chosen], data.train_labels[chosen])
                mx.eval(loss, state)
                losses.append(loss.item())
                bar.update()
            peak = max(peak, mx.get_peak_memory() - allocated)
            accuracy = test_accuracy(model, data)
            if report:
                bar.write(f"{epoch + 1:5d}  {np.mean(losses):.4f}   {accuracy:.3f}")
            if save is not None and epoch + 1 == run.epochs // 2:
                save_checkpoint(save, run, epoch + 1, flat_arrays(model, optimizer))
    return Trained(flat_arrays(model, optimizer), accuracy, peak)


def save_checkpoint(path: Path, run: Run, epoch: int, arrays: Arrays) -> None:
    """Writes beside `path`, then renames: the old file stays whole if interrupted."""
    metadata = {
        "format": CHECKPOINT_FORMAT,
        "optimizer": run.optimizer,
        "epochs": str(run.epochs),
        "seed": str(run.seed),
        "batch_size": str(BATCH_SIZE),
        "epoch": str(epoch),
    }
    path = path.resolve()  # a rename would replace a symbolic link, not its target
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            mx.save_safetensors(file, arrays, metadata)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def check_save_target(path: Path) -> None:
    """Before any training: `path` is writable, and only a checkpoint is replaced."""
    try:
        if path.exists():
            read_checkpoint(path)
        with tempfile.TemporaryFile(dir=path.resolve().parent):
            pass
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; not overwritten, give --save another path"
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from error


def read_checkpoint(path: Path) -> tuple[Run, int, Arrays]:
    """Run, finished epochs and arrays of a file that this script wrote."""
    try:
        with path.open("rb"):
            pass  # if it cannot be opened, the operating system says why
        # By name: MLX 0.32.4 may abort at exit after loading from a Python file.
        loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
        arrays, metadata = loaded
        mx.eval(arrays)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (RuntimeError, ValueError) as error:
        reason = "truncated, damaged or not a safetensors file"
        raise CheckpointError(f"{path}: {reason}") from error

    found = metadata.get("format", "no format")
    if found != CHECKPOINT_FORMAT:
        raise CheckpointError(
            f"{path}: not a checkpoint of this script: found {found!r}, "
            f"expected {CHECKPOINT_FORMAT!r}"
        )
    try:
        numbers = {name: in_range(name, metadata[name]) for name in RANGES}
        run, epoch = Run(metadata["optimizer"], **numbers), int(metadata["epoch"])
        valid = run.optimizer in RECIPES and 0 < epoch < run.epochs
    except (KeyError, ValueError, argparse.ArgumentTypeError):
        valid = False
    if not valid or metadata.get("batch_size") != str(BATCH_SIZE):
        raise CheckpointError(
            f"{path}: foreign checkpoint: unusable metadata {metadata!r}"
        )
    return run, epoch, arrays


def first_difference(
    found: Arrays, expected: Arrays, describe: Callable[[mx.array], object]
) -> tuple[str, object, object] | None:
    """The first name whose descriptions differ, and both; None if there is none."""
    for name in sorted(found.keys() | expected.keys()):
        have = describe(found[name]) if name in found else "nothing"
        want = describe(expected[name]) if name in expected else "nothing"
        if have != want:
            return name, have, want
    return None


def kind(array: mx.array) -> str:
    return f"{array.dtype} {array.shape}"


def bits(array: mx.array) -> tuple[str, bytes]:
    return kind(array), np.array(array).tobytes()


def optimizer_step(optim: ModuleType, run: Run, data: Data) -> Callable[[], None]:
    """A compiled update alone, with the gradient of the first batch."""
    model, optimizer = build(optim, run, data)
    chosen = mx.array(batches(data, run, 0)[0])
    loss_and_gradients = nn.value_and_grad(model, partial(mean_loss, model))
    images, labels = data.train_images[chosen], data.train_labels[chosen]
    _, gradients = loss_and_gradients(images, labels)
    mx.eval(gradients)
    state = [model.state, optimizer.state]
    update = mx.compile(partial(optimizer.update, model), inputs=state, outputs=state)

    def step() -> None:
        update(gradients)
        mx.eval(state)

    step()  # the first call compiles
    return step


def step_peak(step: Callable[[], None]) -> int:
    """Bytes that a step allocates beyond parameters, state and gradients."""
    mx.clear_cache()
    allocated = mx.get_active_memory()
    mx.reset_peak_memory()
    step()
    return mx.get_peak_memory() - allocated


def step_times(steps: list[Callable[[], None]]) -> list[float]:
    """Median microseconds of each; taking turns, a busy machine slows all alike."""
    nanoseconds: list[list[int]] = [[] for _ in steps]
    rounds = tqdm(
        range(TIMING_ROUNDS), desc="timing", unit="round", leave=False, disable=None
    )
    for _ in rounds:
        for step, taken in zip(steps, nanoseconds, strict=True):
            begin = time.perf_counter_ns()
            step()
            taken.append(time.perf_counter_ns() - begin)
    return [median(taken) / 1000 for taken in nanoseconds]


def print_table(ours: Trained, stock: Trained, run: Run, data: Data) -> None:
    libraries = [mlx_fused_optimizers, mlx.optimizers]
    steps = [optimizer_step(optim, run, data) for optim in libraries]
    times = step_times(steps)
    mebibyte = 2**20
    peaks = [trained.peak_bytes / mebibyte for trained in (ours, stock)]
    step_peaks = [step_peak(step) / mebibyte for step in steps]
    rows: list[tuple[str, str, list[float]]] = [
        ("test accuracy", ".3f", [ours.accuracy, stock.accuracy]),
        ("optimizer step, median, us", ".0f", times),
        ("peak memory of the training, MiB", ".2f", peaks),
        ("extra memory in an optimizer step, MiB", ".2f", step_peaks),
    ]
    print(" " * 38 + "".join(f"{optim.__name__:>22}" for optim in libraries))
    for label, form, cells in rows:
        print(f"{label:38}" + "".join(f"{cell:>22{form}}" for cell in cells))
    print(f"time of an optimizer step, fused / stock: {times[0] / times[1]:.2f}")


def title(run: Run, data: Data) -> str:
    name, images = RECIPES[run.optimizer][0], len(data.train_images)
    settings = f"{name}, {run.epochs} epochs, seed {run.seed}"
    return f"{settings}: {images} training and {len(data.test_images)} test images"


def demo(run: Run, save: Path | None) -> int:
    """The whole comparison; the checkpoint is kept only if `save` names a file."""
    if save is not None:
        check_save_target(save)
    data = load_data(run.seed)
    print(title(run, data))
    with tempfile.TemporaryDirectory() as folder:
        path = save or Path(folder) / "digits.safetensors"
        ours = train(mlx_fused_optimizers, run, data, save=path, report=True)
        _, epoch, arrays = read_checkpoint(path)
        resumed = train(mlx_fused_optimizers, run, data, start=(epoch, arrays))
    kept = save or "not kept without --save PATH"
    print(f"checkpoint of epoch {epoch}: {kept}")
    difference = first_difference(resumed.arrays, ours.arrays, bits)
    if difference:
        message = f"resumed run differs from the uninterrupted one in {difference[0]!r}"
        print(f"error: {message}", file=sys.stderr)
        return 1
    print(f"resumed from epoch {epoch}: same bits in all {len(ours.arrays)} arrays\n")
    stock = train(mlx.optimizers, run, data)
    print_table(ours, stock, run, data)
    print(f"test accuracy: {ours.accuracy:.3f}")
    return 0


def resume(path: Path, given: dict[str, Any]) -> int:
    """Finishes the run in `path`, with which the options in `given` must agree."""
    run, epoch, arrays = read_checkpoint(path)
    for name, value in given.items():
        saved = getattr(run, name)
        if value != saved:
            hint = f"saved with --{name} {saved}, not {value}; leave --{name} out"
            raise CheckpointError(f"{path}: {hint}")
    data = load_data(run.seed)
    expected = flat_arrays(*build(mlx_fused_optimizers, run, data))
    difference = first_difference(arrays, expected, kind)
    if difference:
        name, have, want = difference
        hint = f"array {name!r}: found {have}, expected {want}"
        raise CheckpointError(f"{path}: foreign checkpoint: {hint}")
    print(f"{title(run, data)}, resumed from epoch {epoch}")
    result = train(mlx_fused_optimizers, run, data, start=(epoch, arrays), report=True)
    print(f"test accuracy: {result.accuracy:.3f}")
    return 0


def in_range(name: str, text: str) -> int:
    low, high = RANGES[name]
    if not (text.isdecimal() and low <= int(text) <= high):
        message = f"expected an integer from {low} to {high}, got {text!r}"
        raise argparse.ArgumentTypeError(message)
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, argument_default=argparse.SUPPRESS
    )
    add, default = parser.add_argument, Run()
    add("--optimizer", choices=RECIPES, help=f"default: {default.optimizer}")
    for name in RANGES:
        text = f"default: {getattr(default, name)}"
        add(f"--{name}", type=partial(in_range, name), metavar="N", help=text)
    either = parser.add_mutually_exclusive_group().add_argument
    either("--save", type=Path, metavar="PATH", help="keep the half-way checkpoint")
    either("--resume", type=Path, metavar="PATH", help="only finish the run in PATH")
    given = vars(parser.parse_args())
    try:
        if "resume" in given:
            return resume(given.pop("resume"), given)
        save = given.pop("save", None)
        return demo(Run(**given), save)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
