"""A step of each optimizer beside AdamW's: ``python -m bench.optimizers``.

On the gradients of a decoder, as autodiff gives them. The steps take turns in one
process; the table has medians of times, and of ratios of rounds. Writes
``optimizers.json`` and ``optimizers.md`` to bench/results.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_fused_optimizers as optim
from tqdm import tqdm

from . import models, peers, report
from .timing import interleave

RESULTS = Path(__file__).parent / "results"

# Label, class, arguments, and the bytes that a step moves of a float32 parameter.
CASES: list[tuple[str, str, dict[str, Any], int]] = [
    ("SGD", "SGD", {}, 12),
    ("SGD, momentum", "SGD", {"momentum": 0.9}, 20),
    ("ScheduleFreeSGD", "ScheduleFreeSGD", {}, 20),
    ("Lion", "Lion", {}, 20),
    ("AdamW", "AdamW", {"bias_correction": True}, 28),
    ("ScheduleFreeAdamW", "ScheduleFreeAdamW", {}, 28),
    ("NAdam", "NAdam", {}, 28),
    ("RAdam", "RAdam", {}, 28),
    ("AdaBelief", "AdaBelief", {}, 28),
    ("AdamW, amsgrad", "AdamW", {"bias_correction": True, "amsgrad": True}, 36),
    ("AdEMAMix", "AdEMAMix", {}, 36),
    ("Lion, cautious", "Lion", {"cautious": True}, 36),
    ("AdamW, cautious", "AdamW", {"bias_correction": True, "cautious": True}, 44),
    ("Adan", "Adan", {}, 44),
    ("LAMB", "LAMB", {}, 48),
]


def a_step(name: str, options: dict[str, Any], gradients: models.Gradients) -> Any:
    """A step that keeps what it updates, but for gradients that it may overwrite."""
    optimizer = getattr(optim, name)(learning_rate=1e-4, **options)
    parameters = {path: mx.full(x.shape, 0.02) for path, x in gradients.items()}
    optimizer.init(parameters)
    mx.eval(parameters, optimizer.state)

    def step() -> None:
        nonlocal parameters
        parameters = optimizer.apply_gradients(gradients, parameters)
        mx.eval(parameters, optimizer.state)

    return step


def main() -> int:
    """Measure, write and print; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.optimizers", description=__doc__
    )
    parser.add_argument("--rounds", type=int, default=9, help="default: %(default)s")
    parser.add_argument("--width", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    device = "gpu" if mx.is_available(mx.gpu) else "cpu"
    mx.set_default_device(mx.gpu if device == "gpu" else mx.cpu)
    gradients = models.decoder(peers.DTYPES["float32"], width=chosen.width)
    usual = a_step("AdamW", {"bias_correction": True}, gradients)
    rows = []
    for label, name, options, moved in tqdm(CASES, unit="optimizer", disable=None):
        steps = {"AdamW": usual, label: a_step(name, options, gradients)}
        times = interleave(steps, chosen.rounds)
        rows.append(
            {
                "optimizer": label,
                "bytes moved": moved,
                "milliseconds": round(1000 * times.median(label), 1),
                "of AdamW's": round(times.ratio(label, "AdamW"), 2),
            }
        )
    machine = report.machine(device, chosen.rounds)
    machine.pop("torch")
    count = sum(x.size for x in gradients.values())
    named = report.named(machine)
    text = (
        f"# A step of each optimizer\n\n{named}.\n\nA decoder of {count:,} parameters, "
        f"with its own gradients, float32.\n\n{report.table(rows)}"
    )
    result = {"machine": machine, "parameters": count, "rows": rows}
    report.save(chosen.output / "optimizers.json", result, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
