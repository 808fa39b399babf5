"""The benchmarks run, and write what they say. Nothing here times anything."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.fused
ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_steps_beside_peers(tmp_path: Path) -> None:
    arguments = ["--parts", "steps", "--sets", "small", "--rounds", "1"]
    done = run("bench", *arguments, "--device", "cpu", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "bench.json").read_text())
    (row,) = report["rows"]["steps"]
    assert row["tensors"] == 800
    assert {"ours", "ours compiled", "MLX", "MLX compiled"} <= {*row["milliseconds"]}
    assert "800 vectors of 32" in (tmp_path / "bench.md").read_text()
    assert (tmp_path / "steps.png").stat().st_size > 0


def test_a_training_step(tmp_path: Path) -> None:
    sizes = ["--width", "64", "--layers", "1", "--context", "16", "--steps", "2"]
    done = run("bench.train_step", *sizes, "--device", "cpu", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "train_step.json").read_text())["rows"]
    kinds = ["ours", "MLX", "ours compiled", "MLX compiled"]
    assert [row["optimizer"] for row in rows] == [f"AdamW, {kind}" for kind in kinds]
    for row in rows[1:]:
        assert row["last loss"] == pytest.approx(rows[0]["last loss"], rel=1e-4)


def test_bytes_a_parameter_are_those_promised(tmp_path: Path) -> None:
    sizes = ["--width", "128", "--layers", "1", "--vocabulary", "256"]
    done = run("bench.memory", *sizes, "--device", "cpu", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "memory.json").read_text())["rows"]
    promised = [row for row in rows if row["promised"]]
    assert len(promised) == 4
    for row in promised:
        assert row["all"] <= row["promised"]
        assert row["without gradient"] <= row["promised"] - 2
        assert row["extra MB"] == {"eager": 0.0, "compiled": 0.0}
    assert (tmp_path / "memory.png").stat().st_size > 0


def test_accumulation_needs_no_more_with_more_batches(tmp_path: Path) -> None:
    sizes = ["--width", "128", "--layers", "2", "--vocabulary", "512", "--k", "2", "8"]
    done = run("bench.accumulate", *sizes, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "accumulate.json").read_text())["rows"]
    two, eight = (row["bytes a parameter"] for row in rows)
    for way in ("accumulate=k", "accumulate=k, compiled"):
        assert eight[way] < 1.1 * two[way]
    at_once = "MLX, tree_map, one evaluation"
    assert eight[at_once] > two[at_once]
    assert (tmp_path / "accumulate.png").stat().st_size > 0


def test_convergence_in_codes(tmp_path: Path) -> None:
    sizes = ["--width", "64", "--layers", "1", "--context", "16", "--steps", "50"]
    modes = ["float32", "bf16 + 24bit, int8 states", "bf16 + 24bit, int4 states"]
    chosen = ["--tasks", "text", "--seeds", "1", "--modes", *modes]
    where = ["--device", "cpu", "--output", str(tmp_path)]
    done = run("bench.convergence", *sizes, *chosen, *where)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "convergence.json").read_text())["tasks"]["text"]
    usual, *others = [found["runs"][mode][0] for mode in modes]
    for other in others:
        assert other["share in codes"] > 0.8
        assert other["training loss"] == pytest.approx(usual["training loss"], rel=0.01)
        assert other["largest update"] < 4 * usual["largest update"]
    assert (tmp_path / "convergence.png").stat().st_size > 0


def test_the_first_pages_charts_show_the_results(tmp_path: Path) -> None:
    results = ROOT / "bench" / "results"
    done = run("bench.front_page", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = json.loads((results / "bench.json").read_text())["rows"]["steps"]
    times = rows[0]["milliseconds"]
    speed = (tmp_path / "front_speed.svg").read_text()
    for peer in ("ours", "MLX", "MLX compiled"):
        assert f"{times[peer]:.0f} ms" in speed
    (row,) = (
        row
        for row in json.loads((results / "memory.json").read_text())["rows"]
        if (row["optimizer"], row["held"]) == ("AdamW", "bf16 + 24bit, int8 states")
    )
    memory = (tmp_path / "front_memory.svg").read_text()
    assert f"{row['peak MB']['eager']:.0f} MB" in memory
    # Those in the repository were drawn from these numbers.
    for path in tmp_path.glob("*.svg"):
        kept = (results / path.name).read_text()
        assert texts(kept) == texts(path.read_text()), "run: python -m bench.front_page"


def test_the_readmes_cost_on_metal_is_that_of_the_results() -> None:
    report = json.loads((ROOT / "bench" / "results" / "metal_cost.json").read_text())
    lines = (ROOT / "README.md").read_text().splitlines()
    fused = lines[lines.index("## What is fused today") :]
    for row in report["rows"]:
        name = row["optimizer"]
        found = next((line for line in fused if f"`{name}`" in line), None)
        if row["dtype"] != "float32" or found is None:
            continue
        *_, size, launches, _ = found.split("|")
        assert size.split()[0].rstrip(",") == f"{row['bytes_per_parameter']:.3g}", name
        assert launches.split()[0] == f"{row['launches_per_tensor']:.2f}", name


def texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)<", svg)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds is 0; expected at least 1"),
        (["--sets", "huge"], "invalid choice: 'huge'"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], message: str) -> None:
    done = run("bench", *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_step_on_several_ranks(tmp_path: Path) -> None:
    sizes = ["--width", "128", "--layers", "1", "--vocabulary", "1024", "--steps", "1"]
    done = run("bench.distributed", "--ranks", "2", *sizes, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "distributed.json").read_text())["rows"]
    assert row["state times N"] < 1.02
    assert row["formula"] == 1.0
    assert (tmp_path / "distributed.png").stat().st_size > 0
