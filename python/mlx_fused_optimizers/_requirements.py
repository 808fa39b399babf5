"""The check that the MLX beside us is the one that we were built against."""

import sys
from importlib import metadata

MLX_VERSION = "0.32.4"


def check_mlx() -> None:
    """Raise ImportError, with the command that mends it, unless MLX fits.

    An extension of MLX works with exactly the MLX that it was compiled against.
    """
    extra = "[cpu]" if sys.platform == "linux" else ""
    command = f"pip install 'mlx{extra}=={MLX_VERSION}'"
    try:
        found = metadata.version("mlx")
    except metadata.PackageNotFoundError:
        found = None
    if found != MLX_VERSION:
        raise ImportError(
            f"mlx_fused_optimizers needs mlx {MLX_VERSION}, found "
            f"{found or 'no mlx'}; run: {command}"
        )
    try:
        import mlx.core  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"mlx {found} is installed but cannot be loaded ({error}); run: {command}"
        ) from error
