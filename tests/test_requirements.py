"""What cannot work is refused on import in one line; what has no kernels is told."""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import mlx.core as mx
import mlx_fused_optimizers
import mlx_versions
import pytest
from mlx_fused_optimizers import _extension, _requirements

pytestmark = pytest.mark.fused
LINUX = sys.platform == "linux"
MLX = Path(mx.__file__).parent
CORE = Path(mx.__file__).name
VERSION = metadata.version("mlx")
MODULE = f"_ext_{re.sub(r'[^0-9A-Za-z]', '_', VERSION)}"
EXTENSION = MODULE + str(sysconfig.get_config_var("EXT_SUFFIX"))
PYTHON = ".".join(map(str, sys.version_info[:2]))
MACHINE = platform.machine()
PROGRAM = "import mlx_fused_optimizers as optim; print(optim.__version__)"


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

    def add_backend(self, name: str) -> None:
        """As if the distribution with this libmlx were installed."""
        information = self.folder / f"{name.replace('-', '_')}-{VERSION}.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {VERSION}\n"
        )

    def run(
        self, program: str = PROGRAM, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-S", "-c", program],  # -S: without site-packages
            env={**os.environ, "PYTHONPATH": str(self.folder), **environment},
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


def no_libmlx_of_cuda(site: Site) -> None:
    site.add_mlx(library=False)
    site.add_backend("mlx-cuda-12")


def no_libmlx_of_the_cpu(site: Site) -> None:
    site.add_mlx(library=False)
    site.add_backend("mlx-cpu")


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
    other = site.ours / f"{MODULE}.cpython-399-x86_64-linux-gnu.so"
    (site.ours / EXTENSION).rename(other)


EXTRA = "[cpu]" if LINUX else ""
REINSTALL_MLX = f"--force-reinstall 'mlx{EXTRA}=={VERSION}'"
REINSTALL_OURS = f"--force-reinstall --no-cache-dir {_requirements.OURSELVES}"
OTHER_MACHINE = f"a library for another architecture than {MACHINE}"


@pytest.mark.skipif(not LINUX, reason="alters ELF files")
@pytest.mark.parametrize(
    ("prepare", "needed", "found", "arguments"),
    [
        (no_mlx, "any mlx", "no mlx", f"'mlx{EXTRA}>=0.31.2'"),
        (another_version, "any mlx", "mlx 0.31.0", f"--upgrade 'mlx{EXTRA}>=0.31.2'"),
        (
            no_libmlx,
            "backend",
            "no libmlx.so",
            f"'mlx[cpu]=={VERSION}' (or mlx[cuda12], mlx[cuda13])",
        ),
        (no_libmlx_of_the_cpu, "mlx", "no libmlx.so", REINSTALL_MLX),
        (
            no_libmlx_of_cuda,
            "mlx",
            "no libmlx.so",
            REINSTALL_MLX.replace("cpu", "cuda12"),
        ),
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
            f"no mlx_fused_optimizers.{MODULE} for Python {PYTHON} on {MACHINE}",
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
    needed = {
        "any mlx": "mlx 0.31.2 or later",
        "backend": f"mlx {VERSION} with a backend",
        "mlx": f"mlx {VERSION}",
        "ours": f"its extension for MLX {VERSION}",
    }[needed]
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


# An extension is loaded, or plain MLX operations are used: then with the reason.
WHICH = """
from mlx_fused_optimizers import _ext, _extension
print(_ext and _ext.__name__, _extension.reason(), _extension.supported_versions())
"""


def no_extension_for_it(site: Site) -> str:
    other = EXTENSION.replace(VERSION.replace(".", "_"), "0_31_9")
    (site.ours / EXTENSION).rename(site.ours / other)
    return f"it has no kernels for MLX {VERSION}. It has kernels for MLX 0.31.9."


def no_extensions(site: Site) -> str:
    (site.ours / EXTENSION).unlink()
    return f"it has no kernels for MLX {VERSION}. It has kernels for MLX none."


def an_extension_of_another_build(site: Site) -> str:
    """Its symbols are not those of the libmlx that is here."""
    path = site.ours / EXTENSION
    content = path.read_bytes()
    symbol = b"_ZN3mlx4core5arrayC1"
    assert symbol in content
    path.write_bytes(content.replace(symbol, symbol.replace(b"array", b"arrau")))
    return (
        f"its extension for MLX {VERSION} found a libmlx with other symbols. "
        f"It has kernels for MLX {VERSION}."
    )


@pytest.mark.skipif(not LINUX, reason="alters ELF files")
@pytest.mark.parametrize(
    "prepare",
    [no_extension_for_it, no_extensions, an_extension_of_another_build],
)
def test_without_an_extension_that_fits_it_warns_once(
    site: Site, prepare: Callable[[Site], str]
) -> None:
    site.add_mlx()
    ending = prepare(site)
    message = (
        "mlx_fused_optimizers uses plain MLX operations, slower and with more memory: "
    )
    done = site.run(WHICH)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("None i")
    (warning,) = (x for x in done.stderr.splitlines() if "Warning" in x)
    # It names the line that imports the package.
    assert warning == f"<string>:2: RuntimeWarning: {message}{ending}"
    refused = site.run(WHICH, MLX_FUSED_REQUIRE="1")
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1] == (
        f"ImportError: {message}{ending} (MLX_FUSED_REQUIRE is set.)"
    )
    assert site.run(WHICH, MLX_FUSED_REQUIRE="0").returncode == 0


def test_an_extension_with_another_nanobind_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the nanobind of cmake/mlx_versions.json, arrays are MLX's."""
    assert _extension._ext.is_array_type(mx.array)
    assert not _extension._ext.is_array_type(int)
    monkeypatch.setattr(_extension._ext, "is_array_type", lambda _: False)
    extension, reason = _extension._find(VERSION)
    assert extension is None
    assert reason is not None and "of different nanobinds" in reason


@pytest.mark.skipif(not LINUX, reason="alters ELF files")
def test_the_extension_is_chosen_by_the_version_of_mlx(site: Site) -> None:
    site.add_mlx()
    name = VERSION.replace(".", "_")
    for other in ("0_31_0_dev1", "0_32_10"):
        shutil.copy(site.ours / EXTENSION, site.ours / EXTENSION.replace(name, other))
    done = site.run(WHICH)
    assert done.stderr == ""
    assert done.stdout == (
        f"mlx_fused_optimizers._ext_{name} None "
        f"['0.31.0.dev1', '{VERSION}', '0.32.10']\n"
    )


def test_what_names_versions_of_mlx_names_those_of_the_table() -> None:
    root = Path(__file__).parents[1]
    oldest, newest = next(iter(mlx_versions.RELEASES)), mlx_versions.NEWEST
    assert oldest == _requirements.OLDEST_MLX
    assert f'dependencies = ["mlx>={oldest}"]' in (root / "pyproject.toml").read_text()
    guide = (root / "docs/getting_started.md").read_text()
    assert f"each MLX from {oldest} to {newest}" in guide
    workflow = (root / ".github/workflows/test.yml").read_text()
    assert re.findall(r"mlx: ([\d.]+)", workflow) == [oldest, newest]


def test_python_without_the_gil_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: 1)
    with pytest.raises(ImportError) as refused:
        _requirements.check_python()
    assert str(refused.value) == (
        f"mlx_fused_optimizers needs Python with the GIL, found free-threaded Python "
        f"{PYTHON}; run: python{PYTHON} -m pip install {_requirements.OURSELVES}"
    )


def test_python_for_intel_is_refused_on_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    with pytest.raises(ImportError) as refused:
        _requirements.check_python()
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
    assert _requirements.describe("mlx.core", ImportError(message)) == found
