"""Upstream's ``requirements_macos_arm64.txt``: where it is read from, its lines, and what moves in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import msgspec
import requests
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from kohya_mps.core.installation import Installation
from kohya_mps.core.process import capture
from kohya_mps.core.settings import Settings

NAME = "requirements_macos_arm64.txt"

_GITHUB = re.compile(r"(?:https://|ssh://git@|git@)github\.com[/:](?P<repository>[^/]+/[^/]+?)(?:\.git)?/?")
_GIT = re.compile(r"git\+(?P<url>[^#]*?)(?:(?<=[\w/])@(?P<revision>[^@/#]+))?/?(?:#(?P<fragment>.*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_INCLUDE = re.compile(r"(?:-r|--requirement)[\s=]*(\S+)")
_INDEXES = ("--extra-index-url", "--index-url", "-i", "--find-links", "-f")
_TIMEOUT_SECONDS = 20

#: Returns the text of one of upstream's files by its name; raises :class:`Unreadable`.
Reader = Callable[[str], str]


class Unreadable(Exception):
    """A file of upstream cannot be read; the message says why."""


class Line(msgspec.Struct, frozen=True):
    """One line of upstream's files; ``package`` is the canonical name, empty for an option."""

    file: str
    number: int
    text: str
    package: str


def reader(settings: Settings, commit: str) -> Reader:
    """Reads a commit from the user's checkout, or from upstream where the checkout does not have it."""
    root = Installation(settings.home).root
    present = (
        root.is_dir() and not capture(["git", "-C", root, "cat-file", "-e", f"{commit}:{NAME}"]).returncode
    )
    return _from_git(root, commit) if present else remote_reader(settings.url, commit)


def remote_reader(url: str, commit: str) -> Reader:
    """Reads single files of a repository that is a local path, or is on GitHub."""
    if Path(url).is_dir():
        return _from_git(Path(url), commit)
    on_github = _GITHUB.fullmatch(url)

    def read(name: str) -> str:
        if not on_github:
            raise Unreadable(f"{url} is neither on GitHub nor a local path")
        address = f"https://raw.githubusercontent.com/{on_github['repository']}/{commit}/{name}"
        try:
            answer = requests.get(address, timeout=_TIMEOUT_SECONDS)
            answer.raise_for_status()
        except requests.RequestException as error:
            raise Unreadable(f"{address} cannot be fetched ({type(error).__name__})") from error
        return answer.text

    return read


def _from_git(repository: Path, commit: str) -> Reader:
    def read(name: str) -> str:
        shown = capture(["git", "-C", repository, "show", f"{commit}:{name}"])
        if shown.returncode:
            raise Unreadable(shown.stderr.strip())
        return shown.stdout

    return read


def lines(read: Reader, name: str = NAME, including: tuple[str, ...] = ()) -> Iterator[Line]:
    """Every requirement and option of a file, together with the files that it includes.

    Args:
        read: returns the text of a file.
        name: the file.
        including: the files that include this one; they are not read again.

    Raises:
        Unreadable: a file cannot be read.
    """
    for number, raw in enumerate(read(name).splitlines(), 1):
        text = re.sub(r"(^|\s)#.*", "", raw).strip()
        included = _INCLUDE.fullmatch(text)
        if included and included[1] not in (name, *including):
            yield from lines(read, included[1], (name, *including))
        elif text:
            yield Line(name, number, text, _package(text))


def requirement(text: str) -> Requirement | None:
    """The line as a requirement; None for an option or an address."""
    try:
        return Requirement(text)
    except InvalidRequirement:
        return None


def _package(text: str) -> str:
    if (parsed := requirement(text)) is not None:
        return canonicalize_name(parsed.name)
    if from_git := _GIT.fullmatch(text):
        return canonicalize_name(Path(from_git["url"].rstrip("/")).stem)
    return ""


def not_reproducible(text: str) -> Iterator[str]:
    """Why a line installs something else tomorrow; empty when it does not."""
    if text.startswith("-"):
        yield from _moving_options(text)
        return
    parsed = requirement(text)
    if from_git := _GIT.fullmatch(parsed.url if parsed and parsed.url else text):
        revision, fragment = from_git["revision"], from_git["fragment"]
        if revision is None:
            only = f": #{fragment} is a URL fragment, which git ignores" if fragment else ""
            yield f"builds what is HEAD that day{only}"
        elif not _COMMIT.fullmatch(revision):
            yield f"{revision} is a branch or a tag, which can move"
    elif parsed is not None:
        exact = [s for s in parsed.specifier if s.operator == "==" and not s.version.endswith(".*")]
        if not exact:
            yield "does not name one version"


def _moving_options(text: str) -> Iterator[str]:
    for option, value in pairwise([*shlex.split(text), ""]):
        if option == "--pre":
            yield "--pre takes the newest pre-release of the day"
        elif option in _INDEXES:
            nightly = "nightly" in value
            yield f"{option}: {'an index of nightlies, which come and go' if nightly else 'an index of its own'}"
