"""Ranks of which one dies or stops in a step; ``python tests/killed_ranks.py --help``.

By itself it tries each phase of a step several times, of 2 and 3 ranks, with one bucket
and several, and prints how the others end. As a rank (``--rank-of``) it trains, and
rank 1 ends itself at a phase: before the n-th collective of step 2, after it, or while
it goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx_fused_optimizers as optim
import numpy as np
from mlx.utils import tree_map
from mlx_fused_optimizers.sharded.ranks import Ranks
from ranks import Ended, digest, error_of, gradients_of, launch

STEPS, AT = 4, 2  # steps of a run, and that in which a rank is lost
SECONDS = 60  # after which a rank is killed
BUCKETS = {"one": 1 << 25, "several": 1 << 18}
# Collectives of a step with a norm: gradients, reductions, norm, agreement, gathers.
COLLECTIVES = {"one": 5, "several": 9}


class Model(nn.Module):
    """Parameters of which one bucket takes a while to send."""

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(0)
        self.layers = [
            {"weight": mx.array(rng.standard_normal((200, 250)).astype(np.float32))}
            for _ in range(3)
        ]


class Loss(NamedTuple):
    """How rank 1 ends."""

    signal: str = "KILL"
    when: str = "before"  # or "during" or "after" the collective of this number
    number: int = 0
    timeout: float | None = None


def lose(loss: Loss, folder: Path) -> None:
    """Make this rank end itself."""
    count = 0
    usual = Ranks._collect

    def end(delay: float = 0) -> None:
        time.sleep(delay)
        (folder / "lost").write_text(str(time.time()))
        os.kill(os.getpid(), getattr(signal, f"SIG{loss.signal}"))

    def collect(self: Ranks, function: Any, x: mx.array) -> mx.array:
        nonlocal count
        is_it = self._doing == f"step {AT}" and count == loss.number
        count += self._doing == f"step {AT}"
        if is_it and loss.when == "before":
            end()
        if is_it and loss.when == "during":
            threading.Thread(target=end, args=(np.random.rand() * 5e-4,)).start()
        result = usual(self, function, x)
        if is_it and loss.when == "after":
            end()
        return result

    Ranks._collect = collect  # type: ignore[method-assign]


def train(ranks: int, bucket: str, loss: Loss, folder: Path) -> Any:
    """What a rank tells of its end; alone, the parameters after each step."""
    group = mx.distributed.init()
    model = Model()
    optimizer: Any = optim.AdamW(1e-2, max_grad_norm=1.0)
    if group.size() > 1:
        optimizer = optim.ShardedOptimizer(
            optimizer, bucket_size=BUCKETS[bucket], timeout=loss.timeout
        )
        if group.rank() == 1:
            lose(loss, folder)
    found = [digest(model.parameters())]

    def step(i: int) -> None:
        made = [
            gradients_of(model.parameters(), i, r, exact=True) for r in range(ranks)
        ]
        gradients = made[group.rank()]
        if group.size() == 1:
            gradients = tree_map(lambda x, *rest: sum(rest, x) / ranks, *made)
        optimizer.update(model, gradients)

    try:
        for i in range(1, STEPS + 1):
            step(i)
            mx.eval(model.parameters(), optimizer.state)
            found.append(digest(model.parameters()))
    except RuntimeError as error:
        seconds = time.time() - float((folder / "lost").read_text())
        again = time.time()
        return {
            "steps": len(found) - 1,
            "error": str(error),
            "seconds": seconds,
            "parameters": digest(model.parameters()),
            "later": error_of(lambda: step(AT)),
            "seconds later": time.time() - again,
        }
    return found


def run(ranks: int, bucket: str, loss: Loss, folder: Path) -> list[Ended]:
    arguments = ["--rank-of", str(ranks), bucket, json.dumps(loss), str(folder)]
    stops = 1 if loss.signal == "STOP" else None
    return launch(Path(__file__), ranks, folder, arguments, SECONDS, stops)


def alone(ranks: int, folder: Path) -> list[str]:
    """One process's parameters after each step."""
    arguments = ["--rank-of", str(ranks), "one", json.dumps(Loss()), str(folder)]
    (ended,) = launch(Path(__file__), 1, folder, arguments, SECONDS)
    found: list[str] = ended.result
    return found


def fault_of(ended: list[Ended], expected: list[str], loss: Loss) -> str | None:
    """What is wrong with the ranks' ends, if anything is."""
    for rank, (code, output, errors) in enumerate(ended):
        if rank == 1:
            if code != -signal.SIGKILL:
                return f"rank 1 ended by {code}: {errors}"
            continue
        if loss.signal == "STOP":
            if code == 75 and f"step {AT}; no answer in" in errors:
                continue
            if code != 0:
                return f"rank {rank} ended by {code}: {errors}"
        if code != 0:
            return f"rank {rank} ended by {code}: {errors}"
        told = json.loads(output.splitlines()[-1])
        if not isinstance(told, dict):
            return f"rank {rank} had no error"
        done = told["steps"]
        if done not in (AT - 1, AT):
            return f"rank {rank} had an error after {done} steps"
        if told["parameters"] != expected[done]:
            return f"rank {rank} has parameters of no whole step"
        if f"step {done + 1}:" not in told["error"]:
            return f"rank {rank} has the error {told['error']}"
        if "is broken" not in told["later"] or told["seconds later"] > 1:
            return f"rank {rank} later: {told['later']}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 3])
    parser.add_argument("--rank-of", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        ranks, bucket, loss, folder = options.rank_of
        mx.set_default_device(mx.cpu)
        result = train(int(ranks), bucket, Loss(*json.loads(loss)), Path(folder))
        print(json.dumps(result), flush=True)
        os._exit(0)  # not through MLX's end, which may wait for what is lost
    faults = 0
    for ranks in options.ranks:
        for bucket in BUCKETS:
            with ThreadPoolExecutor(options.parallel) as pool:
                results = [
                    pool.submit(attempt, ranks, bucket, loss)
                    for loss in losses_of(bucket) * options.runs
                ]
            found = [result.result() for result in results]
            wrong = [(loss, fault) for loss, fault, _ in found if fault is not None]
            slowest = max(seconds for *_, seconds in found)
            print(
                f"{ranks} ranks, {bucket} bucket: {len(wrong)} faults in {len(found)} "
                f"runs, the slowest error after {slowest:.2f} s",
                *wrong,
                sep="\n  ",
                flush=True,
            )
            faults += len(wrong)
    return int(faults > 0)


def losses_of(bucket: str) -> list[Loss]:
    count = COLLECTIVES[bucket]
    whens = ("before", "during", "after")
    killed = [Loss("KILL", when, i) for i in range(count) for when in whens]
    return [*killed, *(Loss("STOP", "before", i, 3.0) for i in range(count))]


@cache
def expected_of(ranks: int) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        return alone(ranks, Path(folder))


def attempt(ranks: int, bucket: str, loss: Loss) -> tuple[Loss, str | None, float]:
    """What is wrong, if anything is, and the seconds until the last error."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            ended = run(ranks, bucket, loss, Path(folder))
        except subprocess.TimeoutExpired as error:
            return loss, str(error), SECONDS
    told = [json.loads(x.output) for x in ended if x.output.startswith("{")]
    fault = fault_of(ended, expected_of(ranks), loss)
    return loss, fault, max([0.0, *(x["seconds"] for x in told)])


if __name__ == "__main__":
    sys.exit(main())
