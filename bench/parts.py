"""What is measured. Each part is a list of units of work, and a unit gives one row."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as stock
import mlx_fused_optimizers as optim

from . import peers as p
from .modes import FLOAT32, MODES
from .sets import SETS, Shapes, elements, tensors
from .streaming import LONGEST, chip_bandwidth, reading_loop, update_loop
from .timing import Times, interleave

Row = dict[str, Any]
Unit = Callable[[], Row]

LOOP = "streaming loop"


class Choice(NamedTuple):
    """What to measure."""

    optimizers: list[str] | None
    dtypes: list[str]
    sets: list[str]
    rounds: int
    gpu: bool


def bytes_moved(optimizer: str) -> int:
    """Bytes a float32 parameter that a step must read and write."""
    return 4 * (3 + 2 * states_of(optimizer))


def states_of(optimizer: str) -> int:
    name, options = p.OPTIMIZERS[optimizer]
    probe = getattr(optim, name)(learning_rate=0.0, **options)
    state: dict[str, mx.array] = {}
    probe.init_single(mx.zeros(1), state)
    return len(state)


def limit(optimizer: str, count: int, choice: Choice) -> dict[str, p.Step]:
    """A loop with the same traffic; nothing where the chip is known."""
    if choice.gpu:
        return {}
    return {LOOP: update_loop(min(count, LONGEST), states_of(optimizer))}


def bandwidths(
    optimizer: str, dtype: str, count: int, times: Times
) -> dict[str, float | None]:
    """What a step reaches, in GB/s, and its share of the limit."""
    moved = count * bytes_moved(optimizer) * p.DTYPES[dtype].size / 4
    reached = moved / times.median(p.OURS) / 1e9
    if LOOP in times.rounds:
        in_loop = min(count, LONGEST) * bytes_moved(optimizer)
        best: float | None = in_loop / times.median(LOOP) / 1e9
        share: float | None = times.ratio(LOOP, p.OURS) * moved / in_loop
    else:
        best = chip_bandwidth()
        share = best and reached / best
    return {
        "GB/s": round(reached, 2),
        "limit GB/s": best and round(best, 2),
        "share": share and round(share, 3),
    }


def in_milliseconds(times: Times) -> dict[str, float]:
    return {label: round(1e3 * times.median(label), 4) for label in times.rounds}


# Step times beside peers.

LARGE = 10_000_000  # parameters, from which a step takes what memory takes
TABLE = [
    ("decoder", "AdamW"),
    ("decoder", "SGD momentum"),
    ("decoder", "Lion"),
    ("adapters", "AdamW"),
    ("convolutions", "AdamW"),
    ("large", "AdamW"),
    ("gpt2", "AdamW"),
    ("small", "AdamW"),
]
# Beside these, where no dtype is asked for.
TABLE_OF_HALF = [("decoder", "AdamW")]


def steps(choice: Choice) -> list[Unit]:
    pairs = TABLE
    if choice.optimizers:
        pairs = [(s, o) for o in choice.optimizers for s in SETS]
    chosen = [(*pair, dtype) for dtype in choice.dtypes for pair in pairs]
    if pairs == TABLE and choice.dtypes == ["float32"]:
        chosen += [(*pair, "bfloat16") for pair in TABLE_OF_HALF]
    return [
        partial(step_row, name, optimizer, dtype, choice)
        for name, optimizer, dtype in chosen
        if name in choice.sets
    ]


def step_row(name: str, optimizer: str, dtype: str, choice: Choice) -> Row:
    chosen = SETS[name]
    gradients = chosen.gradients(p.DTYPES[dtype])
    count = sum(x.size for x in gradients.values())
    loop = limit(optimizer, count, choice) if count >= LARGE else {}
    contenders = p.peers(optimizer, gradients, dtype, chosen.is_real)
    # Its threads spin, and beside others it takes many times as long: on its own.
    alone = {k: contenders.pop(k) for k in [p.TORCH] if k in contenders}
    times = interleave(contenders | loop, choice.rounds)
    if alone:
        times.rounds |= interleave(alone, choice.rounds).rounds
    reached = bandwidths(optimizer, dtype, count, times) if count >= LARGE else {}
    times.rounds.pop(LOOP, None)
    return {
        "set": chosen.label,
        "optimizer": optimizer,
        "dtype": dtype,
        "tensors": len(gradients),
        "parameters": count,
        "milliseconds": in_milliseconds(times),
        "ratio to ours": {
            label: round(times.ratio(label, p.OURS), 2) for label in times.rounds
        },
        **reached,
    }


# Bandwidth of large tensors against the limit.

MILLIONS = [1, 4, 16, 64, 256, 500]


def bandwidth(choice: Choice) -> list[Unit]:
    return [
        partial(bandwidth_row, millions, dtype, choice)
        for dtype in choice.dtypes
        for millions in MILLIONS
        if dtype == "float32" or millions <= 64
    ]


def bandwidth_row(millions: int, dtype: str, choice: Choice) -> Row:
    shapes: Shapes = [(1 << 20,)] * millions
    count = elements(shapes)
    kind = p.DTYPES[dtype]
    gradients = tensors(shapes, kind)
    step = p.mlx_step(optim, "AdamW", kind, gradients)
    rounds = choice.rounds if millions < 100 else max(3, choice.rounds // 3)
    times = interleave({p.OURS: step, **limit("AdamW", count, choice)}, rounds)
    return {
        "parameters": count,
        "dtype": dtype,
        "milliseconds": in_milliseconds(times),
        **bandwidths("AdamW", dtype, count, times),
    }


# Cost against the number of tensors.

COUNTS = [100, 300, 1000, 3000, 10000]


def growth(choice: Choice) -> list[Unit]:
    return [partial(growth_row, count, choice) for count in COUNTS]


def growth_row(count: int, choice: Choice) -> Row:
    shapes: Shapes = [(64,)] * count
    gradients = tensors(shapes, mx.float32)
    contenders = {p.OURS: (optim, False)}
    if count <= 3000:
        contenders |= {p.STOCK: (stock, False), p.STOCK_COMPILED: (stock, True)}
    steps = {
        label: p.mlx_step(module, "AdamW", mx.float32, gradients, compiled)
        for label, (module, compiled) in contenders.items()
    }
    times = interleave(steps, choice.rounds)
    return {
        "tensors": count,
        "microseconds a tensor": {
            label: round(1e6 * times.median(label) / count, 2) for label in steps
        },
        "MLX's own cost": graph_cost(count, choice.rounds),
    }


def graph_cost(count: int, rounds: int) -> float:
    """Microseconds that MLX needs for three outputs that share their input's memory.

    A step must give as many new arrays: nothing that goes through MLX's graph takes
    less.
    """
    arrays = [mx.zeros((96,)) for _ in range(count)]
    mx.eval(arrays)

    def split() -> None:
        mx.eval([mx.split(a, 3) for a in arrays])

    times = interleave({"split": split}, rounds)
    return round(1e6 * times.median("split") / count, 2)


# Sizes from small tensors, which share a primitive, to large ones, each its own.

SIZES = [1 << exponent for exponent in range(10, 21)]
SIZED = 64  # tensors


def sizes(choice: Choice) -> list[Unit]:
    return [partial(size_row, size, choice) for size in SIZES]


def size_row(size: int, choice: Choice) -> Row:
    gradients = tensors([(size,)] * SIZED, mx.float32)
    steps = {
        label: p.mlx_step(module, "AdamW", mx.float32, gradients, compiled)
        for label, module, compiled in (
            (p.OURS, optim, False),
            (p.STOCK, stock, False),
            (p.STOCK_COMPILED, stock, True),
        )
    }
    times = interleave(steps, choice.rounds)
    return {
        "elements": size,
        "microseconds a tensor": {
            label: round(1e6 * times.median(label) / SIZED, 2) for label in steps
        },
    }


# Clipping by global norm.


def clipping(choice: Choice) -> list[Unit]:
    return [partial(clipping_row, dtype, choice) for dtype in choice.dtypes]


def clipping_row(dtype: str, choice: Choice) -> Row:
    kind = p.DTYPES[dtype]
    gradients = SETS["decoder"].gradients(kind)

    def clip(module: Any, gradients: Any = gradients) -> p.Step:
        def run() -> None:
            mx.eval(module.clip_grad_norm(gradients, 1.0))

        return run

    count = sum(x.nbytes for x in gradients.values()) // 4
    reading = {} if choice.gpu else {"reading alone": reading_loop(count)}
    times = interleave(
        {
            "clip_grad_norm": clip(optim),
            "MLX clip_grad_norm": clip(stock),
            "AdamW": p.mlx_step(optim, "AdamW", kind, gradients),
            "AdamW max_grad_norm": p.mlx_step(
                optim, "AdamW", kind, gradients, options={"max_grad_norm": 1.0}
            ),
            "clip_grad_norm, contiguous": clip(optim, p.contiguous(gradients)),
            **reading,
        },
        choice.rounds,
    )
    row: Row = {
        "dtype": dtype,
        "milliseconds": in_milliseconds(times),
        "MLX / ours": round(times.ratio("MLX clip_grad_norm", "clip_grad_norm"), 2),
        "ours / ours on contiguous": round(
            times.ratio("clip_grad_norm", "clip_grad_norm, contiguous"), 2
        ),
        "cost of max_grad_norm": round(
            times.ratio("AdamW max_grad_norm", "AdamW") - 1, 3
        ),
    }
    if reading:
        share = times.ratio("reading alone", "AdamW")
        row["cost of reading alone"] = round(share, 3)
    return row


# States in codes and masters, on a decoder's gradients.


def held(choice: Choice) -> list[Unit]:
    return [
        partial(held_row, name, choice)
        for name in choice.optimizers or ["AdamW", "SGD momentum", "Lion"]
    ]


def held_row(optimizer: str, choice: Choice) -> Row:
    dtypes = {mode.dtype for mode in MODES.values()}
    gradients = {dtype: SETS["decoder"].gradients(dtype) for dtype in dtypes}
    times = interleave(
        {
            label: p.mlx_step(
                optim, optimizer, dtype, gradients[dtype], options=options
            )
            for label, (dtype, options) in MODES.items()
        },
        choice.rounds,
    )
    return {
        "optimizer": optimizer,
        "rounds": choice.rounds,
        "milliseconds": in_milliseconds(times),
        "ratio to float32": {
            label: round(times.ratio(label, FLOAT32), 2) for label in MODES
        },
    }


# Memory.

MEMORY_SHAPES: Shapes = [(1 << 22,)] * 8  # 128 MB in float32


def memory(choice: Choice) -> list[Unit]:
    names = choice.optimizers or [*p.OPTIMIZERS]
    return [
        *(
            partial(memory_row, name, dtype)
            for dtype in choice.dtypes
            for name in names
        ),
        *(partial(training_memory_row, compiled) for compiled in (False, True)),
    ]


def extra_memory(module: Any, optimizer: str, dtype: str, compiled: bool) -> float:
    """MB that a step takes beyond parameters, gradients and state."""
    kind = p.DTYPES[dtype]
    gradients = tensors(MEMORY_SHAPES, kind)
    step = p.mlx_step(module, optimizer, kind, gradients, compiled)
    step()
    step()
    return peak_of(step)


def peak_of(step: Callable[[], Any]) -> float:
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    step()
    mx.synchronize()
    return round((mx.get_peak_memory() - before) / 1e6, 2)


def memory_row(optimizer: str, dtype: str) -> Row:
    row: Row = {"what": f"a step of {optimizer}", "dtype": dtype}
    for label, module, compiled in (
        (p.OURS, optim, False),
        (p.OURS_COMPILED, optim, True),
        (p.STOCK, stock, False),
        (p.STOCK_COMPILED, stock, True),
    ):
        row[label] = extra_memory(module, optimizer, dtype, compiled)
        gc.collect()
    return row


def training_memory_row(compiled: bool) -> Row:
    """Peak over forward, backward and update in one evaluation."""
    row: Row = {
        "what": "forward, backward and AdamW in one evaluation",
        "dtype": "float32",
    }
    for label, module in ((p.OURS, optim), (p.STOCK, stock)):
        mx.random.seed(0)
        model = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(16)])
        optimizer = module.AdamW(1e-4, bias_correction=True)
        optimizer.init(model.trainable_parameters())
        x = mx.random.normal((64, 1024))
        mx.eval(model.parameters(), optimizer.state, x)
        state = [model.state, optimizer.state]
        loss_and_grad = nn.value_and_grad(model, lambda m, x: m(x).square().mean())

        def train(x: mx.array, f: Any = loss_and_grad, o: Any = optimizer) -> mx.array:
            loss, gradients = f(model, x)  # noqa: B023
            o.update(model, gradients)  # noqa: B023
            return loss  # type: ignore[no-any-return]

        if compiled:
            train = mx.compile(train, inputs=state, outputs=state)

        def step(train: Any = train, state: Any = state, x: mx.array = x) -> None:
            mx.eval(train(x), state)

        step()
        step()
        row[f"{label}{' compiled' if compiled else ''}"] = peak_of(step)
    return row


# A kernel alone: one tensor, no tree.

KERNEL_SIZES = [1 << 12, 1 << 16, 1 << 20, 1 << 24]


def kernels(choice: Choice) -> list[Unit]:
    names = choice.optimizers or [*p.OPTIMIZERS]
    return [
        partial(kernel_row, name, dtype, size, choice)
        for name in names
        for dtype in ("float32", "float16", "bfloat16")
        for size in KERNEL_SIZES
    ]


def kernel_row(optimizer: str, dtype: str, size: int, choice: Choice) -> Row:
    kind = p.DTYPES[dtype]
    shapes: Shapes = [(size,)]
    gradients = tensors(shapes, kind)
    step = p.mlx_step(optim, optimizer, kind, gradients)
    times = interleave({p.OURS: step, **limit(optimizer, size, choice)}, choice.rounds)
    return {
        "rule": optimizer,
        "dtype": dtype,
        "elements": size,
        "microseconds": round(1e6 * times.median(p.OURS), 1),
        **bandwidths(optimizer, dtype, size, times),
    }


PARTS: dict[str, Callable[[Choice], list[Unit]]] = {
    "steps": steps,
    "bandwidth": bandwidth,
    "growth": growth,
    "sizes": sizes,
    "clipping": clipping,
    "held": held,
    "memory": memory,
    "kernels": kernels,
}

__all__ = ["PARTS", "Choice", "Row", "Unit"]
