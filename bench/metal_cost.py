"""Bytes and launches that a step costs on Metal: ``python -m bench.metal_cost``.

Ours are counted by the Metal simulator, which runs the real kernels: every byte that
they read or write in device memory, and every launch. Those of mlx.optimizers are
counted from its graph, a launch for each primitive that computes, and the bytes of its
operands; that is what those primitives must at least move (a product of matrices or a
reduction may need more). Nothing here ran on a GPU.

Writes ``metal_cost.json``, ``metal_cost.md`` and ``metal_cost.png`` to bench/results.
"""

import argparse
import io
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.optimizers as stock
import mlx_fused_optimizers as optim
from mlx.utils import tree_flatten
from mlx_fused_optimizers import _ext
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import metal_simulator  # noqa: E402
from metal_simulator.extension import extension, simulated  # noqa: E402

from bench import models, report  # noqa: E402


class Case(NamedTuple):
    """An optimizer with options, and whether gradients are clipped by global norm."""

    label: str
    name: str
    options: dict[str, Any]
    clipped: bool = False

    def ours(self) -> Any:
        """The fused optimizer."""
        clip = {"max_grad_norm": 1.0} if self.clipped else {}
        return getattr(optim, self.name)(learning_rate=1e-3, **self.options, **clip)

    def has_operations(self) -> bool:
        """Whether it leaves more to MLX than scalars, once a step."""
        is_partly = self.name in ("Adafactor", "LAMB", "Muon")
        return is_partly or "cautious" in self.options

    def stock(self) -> Any:
        """That of mlx.optimizers."""
        return getattr(stock, self.name)(learning_rate=1e-3, **self.options)

    def is_stocks(self) -> bool:
        """Whether mlx.optimizers has it."""
        is_ours = {"amsgrad", "cautious"} & self.options.keys()
        return hasattr(stock, self.name) and not is_ours


CASES = [
    Case("SGD", "SGD", {}),
    Case("SGD momentum", "SGD", {"momentum": 0.9}),
    Case("Lion", "Lion", {"weight_decay": 0.1}),
    Case("Adam", "Adam", {"bias_correction": True}),
    Case("AdamW", "AdamW", {"bias_correction": True}),
    Case("RMSprop", "RMSprop", {}),
    Case("Adagrad", "Adagrad", {}),
    Case("AdaDelta", "AdaDelta", {}),
    Case("Adamax", "Adamax", {}),
    Case("AdEMAMix", "AdEMAMix", {}),
    Case("AdamW amsgrad", "AdamW", {"bias_correction": True, "amsgrad": True}),
    Case("AdaBelief", "AdaBelief", {}),
    Case("Adan", "Adan", {}),
    Case("NAdam", "NAdam", {}),
    Case("RAdam", "RAdam", {}),
    Case("ScheduleFreeSGD", "ScheduleFreeSGD", {}),
    Case("ScheduleFreeAdamW", "ScheduleFreeAdamW", {}),
    Case("LAMB", "LAMB", {}),
    Case("AdamW cautious", "AdamW", {"bias_correction": True, "cautious": True}),
    Case("Lion cautious", "Lion", {"cautious": True}),
    Case("Adafactor", "Adafactor", {"beta_1": 0.9, "weight_decay": 0.1}),
    Case("Muon", "Muon", {}),
    Case("AdamW clipped", "AdamW", {"bias_correction": True}, clipped=True),
]
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

# Primitives that the simulator counts.
OURS = ("FusedUpdate", "SumsOfSquares")
# Primitives that only look at memory in another way.
VIEWS = {
    *("Broadcast", "Reshape", "Transpose", "Squeeze", "ExpandDims", "StopGradient"),
    *("Slice", "Unflatten", "Flatten"),
}


class Cost(NamedTuple):
    """Of one step, as measured."""

    bytes_per_parameter: float
    launches_per_tensor: float
    # The 128-byte lines of the cache that the instructions of its simdgroups touch.
    line_bytes_per_parameter: float


LINE = 128


def transformer(width: int, dtype: mx.Dtype) -> dict[str, mx.array]:
    """The 100 parameters of ten transformer layers."""
    shapes = {
        "attention_norm.weight": (width,),
        "attention_norm.bias": (width,),
        "query.weight": (width, width),
        "key.weight": (width, width),
        "value.weight": (width, width),
        "output.weight": (width, width),
        "mlp_norm.weight": (width,),
        "mlp_norm.bias": (width,),
        "up.weight": (4 * width, width),
        "down.weight": (width, 4 * width),
    }
    return {
        f"layers.{layer}.{name}": mx.ones(shape, dtype)
        for layer in range(10)
        for name, shape in shapes.items()
    }


def leaves(tree: Any) -> list[mx.array]:
    """The arrays of a tree."""
    flat: Any = tree_flatten(tree, destination={})
    return list(flat.values())


class Node(NamedTuple):
    """A primitive of a graph."""

    name: str
    inputs: list[str]
    outputs: list[str]


