"""The charts of the first page, from what is in bench/results already.

``python -m bench.front_page`` draws ``front_speed.svg`` from ``bench.json`` and
``front_memory.svg`` from ``memory.json``; ``python -m bench`` and ``python -m
bench.memory`` measure those.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

OURS, STOCK, STOCK_COMPILED = "#1a9850", "#4575b4", "#91bfdb"

# Steps on a model's own gradients: set and optimizer, and what the chart calls them.
STEPS = {
    ("a 38M decoder", "AdamW"): "AdamW,\n38M decoder",
    ("a 38M decoder", "SGD momentum"): "SGD with momentum,\n38M decoder",
    ("a 38M decoder", "Lion"): "Lion,\n38M decoder",
    ("256 rank-8 adapters of width 2048", "AdamW"): "AdamW,\n256 LoRA adapters",
    ("a 5.9M convolutional net", "AdamW"): "AdamW,\n5.9M conv net",
}
PEERS = {"ours": OURS, "MLX": STOCK, "MLX compiled": STOCK_COMPILED}

# AdamW's ways to hold weights and states: rows of memory.json by their names there.
WAYS = {
    ("MLX float32", "compiled"): ("mlx.optimizers,\nfloat32, compiled", STOCK_COMPILED),
    ("MLX float32", "eager"): ("mlx.optimizers,\nfloat32", STOCK),
    ("float32", "eager"): ("ours, float32", OURS),
    ("float32, int8 states", "eager"): ("ours, float32,\n8-bit states", OURS),
    ("bf16 + 24bit, int8 states", "eager"): (
        "ours, bfloat16,\n24-bit masters, 8-bit states",
        OURS,
    ),
    ("bf16 + 24bit, int4 states", "eager"): (
        "ours, bfloat16,\n24-bit masters, 4-bit states",
        OURS,
    ),
}


def machine_of(report: dict[str, Any]) -> str:
    """Where a report's numbers are from."""
    found = report["machine"]
    return (
        f"{found['processor']}, {found['cores']} cores, {found['system']}, "
        f"MLX {found['mlx']} on the {found['device'].upper()}"
    )


def speed(report: dict[str, Any]) -> Any:
    """Milliseconds of a step, ours beside ``mlx.optimizers``."""
    from matplotlib import pyplot

    steps = report["rows"]["steps"]
    rows = {(r["set"], r["optimizer"]): r for r in steps if r["dtype"] == "float32"}
    figure, axes = pyplot.subplots(figsize=(8, 4.8))
    for i, step in enumerate(STEPS):
        found = rows[step]
        for j, (peer, colour) in enumerate(PEERS.items()):
            time, place = found["milliseconds"][peer], i + 0.26 * (j - 1)
            label = peer.replace("MLX", "mlx.optimizers")
            axes.barh(place, time, 0.25, color=colour, label=None if i else label)
            ratio = found["ratio to ours"][peer]
            text = f" {time:.0f} ms" + (f", {ratio:.1f} times ours" if j else "")
            axes.text(time, place, text, va="center", fontsize=8)
    axes.set_yticks(range(len(STEPS)), [*STEPS.values()])
    axes.set_xlabel("milliseconds a step of the optimizer (less is better)")
    axes.set_title("Time of a step, on gradients as training makes them")
    axes.legend(loc="lower right", frameon=False)
    axes.margins(x=0.22)
    footer = f"float32; medians of {report['machine']['rounds']} rounds; "
    return finished(figure, axes, footer + machine_of(report))


def memory(report: dict[str, Any]) -> Any:
    """Megabytes at the peak of a training step with AdamW."""
    from matplotlib import pyplot

    rows = {r["held"]: r for r in report["rows"] if r["optimizer"] == "AdamW"}
    figure, axes = pyplot.subplots(figsize=(8, 4))
    for i, ((held, kind), (_, colour)) in enumerate(WAYS.items()):
        peak, size = rows[held]["peak MB"][kind], rows[held]["without gradient"]
        axes.barh(i, peak, 0.7, color=colour)
        text = f" {peak:.0f} MB ({size:.1f} bytes a parameter)"
        axes.text(peak, i, text, va="center", fontsize=8)
    axes.set_yticks(range(len(WAYS)), [name for name, _ in WAYS.values()])
    axes.set_xlabel("MB at the peak of forward, backward and update (less is better)")
    count = rows["float32"]["parameters"] / 1e6
    axes.set_title(f"Memory of a training step of a {count:.0f}M decoder with AdamW")
    axes.margins(x=0.35)
    footer = "In brackets: weight, its correction and states; "
    return finished(figure, axes, footer + machine_of(report))


def finished(figure: Any, axes: Any, footer: str) -> Any:
    """With what both charts have."""
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.text(0.01, 0.01, footer, fontsize=7, color="#555555")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    return figure


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.front_page", description=__doc__
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="read here")
    parser.add_argument("--output", type=Path, default=RESULTS, help="written here")
    chosen = parser.parse_args()

    import matplotlib

    matplotlib.use("Agg")
    # Text as text, and the same file from the same numbers.
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "front page"}
    matplotlib.rcParams |= {"font.family": "sans-serif", "font.size": 9}
    chosen.output.mkdir(parents=True, exist_ok=True)
    for name, draw, source in (
        ("front_speed", speed, "bench.json"),
        ("front_memory", memory, "memory.json"),
    ):
        report = json.loads((chosen.results / source).read_text())
        path = chosen.output / f"{name}.svg"
        draw(report).savefig(path, metadata={"Date": None})
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
