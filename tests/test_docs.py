"""The documentation's examples run, and the types hold for a user's program."""

import doctest
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_fused_optimizers as optim
import pytest
from mypy import api as mypy_api

ROOT = Path(__file__).resolve().parents[1]
MODULES = ["checkpoint", "clipping", "filters", "schedulers", "optimizers.base"]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # an example writes a file
    module = importlib.import_module(f"mlx_fused_optimizers.{name}")
    names = {"mx": mx, "nn": nn, "optim": optim, **vars(optim)}
    failures, _ = doctest.testmod(module, extraglobs=names)
    assert failures == 0


def test_every_public_name_is_documented() -> None:
    for name in optim.__all__:
        value: Any = getattr(optim, name)
        if name.startswith("__"):
            continue
        text = inspect.getdoc(value) or ""
        assert "Args:" in text, name
        if value.__module__.startswith("mlx_fused_optimizers") and inspect.isclass(
            value
        ):
            assert "Raises:" in text, name


def test_the_example_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    programs = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(programs) >= 2
    for program in programs:
        subprocess.run([sys.executable, "-c", program], check=True)


PROGRAM = """
from pathlib import Path

import mlx.core as mx
import mlx_fused_optimizers as optim

schedule = optim.warmup_stable_decay(1e-3, 10, 80, 10)
optimizer = optim.AdamW(
    schedule,
    betas=(0.9, 0.95),
    max_grad_norm=1.0,
    skip_nonfinite=True,
    state_dtype=mx.float32,
    weight_decay_filter=optim.decay_matrices_only,
)
parameters = optimizer.apply_gradients({"w": mx.ones((2, 2))}, {"w": mx.ones((2, 2))})
norm: mx.array | None = optimizer.grad_norm
clipped, total = optim.clip_grad_norm({"w": mx.ones((2,))}, 1.0)
mixed = optim.MultiOptimizer([optim.Muon(1e-2), optimizer], [lambda p, x: x.ndim == 2])
optim.save("file.safetensors", parameters, optimizer)
optim.load(Path("file.safetensors"), parameters, optimizer, strict=False)
"""
WRONG = 'optim.AdamW(1e-3, max_grad_norm="one")\n'


def test_types_of_a_users_program(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    for text, expected in ((PROGRAM, 0), (PROGRAM + WRONG, 1)):
        path.write_text(text)
        output, _, status = mypy_api.run(["--strict", str(path)])
        assert status == expected, output
