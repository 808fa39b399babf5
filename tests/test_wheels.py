"""What is released: the source distribution, and the wheels for here and for macOS.

Here with extensions for the oldest and the newest MLX. `make wheel-check` and
`make wheel-macos` build and check those for all, which takes minutes.
"""

import base64
import hashlib
import json
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

import build_backend
import build_wheels
import mlx_versions
import pytest
from cross_compile.cross_compile import cross_compile_every
from mlx_fused_optimizers import __version__

pytestmark = pytest.mark.fused
ROOT = Path(__file__).resolve().parents[1]
PYTHON = f"cp{sys.version_info[0]}{sys.version_info[1]}"
NAME = f"mlx_fused_optimizers-{__version__}"
INFORMATION = f"{NAME}.dist-info"
RELEASES = mlx_versions.releases_for(build_wheels.PYTHON)
MLX = sorted({RELEASES[0], RELEASES[-1]}, key=RELEASES.index)
EXTENSIONS = [f"_ext_{version.replace('.', '_')}" for version in MLX]


def files(folder: str, *patterns: str) -> set[str]:
    """Those below a folder of the repository, as they are named in a distribution."""
    found = {x for pattern in patterns for x in (ROOT / folder).rglob(pattern)}
    return {str(x.relative_to(ROOT / folder)) for x in found}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheels.build_sdist(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """The wheel for this machine, built from nothing but the source distribution."""
    return build_wheels.build_wheel(sdist, sdist.parent, MLX)


@pytest.fixture(scope="module")
def macos_wheel() -> Path:
    return cross_compile_every(ROOT / "build/cross", releases=MLX)


@pytest.fixture(params=["wheel", "macos_wheel"])
def any_wheel(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def metadata(wheel: Path, file: str) -> Message:
    return message_from_string(
        zipfile.ZipFile(wheel).read(f"{INFORMATION}/{file}").decode()
    )


def test_the_source_distribution_has_what_the_build_needs_and_no_more(
    sdist: Path,
) -> None:
    assert sdist.name == f"{NAME}.tar.gz"
    with tarfile.open(sdist) as archive:
        found = {x.name.removeprefix(f"{NAME}/") for x in archive.getmembers()}
    assert found == {
        *("CMakeLists.txt", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml"),
        *(f"cmake/{x}" for x in files("cmake", "*.cmake", "*.json")),
        *("cmake/build_backend.py", "cmake/mlx_versions.py"),
        *(f"csrc/{x}" for x in files("csrc", "*.h", "*.cpp")),
        *(f"metal/{x}" for x in files("metal", "*.h", "*.metal")),
        *(f"python/{x}" for x in files("python", "*.py", "*.pyi", "py.typed")),
    }


def test_a_wheel_has_the_package_and_an_extension_for_each_mlx(any_wheel: Path) -> None:
    found = set(zipfile.ZipFile(any_wheel).namelist())
    suffix = str(sysconfig.get_config_var("EXT_SUFFIX"))
    if "macosx" in any_wheel.name:
        suffix = f".cpython-{PYTHON[2:]}-darwin.so"
    assert found == {
        *files("python", "*.py", "*.pyi", "py.typed"),
        "mlx_fused_optimizers/formats.h",
        "mlx_fused_optimizers/update_rules.h",
        *(f"mlx_fused_optimizers/{name}{suffix}" for name in EXTENSIONS),
        *(f"{INFORMATION}/{x}" for x in ("METADATA", "RECORD", "WHEEL")),
        f"{INFORMATION}/licenses/LICENSE",
    }
    assert any_wheel.stat().st_size < 8e6


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


def test_a_wheel_needs_mlx_of_any_version(any_wheel: Path) -> None:
    needed = metadata(any_wheel, "METADATA").get_all("Requires-Dist")
    assert needed is not None
    oldest = next(iter(mlx_versions.RELEASES))
    assert [x for x in needed if "extra ==" not in x] == [f"mlx>={oldest}"]
    assert 'mlx[cuda12]; extra == "cuda12"' in needed


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
        libraries = list(installed.glob("*.so"))
        assert len(libraries) == len(MLX)
        for library in libraries:
            (rpath,) = re.findall(rb"@loader_path/[\w./]+", library.read_bytes())
            # Where the wheels of MLX put libmlx.dylib.
            path = installed / rpath.decode().removeprefix("@loader_path/")
            assert Path(os.path.normpath(path)) == tmp_path / "mlx" / "lib"
    else:
        assert "is not a supported wheel on this platform" in done.stderr


def test_it_works_in_an_empty_environment_without_a_compiler(
    wheel: Path, tmp_path: Path
) -> None:
    venv.create(tmp_path, symlinks=True)
    scripts = tmp_path / "bin"
    done = pip("--python", str(tmp_path), "install", wheel, mlx_versions.mlx(MLX[-1]))
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


@pytest.mark.parametrize(
    "beside",
    ["mlx-lm", *(f"mlx=={version}" for version in MLX)],
)
def test_pip_installs_it_beside_what_pins_an_mlx_on_macos(
    macos_wheel: Path, tmp_path: Path, beside: str
) -> None:
    options: list[str | Path] = ["--dry-run", "--quiet", "--only-binary=:all:"]
    options += ["--target", tmp_path / "nothing", "--platform", "macosx_14_0_arm64"]
    report = tmp_path / "report.json"
    done = pip("install", *options, "--report", report, macos_wheel, beside)
    assert done.returncode == 0, done.stderr
    found = {
        x["metadata"]["name"]: x["metadata"]["version"]
        for x in json.loads(report.read_text())["install"]
    }
    assert found["mlx-fused-optimizers"] == __version__
    # Requirements with markers are those of this machine: mlx-metal is not among them.
    if beside == "mlx-lm":
        assert "mlx-lm" in found
    else:
        assert found["mlx"] == beside.partition("==")[2]


def test_another_extension_for_the_same_mlx_is_not_merged(
    wheel: Path, tmp_path: Path
) -> None:
    with pytest.raises(build_wheels.BuildError, match="hold"):
        build_wheels.merge([wheel] * (len(MLX) + 1), tmp_path)


def test_a_source_install_is_for_the_mlx_that_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else for the newest: also if the one that is installed is not known."""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    needed = build_backend.get_requires_for_build_wheel()[-2:]
    assert needed == mlx_versions.build_requirements(mlx_versions.NEWEST)
    for version in [*RELEASES, "9.9.9"]:
        information = tmp_path / f"mlx-{version}.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: mlx\nVersion: {version}\n"
        )
        needed = build_backend.get_requires_for_build_wheel()[-2:]
        assert needed == build_backend.get_requires_for_build_editable()[-2:]
        known = version if version in RELEASES else mlx_versions.NEWEST
        assert needed == mlx_versions.build_requirements(known)
        shutil.rmtree(information)
