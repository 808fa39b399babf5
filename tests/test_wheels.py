"""What is released: the source distribution, and the wheels for here and for macOS."""

import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest
from cross_compile.cross_compile import cross_compile
from mlx_fused_optimizers import __version__
from mlx_fused_optimizers._requirements import MLX_VERSION

ROOT = Path(__file__).resolve().parents[1]
PYTHON = f"cp{sys.version_info[0]}{sys.version_info[1]}"
NAME = f"mlx_fused_optimizers-{__version__}"
INFORMATION = f"{NAME}.dist-info"


def files(folder: str, *patterns: str) -> set[str]:
    """Those below a folder of the repository, as they are named in a distribution."""
    found = {x for pattern in patterns for x in (ROOT / folder).rglob(pattern)}
    return {str(x.relative_to(ROOT / folder)) for x in found}


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution, and the wheel that is built from nothing but that."""
    folder = tmp_path_factory.mktemp("dist")
    scripts = sysconfig.get_path("scripts")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT],
        env={**os.environ, "PATH": os.pathsep.join([scripts, os.environ["PATH"]])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    """The wheel for this machine."""
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def macos_wheel() -> Path:
    return cross_compile(ROOT / "build/cross").wheel


@pytest.fixture(params=["wheel", "macos_wheel"])
def any_wheel(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def metadata(wheel: Path, file: str) -> Message:
    return message_from_string(
        zipfile.ZipFile(wheel).read(f"{INFORMATION}/{file}").decode()
    )


def test_the_source_distribution_has_what_the_build_needs_and_no_more(
    dist: Path,
) -> None:
    with tarfile.open(dist / f"{NAME}.tar.gz") as archive:
        found = {x.name.removeprefix(f"{NAME}/") for x in archive.getmembers()}
    assert found == {
        *("CMakeLists.txt", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml"),
        "cmake/embed_metal.cmake",
        *(f"csrc/{x}" for x in files("csrc", "*.h", "*.cpp")),
        *(f"metal/{x}" for x in files("metal", "*.h", "*.metal")),
        *(f"python/{x}" for x in files("python", "*.py", "*.pyi", "py.typed")),
    }


def test_a_wheel_has_the_package_and_its_extension(any_wheel: Path) -> None:
    found = set(zipfile.ZipFile(any_wheel).namelist())
    macos = f"_ext.cpython-{PYTHON[2:]}-darwin.so"
    here = f"_ext{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert found == {
        *files("python", "*.py", "*.pyi", "py.typed"),
        f"mlx_fused_optimizers/{macos if 'macosx' in any_wheel.name else here}",
        *(f"{INFORMATION}/{x}" for x in ("METADATA", "RECORD", "WHEEL")),
        f"{INFORMATION}/licenses/LICENSE",
    }


def test_every_file_of_a_wheel_is_recorded(any_wheel: Path) -> None:
    archive = zipfile.ZipFile(any_wheel)
    record = f"{INFORMATION}/RECORD"
    expected = [f"{record},,"]
    for name in archive.namelist():
        if name != record:
            content = archive.read(name)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest())
            text = digest.decode().rstrip("=")
            expected.append(f"{name},sha256={text},{len(content)}")
    assert sorted(archive.read(record).decode().splitlines()) == sorted(expected)


def test_a_wheel_needs_the_mlx_that_it_was_built_with(any_wheel: Path) -> None:
    needed = metadata(any_wheel, "METADATA").get_all("Requires-Dist")
    assert needed is not None
    assert [x for x in needed if "extra ==" not in x] == [
        f'mlx=={MLX_VERSION}; sys_platform == "darwin"',
        f'mlx[cpu]=={MLX_VERSION}; sys_platform == "linux"',
    ]


def test_the_tag_says_for_what_a_wheel_is(wheel: Path, macos_wheel: Path) -> None:
    macos = f"{PYTHON}-{PYTHON}-macosx_14_0_arm64"
    assert macos_wheel.name == f"{NAME}-{macos}.whl"
    assert metadata(macos_wheel, "WHEEL")["Tag"] == macos
    assert metadata(macos_wheel, "WHEEL")["Root-Is-Purelib"] == "false"
    assert wheel.name == f"{NAME}-{metadata(wheel, 'WHEEL')['Tag']}.whl"
    assert wheel.name.startswith(f"{NAME}-{PYTHON}-{PYTHON}-")


def pip(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments],
        env={name: x for name, x in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("platform", "fits"),
    [
        ("macosx_14_0_arm64", True),
        ("macosx_26_0_arm64", True),
        ("macosx_13_0_arm64", False),
        ("macosx_14_0_x86_64", False),
    ],
)
def test_pip_installs_it_on_macos_14_and_later(
    macos_wheel: Path, tmp_path: Path, platform: str, fits: bool
) -> None:
    options: list[str | Path] = ["--no-deps", "--no-index", "--only-binary=:all:"]
    options += ["--target", tmp_path, "--platform", platform]
    done = pip("install", *options, macos_wheel)
    assert (done.returncode == 0) == fits, done.stderr
    if fits:
        installed = tmp_path / "mlx_fused_optimizers"
        (library,) = installed.glob("*.so")
        (rpath,) = re.findall(rb"@loader_path/[\w./]+", library.read_bytes())
        # Where the wheels of MLX put libmlx.dylib.
        folder = Path(
            os.path.normpath(installed / rpath.decode()[len("@loader_path/") :])
        )
        assert folder == tmp_path / "mlx" / "lib"
    else:
        assert "is not a supported wheel on this platform" in done.stderr


def test_it_works_in_an_empty_environment_without_a_compiler(
    wheel: Path, tmp_path: Path
) -> None:
    venv.create(tmp_path, symlinks=True)
    scripts = tmp_path / "bin"
    done = pip("--python", str(tmp_path), "install", wheel)
    assert done.returncode == 0, done.stderr
    for compiler in ("cc", "c++", "gcc", "g++", "clang", "clang++"):
        assert shutil.which(compiler, path=str(scripts)) is None
    checked = subprocess.run(
        [scripts / "python", "-m", "mlx_fused_optimizers.selfcheck"],
        cwd=tmp_path,
        env={"PATH": str(scripts)},
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert re.search(r"^(\d+) of \1 kernels agree\.$", checked.stdout, re.MULTILINE)
