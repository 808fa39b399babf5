"""A step on several ranks: ``python -m bench.distributed [--bandwidth 2gbit]``.

N processes on this machine, over MLX's ring, each with the gradients of a decoder:
ShardedOptimizer(AdamW) beside ``nn.average_gradients`` and AdamW on every rank, a step
of each in turn. Per rank: bytes of state, bytes sent (counted on the loopback) beside
the formula, time, and the peak of memory beyond parameters, gradients and state.

With a bandwidth the processes run in a network namespace of their own (root, iproute2),
whose loopback has that for all ranks together. Collectives spin: with more ranks than
cores, times say little. Writes ``distributed.json``, ``.md`` and ``.png`` to
bench/results.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_fused_optimizers as optim
from mlx.utils import tree_flatten

from . import models, report
from .parts import peak_of

SHARDED, REPLICATED = "sharded", "replicated"
SECONDS = 1800  # after which a rank is killed
NAMESPACE = "mlx-fused-bench"


class Ways:
    """A model that is trained in both ways, as one rank."""

    def __init__(self, width: int, layers: int, vocabulary: int, bucket: int) -> None:
        self.models = {}
        self.optimizers: dict[str, Any] = {
            SHARDED: optim.ShardedOptimizer(optim.AdamW(1e-4), bucket_size=bucket),
            REPLICATED: optim.AdamW(1e-4),
        }
        for way, optimizer in self.optimizers.items():
            mx.random.seed(0)
            model = models.Decoder(width, layers, vocabulary)
            optimizer.init(model.trainable_parameters())
            mx.eval(model.parameters(), optimizer.state)
            self.models[way] = model
        rank = mx.distributed.init().rank()
        tokens = mx.random.randint(0, vocabulary, (1, 16), key=mx.random.key(rank))

        def loss(model: nn.Module) -> mx.array:
            value: mx.array = mx.logsumexp(model(tokens), axis=-1).mean()
            return value

        model = self.models[REPLICATED]
        # The gradients that training makes, of which most are transposed.
        self.gradients = nn.value_and_grad(model, loss)(model)[1]
        mx.eval(self.gradients)

    def step(self, way: str) -> None:
        gradients = self.gradients
        if way == REPLICATED:
            gradients = nn.average_gradients(gradients)
        self.optimizers[way].update(self.models[way], gradients)
        mx.eval(self.models[way].parameters(), self.optimizers[way].state)


def size_of(tree: Any) -> int:
    flat: Any = tree_flatten(tree)
    return sum(x.nbytes for _, x in flat)


def sent() -> int:
    """Bytes that the loopback has carried."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[8])
    return 0


def meet() -> None:
    mx.eval(mx.distributed.all_sum(mx.zeros(8)))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """What one rank finds."""
    ranks = mx.distributed.init().size()
    ways = Ways(options.width, options.layers, options.vocabulary, options.bucket_size)
    parameters = size_of(ways.models[SHARDED].parameters())
    seconds: dict[str, list[float]] = {SHARDED: [], REPLICATED: []}
    found: dict[str, Any] = {}
    for way in seconds:
        ways.step(way)
        meet()
        before = sent()
        ways.step(way)
        meet()
        found[way] = {
            "state MB": size_of(ways.optimizers[way].state) / 1e6,
            "sent MB": (sent() - before) / ranks / 1e6,
            "peak MB": peak_of(lambda w=way: ways.step(w)),  # type: ignore[misc]
        }
    for i in range(options.steps):
        for way in [SHARDED, REPLICATED][:: 1 if i % 2 else -1]:
            meet()
            start = time.perf_counter()
            ways.step(way)
            seconds[way].append(time.perf_counter() - start)
    for way, times in seconds.items():
        found[way]["milliseconds"] = 1e3 * statistics.median(times)
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    return {
        "parameters": parameters,
        "ways": found,
        "ratio": statistics.median(ratios),
    }


