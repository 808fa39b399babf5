"""Sphinx: ``make docs``."""

import sys
from pathlib import Path

from mlx_fused_optimizers import __version__

sys.path.insert(0, str(Path(__file__).parent))

project = "mlx-fused-optimizers"
author = "the mlx-fused-optimizers authors"
release = version = __version__

extensions = [
    "formulas",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# The text of the docstrings says which types arguments have, as in MLX's docs.
autodoc_typehints = "none"
napoleon_use_param = False
napoleon_use_rtype = False
add_module_names = False

html_theme = "sphinx_book_theme"
html_theme_options = {"show_toc_level": 2, "navigation_with_keys": False}
html_title = f"{project} {release}"
html_math_renderer = "mathml"
