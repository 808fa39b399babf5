"""examples/mlx_lm_lora.py: the losses agree; where they do not, it says so."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx.optimizers as stock
import mlx_fused_optimizers as optim
import pytest

pytest.importorskip("mlx_lm")  # needs Python 3.11

SCRIPT = Path(__file__).parents[1] / "examples" / "mlx_lm_lora.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    specification = importlib.util.spec_from_file_location("mlx_lm_lora", SCRIPT)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_losses_agree_and_fall(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--iters", "20"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    table = result.stdout[result.stdout.rindex("mlx.optimizers ") :]
    rows = re.findall(r"^(train|validation) +\d+ +([\d.]+) +([\d.]+)$", table, re.M)
    assert [kind for kind, _, _ in rows] == ["train"] * 10 + ["validation"] * 2
    for _, reference, loss in rows:
        assert float(loss) == pytest.approx(float(reference), abs=1e-4)
    before, after = (float(loss) for _, _, loss in rows[-2:])
    assert after < before - 1
    assert re.search(r"^largest difference: \d\.\de[+-]\d\d$", table, re.M)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_full", [False, True], ids=["adapters", "full"])
def test_states_in_codes_lose_nothing(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, is_full: bool
) -> None:
    """Adapters, and fine-tuning of all of the model: losses are not 1 % higher."""
    make_model = script.make_model

    def make_unfrozen() -> Any:
        model = make_model()
        model.unfreeze()
        return model

    if is_full:
        monkeypatch.setattr(script, "make_model", make_unfrozen)

    def in_codes(learning_rate: float, **options: Any) -> stock.Optimizer:
        def is_worth_it(path: str, array: Any) -> bool:
            return bool(array.ndim == 2)

        return optim.AdamW(
            learning_rate, state_dtype="int8", quantize_filter=is_worth_it, **options
        )

    lines = script.TEXT.splitlines()
    held = SimpleNamespace(__name__="in codes", AdamW=in_codes)
    reference, losses = (script.fine_tune(x, lines, 40, 0) for x in (optim, held))
    # So short a run is not stable: a learning rate that is 1.0001 times as large makes
    # single losses differ by 0.7 %. Hence the mean, and that after the last step.
    mean = sum(losses.train.values()) / sum(reference.train.values())
    last = max(losses.validation)
    assert mean == pytest.approx(1, abs=0.02) and mean < 1.01
    assert losses.validation[last] < 1.01 * reference.validation[last]
    assert losses.train != reference.train


def test_a_disagreement_is_an_error(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def wrong(learning_rate: float, **options: Any) -> stock.Optimizer:
        return stock.AdamW(1.1 * learning_rate, **options)

    other = SimpleNamespace(__name__="other", AdamW=wrong)
    monkeypatch.setattr(script, "mlx_fused_optimizers", other)
    assert script.main(["--iters", "4"]) == 1
    assert "error: the losses differ by over 0.0001" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--iters", "1"], "expected an integer from 2, got '1'"),
        (["--text", "missing.txt"], "cannot read missing.txt"),
        (["--text", "short.txt"], "short.txt has 1 lines; needs 2"),
    ],
)
def test_bad_arguments(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("one line\n")
    with pytest.raises(SystemExit) as caught:
        script.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
