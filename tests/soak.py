"""A soak: many steps of small models, with everything that happens in a long run.

Random trees, optimizers, options, schedules and numbers of threads; eager and compiled
steps; states written, read and assigned; schedules that raise. mlx.optimizers takes the
same steps beside, and at every 1,000th step, and at each model's end, the results must
agree: in float32 within 2e-6 relative a step, in half precision a step from the same
values within one rounding. At the end memory must be what it was at the start.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import random
import resource
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as stock
import mlx_fused_optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_fused_optimizers._kernels import kernels
from support import ALL_OPTIMIZERS, leaves_of, oracle, snapshot, to_numpy

CHECK_EVERY = 1000
STEP_TOLERANCE = 2e-6
# What may remain of the arrays of all models, and what the process may have grown by
# after the first third: heaps fragment.
MAX_ACTIVE_GROWTH = 1 << 16
MAX_RESIDENT_GROWTH = 16 << 20
# A reduction in another order, and rounding that later steps magnify.
LOOSE = {"Adafactor": 50.0, "Muon": 500.0}
HALF_ROUNDING = {mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}

Flat = dict[str, mx.array]


@dataclass
class Report:
    """What a soak did, and the memory before and after in bytes."""

    steps: int = 0
    models: int = 0
    checks: int = 0
    compiled: int = 0
    reloads: int = 0
    reassignments: int = 0
    exceptions: int = 0
    skipped: int = 0
    worst: float = 0.0  # difference, as a share of what is tolerated
    active: tuple[int, int] = (0, 0)
    resident: tuple[int, int] = (0, 0)


class ScheduleError(RuntimeError):
    """What a schedule raises."""


class Schedule:
    """A schedule that raises when it is told to."""

    def __init__(self, schedule: Callable[[mx.array], mx.array]) -> None:
        self.schedule = schedule
        self.raises = False

    def __call__(self, step: mx.array) -> mx.array:
        if self.raises:
            raise ScheduleError
        return self.schedule(step)


def random_tree(rng: random.Random, empty: bool) -> Any:
    """Nested dicts, lists and tuples of standard normal arrays."""

    def leaf() -> mx.array:
        kind = rng.random()
        if kind < 0.03:
            shape: tuple[int, ...] = (40_000, 2)  # work for several threads
        elif kind < 0.15:
            shape = ()
        elif kind < 0.22 and empty:
            shape = rng.choice([(0,), (3, 0), (0, 4)])
        else:
            shape = tuple(rng.randint(1, 9) for _ in range(rng.randint(1, 3)))
        return mx.random.normal(shape)

    def node(depth: int) -> Any:
        if depth == 0 or rng.random() < 0.4:
            return leaf()
        children = [node(depth - 1) for _ in range(rng.randint(1, 3))]
        kind = rng.random()
        if kind < 0.5:
            return {f"{rng.choice('abc')}{i}": x for i, x in enumerate(children)}
        return children if kind < 0.8 else tuple(children)

    return {name: node(3) for name in "uvwxyz"[: rng.randint(1, 5)]}


RATES: list[float | Callable[[mx.array], mx.array]] = [
    1e-2,
    optim.exponential_decay(1e-2, 0.999),
    optim.cosine_decay(1e-2, 200),
    optim.warmup_stable_decay(1e-2, 10, 50, 50),
]


def only_matrices(path: str, array: mx.array) -> bool:
    return array.ndim == 2


class Model:
    """A tree of parameters, its optimizer, and mlx.optimizers beside it."""

    def __init__(self, rng: random.Random, report: Report) -> None:
        self.rng, self.report = rng, report
        self.name, options = rng.choice(ALL_OPTIMIZERS)
        partly = self.name in ("Adafactor", "Muon")
        # Upstream divides by zero for arrays of no elements.
        self.parameters = random_tree(rng, empty=not partly)
        self.dtype = mx.float32
        if not partly and rng.random() < 0.25:
            self.dtype = rng.choice([mx.float16, mx.bfloat16])
            self.parameters = tree_map(lambda x: x.astype(self.dtype), self.parameters)
        self.rate = rng.choice(RATES)
        self.schedule = Schedule(self.rate) if callable(self.rate) else None
        self.max_norm = rng.choice([None, None, 0.5])
        self.skip_nonfinite = rng.random() < 0.25
        extra: dict[str, Any] = {"max_grad_norm": self.max_norm}
        extra["skip_nonfinite"] = self.skip_nonfinite
        build = getattr(optim, self.name), getattr(oracle, self.name)
        rate = self.schedule or self.rate
        filters: list[Callable[[str, mx.array], bool]] = []
        variants = [options]
        kind = rng.random()
        decays = options.get("weight_decay", getattr(build[0](1e-2), "weight_decay", 0))
        if kind < 0.2 and decays:
            # For upstream, an optimizer each for what decays and what does not.
            filters = [only_matrices]
            variants = [options, {**options, "weight_decay": 0.0}]
            self.ours: Any = build[0](
                learning_rate=rate, **options, **extra, weight_decay_filter=filters[0]
            )
        elif kind < 0.35:
            filters = [only_matrices]
            variants = [options, options]
            parts = [build[0](learning_rate=rate, **o) for o in variants]
            self.ours = optim.MultiOptimizer(parts, filters, **extra)
        else:
            self.ours = build[0](learning_rate=rate, **options, **extra)
        # Half precision is compared with float32 rounded once, and Lion takes signs,
        # which the last bit of the norm may turn: one step from the same values.
        self.compares_one = self.dtype != mx.float32 or (
            self.name == "Lion" and self.max_norm is not None
        )
        self.is_multi = isinstance(self.ours, optim.MultiOptimizer)
        self.theirs = [build[1](learning_rate=self.rate, **o) for o in variants]
        flat = leaves_of(self.parameters)
        self.members = [
            [path for path, x in flat.items() if only_matrices(path, x) == chosen]
            for chosen in (True, False)
        ]
        if not filters:
            self.members = [list(flat)]
        self.gradients = [
            tree_map(lambda x: mx.random.normal(x.shape).astype(x.dtype), tree)
            for tree in [self.parameters] * 4
        ]
        mx.eval(self.parameters, self.gradients)
        self.ours.init(self.parameters)
        self.step: Callable[[Any, Any], Any] | None = None
        self.may_compile = rng.random() < 0.3
        self.synchronize()

    def synchronize(self) -> None:
        """Upstream's parameters and state become ours, in memory of their own."""

        def widened(x: mx.array) -> mx.array:
            return mx.array(to_numpy(x)) if x.dtype in HALF_ROUNDING else x + 0

        self.reference: Flat = {
            path: widened(x) for path, x in leaves_of(self.parameters).items()
        }
        for optimizer, members, part in zip(
            self.theirs, self.members, self.our_states(), strict=True
        ):
            optimizer.init({path: self.reference[path] for path in members})
            for path in members:
                entries = optimizer.state[path]
                for key in entries:
                    entries[key] = widened(part[f"{path}.{key}"])
            for key in ("step", "learning_rate"):
                if key in part:
                    optimizer.state[key] = part[key] + 0
        mx.eval(self.reference, [o.state for o in self.theirs])
        self.since = 0  # steps

    def our_states(self) -> list[Flat]:
        """The flat state for each of upstream's optimizers."""
        if self.is_multi:
            return [leaves_of(part) for part in self.ours.state["states"]]
        return [leaves_of(self.ours.state)] * len(self.theirs)

    def take_step(self, is_last: bool) -> None:
        rng = self.rng
        gradients = rng.choice(self.gradients)
        if self.skip_nonfinite and rng.random() < 0.1:
            gradients = tree_map(lambda x: x * float("inf"), gradients)
        if is_last and self.compares_one:
            self.synchronize()
        held = self.parameters if rng.random() < 0.05 else None
        before = snapshot(held) if held is not None else None

        step = self.step or self.ours.apply_gradients
        if self.step is None and self.schedule and rng.random() < 0.02:
            self.refuse(gradients)
        # Where nothing else holds them they are updated in place.
        given, self.parameters = self.parameters, None
        self.parameters = step(gradients, given)
        del given
        if is_last or rng.random() < 0.5:
            mx.eval(self.parameters, self.ours.state)
        else:
            mx.async_eval(self.parameters, self.ours.state)
        if held is not None:
            assert snapshot(held) == before, "an array that was held has changed"
        if is_last or not self.compares_one:
            self.take_their_step(gradients)
        self.report.steps += 1
        self.since += 1

    def take_their_step(self, gradients: Any) -> None:
        flat = leaves_of(gradients)
        if self.dtype != mx.float32:
            flat = {path: x.astype(mx.float32) for path, x in flat.items()}
        if self.skip_nonfinite or self.max_norm is not None:
            clipped, norm = stock.clip_grad_norm(flat, self.max_norm or float("inf"))
            if self.skip_nonfinite and not np.isfinite(norm.item()):
                self.report.skipped += 1
                return
            if self.max_norm is not None:
                flat = clipped
        for optimizer, members in zip(self.theirs, self.members, strict=True):
            chosen = {path: flat[path] for path in members}
            self.reference.update(optimizer.apply_gradients(chosen, self.reference))
        mx.eval(self.reference, [o.state for o in self.theirs])

    def refuse(self, gradients: Any) -> None:
        """A step whose schedule raises changes nothing."""
        assert self.schedule is not None
        before = set(map(id, leaves_of(self.ours.state).values()))
        values = snapshot(self.ours.state)
        self.schedule.raises = True
        try:
            self.ours.apply_gradients(gradients, self.parameters)
        except ScheduleError:
            self.report.exceptions += 1
        else:
            raise AssertionError("a schedule's exception was lost")
        finally:
            self.schedule.raises = False
        assert set(map(id, leaves_of(self.ours.state).values())) == before
        assert snapshot(self.ours.state) == values

    def disturb(self, folder: Path) -> None:
        """What may happen between steps."""
        rng = self.rng
        event = rng.random()
        if event < 0.2:
            kernels.set_num_threads(rng.randint(1, 4))
        elif event < 0.5:
            self.reload(folder, file=event < 0.4)
        elif event < 0.7:
            self.ours.state["learning_rate"] = mx.array(3e-3)
            for optimizer in self.theirs:
                optimizer.state["learning_rate"] = mx.array(3e-3)
            if self.is_multi:
                for part in self.ours.state["states"]:
                    part["learning_rate"] = mx.array(3e-3)
                del self.ours.state["learning_rate"]
        elif event < 0.8 and self.may_compile:
            self.compile()
        elif event < 0.9:
            self.step = None

    def reload(self, folder: Path, file: bool) -> None:
        """Parameters and state through a file, or the state through a flat tree."""
        checkpoints: Any = optim
        if file and hasattr(optim, "save"):
            path = folder / "soak.safetensors"
            checkpoints.save(path, self.parameters, self.ours)
            checkpoints.load(path, self.parameters, self.ours)
            mx.eval(self.parameters, self.ours.state)
            self.report.reloads += 1
        flat: Any = tree_flatten(self.ours.state)
        if file:
            path = folder / "state.safetensors"
            mx.save_safetensors(str(path), dict(flat))
            flat = list(mx.load(str(path)).items())  # type: ignore[union-attr]
            mx.eval(flat)
            self.report.reloads += 1
        self.ours.state = tree_unflatten(flat)
        self.report.reassignments += 1
        if self.step is not None:
            self.compile()  # which captures the state's dict

    def compile(self) -> None:
        state = self.ours.state
        self.step = mx.compile(
            lambda gradients, parameters: self.ours.apply_gradients(
                gradients, parameters
            ),
            inputs=state,
            outputs=state,
        )
        self.report.compiled += 1

    def check(self) -> None:
        """Results agree with upstream's; then they go on from the same values."""
        relative = STEP_TOLERANCE * self.since * LOOSE.get(self.name, 1.0)
        relative = HALF_ROUNDING.get(self.dtype, relative)
        ours = leaves_of(self.parameters)
        pairs = [(path, ours[path], x) for path, x in self.reference.items()]
        for optimizer, members, part in zip(
            self.theirs, self.members, self.our_states(), strict=True
        ):
            for path in members:
                for key, x in optimizer.state[path].items():
                    pairs.append((f"{path}.{key}", part[f"{path}.{key}"], x))
            assert part["step"].item() == optimizer.state["step"].item(), "step"
        for path, x, y in pairs:
            assert x.shape == y.shape, path
            if x.size == 0:
                continue
            mine, expected = to_numpy(x).astype("f8"), to_numpy(y).astype("f8")
            scale = max(float(np.abs(expected).max()), 1e-3)
            error = float(np.abs(mine - expected).max()) / (relative * scale)
            self.report.worst = max(self.report.worst, error)
            assert error <= 1, f"{self.name} {path}: {error} times the tolerance"
        self.report.checks += 1
        self.synchronize()


