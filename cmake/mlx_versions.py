"""The table of the MLX releases that the package has kernels for, and their builds.

mlx_versions.json is the one place that names them: by version, a nanobind with the
internals of the one that this MLX was built with, and the Pythons of MLX's wheels.
"""

import json
import sys
from pathlib import Path
from typing import TypedDict


class Release(TypedDict):
    """What belongs to a release of MLX."""

    nanobind: str
    python: list[str]


# From the oldest to the newest.
RELEASES: dict[str, Release] = json.loads(
    Path(__file__).with_name("mlx_versions.json").read_text()
)
NEWEST = list(RELEASES)[-1]


def releases_for(python: str) -> list[str]:
    """The versions of MLX that have wheels for a Python, such as "3.11"."""
    return [version for version, x in RELEASES.items() if python in x["python"]]


def mlx(version: str = "") -> str:
    """The requirement that brings MLX with its headers and libmlx; the newest if ""."""
    name = "mlx[cpu]" if sys.platform == "linux" else "mlx"
    return f"{name}=={version}" if version else name


def build_requirements(version: str) -> list[str]:
    """What is needed to build for a version of MLX; one that is not known too."""
    release = RELEASES.get(version)
    nanobind = f"nanobind=={release['nanobind']}" if release else "nanobind"
    return [mlx(version), nanobind]
