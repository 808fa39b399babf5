"""Formulas as MathML, which browsers draw by themselves: no script and no network.

Firefox and Safari have it, and Chrome and Edge since version 109. A page that would
fetch anything else from the network is a warning, and so an error of ``make docs``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docutils.nodes import SkipNode
from math_core import LatexToMathML
from sphinx.util import logging

converter = LatexToMathML(annotation=True)
logger = logging.getLogger(__name__)


def mathml(latex: str, is_block: bool) -> str:
    """The formula; what cannot be converted ends the build."""
    if is_block and ("\\\\" in latex or "&" in latex) and "\\begin{" not in latex:
        latex = rf"\begin{{aligned}}{latex}\end{{aligned}}"
    return str(converter.convert_with_local_state(latex, displaystyle=is_block))


def visit_inline(self: Any, node: Any) -> None:
    self.body.append(mathml(node.astext(), is_block=False))
    raise SkipNode


def visit_block(self: Any, node: Any) -> None:
    style = "overflow-x: auto; margin: 1em 0"
    self.body.append(self.starttag(node, "div", CLASS="formula", style=style))
    self.body.append(mathml(node.astext(), is_block=True) + "</div>\n")
    raise SkipNode


def check_pages(app: Any, error: Exception | None) -> None:
    for page in [] if error else Path(app.outdir).rglob("*.html"):
        text = page.read_text()
        for tag in re.findall(
            r"<(?:script|link|img)[^>]*=\"(?:https?:)?//[^>]*>", text
        ):
            logger.warning("%s needs the network: %s", page.name, tag)


def setup(app: Any) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    app.connect("build-finished", check_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
