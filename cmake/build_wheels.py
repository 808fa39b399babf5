"""Builds the source distribution, and the wheel with an extension for each MLX.

    python cmake/build_wheels.py --output dist

Each extension is built from nothing but the source distribution, against its own MLX
and nanobind, which are fetched once to build/mlx. The wheels that come of it differ in
their extension alone, and are merged into one.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import mlx_versions

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"
PYTHON = ".".join(map(str, sys.version_info[:2]))
EXTENSION = re.compile(r"mlx_fused_optimizers/_ext_\w+\.[\w.-]+\.so")
BACKEND = """
import json, sys
from scikit_build_core import build
print(getattr(build, sys.argv[1])(sys.argv[2], json.loads(sys.argv[3])))
"""


class BuildError(RuntimeError):
    """The build failed; the text is what it said."""


def build_sdist(output: Path) -> Path:
    """Builds the source distribution in the folder `output`."""
    return output / run_backend("build_sdist", output, {})


def build_wheel(sdist: Path, output: Path, releases: list[str] | None = None) -> Path:
    """Builds the wheel for this Python and machine, in the folder `output`.

    It holds an extension for each of these MLX; by default for all.
    """
    source = unpack(sdist)
    wheels = []
    for version in releases or mlx_versions.releases_for(PYTHON):
        requirements = mlx_versions.build_requirements(version)
        packages = fetch(f"{version}-{sys.implementation.cache_tag}", requirements)
        folder = BUILD / "wheels" / f"{version}-{sys.implementation.cache_tag}"
        settings = {"build-dir": str(folder / "build")}
        name = run_backend(
            "build_wheel", folder, settings, source, PYTHONPATH=str(packages)
        )
        print(f"built for MLX {version}", flush=True)
        wheels.append(folder / name)
    return merge(wheels, output)


def fetch(name: str, requirements: list[str]) -> Path:
    """A folder below build/mlx with packages for PYTHONPATH, fetched at first."""
    folder = BUILD / "mlx" / name
    done = folder / "requirements.txt"
    wanted = "\n".join(requirements)
    if not done.exists() or done.read_text() != wanted:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade"]
        subprocess.run([*pip, "--target", folder, *requirements], check=True)
        done.write_text(wanted)
    return folder


def unpack(sdist: Path) -> Path:
    """The source distribution in build/wheels, where equal files are left as they are.

    So that what was built from them is not built again.
    """
    folder = BUILD / "wheels/source"
    found = set()
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            file = archive.extractfile(member)
            if file is not None:
                path = folder / member.name.partition("/")[2]
                found.add(path)
                content = file.read()
                if not path.exists() or path.read_bytes() != content:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
    for path in folder.rglob("*"):
        if path.is_file() and path not in found:
            path.unlink()
    return folder


def merge(wheels: list[Path], output: Path) -> Path:
    """One wheel with the extensions of all, which are otherwise alike."""
    contents: dict[str, bytes] = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                content = archive.read(name)
                if name.endswith("/RECORD"):
                    record = name
                elif contents.setdefault(name, content) != content:
                    raise BuildError(f"{name} of {wheel} is another than in the others")
    extensions = [name for name in contents if EXTENSION.fullmatch(name)]
    if len(extensions) != len(wheels) or len({wheel.name for wheel in wheels}) != 1:
        raise BuildError(f"{wheels} hold {extensions}")

    lines = [f"{record},,"]
    for name, content in sorted(contents.items()):
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest())
        text = digest.decode().rstrip("=")
        lines.append(f"{name},sha256={text},{len(content)}")
    contents[record] = "".join(f"{line}\n" for line in sorted(lines)).encode()
    output.mkdir(parents=True, exist_ok=True)
    path = output / wheels[0].name
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        # The metadata last, as the format recommends.
        for name in sorted(contents, key=lambda x: (".dist-info/" in x, x)):
            is_library = bool(EXTENSION.fullmatch(name))
            information = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            information.compress_type = zipfile.ZIP_DEFLATED
            information.external_attr = (0o100755 if is_library else 0o100644) << 16
            archive.writestr(information, contents[name])
    return path


def run_backend(
    hook: str,
    output: Path,
    settings: dict[str, str],
    source: Path = ROOT,
    **environment: str,
) -> str:
    """Runs scikit-build-core; returns the name of the file in `output`.

    Raises:
        BuildError: with what it said.
    """
    output.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    arguments = [hook, str(output.resolve()), json.dumps(settings)]
    done = subprocess.run(
        [sys.executable, "-c", BACKEND, *arguments],
        cwd=source,
        env={**os.environ, "PATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise BuildError(done.stdout)
    return done.stdout.splitlines()[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("dist"))
    output = parser.parse_args().output.resolve()
    try:
        sdist = build_sdist(output)
        wheel = build_wheel(sdist, output)
    except BuildError as error:
        print(f"build failed: {error}", file=sys.stderr)
        return 1
    for path in (sdist, wheel):
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
