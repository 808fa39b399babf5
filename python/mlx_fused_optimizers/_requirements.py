"""The check that the MLX beside us, and our own library, are those that fit.

Where they are not, the user reads one line: what is needed, what was found and the
command that mends it. What the dynamic loader says is paths and symbols, and no help.
"""

import platform
import re
import sys
from importlib import import_module, metadata
from pathlib import Path

from ._version import __version__

MLX_VERSION = "0.32.4"  # an extension fits exactly the MLX that it was built against
MLX = f"'mlx[cpu]=={MLX_VERSION}'" if sys.platform == "linux" else f"mlx=={MLX_VERSION}"
OURSELVES = f"mlx-fused-optimizers=={__version__}"


def check_requirements() -> None:
    """Load MLX and our extension.

    Raises:
        ImportError: one line, if either is missing, of another version or for another
            machine.
    """
    if (sys.platform, platform.machine()) == ("darwin", "x86_64"):
        raise ImportError(
            "mlx_fused_optimizers needs Python for arm64, found Python for x86_64; "
            f"run: arch -arm64 python3 -m pip install {OURSELVES}"
        )
    needed = f"mlx {MLX_VERSION}"
    try:
        version = metadata.version("mlx")
    except metadata.PackageNotFoundError:
        raise _error(needed, "no mlx", MLX) from None
    if version != MLX_VERSION:
        raise _error(needed, f"mlx {version}", MLX)

    reinstall = f"--force-reinstall {MLX}"
    try:
        core = import_module("mlx.core")
    except ImportError as error:
        raise _error(needed, _describe("mlx.core", error), reinstall) from None
    # libmlx's own, which is installed as a distribution of its own. Without the
    # extension, the folder of its stubs is imported and has none.
    libmlx = getattr(core, "__version__", None)
    if libmlx != MLX_VERSION:
        found = f"libmlx {libmlx}" if libmlx else _missing("mlx.core")
        raise _error(needed, found, reinstall)

    try:
        import_module("._ext", __package__)
    except ImportError as error:
        found = _describe("mlx_fused_optimizers._ext", error)
        if "libmlx" in found:
            raise _error(needed, found, reinstall) from None
        arguments = f"--force-reinstall --no-cache-dir {OURSELVES}"
        raise _error("its extension", found, arguments) from None


def _error(needed: str, found: str, arguments: str) -> ImportError:
    return ImportError(
        f"mlx_fused_optimizers needs {needed}, found {found}; "
        f"run: pip install {arguments}"
    )


def _missing(module: str) -> str:
    python = ".".join(map(str, sys.version_info[:2]))
    return f"no {module} for Python {python} on {platform.machine()}"


def _describe(module: str, error: ImportError) -> str:
    """What is in the place of `module`, by what the loader of Linux or macOS says."""
    if isinstance(error, ModuleNotFoundError):
        return _missing(module)
    text = str(error)
    absent = re.match(r"(.*): cannot open shared object file", text) or re.search(
        r"Library not loaded: (\S+)", text
    )
    if (
        re.search(r"wrong ELF class|invalid ELF header|incompatible archit", text)
        # So says Linux of a library for another processor, too.
        or (absent and Path(absent[1]).is_file())
    ):
        return f"a library for another architecture than {platform.machine()}"
    if absent:
        return f"no {Path(absent[1]).name}"
    if re.search(r"undefined symbol|Symbol not found", text):
        return "a libmlx with other symbols"
    return f"{module} that cannot be loaded ({text.splitlines()[0]})"
