"""examples/train_digits.py: its accuracy, its resumed run, and its refusals."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

SCRIPT = Path(__file__).parents[1] / "examples" / "train_digits.py"


Completed = subprocess.CompletedProcess[str]


def run(*arguments: object, cwd: Path | None = None) -> Completed:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)


def refusal(*arguments: object) -> str:
    """The one line on standard error of a run that ends with exit code 2."""
    result = run(*arguments)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A checkpoint that a whole demo left, and what the demo printed."""
    folder = tmp_path_factory.mktemp("demo")
    path = folder / "digits.safetensors"
    result = run("--epochs", 4, "--seed", 3, "--save", path, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert os.listdir(folder) == [path.name]
    return path, result.stdout


@pytest.fixture(scope="module")
def script() -> ModuleType:
    specification = importlib.util.spec_from_file_location("train_digits", SCRIPT)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_accuracy_resumed_bits_and_table(demo: tuple[Path, str]) -> None:
    output = demo[1]
    last = re.fullmatch(r"test accuracy: (\d\.\d{3})", output.splitlines()[-1])
    assert last is not None
    assert float(last[1]) >= 0.96
    assert "resumed from epoch 2: same bits in all 26 arrays" in output
    table = output[output.index("mlx.optimizers") :]
    accuracies = re.search(r"^test accuracy +([\d.]+) +([\d.]+)$", table, re.MULTILINE)
    assert accuracies is not None
    assert abs(float(accuracies[1]) - float(accuracies[2])) <= 0.02
    for row in ("optimizer step, median", "peak memory", "extra memory"):
        assert re.search(rf"^{row}.* [\d.]+ +[\d.]+$", table, re.MULTILINE), row


def test_resume_ends_with_the_accuracy_of_the_whole_run(demo: tuple[Path, str]) -> None:
    path, output = demo
    before = path.read_bytes()
    result = run("--resume", path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == output.splitlines()[-1]
    assert path.read_bytes() == before


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "lion"])
def test_other_optimizers(optimizer: str) -> None:
    result = run("--optimizer", optimizer, "--epochs", 2)
    assert result.returncode == 0, result.stderr
    assert "resumed from epoch 1: same bits" in result.stdout
    last = result.stdout.splitlines()[-1]
    assert float(last.removeprefix("test accuracy: ")) >= 0.85  # 0.96 takes more epochs


def test_missing_checkpoint(tmp_path: Path) -> None:
    assert "No such file" in refusal("--resume", tmp_path / "missing.safetensors")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("option", ["--resume", "--save"])
@pytest.mark.parametrize("length", [0, 5, 8, 300, 0.5, -1])
def test_truncated(
    demo: tuple[Path, str], tmp_path: Path, length: float, option: str
) -> None:
    whole = demo[0].read_bytes()
    content = whole[: int(length * len(whole)) if length == 0.5 else int(length)]
    path = tmp_path / "digits.safetensors"
    path.write_bytes(content)
    assert "truncated" in refusal(option, path)
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("option", ["--resume", "--save"])
@pytest.mark.parametrize("kind", ["text", "safetensors", "metadata"])
def test_foreign_file(
    tmp_path: Path, kind: str, option: str, script: ModuleType
) -> None:
    path = tmp_path / "other.safetensors"
    if kind == "text":
        path.write_text("not a checkpoint\n" * 100)
    else:
        metadata = {"format": script.CHECKPOINT_FORMAT} if kind == "metadata" else {}
        mx.save_safetensors(str(path), {"weight": mx.ones((2, 3))}, metadata)
    before = path.read_bytes()
    assert str(path) in refusal(option, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "dtype"])
def test_foreign_arrays(demo: tuple[Path, str], tmp_path: Path, change: str) -> None:
    loaded: Any = mx.load(str(demo[0]), return_metadata=True)
    arrays, metadata = loaded
    name = "model.output.bias"
    if change == "missing":
        del arrays[name]
    elif change == "extra":
        name = "model.output.scale"
        arrays[name] = mx.ones(10)
    elif change == "shape":
        arrays[name] = mx.ones((11,))
    else:
        arrays[name] = arrays[name].astype(mx.float16)
    path = tmp_path / "digits.safetensors"
    mx.save_safetensors(str(path), arrays, metadata)
    before = path.read_bytes()
    line = refusal("--resume", path)
    assert name in line and "found" in line and "expected" in line
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "option", [("--optimizer", "lion"), ("--epochs", "9"), ("--seed", "1")]
)
def test_checkpoint_of_another_run(
    demo: tuple[Path, str], option: tuple[str, str]
) -> None:
    before = demo[0].read_bytes()
    line = refusal("--resume", demo[0], *option)
    assert option[0] in line and f"not {option[1]}" in line
    assert demo[0].read_bytes() == before


def test_save_where_nothing_can_be_written(tmp_path: Path) -> None:
    assert "cannot write" in refusal("--save", tmp_path / "missing" / "a.safetensors")
    assert "directory" in refusal("--save", tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [("--epochs", 0), ("--epochs", 1), ("--epochs", -3), ("--epochs", "x"),
     ("--seed", -1), ("--optimizer", "adagrad"), ("--save", "a", "--resume", "b")],
)  # fmt: skip
def test_bad_arguments(arguments: tuple[object, ...]) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert f"error: argument {arguments[-2]}" in result.stderr


def test_help() -> None:
    result = run("--help")
    assert result.returncode == 0
    for option in ("--optimizer", "--epochs", "--seed", "--save", "--resume"):
        assert option in result.stdout


def test_interrupt_leaves_the_old_checkpoint(
    demo: tuple[Path, str], tmp_path: Path
) -> None:
    path = tmp_path / "digits.safetensors"
    path.write_bytes(demo[0].read_bytes())
    command = [sys.executable, "-u", str(SCRIPT), "--save", str(path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command,
        stdout=pipe,
        stderr=pipe,
        text=True,
        # A shell starts what it puts in the background with SIGINT ignored, and
        # that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("    1 "):  # the first epoch's line
                break
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted"
    assert "Traceback" not in errors
    assert path.read_bytes() == demo[0].read_bytes()
    assert os.listdir(tmp_path) == [path.name]


def test_first_difference(script: ModuleType) -> None:
    left = {"a": mx.zeros(3), "b": mx.array([1.0, 0.0])}
    assert script.first_difference(left, dict(left), script.bits) is None
    right = {"a": mx.zeros(3), "b": mx.array([1.0, -0.0])}  # equal, but for one bit
    assert script.first_difference(left, right, script.bits)[0] == "b"
    assert script.first_difference(left, {"b": left["b"]}, script.bits)[0] == "a"
