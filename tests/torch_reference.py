"""The numbers of torch for docs/pytorch.md: ``python tests/torch_reference.py``.

Evaluates the left column of that page's tables with torch, whose wheel is too large for
an environment of the tests, and writes what came out to ``torch_reference.json``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt

PAGE = Path(__file__).resolve().parents[1] / "docs" / "pytorch.md"
STORED = Path(__file__).with_suffix(".json")

Arrays = dict[str, npt.NDArray[np.float32]]

DIFFERENT = "What is not the same"

SHAPES: dict[str, tuple[int, ...]] = {"tall": (8, 3), "wide": (3, 7), "vector": (5,)}
STEPS, SCHEDULED = 10, 60
MAX_NORM = 1.5

# The names of the page's rows.
VALUES: dict[str, Any] = {
    "lr": 0.05,
    "wd": 0.3,
    "betas": (0.8, 0.95),
    "eps": 1e-3,
    "momentum": 0.85,
    "alpha": 0.9,
    "rho": 0.8,
    "d": 1.1,
    "decay": 0.1,
    "factor": 0.25,
    "gamma": 0.5,
    "power": 2.0,
    "eta_min": 0.01,
}


def rows(section: str) -> list[tuple[str, str]]:
    """The two programs of each row of a table of the page."""
    text = PAGE.read_text().partition(f"# {section}\n")[2].partition("\n#")[0]
    return re.findall(r"^\| `(.+?)` \| `(.+?)` \|", text, re.M)


def arrays(seed: int, only_matrices: bool = False) -> Arrays:
    """Parameters, or the gradients of a step."""
    rng = np.random.default_rng(seed)
    drawn = {key: rng.normal(size=shape) for key, shape in SHAPES.items()}
    return {
        key: x.astype(np.float32)
        for key, x in drawn.items()
        if x.ndim > 1 or not only_matrices
    }


def steps(program: str, max_norm: float | None = None) -> dict[str, Any]:
    """The parameters after torch's steps, and the last norm."""
    import torch

    only_matrices = "Muon" in program
    start = arrays(0, only_matrices)
    held = {key: torch.nn.Parameter(torch.tensor(x)) for key, x in start.items()}
    names = {**VALUES, "torch": torch, "params": [*held.values()]}
    optimizer = eval(program, names)
    norm: Any = 0.0
    for step in range(1, STEPS + 1):
        for key, x in arrays(step, only_matrices).items():
            held[key].grad = torch.tensor(x)
        if max_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(held.values(), max_norm)
        optimizer.step()
    found = {key: x.detach().numpy().ravel().tolist() for key, x in held.items()}
    return {**found, "norm": float(norm)}


def learning_rates(program: str) -> list[float]:
    """Those of torch's scheduler, a step each."""
    import torch

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], VALUES["lr"])
    names = {**vars(torch.optim.lr_scheduler), **VALUES, "opt": optimizer}
    schedule = eval(program, names)
    found = []
    for _ in range(SCHEDULED):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    return found


def reference() -> dict[str, Any]:
    """All that torch says, by the programs of the page."""
    import torch

    found = {program: steps(program) for program, _ in rows("Optimizers")}
    muon = {program: steps(program) for program, _ in rows("Muon")}
    # A copy, as bfloat16() makes one: torch then divides it in place.
    with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone):
        single = {program: steps(program) for program, _ in rows("Muon")}
    return {
        "torch": torch.__version__,
        "steps": found,
        "different": {program: steps(program) for program, _ in rows(DIFFERENT)},
        "muon": muon,
        "muon in float32": single,
        "clipped": steps("torch.optim.AdamW(params, lr)", MAX_NORM),
        "schedules": {
            program: learning_rates(program) for program, _ in rows("Schedules")
        },
    }


if __name__ == "__main__":
    STORED.write_text(json.dumps(reference(), indent=1) + "\n")