def run_ranks(ranks: int, arguments: list[str]) -> list[dict[str, Any]]:
    """What each rank finds, all on this machine."""
    with tempfile.TemporaryDirectory() as name:
        hosts = Path(name) / "hosts.json"
        ports = range(41300, 41300 + ranks)
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
        outputs = [Path(name) / f"{rank}.json" for rank in range(ranks)]
        this = [sys.executable, "-m", "bench.distributed"]
        processes = [
            subprocess.Popen(
                [*this, *arguments, "--rank-output", str(output)],
                env={**os.environ, "MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)},
            )
            for rank, output in enumerate(outputs)
        ]
        try:
            codes = [process.wait(SECONDS) for process in processes]
        finally:
            for process in processes:
                process.kill()
        if any(codes):
            raise RuntimeError(f"the ranks ended with {codes}")
        return [json.loads(output.read_text()) for output in outputs]


def row_of(ranks: int, found: list[dict[str, Any]], bandwidth: str) -> dict[str, Any]:
    """Per rank, of the rank that has most."""
    mega = found[0]["parameters"] / 1e6

    def most(way: str, key: str) -> float:
        return float(max(rank["ways"][way][key] for rank in found))

    def both(key: str, digits: int, unit: float = 1) -> dict[str, float]:
        ways = (SHARDED, REPLICATED)
        return {way: round(most(way, key) / unit, digits) for way in ways}

    # A ring has no sum_scatter; two ranks exchange halves.
    share = 2 if ranks == 2 else 3
    return {
        "ranks": ranks,
        "bandwidth": bandwidth,
        "parameters MB": round(mega, 1),
        "state MB": both("state MB", 1),
        "state times N": round(
            most(SHARDED, "state MB") * ranks / most(REPLICATED, "state MB"), 4
        ),
        "sent, of the parameters": both("sent MB", 3, mega),
        "formula": round(share * (ranks - 1) / ranks, 3),
        "milliseconds": both("milliseconds", 0),
        "time, sharded by replicated": round(
            statistics.median(rank["ratio"] for rank in found), 3
        ),
        "peak, of the parameters": both("peak MB", 2, mega),
    }


def inside_namespace(bandwidth: str) -> int:
    """Runs this command where the loopback has that bandwidth."""

    def call(*command: str) -> None:
        subprocess.run(command, check=True)

    call("ip", "netns", "add", NAMESPACE)
    inside = ("ip", "netns", "exec", NAMESPACE)
    try:
        call(*inside, "ip", "link", "set", "lo", "up")
        shaped = ("rate", bandwidth, "burst", "512kb", "latency", "100ms")
        call(*inside, "tc", "qdisc", "add", "dev", "lo", "root", "tbf", *shaped)
        command = [sys.executable, "-m", "bench.distributed", *sys.argv[1:], "--inside"]
        return subprocess.run([*inside, *command], check=False).returncode
    finally:
        call("ip", "netns", "delete", NAMESPACE)


def chart(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib import pyplot

    kinds: list[tuple[str, Callable[[Any], Any]]] = [
        ("state, MB a rank", lambda row: row["state MB"]),
        (
            "bytes sent a rank, of the parameters",
            lambda r: r["sent, of the parameters"],
        ),
        ("milliseconds a step", lambda row: row["milliseconds"]),
    ]
    figure, axes = pyplot.subplots(1, len(kinds), figsize=(11, 3.2))
    names = [f"{row['ranks']}, {row['bandwidth']}" for row in rows]
    for axis, (title, values) in zip(axes, kinds, strict=True):
        for i, way in enumerate((REPLICATED, SHARDED)):
            places = [place + 0.4 * i for place in range(len(rows))]
            axis.bar(places, [values(row)[way] for row in rows], 0.4, label=way)
        axis.set_xticks([place + 0.2 for place in range(len(rows))], names, fontsize=7)
        axis.set_title(title, fontsize=9)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.distributed", description=__doc__
    )
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 3])
    parser.add_argument("--bandwidth", help="of the loopback, as tc has it: 2gbit")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--bucket-size", type=int, default=32 << 20)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results"
    )
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rank-output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    mx.set_default_device(mx.cpu)
    if options.rank_output:
        options.rank_output.write_text(json.dumps(measure(options)))
        return 0
    if options.bandwidth and not options.inside:
        return inside_namespace(options.bandwidth)
    names = ("width", "layers", "vocabulary", "bucket_size", "steps")
    arguments = [
        f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names
    ]
    bandwidth = options.bandwidth or "loopback"
    rows = []
    for ranks in options.ranks:
        rows.append(row_of(ranks, run_ranks(ranks, arguments), bandwidth))
        print(json.dumps(rows[-1]), flush=True)
    path = options.output / "distributed.json"
    # Rows of other bandwidths and numbers of ranks stay.
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    own = {(row["ranks"], row["bandwidth"]) for row in rows}
    kept = [row for row in kept if (row["ranks"], row["bandwidth"]) not in own]
    rows = sorted([*kept, *rows], key=lambda row: (row["bandwidth"], row["ranks"]))
    machine = {**report.machine("cpu", options.steps), "load": os.getloadavg()[0]}
    named = report.named(machine)
    text = f"# A step on several ranks\n\n{named}.\n\n{report.table(rows)}"
    report.save(path, {"machine": machine, "rows": rows}, text)
    chart(rows, path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
