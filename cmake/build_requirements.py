"""Print what pyproject.toml requires, a line each.

Without an argument: what the build needs, CMake and Ninja included. With the name of
an extra: what that extra adds.
"""

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib  # a package of its own until 3.11

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
if len(sys.argv) > 1:
    requirements = project["project"]["optional-dependencies"][sys.argv[1]]
else:
    settings = project["tool"]["scikit-build"]
    requirements = [
        *project["build-system"]["requires"],
        f"cmake{settings['cmake']['version']}",
        f"ninja{settings['ninja']['version']}",
    ]
print("\n".join(requirements))
