"""Links of the Markdown files for people: every file and heading that one names has to be there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from kohya_mps.core.settings import ROOT

_TAG = re.compile(r"""\b(?:href|src)=["']([^"']+)["']""")
_ELSEWHERE = re.compile(r"^[a-z][a-z0-9+.-]*:", re.IGNORECASE)


def pages(root: Path = ROOT) -> list[Path]:
    """The Markdown files for people: those at the top of the repository and those of docs/."""
    return sorted([*root.glob("*.md"), *root.glob("docs/**/*.md")])


def broken(root: Path = ROOT) -> list[str]:
    """Each link to a file or heading of this repository that is not there, as ``page: link``."""
    return [
        f"{page.relative_to(root)}: {link}"
        for page in pages(root)
        for link in links(page.read_text(encoding="utf-8"))
        if not _ELSEWHERE.match(link) and not _leads_somewhere(page, link)
    ]


def links(text: str) -> list[str]:
    """The addresses of a Markdown text's links and pictures, those in HTML tags included."""
    return [link for token in _tokens(MarkdownIt().enable("table").parse(text)) for link in _addresses(token)]


def headings(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a Markdown text."""
    found: set[str] = set()
    tokens = MarkdownIt().parse(text)
    for opening, inline in pairwise(tokens):
        if opening.type == "heading_open":
            words = "".join(
                token.content for token in inline.children or () if token.type in ("text", "code_inline")
            )
            slug = re.sub(r"[^\w\- ]", "", words.strip().lower()).replace(" ", "-")
            found.add(slug)
    return found


def _leads_somewhere(page: Path, link: str) -> bool:
    name, _, anchor = link.partition("#")
    target = (page.parent / name).resolve() if name else page
    if not _has_exactly(target):
        return False
    return not anchor or target.suffix != ".md" or anchor in headings(target.read_text(encoding="utf-8"))


@cache
def _has_exactly(path: Path) -> bool:
    """Whether a path exists with these very capital letters: macOS' own file system takes any."""
    return path.exists() and path.name in (entry.name for entry in path.parent.iterdir())


def _tokens(tokens: list[Token]) -> Iterator[Token]:
    for token in tokens:
        yield token
        yield from _tokens(token.children or [])


def _addresses(token: Token) -> Iterator[str]:
    for name in ("href", "src"):
        if isinstance(address := token.attrs.get(name), str):
            yield address
    if token.type in ("html_block", "html_inline"):
        yield from _TAG.findall(token.content)
