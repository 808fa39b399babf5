"""Builds everything of ours with sanitizers, and runs the tests under them.

``address`` is AddressSanitizer and UndefinedBehaviorSanitizer, for the extension and
the Metal simulator; ``thread`` is ThreadSanitizer, for the CPU backend. Python and MLX
are not built with them. First each fault of faults.cpp must be reported: that proves
the set-up. On Linux with GCC.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = {"address": "address,undefined", "thread": "thread"}
RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}
# What must be reported, and in which words.
FAULTS = {
    "address": {
        "overflow": "heap-buffer-overflow",
        "signed_overflow": "signed integer overflow",
        "unheld": "heap-use-after-free",
    },
    "thread": {
        "race_with_stream": "data race",
        "race_of_pieces": "data race",
    },
}
# No faults: tests ask for more memory than there is, and the simulator switches stacks.
WARNINGS = (
    "WARNING: AddressSanitizer failed to allocate",
    "WARNING: ASan doesn't fully support makecontext/swapcontext",
)
# Of the simulator alone, which ThreadSanitizer does not run, or of no code of ours.
NOT_THREADED = [
    "test_metal.py",
    "test_metal_cost.py",
    "test_metal_simulator.py",
    "test_cross_compile.py",
    "test_train_digits.py",
]
# MLX keeps freed memory for the next array, so that AddressSanitizer would not see it
# used. ThreadSanitizer knows nothing of MLX's reference counts, and would not see that
# the memory's next use comes after ours.
CACHE = {"address": "mx.set_cache_limit(0)", "thread": ""}
PYTEST = """
import sys, mlx.core as mx, pytest
{cache}
sys.exit(pytest.main(sys.argv[1:]))
"""
FAULT = """
import sys, mlx.core as mx
{cache}
sys.path.insert(0, sys.argv[1])
import sanitizer_faults
getattr(sanitizer_faults, sys.argv[2])()
"""


def build(kind: str, folder: Path) -> None:
    """Builds below the folder; what is up to date stays."""
    package = folder / "package"
    simulated = ["OFF", "ON"] if kind == "address" else ["OFF"]
    for simulator in simulated:
        target = folder / ("simulator" if simulator == "ON" else "extension")
        options = {
            "MLX_FUSED_SIMULATOR": simulator,
            "MLX_FUSED_SANITIZE": SANITIZERS[kind],
            "Python_EXECUTABLE": sys.executable,
            "CMAKE_CXX_COMPILER": "g++",  # whose runtimes are loaded below
            "CMAKE_BUILD_TYPE": "RelWithDebInfo",  # nanobind strips a release
        }
        define = [f"-D{name}={value}" for name, value in options.items()]
        _run("cmake", "-S", ROOT, "-B", target, "-G", "Ninja", *define)
        _run("cmake", "--build", target)
    _run("cmake", "--install", folder / "extension", "--prefix", package)
    name = "mlx_fused_optimizers"
    shutil.copytree(ROOT / "python" / name, package / name, dirs_exist_ok=True)


def _run(*command: str | Path) -> None:
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)


def environment(kind: str, folder: Path) -> dict[str, str]:
    """The sanitizer's runtime for a Python that was built without it."""
    # The sanitizers wrap what libstdc++ throws with, and look for it at the start.
    runtimes = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        for name in (RUNTIMES[kind], "libstdc++.so.6")
    ]
    # As without sanitizers: what is too large gives no memory.
    common = f"log_path={folder}/reports/report:allocator_may_return_null=1"
    suppressions = ROOT / "tests/sanitize/thread_suppressions.txt"
    simulator = folder / "simulator/tests/metal_simulator/libmetal_simulator.so"
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": f"{common}:detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": f"{common}:print_stacktrace=1",
        "TSAN_OPTIONS": f"{common}:suppressions={suppressions}:die_after_fork=0",
        "PYTHONPATH": str(folder / "package"),
        "MLX_FUSED_SIMULATOR_LIBRARY": str(simulator),
    }


def take_reports(folder: Path) -> str:
    """What the sanitizers wrote since the last call, in any process."""
    reports = folder / "reports"
    files = sorted(reports.glob("*")) if reports.exists() else []
    lines = "".join(file.read_text(errors="replace") for file in files).splitlines(True)
    text = "".join(line for line in lines if not any(w in line for w in WARNINGS))
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir(parents=True)
    return text


def check_faults(kind: str, folder: Path) -> None:
    """Exits unless the sanitizer reports each fault, and nothing else."""
    (module,) = (folder / "extension").glob("tests/sanitize/sanitizer_faults*.so")
    for fault, words in {"sound": "", **FAULTS[kind]}.items():
        take_reports(folder)
        result = subprocess.run(
            [
                sys.executable,
                "-c",
                FAULT.format(cache=CACHE[kind]),
                module.parent,
                fault,
            ],
            env=environment(kind, folder),
            capture_output=True,
            text=True,
            check=False,
        )
        # UndefinedBehaviorSanitizer, beside another, writes to standard error alone.
        report = take_reports(folder) + result.stderr
        is_right = words in report if words else not report and result.returncode == 0
        print(f"{kind}: {fault}: {words or 'nothing'} reported: {is_right}", flush=True)
        if not is_right:
            sys.exit(report + result.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sanitizer", choices=SANITIZERS)
    parser.add_argument(
        "tests", nargs="*", help="pytest's arguments; default: the whole suite"
    )
    arguments, others = parser.parse_known_args()
    kind: str = arguments.sanitizer
    folder = ROOT / "build/sanitize" / kind
    build(kind, folder)
    check_faults(kind, folder)
    tests = [*arguments.tests, *others] or [str(ROOT / "tests")]
    if kind == "thread":
        tests += [f"--ignore={ROOT / 'tests' / name}" for name in NOT_THREADED]
    result = subprocess.run(
        # Without capturing standard error's descriptor: see above.
        [
            sys.executable,
            "-c",
            PYTEST.format(cache=CACHE[kind]),
            "--capture=sys",
            *tests,
        ],
        env=environment(kind, folder),
        cwd=ROOT,
        check=False,
    )
    report = take_reports(folder)
    sys.exit(report or result.returncode)


if __name__ == "__main__":
    main()
