"""The macOS wheels of MLX: its real Metal headers and kernels, and libmlx.dylib."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .compile_kernels import cache_folder

MLX = "0.32.4"


def macos_wheels() -> Path:
    """The folder in which the wheels are unpacked, as site-packages would be.

    They are downloaded once, to MLX_FUSED_SIMULATOR_CACHE; 55 MB.
    """
    folder = cache_folder() / f"mlx-{MLX}-macos"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            wheels, unpacked = Path(work, "wheels"), Path(work, "unpacked")
            subprocess.run(
                [
                    *(sys.executable, "-m", "pip", "download", "--quiet"),
                    *("--no-deps", "--only-binary=:all:", "--dest", str(wheels)),
                    *("--platform", "macosx_14_0_arm64", "--python-version", "3.11"),
                    *(f"mlx=={MLX}", f"mlx-metal=={MLX}"),
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
