"""python -m mlx_fused_optimizers.selfcheck."""

import json
import subprocess
import sys

import pytest
from mlx_fused_optimizers import _ext, selfcheck

pytestmark = pytest.mark.fused


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mlx_fused_optimizers.selfcheck", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_table_and_json() -> None:
    table = run()
    assert table.returncode == 0, table.stdout + table.stderr
    report = run("--json")
    assert report.returncode == 0
    results = json.loads(report.stdout)["results"]
    kernels = {result["kernel"] for result in results}
    averaged = {name for name in kernels if name.endswith("Averaged")}
    assert kernels - averaged == {*_ext.rule_names(), "fuse", "sums", "counts"}
    assert {"AdamAveraged", "SGDAveraged"} <= averaged
    assert "MuonMomentAveraged" not in averaged
    assert all(result["failure"] is None for result in results)
    assert f"{len(results)} of {len(results)} kernels agree." in table.stdout
    assert table.stdout.count(" ok") == len(results)
    if not any(result["device"] == "gpu" for result in results):
        assert "Metal is not available on this machine" in table.stdout
    assert run("--help").returncode == 0


def test_a_failure_is_reported_with_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_ext, "check_sums", lambda *_: "relative error 0.5")
    monkeypatch.setattr(sys, "argv", ["selfcheck"])
    assert selfcheck.main() == 1
    output = capsys.readouterr().out
    assert "relative error 0.5" in output
    assert "Please report this" in output
    monkeypatch.setattr(sys, "argv", ["selfcheck", "--json"])
    assert selfcheck.main() == 1
    failures = [
        result
        for result in json.loads(capsys.readouterr().out)["results"]
        if result["failure"]
    ]
    assert {result["kernel"] for result in failures} == {"sums", "counts"}