def graph(outputs: list[mx.array], names: dict[str, mx.array]) -> list[Node]:
    """The primitives that lead to the outputs, in an order in which they can run."""
    dot = io.StringIO()
    mx.export_to_dot(dot, *outputs, **names)
    nodes: dict[str, Node] = {}
    for line in dot.getvalue().splitlines():
        if found := re.match(r"\{ (\d+) \[label =\"([^\"]+)\"", line):
            nodes[found[1]] = Node(found[2], [], [])
        elif found := re.match(r"\"([^\"]+)\" -> (\d+)", line):
            nodes[found[2]].inputs.append(found[1])
        elif found := re.match(r"(\d+) -> \"([^\"]+)\"", line):
            nodes[found[1]].outputs.append(found[2])
    return list(nodes.values())


def updated_inputs(node: Node) -> list[str]:
    """The input that each output of a FusedUpdate is the new value of.

    Inputs are, for each tensor, the slots of its rule; outputs, those that it writes.
    """
    slots, written = _ext.written_slots(node.name.split()[1])
    tensors = len(node.outputs) // len(written)
    return [node.inputs[i * slots + slot] for i in range(tensors) for slot in written]


def graph_cost(
    before: list[mx.array], after: list[mx.array], strided: int = 0
) -> tuple[int, int]:
    """Elements that MLX's own primitives between these arrays move, and launches.

    Of the last `strided` arrays of `before`, each element is in another line.
    """
    first = len(before) - strided
    named = {f"array{i}": x for i, x in enumerate([*before, *after])}
    sizes: dict[str, int] = defaultdict(lambda: 1)  # constants are scalars
    sizes.update({label: x.size for label, x in named.items()})
    moved = launches = 0
    lines = {f"array{i}" for i in range(first, len(before)) if before[i].ndim > 1}
    for node in graph(after, named):
        read = sum(sizes[label] for label in node.inputs)
        if node.name in VIEWS:
            sizes[node.outputs[0]] = read
            continue
        is_known = all(label in sizes for label in node.outputs)
        if node.name.startswith("FusedUpdate") and not is_known:
            for label, like in zip(node.outputs, updated_inputs(node), strict=True):
                sizes.setdefault(label, sizes[like])
        largest = max(sizes[i] for i in node.inputs)
        if node.name in ("Reduce", "Max", "Min"):
            largest = 1
        elif node.name == "Concatenate":
            largest = read
        elif node.name == "SumsOfSquares":
            largest = len(node.inputs)
        for label in node.outputs:
            sizes.setdefault(label, largest)
        if not node.name.startswith(OURS):
            # It copies its operands one by one.
            launches += len(node.inputs) if node.name == "Concatenate" else 1
            moved += read + sum(sizes[label] for label in node.outputs)
            wide = [label for label in node.inputs if label in lines]
            itemsize = before[-1].itemsize
            moved += sum(sizes[label] * (LINE // itemsize - 1) for label in wide)
    return moved, launches


def real_gradients(width: int, dtype: mx.Dtype) -> dict[str, mx.array]:
    """Those of a small decoder, as autodiff gives them: transposed."""
    return models.decoder(dtype, width=width, layers=2, vocabulary=4 * width)


def fused_cost(case: Case, width: int, dtype: mx.Dtype, real: bool = False) -> Cost:
    """Counted by the simulator in a step that nothing keeps from being in place.

    What our optimizers leave to MLX's operations is added from the graph.
    """
    gradients = real_gradients(width, dtype) if real else transformer(width, dtype)
    with simulated():
        optimizer = case.ours()
        parameters = {path: mx.ones(x.shape, dtype) for path, x in gradients.items()}
        optimizer.init(parameters)
        mx.eval(parameters, gradients, optimizer.state)
        sizes = [x.size for x in parameters.values()]
        # The kernels are checked in the first step.
        before = [*parameters.values(), *gradients.values(), *leaves(optimizer.state)]
        parameters = optimizer.apply_gradients(gradients, parameters)
        after = [*parameters.values(), *leaves(optimizer.state)]
        # An elementwise rule leaves scalars to MLX, and names are limited in number.
        moved = launches = 0
        if case.has_operations():
            moved, launches = graph_cost(before, after)
        moved *= dtype.size
        lines = moved
        mx.eval(after)
        del before, after
        metal_simulator.reset()
        parameters = optimizer.apply_gradients(gradients, parameters)
        mx.eval(parameters, optimizer.state)
        mx.synchronize()
        for launch in metal_simulator.counters():
            moved += launch.bytes_read + launch.bytes_written
            lines += launch.line_bytes_read + launch.line_bytes_written
            launches += 1
    count = sum(sizes)
    return Cost(moved / count, launches / len(sizes), lines / count)


def stock_cost(
    case: Case, width: int, dtype: mx.Dtype, compiled: bool, real: bool = False
) -> Cost:
    """Counted from the graph of a step of mlx.optimizers."""
    gradients = real_gradients(width, dtype) if real else transformer(width, dtype)
    parameters = {path: mx.ones(x.shape, dtype) for path, x in gradients.items()}
    optimizer = case.stock()
    optimizer.init(parameters)
    mx.eval(parameters, gradients, optimizer.state)
    before = [*parameters.values(), *leaves(optimizer.state), *gradients.values()]

    def step(parameters: Any, gradients: Any) -> Any:
        if case.clipped:
            gradients, _ = stock.clip_grad_norm(gradients, 1.0)
        return optimizer.apply_gradients(gradients, parameters)

    if compiled:
        step = mx.compile(step, inputs=optimizer.state, outputs=optimizer.state)
    updated = step(parameters, gradients)
    after = [*updated.values(), *leaves(optimizer.state)]
    count = sum(x.size for x in parameters.values())
    moved, launches = graph_cost(before, after)
    lines, _ = graph_cost(before, after, len(gradients) if real else 0)
    scale = dtype.size / count
    return Cost(moved * scale, launches / len(parameters), lines * scale)


def rows(width: int, dtypes: list[str]) -> Iterator[dict[str, Any]]:
    """One row for each case and dtype."""
    cases = [(dtype, case) for dtype in dtypes for case in CASES]
    for dtype, case in tqdm(cases, unit="case", disable=None):
        kind = DTYPES[dtype]
        # Beside the updates, these need many of MLX's operations on the CPU.
        size = min(width, 64) if case.name in ("Adafactor", "Muon") else width
        parameters = transformer(size, kind)
        row: dict[str, Any] = {
            "optimizer": case.label,
            "dtype": dtype,
            "tensors": len(parameters),
            "parameters": sum(x.size for x in parameters.values()),
            **fused_cost(case, size, kind)._asdict(),
            "on real gradients": fused_cost(case, REAL_WIDTH, kind, True)._asdict(),
        }
        if case.is_stocks():
            for label, compiled in (("mlx_eager", False), ("mlx_compiled", True)):
                row[label] = stock_cost(case, size, kind, compiled)._asdict()
            real = stock_cost(case, REAL_WIDTH, kind, compiled=True, real=True)
            row["mlx_compiled on real gradients"] = real._asdict()
        yield row


REAL_WIDTH = 128
KINDS = [("fused", None), ("MLX eager", "mlx_eager"), ("MLX compiled", "mlx_compiled")]
COLUMNS = [
    *[
        (f"bytes a parameter, {label}", key, "bytes_per_parameter")
        for label, key in KINDS
    ],
    *[
        (f"launches a tensor, {label}", key, "launches_per_tensor")
        for label, key in KINDS
    ],
    ("line bytes a parameter, contiguous", None, "line_bytes_per_parameter"),
    ("on a decoder's gradients", "on real gradients", "line_bytes_per_parameter"),
    (
        "the same, MLX compiled",
        "mlx_compiled on real gradients",
        "line_bytes_per_parameter",
    ),
]


def table(table_rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    head = ["optimizer", "dtype", *[title for title, _, _ in COLUMNS]]
    lines = [head, ["---"] * 2 + ["---:"] * len(COLUMNS)]
    for row in table_rows:
        line = [row["optimizer"], row["dtype"]]
        for _, source, key in COLUMNS:
            cost = row.get(source) if source else row
            line.append(
                f"{cost[key]:.{2 if 'launches' in key else 1}f}" if cost else "-"
            )
        lines.append(line)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def chart(chart_rows: list[dict[str, Any]], path: Path) -> None:
    """Bytes and launches of the float32 rows as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chart_rows = [row for row in chart_rows if row["dtype"] == "float32"] or chart_rows
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 0.6 * len(chart_rows) + 1.5))
    for axis, key in zip(axes, Cost._fields[:2], strict=True):
        for i, (label, source) in enumerate(KINDS):
            values = [
                (row.get(source, {}) if source else row).get(key, 0)
                for row in chart_rows
            ]
            places = [place + (i - 1) * 0.27 for place in range(len(values))]
            bars = axis.barh(places, values, 0.27, label=label)
            axis.bar_label(bars, fmt="%.3g", fontsize=7, padding=2)
        axis.set_xscale("log")
        axis.margins(x=0.1)
        axis.invert_yaxis()
        axis.set_title(f"{key.replace('_', ' ')} (log scale)", fontsize=10)
        names = [row["optimizer"] for row in chart_rows]
        axis.set_yticks(range(len(names)), names, fontsize=8)
    axes[1].legend(fontsize=8)
    figure.suptitle(
        "One step of a transformer's 100 float32 tensors on Metal. Fused: counted in "
        "simulation; MLX: from its graph",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Count, write, print; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.metal_cost", description=__doc__
    )
    parser.add_argument("--width", type=int, default=512, help="default: 512")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=[*DTYPES])
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results")
    options = parser.parse_args()
    if extension() is None:
        print("error: the simulator is not built; run: make simulator", file=sys.stderr)
        return 2
    mx.set_default_device(mx.cpu)
    collected = list(rows(options.width, options.dtypes))
    result = {
        "source": "fused: Metal simulator; mlx: graph of mlx.optimizers 0.32.4",
        "rows": collected,
    }
    path = options.output / "metal_cost.json"
    report.save(path, result, table(collected))
    chart(collected, path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
