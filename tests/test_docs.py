"""The documentation's examples run, and the types hold for a user's program."""

import doctest
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_fused_optimizers as optim
import pytest
from metal_simulator.extension import extension
from mypy import api as mypy_api

ROOT = Path(__file__).resolve().parents[1]
# Paths from the root, so that they are the tests' names.
PAGES = ["README.md", "CONTRIBUTING.md"]
PAGES += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
# A program in one of these is not run.
OTHER_LANGUAGES = {"sh", "cpp", "py", "{include}", "{image}", "{toctree}"}


class Checker(doctest.OutputChecker):
    """MLX's own examples, which the documentation shows too, print 0 as 0.0."""

    def check_output(self, want: str, got: str, flags: int) -> bool:
        return super().check_output(want.replace("array(0.0,", "array(0,"), got, flags)


def test_examples_in_docstrings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # an example writes a file
    names = {"mx": mx, "nn": nn, "optim": optim, **vars(optim)}
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(Checker())
    for name in optim.__all__:
        for example in finder.find(getattr(optim, name), name, globs=names):
            runner.run(example)
    failures, attempted = runner.summarize()
    assert failures == 0
    assert attempted > 20


def test_every_public_name_is_documented() -> None:
    for name in optim.__all__:
        value: Any = getattr(optim, name)
        if name.startswith("__"):
            continue
        text = inspect.getdoc(value) or ""
        assert "Args:" in text or "Returns:" in text, name
        if value.__module__.startswith("mlx_fused_optimizers") and inspect.isclass(
            value
        ):
            assert "Raises:" in text, name


def test_every_public_name_has_an_entry_in_the_documentation() -> None:
    page = (ROOT / "docs" / "api.rst").read_text()
    entries = re.findall(r"^\.\. (?:auto)?(?:class|function|data):: (\S+)$", page, re.M)
    assert sorted(entries) == sorted(optim.__all__)


@pytest.mark.parametrize(
    "page",
    [
        # Of memory in place.
        pytest.param(x, marks=[pytest.mark.fused] if x == "docs/memory.md" else [])
        for x in PAGES
    ],
)
def test_programs_in_the_documentation(page: str) -> None:
    """A page's Python blocks are one program: each goes on from those before it."""
    blocks = re.findall(
        r"^```(\S*).*?\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S
    )
    assert {language for language, _ in blocks} <= {"python", *OTHER_LANGUAGES}
    program = "\n".join(text for language, text in blocks if language == "python")
    if not program:
        return
    if "metal_simulator" in program and extension() is None:
        pytest.skip("the simulator is not built")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


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
