"""What a step costs beside its peers: ``python -m bench --help``.

Writes ``bench.json``, ``bench.md`` and charts to bench/results. Times are medians of
rounds in which all peers take turns in one process, and ratios the medians of the
rounds' ratios. The peers are mlx.optimizers, the same under mx.compile, and torch's
fused optimizers where torch is installed.
"""

import argparse
import gc
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from . import peers, report
from .parts import PARTS, Choice
from .sets import SETS

RESULTS = Path(__file__).parent / "results"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument(
        "--optimizers",
        nargs="+",
        choices=peers.OPTIMIZERS,
        help="default: those of each part's table",
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=peers.DTYPES,
        help="default: float32; bandwidth and clipping: all",
    )
    parser.add_argument("--sets", nargs="+", choices=SETS, default=[*SETS])
    parser.add_argument(
        "--device",
        choices=["cpu", "gpu"],
        default="gpu" if mx.is_available(mx.gpu) else "cpu",
        help="default: %(default)s",
    )
    parser.add_argument("--rounds", type=int, default=9, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    if chosen.rounds < 1:
        parser.error(f"--rounds is {chosen.rounds}; expected at least 1")
    if chosen.device == "gpu" and not mx.is_available(mx.gpu):
        parser.error("--device gpu: MLX has no GPU here")
    return chosen


def main() -> int:
    chosen = arguments()
    mx.set_default_device(mx.gpu if chosen.device == "gpu" else mx.cpu)
    mx.random.seed(0)
    units = []
    for part in chosen.parts:
        every = [*peers.DTYPES] if part in ("bandwidth", "clipping") else ["float32"]
        choice = Choice(
            chosen.optimizers,
            chosen.dtypes or every,
            chosen.sets,
            chosen.rounds,
            chosen.device == "gpu",
        )
        units += [(part, unit) for unit in PARTS[part](choice)]
    rows: dict[str, list[dict[str, Any]]] = {part: [] for part in chosen.parts}
    progress = tqdm(units, unit="row", disable=None)
    for part, unit in progress:
        progress.set_description(part)
        rows[part].append(unit())
        gc.collect()
        mx.clear_cache()
    if peers.torch is None:
        print("torch is not installed: it is left out", file=sys.stderr)
    report.write(rows, chosen.device, chosen.rounds, chosen.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
