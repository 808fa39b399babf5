"""What cannot work is refused on import, in one line with the command that mends it."""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx_fused_optimizers
import pytest
from mlx_fused_optimizers import _requirements

LINUX = sys.platform == "linux"
MLX = Path(mx.__file__).parent
CORE = Path(mx.__file__).name
EXTENSION = Path(mlx_fused_optimizers._ext.__file__).name
VERSION = _requirements.MLX_VERSION
PYTHON = ".".join(map(str, sys.version_info[:2]))
MACHINE = platform.machine()


class Site:
    """A site-packages of its own: our package, and what a test puts beside it."""

    def __init__(self, folder: Path) -> None:
        self.mlx = folder / "mlx"
        self.ours = folder / "mlx_fused_optimizers"
        self.folder = folder
        shutil.copytree(Path(mlx_fused_optimizers.__file__).parent, self.ours)

    def add_mlx(self, version: str = VERSION, library: bool = True) -> None:
        """MLX as its wheel installs it; its libmlx is in a wheel of its own."""
        information = self.folder / f"mlx-{version}.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: mlx\nVersion: {version}\n"
        )
        self.mlx.mkdir()
        for path in MLX.iterdir():
            if path.name not in ("lib", CORE):
                (self.mlx / path.name).symlink_to(path)
        shutil.copy(MLX / CORE, self.mlx)
        if library:
            (self.mlx / "lib").symlink_to(MLX / "lib")

    def run(self) -> subprocess.CompletedProcess[str]:
        program = "import mlx_fused_optimizers as optim; print(optim.__version__)"
        return subprocess.run(
            [sys.executable, "-S", "-c", program],  # -S: without site-packages
            env={**os.environ, "PYTHONPATH": str(self.folder)},
            capture_output=True,
            text=True,
        )


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def no_mlx(site: Site) -> None:
    pass


def another_version(site: Site) -> None:
    site.add_mlx("0.31.0")


def no_libmlx(site: Site) -> None:
    site.add_mlx(library=False)


def libmlx_of_another_version(site: Site) -> None:
    site.add_mlx()
    (site.mlx / CORE).unlink()
    (site.mlx / "core").unlink()
    (site.mlx / "core.py").write_text('__version__ = "0.31.0"\n')


def libmlx_with_other_symbols(site: Site) -> None:
    site.add_mlx(library=False)
    (site.mlx / "lib").mkdir()
    any_library = next(Path(sysconfig.get_config_var("DESTSHARED")).glob("*.so"))
    shutil.copy(any_library, site.mlx / "lib" / "libmlx.so")


def mlx_for_another_python(site: Site) -> None:
    site.add_mlx()
    (site.mlx / CORE).rename(site.mlx / "core.cpython-399-x86_64-linux-gnu.so")


def with_header(path: Path, offset: int, header: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(header)] = header
    path.write_bytes(content)


def mlx_for_32_bits(site: Site) -> None:
    site.add_mlx()
    with_header(site.mlx / CORE, 4, b"\1")  # EI_CLASS


def mlx_for_another_processor(site: Site) -> None:
    site.add_mlx()
    with_header(site.mlx / CORE, 18, b"\x08\0")  # e_machine: MIPS


def mlx_for_macos(site: Site) -> None:
    site.add_mlx()
    with_header(site.mlx / CORE, 0, b"\xcf\xfa\xed\xfe")  # Mach-O's magic number


def ours_for_another_processor(site: Site) -> None:
    site.add_mlx()
    with_header(site.ours / EXTENSION, 18, b"\x08\0")


def ours_for_another_python(site: Site) -> None:
    site.add_mlx()
    (site.ours / EXTENSION).rename(site.ours / "_ext.cpython-399-x86_64-linux-gnu.so")


REINSTALL_MLX = f"--force-reinstall {_requirements.MLX}"
REINSTALL_OURS = f"--force-reinstall --no-cache-dir {_requirements.OURSELVES}"
OTHER_MACHINE = f"a library for another architecture than {MACHINE}"


