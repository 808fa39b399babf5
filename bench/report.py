"""Results as JSON, Markdown and charts."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_fused_optimizers import __version__, _ext

from . import peers

Rows = list[dict[str, Any]]


def machine(device: str, rounds: int) -> dict[str, Any]:
    """What the numbers are from."""
    chip = str(mx.device_info().get("device_name", "")) if device == "gpu" else ""
    cpuinfo = Path("/proc/cpuinfo")
    if not chip and cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if "model name" in line]
        chip = names[0] if names else ""
    return {
        "device": device,
        "processor": chip or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": _ext.num_threads(),
        "instruction set": _ext.instruction_set(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "mlx": importlib.metadata.version("mlx"),
        "torch": peers.torch.__version__ if peers.torch else None,
        "mlx-fused-optimizers": __version__,
        "rounds": rounds,
    }


def write(rows: dict[str, Rows], device: str, rounds: int, folder: Path) -> None:
    """``bench.json``, with what other runs left there of other parts; the rest."""
    path = folder / "bench.json"
    kept = json.loads(path.read_text())["rows"] if path.exists() else {}
    report = {"machine": machine(device, rounds), "rows": kept | rows}
    save(path, report, markdown(report))
    charts(report["rows"], folder)


def save(path: Path, result: dict[str, Any], text: str) -> None:
    """A benchmark's results: as JSON at this path, as Markdown beside it, printed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(text)
    print(text, end="")


def named(machine: dict[str, Any]) -> str:
    """A machine in a line."""
    return ", ".join(f"{key} {value}" for key, value in machine.items())


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row with the entries of its dicts as its own."""
    result: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            result |= {f"{label}, {key}": x for label, x in value.items()}
        else:
            result[key] = value
    return result


def table(rows: Rows) -> str:
    """Rows in Markdown; columns in the order in which they are met."""
    flattened = [flat(row) for row in rows]
    heads = list(dict.fromkeys(key for row in flattened for key in row))
    lines = [heads, ["---"] * len(heads)]
    lines += [[str(row.get(head, "")) for head in heads] for row in flattened]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def markdown(report: dict[str, Any]) -> str:
    """All parts."""
    parts = [f"# What a step costs\n\n{named(report['machine'])}.\n"]
    parts += [f"## {part}\n\n{table(rows)}" for part, rows in report["rows"].items()]
    return "\n".join(parts)


COLOURS = {
    peers.OURS: "#1a9850",
    peers.OURS_COMPILED: "#91cf60",
    peers.STOCK: "#4575b4",
    peers.STOCK_COMPILED: "#91bfdb",
    peers.CONTIGUOUS: "#d9ef8b",
    peers.TORCH: "#f46d43",
}


def charts(rows: dict[str, Rows], folder: Path) -> None:
    """A PNG for each part that has one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def save(name: str, title: str) -> None:
        pyplot.title(title, fontsize=10)
        pyplot.tight_layout()
        pyplot.savefig(folder / f"{name}.png", dpi=120)
        pyplot.close()

    if found := rows.get("steps"):
        pyplot.figure(figsize=(9, 0.85 * len(found) + 1))
        for i, row in enumerate(found):
            times = row["milliseconds"]
            for j, (label, time) in enumerate(times.items()):
                ratio = row["ratio to ours"][label]
                place = i + (j - 2.5) * 0.14
                pyplot.barh(
                    place,
                    ratio,
                    0.14,
                    color=COLOURS[label],
                    label=label if i == 0 else None,
                )
                pyplot.text(ratio, place, f" {time:.3g} ms", va="center", fontsize=7)
        names = [f"{row['optimizer']} ({row['dtype']})\n{row['set']}" for row in found]
        pyplot.yticks(range(len(names)), names, fontsize=8)
        pyplot.gca().invert_yaxis()
        pyplot.xscale("log")
        pyplot.margins(x=0.15)
        pyplot.legend(
            fontsize=8, loc="upper center", bbox_to_anchor=(0.4, -0.05), ncols=6
        )
        save("steps", "Time of a step, relative to ours (log scale; less is better)")
    if found := rows.get("bandwidth"):
        pyplot.figure(figsize=(7, 4))
        for dtype in dict.fromkeys(row["dtype"] for row in found):
            chosen = [row for row in found if row["dtype"] == dtype]
            sizes = [row["parameters"] for row in chosen]
            pyplot.plot(sizes, [row["GB/s"] for row in chosen], "o-", label=dtype)
            if dtype == "float32":
                limits = [row["limit GB/s"] for row in chosen]
                pyplot.plot(sizes, limits, "k--", label="limit")
        pyplot.xscale("log")
        pyplot.ylim(bottom=0)
        pyplot.xlabel("parameters, in tensors of 1M")
        pyplot.ylabel("GB/s")
        pyplot.legend(fontsize=8)
        save("bandwidth", "AdamW's memory traffic against the limit")
    if found := rows.get("sizes"):
        pyplot.figure(figsize=(7, 4))
        for label in found[0]["microseconds a tensor"]:
            points = [
                (row["elements"], row["microseconds a tensor"][label]) for row in found
            ]
            pyplot.plot(
                *zip(*points, strict=True), "o-", color=COLOURS[label], label=label
            )
        pyplot.xscale("log", base=2)
        pyplot.yscale("log")
        pyplot.xlabel("elements of each of 64 tensors")
        pyplot.ylabel("microseconds a tensor")
        pyplot.legend(fontsize=8)
        save("sizes", "Cost of a tensor against its size, AdamW")
    if found := rows.get("growth"):
        pyplot.figure(figsize=(7, 4))
        for label in found[0]["microseconds a tensor"]:
            points = [
                (row["tensors"], row["microseconds a tensor"][label])
                for row in found
                if label in row["microseconds a tensor"]
            ]
            pyplot.plot(
                *zip(*points, strict=True), "o-", color=COLOURS[label], label=label
            )
        floor = [(row["tensors"], row["MLX's own cost"]) for row in found]
        pyplot.plot(*zip(*floor, strict=True), "k--", label="MLX's graph alone")
        pyplot.xscale("log")
        pyplot.yscale("log")
        pyplot.xlabel("tensors of 64 elements")
        pyplot.ylabel("microseconds a tensor")
        pyplot.legend(fontsize=8)
        save("growth", "Cost of a tensor against their number, AdamW")
