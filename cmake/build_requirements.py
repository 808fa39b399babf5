"""Print what the build and the project's extras require, a line each.

Without an argument: what the build needs, CMake, Ninja, MLX and its nanobind included.
With the name of an extra of pyproject.toml: what that extra adds.
"""

import argparse
import sys
from pathlib import Path

import mlx_versions

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib  # a package of its own until 3.11

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("extra", nargs="?")
parser.add_argument(
    "--mlx",
    default=mlx_versions.NEWEST,
    help="MLX's version, or 'newest' for that of the index; default: %(default)s",
)
arguments = parser.parse_args()
project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
if arguments.extra:
    requirements = project["project"]["optional-dependencies"][arguments.extra]
else:
    settings = project["tool"]["scikit-build"]
    version = "" if arguments.mlx == "newest" else arguments.mlx
    requirements = [
        *project["build-system"]["requires"],
        *mlx_versions.build_requirements(version),
        f"cmake{settings['cmake']['version']}",
        f"ninja{settings['ninja']['version']}",
    ]
print("\n".join(requirements))
