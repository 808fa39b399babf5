"""scikit-build-core, for the MLX that is where the package will be installed.

An extension fits the MLX that it was built against. pip builds in an environment of its
own, in which it would put the newest MLX: so we ask for the one that is installed, or
else for the newest that we know. Without build isolation nothing is asked for.
"""

import sysconfig
from importlib.metadata import distributions
from typing import Any

import mlx_versions
from scikit_build_core import build
from scikit_build_core.build import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
]


def get_requires_for_build_wheel(settings: Any = None) -> list[str]:
    """What scikit-build-core needs, MLX and its nanobind."""
    needed: list[str] = build.get_requires_for_build_wheel(settings)
    return needed + mlx_versions.build_requirements(_mlx_version())


def get_requires_for_build_editable(settings: Any = None) -> list[str]:
    """What scikit-build-core needs, MLX and its nanobind."""
    needed: list[str] = build.get_requires_for_build_editable(settings)
    return needed + mlx_versions.build_requirements(_mlx_version())


def _mlx_version() -> str:
    """The MLX of this Python, whose packages an isolated build cannot import."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    for distribution in distributions(name="mlx", path=folders):
        if distribution.version in mlx_versions.RELEASES:
            return distribution.version
    return mlx_versions.NEWEST
