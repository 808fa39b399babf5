"""The macOS wheels of MLX: its real Metal headers and kernels, and libmlx.dylib."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

from .compile_kernels import cache_folder


def macos_wheels(version: str | None = None) -> Path:
    """The folder in which the wheels are unpacked, as site-packages would be.

    They are downloaded once, to MLX_FUSED_SIMULATOR_CACHE; 55 MB. The default is the
    version that is installed here.
    """
    version = version or metadata.version("mlx")
    folder = cache_folder() / f"mlx-{version}-macos"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            wheels, unpacked = Path(work, "wheels"), Path(work, "unpacked")
            subprocess.run(
                [
                    *(sys.executable, "-m", "pip", "download", "--quiet"),
                    *("--no-deps", "--only-binary=:all:", "--dest", str(wheels)),
                    *("--platform", "macosx_14_0_arm64", "--python-version", "3.11"),
                    *(f"mlx=={version}", f"mlx-metal=={version}"),
                ],
                check=True,
            )
            for wheel in wheels.glob("*.whl"):
                zipfile.ZipFile(wheel).extractall(unpacked)
            try:
                os.rename(unpacked, folder)
            except OSError:  # another process was faster
                if not folder.exists():
                    raise
    return folder
