"""Checks one wheel with each MLX that it has kernels for, each in an environment.

    python tests/wheel_check.py --mlx 0.31.2 tests/test_options.py

In each: the self-check, the comparison with that version's own mlx.optimizers, and the
tests of memory in place; or the tests that are named. The environments stay in
build/wheel-check, and the output of what failed beside them.
"""

import argparse
import os
import re
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "cmake"))

import mlx_versions  # noqa: E402

TESTS = ["tests/test_against_mlx.py", "tests/test_in_place.py"]
NEEDED = ["hypothesis", "numpy", "pytest"]  # versions are those of pyproject.toml
PYTHON = ".".join(map(str, sys.version_info[:2]))


def built_wheel() -> Path:
    """What `make wheel` made for this Python and machine."""
    tag = f"cp{PYTHON.replace('.', '')}"
    system = "macosx" if sys.platform == "darwin" else "linux"
    (wheel,) = (ROOT / "dist").glob(f"*-{tag}-{tag}-*{system}_*.whl")
    return wheel


def prepare(wheel: Path, version: str) -> Path:
    """The Python of an environment with this MLX and nothing of ours but the wheel."""
    folder = ROOT / "build/wheel-check" / f"{version}-{sys.implementation.cache_tag}"
    python = folder / "bin/python"
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    if not python.exists():
        venv.create(folder, symlinks=True, with_pip=True)
    mlx = mlx_versions.mlx(version)
    # As a user's would: MLX is asked for, and our wheel is content with it.
    subprocess.run([*pip, mlx, str(wheel), *NEEDED], check=True)
    subprocess.run([*pip, "--no-deps", "--force-reinstall", str(wheel)], check=True)
    return python


def run(python: Path, log: Path, *arguments: str) -> str:
    """What to say of a program's run, by its last line and exit code."""
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    # That of `make simulator` is built for another MLX.
    environment["MLX_FUSED_SIMULATOR_LIBRARY"] = "/not/built/for/this"
    environment["MLX_FUSED_REQUIRE"] = "1"
    done = subprocess.run(
        [python, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log.write_text(done.stdout)
    last = (done.stdout.strip().splitlines() or [""])[-1].strip("= ")
    last = re.sub(r" in [\d.]+s.*", "", last).removesuffix(".")
    return last if done.returncode == 0 else f"FAILED: {last} ({log.name})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tests", nargs="*", help=f"default: {' '.join(TESTS)}")
    parser.add_argument("--wheel", type=Path, help="default: that in dist")
    parser.add_argument("--mlx", action="append", help="default: every version")
    options = parser.parse_args()
    wheel = options.wheel or built_wheel()
    tests = options.tests or TESTS
    names = ["self-check", *(Path(test).name for test in tests)]
    rows = []
    for version in options.mlx or mlx_versions.releases_for(PYTHON):
        start = time.monotonic()
        python = prepare(wheel, version)
        row = [version]
        for name in names:
            log = python.parents[1].with_name(f"{version}-{name}.log")
            if name == "self-check":
                arguments = ["mlx_fused_optimizers.selfcheck"]
            else:
                arguments = ["pytest", "-q", tests[names.index(name) - 1]]
            row.append(run(python, log, "-m", *arguments))
        rows.append(row)
        print(" | ".join([*row, f"{time.monotonic() - start:.0f} s"]), flush=True)
    print(f"\n{wheel.name}, {wheel.stat().st_size / 1e6:.2f} MB, Python {PYTHON}\n")
    print("| MLX |", " | ".join(names), "|")
    print("| --- " * (len(names) + 1) + "|")
    for row in rows:
        print("|", " | ".join(row), "|")
    return int(any("FAILED" in cell for row in rows for cell in row))


if __name__ == "__main__":
    sys.exit(main())
