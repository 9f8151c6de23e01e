"""The site, built by ``nox -s docs``: the Markdown pages as they are, and nothing that only the site has.

The source directory is the repository, so that a link from a page to any file of it is the
same on GitHub and here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

project = "kohya_mps"
author = "kohya-mps contributors"
extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = ["docs/*.md", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "kohya_mps"
html_copy_source = False
html_show_copyright = False

_LINKED_PAGE = re.compile(r"^- \[[^]]+\]\(([\w./-]+)\.md\)", re.MULTILINE)


def add_contents(_app: Any, name: str, source: list[str]) -> None:
    """Give the index the table of contents that Sphinx wants: the pages that its lists link to."""
    if name == root_doc:
        pages = "\n".join(_LINKED_PAGE.findall(source[0]))
        source[0] += f"\n```{{toctree}}\n:hidden:\n\n{pages}\n../README\n```\n"


def add_front_door(app: Any, error: Exception | None) -> None:
    """Lead from the site's own index.html to the index page."""
    if error is None:
        refresh = '<!doctype html><meta http-equiv="refresh" content="0; url=docs/index.html">\n'
        (Path(app.outdir) / "index.html").write_text(refresh, encoding="utf-8")


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", add_contents)
    app.connect("build-finished", add_front_door)
