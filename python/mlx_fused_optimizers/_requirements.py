"""The checks that the Python, the MLX and the libmlx beside us work at all.

Where they do not, the user reads one line: what is needed, what was found and the
command that mends it. What the dynamic loader says is paths and symbols, and no help.
"""

import platform
import re
import sys
import sysconfig
from importlib import import_module, metadata
from pathlib import Path

from ._version import __version__

OLDEST_MLX = "0.31.2"
NEEDED = f"mlx {OLDEST_MLX} or later"
OURSELVES = f"mlx-fused-optimizers=={__version__}"


def check_python() -> None:
    """Refuse a Python that our extensions are not made for.

    Raises:
        ImportError: one line.
    """
    if (sys.platform, platform.machine()) == ("darwin", "x86_64"):
        raise ImportError(
            "mlx_fused_optimizers needs Python for arm64, found Python for x86_64; "
            f"run: arch -arm64 python3 -m pip install {OURSELVES}"
        )
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        # It does not tell Python that it can do without the GIL: its own objects have
        # no locks.
        python = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise ImportError(
            f"mlx_fused_optimizers needs Python with the GIL, found free-threaded "
            f"Python {python}; run: python{python} -m pip install {OURSELVES}"
        )


def import_mlx() -> str:
    """Load MLX and return its version.

    Raises:
        ImportError: one line, if it is missing, too old or for another machine.
    """
    try:
        version = metadata.version("mlx")
    except metadata.PackageNotFoundError:
        raise error(NEEDED, "no mlx", _with_libmlx()) from None
    if _release(version) < _release(OLDEST_MLX):
        raise error(NEEDED, f"mlx {version}", f"--upgrade {_with_libmlx()}")

    reinstall = f"--force-reinstall {_with_libmlx(version)}"
    try:
        core = import_module("mlx.core")
    except ImportError as failure:
        found = describe("mlx.core", failure)
        if found == "no libmlx.so" and not _libmlx_extra():
            command = f"{_with_libmlx(version)} (or mlx[cuda12], mlx[cuda13])"
            raise error(f"mlx {version} with a backend", found, command) from None
        raise error(f"mlx {version}", found, reinstall) from None
    # libmlx's own. Without the extension, the folder of its stubs is imported and has
    # none. A development build may be named otherwise in the two.
    libmlx = getattr(core, "__version__", None)
    if libmlx is None:
        raise error(f"mlx {version}", missing("mlx.core"), reinstall)
    if libmlx != version and _is_release(libmlx) and _is_release(version):
        raise error(f"mlx {version}", f"libmlx {libmlx}", reinstall)
    return str(libmlx)


def error(needed: str, found: str, arguments: str) -> ImportError:
    """The one line; `arguments` are those of pip."""
    return ImportError(
        f"mlx_fused_optimizers needs {needed}, found {found}; "
        f"run: pip install {arguments}"
    )


def missing(module: str) -> str:
    """That there is no `module` for this Python."""
    python = ".".join(map(str, sys.version_info[:2]))
    return f"no {module} for Python {python} on {platform.machine()}"


def describe(module: str, failure: ImportError) -> str:
    """What is in the place of `module`, by what the loader of Linux or macOS says."""
    if isinstance(failure, ModuleNotFoundError):
        return missing(module)
    text = str(failure)
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


def _with_libmlx(version: str = "") -> str:
    """What to ask pip for; on Linux libmlx is in a distribution of its own."""
    extra = f"[{_libmlx_extra() or 'cpu'}]" if sys.platform == "linux" else ""
    return f"'mlx{extra}=={version}'" if version else f"'mlx{extra}>={OLDEST_MLX}'"


def _libmlx_extra() -> str | None:
    """MLX's extra whose libmlx is installed; those of CPU and CUDA share a place."""
    for extra in ("cuda13", "cuda12", "cpu"):
        try:
            metadata.version(f"mlx-{extra.replace('cuda', 'cuda-')}")
        except metadata.PackageNotFoundError:
            continue
        return extra
    return None


def _is_release(version: str) -> bool:
    return re.fullmatch(r"\d+(\.\d+)*", version) is not None


def _release(version: str) -> tuple[int, ...]:
    """The numbers with which a version begins."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()
