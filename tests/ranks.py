"""Runs a script as the ranks of a group, on this machine; and what such scripts do."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

# Of MLX's launchers.
RANK_VARIABLES = ("MLX_RANK", "MLX_HOSTFILE", "MLX_WORLD_SIZE", "OMPI_", "PMI")


class Ended(NamedTuple):
    """What became of a rank."""

    code: int
    output: str
    errors: str

    @property
    def result(self) -> Any:
        """The JSON that it printed last."""
        assert self.code == 0, self.errors
        return json.loads(self.output.splitlines()[-1])


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def launch(
    script: Path,
    ranks: int,
    folder: Path,
    arguments: list[str],
    seconds: float,
    stops: int | None = None,
) -> list[Ended]:
    """Each rank's end; one alone takes part in no group.

    One that stops is killed when the others have ended.

    Raises:
        subprocess.TimeoutExpired: If a rank takes longer; all are killed then.
    """
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(RANK_VARIABLES)
    }
    hosts = folder / f"hosts{ranks}.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(ranks)]))
    # Not pipes: a rank would wait where nobody reads.
    with ExitStack() as stack:
        files = [
            [stack.enter_context(TemporaryFile("w+")) for _ in range(2)]
            for _ in range(ranks)
        ]
        processes = []
        for rank, (output, errors) in enumerate(files):
            own = {"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)}
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(script), *arguments],
                    env={**environment, **(own if ranks > 1 else {})},
                    stdout=output,
                    stderr=errors,
                )
            )
        try:
            for rank, process in enumerate(processes):
                if rank != stops:
                    process.wait(seconds)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        texts = [[file.seek(0), file.read()][1] for pair in files for file in pair]
    return [
        Ended(process.returncode, str(texts[2 * i]), str(texts[2 * i + 1]))
        for i, process in enumerate(processes)
    ]


def gradients_of(tree: Any, step: int, rank: int, exact: bool = False) -> Any:
    """A rank's gradients, some of them transposed; sums of exact ones round nothing."""
    rng = np.random.default_rng(1000 * step + rank)

    def one(x: mx.array) -> mx.array:
        values = rng.standard_normal(x.shape[::-1]).astype(np.float32)
        if exact:
            values = np.round(values * 8) * 3  # so that a third is exact, too
        return mx.array(values).astype(x.dtype).T

    return tree_map(one, tree)


def digest(tree: Any) -> str:
    flat: Any = tree_flatten(tree)
    found = sha256()
    for path, x in flat:
        found.update(f"{path} {x.dtype} {x.shape}".encode())
        if x.size > 0:
            data: Any = mx.view(mx.contiguous(x).reshape(-1), mx.uint8)
            found.update(bytes(memoryview(data)))
    return found.hexdigest()


def error_of(function: Any) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
