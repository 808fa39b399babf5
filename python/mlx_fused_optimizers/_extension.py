"""The extension that fits the MLX beside us, or None: then plain MLX operations do.

An extension of MLX is bound to the MLX that it was compiled against. So a wheel has one
for each, such as `_ext_0_32_4.cpython-311-darwin.so` for MLX 0.32.4; a source install
has one, for the MLX that it was built with.
"""

import os
import re
import warnings
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from . import _requirements

REQUIRE = "MLX_FUSED_REQUIRE"

_folder = Path(__file__).parent
_reason: str | None = None


def supported_versions() -> list[str]:
    """The versions of MLX that there are extensions for, from the oldest."""
    names = {_parts(path)[0] for path in _extensions() if _is_for_this_python(path)}
    return sorted(
        (name.removeprefix("_ext_").replace("_", ".") for name in names),
        key=lambda version: [int(x) for x in re.findall(r"\d+", version)],
    )


def reason() -> str | None:
    """Why no extension is loaded; None if one is."""
    return _reason


def load() -> ModuleType | None:
    """Check what we run on, and load the extension that fits.

    Without one, a warning names the versions of MLX that have kernels. It is an error
    if the environment variable MLX_FUSED_REQUIRE is set, and not to 0.

    Raises:
        ImportError: one line with the command that mends it, if what is installed
            cannot work: MLX without libmlx, or a library for another machine.
    """
    global _reason
    _requirements.check_python()
    version = _requirements.import_mlx()
    extension, _reason = _find(version)
    if _reason is not None:
        supported = ", ".join(supported_versions()) or "none"
        message = (
            f"mlx_fused_optimizers uses plain MLX operations, slower and with more "
            f"memory: {_reason}. It has kernels for MLX {supported}."
        )
        if os.environ.get(REQUIRE, "0") not in ("", "0"):
            raise ImportError(f"{message} ({REQUIRE} is set.)")
        # Of the line that imports the package, past this module and __init__.py.
        warnings.warn(message, RuntimeWarning, stacklevel=4)
    return extension


def _find(version: str) -> tuple[ModuleType | None, str | None]:
    """The extension for a version of MLX, or why there is none."""
    name = "_ext_" + re.sub(r"[^0-9A-Za-z]", "_", version)
    here = [path for path in _extensions() if _parts(path)[0] == name]
    if not here:
        return None, f"it has no kernels for MLX {version}"
    module = f"{__package__}.{name}"
    ours = _requirements.OURSELVES
    reinstall = f"--force-reinstall --no-cache-dir {ours}"
    needed = f"its extension for MLX {version}"
    if not any(map(_is_for_this_python, here)):
        raise _requirements.error(needed, _requirements.missing(module), reinstall)
    try:
        extension = import_module(module)
    except ImportError as failure:
        found = _requirements.describe(module, failure)
        if "libmlx" in found:  # MLX itself was loaded: it is built or placed otherwise
            return None, f"its extension for MLX {version} found {found}"
        raise _requirements.error(needed, found, reinstall) from None

    import mlx.core as mx

    if not extension.is_array_type(mx.array):
        return None, f"MLX {version} and its extension are of different nanobinds"
    return extension, None


def _extensions() -> list[Path]:
    return sorted(_folder.glob("_ext_*.so"))


def _parts(path: Path) -> tuple[str, str]:
    """The module's name, and what the file's name has after it."""
    name, dot, suffix = path.name.partition(".")
    return name, dot + suffix


def _is_for_this_python(path: Path) -> bool:
    return _parts(path)[1] in EXTENSION_SUFFIXES


if TYPE_CHECKING:
    from . import _ext  # its types
else:
    _ext = load()
