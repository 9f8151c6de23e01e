"""Locks: ``constraints/NAME.txt`` has every distribution with its exact version and digests."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
from packaging.markers import Marker
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from kohya_mps.core.errors import UsageError, restores

#: The values of PEP 508's markers on a Mac, without those of the operating system's version.
MAC_ARM64: Mapping[str, str] = {
    "implementation_name": "cpython",
    "implementation_version": "3.11.0",
    "os_name": "posix",
    "platform_machine": "arm64",
    "platform_python_implementation": "CPython",
    "platform_system": "Darwin",
    "python_full_version": "3.11.0",
    "python_version": "3.11",
    "sys_platform": "darwin",
}

#: The same for the Linux machines that contributors and CI use.
LINUX_X86_64: Mapping[str, str] = {
    **MAC_ARM64,
    "platform_machine": "x86_64",
    "platform_system": "Linux",
    "sys_platform": "linux",
}

_SHA256 = re.compile(r"sha256:[0-9a-f]{64}")


class Pin(msgspec.Struct, frozen=True):
    """One line of a lock: canonical name, exact version, marker (may be empty), allowed digests."""

    name: str
    version: str
    marker: str
    hashes: tuple[str, ...]

    def applies(self, environment: Mapping[str, str]) -> bool:
        """Whether the pin is installed on a machine with these marker values."""
        return not self.marker or Marker(self.marker).evaluate(dict(environment))


class Lock(msgspec.Struct, frozen=True):
    """A constraints file, its SHA-256 in hexadecimal, and its pins."""

    path: Path
    digest: str
    pins: tuple[Pin, ...]

    def versions(self, environment: Mapping[str, str]) -> dict[str, str]:
        """Distribution name to version, for a machine with these marker values."""
        return {pin.name: pin.version for pin in self.pins if pin.applies(environment)}


def here(mac: bool) -> Mapping[str, str]:
    """The marker values of this machine: a Mac, or the Linux machines that contributors use."""
    return MAC_ARM64 if mac else LINUX_X86_64


def digest(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(path: Path) -> Lock:
    """Read a lock.

    Raises:
        UsageError: it is missing, or a line is not an exact pin with hashes.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}", restores(path)) from error
    return Lock(path, hashlib.sha256(text.encode()).hexdigest(), _pins(path, text))


@functools.lru_cache(maxsize=8)
def _pins(path: Path, text: str) -> tuple[Pin, ...]:
    """The pins of a lock's text. Kept, because parsing takes long and one command reads a lock several times."""
    pins = tuple(_pin(path, number, line) for number, line in _logical_lines(text))
    if not pins:
        raise UsageError(f"{path}: holds no pins", "`nox -s lock` makes it again")
    return pins


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Each requirement joined with its hashes to one line, and the number of its first line."""
    pending, start = "", 0
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.split(" #")[0].strip() if not raw.lstrip().startswith("#") else ""
        if not line:
            continue
        start = start if pending else number
        pending += line.removesuffix("\\")
        if not line.endswith("\\"):
            yield start, pending
            pending = ""
    if pending:
        yield start, pending


def _pin(path: Path, number: int, line: str) -> Pin:
    specification, *hashes = (part.strip() for part in line.split("--hash="))
    fix = f"{restores(path)}, `nox -s lock` makes it again"
    try:
        requirement = Requirement(specification)
    except InvalidRequirement as error:
        raise UsageError(f"{path}:{number}: {specification!r} is not a pin", fix) from error
    exact = [s for s in requirement.specifier if s.operator == "==" and "*" not in s.version]
    if requirement.url or len(exact) != 1 or len(requirement.specifier) != 1:
        raise UsageError(f"{path}:{number}: {specification!r} is not pinned to one version", fix)
    if not hashes or not all(_SHA256.fullmatch(value) for value in hashes):
        raise UsageError(f"{path}:{number}: {requirement.name} has no hash, or a malformed one", fix)
    marker = str(requirement.marker) if requirement.marker else ""
    return Pin(canonicalize_name(requirement.name), exact[0].version, marker, tuple(hashes))