@pytest.mark.skipif(not LINUX, reason="alters ELF files")
@pytest.mark.parametrize(
    ("prepare", "needed", "found", "arguments"),
    [
        (no_mlx, "mlx", "no mlx", _requirements.MLX),
        (another_version, "mlx", "mlx 0.31.0", _requirements.MLX),
        (no_libmlx, "mlx", "no libmlx.so", REINSTALL_MLX),
        (libmlx_of_another_version, "mlx", "libmlx 0.31.0", REINSTALL_MLX),
        (
            libmlx_with_other_symbols,
            "mlx",
            "a libmlx with other symbols",
            REINSTALL_MLX,
        ),
        (
            mlx_for_another_python,
            "mlx",
            f"no mlx.core for Python {PYTHON} on {MACHINE}",
            REINSTALL_MLX,
        ),
        (mlx_for_32_bits, "mlx", OTHER_MACHINE, REINSTALL_MLX),
        (mlx_for_another_processor, "mlx", OTHER_MACHINE, REINSTALL_MLX),
        (mlx_for_macos, "mlx", OTHER_MACHINE, REINSTALL_MLX),
        (ours_for_another_processor, "ours", OTHER_MACHINE, REINSTALL_OURS),
        (
            ours_for_another_python,
            "ours",
            f"no mlx_fused_optimizers._ext for Python {PYTHON} on {MACHINE}",
            REINSTALL_OURS,
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    site: Site,
    prepare: Callable[[Site], None],
    needed: str,
    found: str,
    arguments: str,
) -> None:
    prepare(site)
    done = site.run()
    assert done.returncode == 1
    needed = {"mlx": f"mlx {VERSION}", "ours": "its extension"}[needed]
    lines = done.stderr.splitlines()
    assert lines[-1] == (
        f"ImportError: mlx_fused_optimizers needs {needed}, found {found}; "
        f"run: pip install {arguments}"
    )
    assert done.stderr.count("Error: ") == 1  # no other exception led to it
    assert not re.search(r"cannot open|ELF|undefined symbol", done.stderr)


def test_what_fits_is_imported(site: Site) -> None:
    site.add_mlx()
    done = site.run()
    assert done.stdout.strip() == mlx_fused_optimizers.__version__, done.stderr


def test_the_command_is_for_the_version_that_we_are_built_with() -> None:
    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f'"mlx[cpu]=={VERSION}; sys_platform' in pyproject
    assert set(re.findall(r'"mlx(?:\[cpu\])?==([\d.]+)', pyproject)) == {VERSION}


def test_python_for_intel_is_refused_on_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    with pytest.raises(ImportError) as refused:
        _requirements.check_requirements()
    assert str(refused.value) == (
        "mlx_fused_optimizers needs Python for arm64, found Python for x86_64; "
        f"run: arch -arm64 python3 -m pip install {_requirements.OURSELVES}"
    )


@pytest.mark.parametrize(
    ("message", "found"),
    [
        (
            "dlopen(/site/mlx/core.cpython-311-darwin.so, 0x0002): Library not loaded: "
            "@rpath/libmlx.dylib\n  Referenced from: <0A1B> /site/mlx/core.so\n"
            "  Reason: tried: '/site/mlx/lib/libmlx.dylib' (no such file)",
            "no libmlx.dylib",
        ),
        (
            "dlopen(/site/mlx/core.cpython-311-darwin.so, 0x0002): tried: "
            "'/site/mlx/core.cpython-311-darwin.so' (mach-o file, but is an "
            "incompatible architecture (have 'x86_64', need 'arm64'))",
            OTHER_MACHINE,
        ),
        (
            "dlopen(/site/mlx/core.cpython-311-darwin.so, 0x0002): Symbol not found: "
            "__ZN3mlx4core5arrayE\n  Referenced from: <0A1B> /site/mlx/core.so\n"
            "  Expected in: <2C3D> /site/mlx/lib/libmlx.dylib",
            "a libmlx with other symbols",
        ),
        (
            "libstdc++.so.6: version `GLIBCXX_3.4.99' not found\nand more",
            "mlx.core that cannot be loaded "
            "(libstdc++.so.6: version `GLIBCXX_3.4.99' not found)",
        ),
    ],
    ids=["libmlx", "architecture", "symbol", "anything else"],
)
def test_what_the_loader_says_is_told_in_words(message: str, found: str) -> None:
    assert _requirements._describe("mlx.core", ImportError(message)) == found