def resident() -> int:
    """Bytes of memory that the process has, after what can be freed is freed."""
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()
    # On macOS, its peak.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def soak(steps: int, seed: int, show: bool = False) -> Report:
    """Runs the soak.

    Args:
        steps: Steps in all.
        seed: Of everything random.
        show: Show a progress bar.

    Raises:
        AssertionError: If something does not hold; the text names the model.
    """
    report = Report()
    rng = random.Random(seed)
    mx.random.seed(seed)
    threads = kernels.num_threads()
    progress: Any = None
    if show:
        from tqdm import tqdm

        progress = tqdm(total=steps, unit="step")
    measured: list[tuple[int, int]] = []
    gc.collect()
    mx.clear_cache()
    active_at_start = mx.get_active_memory()
    try:
        with tempfile.TemporaryDirectory() as folder:
            while report.steps < steps:
                _run_model(rng, report, steps, Path(folder))
                report.models += 1
                if progress is not None:
                    progress.update(report.steps - progress.n)
                if report.models % 10 == 0:
                    measured.append((report.steps, resident()))
    finally:
        kernels.set_num_threads(threads)
        if progress is not None:
            progress.close()
    measured.append((report.steps, resident()))
    report.active = active_at_start, mx.get_active_memory()
    warm = next(size for at, size in measured if at >= report.steps / 3)
    report.resident = warm, measured[-1][1]
    assert report.active[1] - report.active[0] <= MAX_ACTIVE_GROWTH, report.active
    assert report.resident[1] - report.resident[0] <= MAX_RESIDENT_GROWTH, (
        report.resident
    )
    return report


def _run_model(rng: random.Random, report: Report, steps: int, folder: Path) -> None:
    model = Model(rng, report)
    for _ in range(min(rng.randint(50, 250), steps - report.steps)):
        if rng.random() < 0.05:
            model.disturb(folder)
        model.take_step((report.steps + 1) % CHECK_EVERY == 0)
        if report.steps % CHECK_EVERY == 0:
            model.check()
    if model.since and not model.compares_one:
        model.check()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000, help="default: 100000")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error("--steps must be at least 1")
    mx.set_default_device(mx.cpu)
    report = soak(arguments.steps, arguments.seed, show=sys.stderr.isatty())
    for name, value in vars(report).items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
