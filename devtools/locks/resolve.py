"""uv's resolver, and what its sentences mean.

uv explains a failed resolution in English and has no machine-readable form of it. This module
is the only one that reads those sentences. ``tests/devtools/locks/test_resolve.py`` has the
locked uv say each of them, so that a new uv with other words fails there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec
from packaging.utils import canonicalize_name

from kohya_mps.core.process import capture, uv

from . import dependency_chain
from .in_file import PYTHON

#: Later than any macOS that wheels are tagged for: is there a wheel for *some* Mac?
#: The lowest macOS that a lock really needs is what cross_check measures.
ANY_MACOS = "99.0"

#: uv's arguments for a Mac with Apple Silicon, whatever this machine is.
FOR_A_MAC = ("--python-platform", "aarch64-apple-darwin")

_OFFLINE = "the network was disabled"
_FROM_SOURCE = "building from source is disabled"
_ABSENT = ("has no wheels", "was not found", "there is no version of")
# A pin whose version has no wheel that fits. uv uses the second where there is a source archive, too.
_NO_FITTING_WHEEL = ("matching platform tag", "has no usable wheels")
_BLAMED = re.compile(r"([\w.-]+?)(?:[=<>!~]\S*)? (?:has no (?:usable )?wheels|was not found)")
_DEPENDS = re.compile(r"([\w.-]+)(?:[=<>!~]\S*)? depends? on ([\w.-]+)")
_REQUIRED = re.compile(r"you require (.*?), we can conclude", re.DOTALL)
_PIN = re.compile(r"^([\w.-]+)==([^\s;]+)", re.MULTILINE)


class Resolution(msgspec.Struct, frozen=True):
    """What uv's resolver found: versions by package, or its reason why there are none."""

    versions: dict[str, str]
    reason: str


def resolve(arguments: list[str], *, cwd: Path, env: Mapping[str, str]) -> Resolution:
    """Run uv's resolver, with wheels alone; it installs nothing.

    Args:
        arguments: of ``uv pip compile``: the requirements file and further options.
        cwd: what relative paths in the file are relative to.
        env: uv's whole environment.
    """
    command = [uv(), "pip", "compile", "--quiet", "--python-version", PYTHON, "--only-binary", ":all:"]
    done = capture([*command, *arguments], cwd=cwd, env=env)
    if done.returncode:
        return Resolution({}, done.stderr.strip().removeprefix("error:").strip() or f"uv: {done.returncode}")
    return Resolution({str(canonicalize_name(n)): version for n, version in _PIN.findall(done.stdout)}, "")


def culprit_chain(reason: str) -> str:
    """The chain to the package that the resolver blames, as "X needs Y"; empty when it blames none."""
    blamed = _BLAMED.search(reason)
    if not blamed:
        return ""
    needs: dict[str, set[str]] = {}
    for package, required in _DEPENDS.findall(reason):
        needs.setdefault(canonicalize_name(package), set()).add(canonicalize_name(required))
    roots = {canonicalize_name(name) for name in re.findall(r"you require ([\w.-]+)", reason)}
    return dependency_chain.chain(needs, roots, canonicalize_name(blamed[1]))


def required_packages(reason: str, packages: Iterable[str]) -> tuple[str, ...]:
    """Those of the packages whose lines the resolver blames: the ones that "you require".

    None of them when uv had no network: what is not in its cache may well exist.
    """
    if _OFFLINE in reason:
        return ()
    required = " and ".join(_REQUIRED.findall(reason))
    words = {canonicalize_name(word) for word in re.findall(r"(?:^| and )([\w.-]+)", required)}
    return tuple(sorted(words & set(packages)))


def is_source_only(reason: str) -> bool:
    """Whether a package is published only as source, which would be built where it is installed."""
    return _FROM_SOURCE in reason


def is_absent(reason: str) -> bool:
    """Whether a package, or this version of it, does not exist for the platform."""
    return any(words in reason for words in _ABSENT)


def cause(reason: str) -> str:
    """The first cause that the resolver states, on one line."""
    sentence = reason.partition("cause:")[2].split(", we can conclude")[0]
    return " ".join(sentence.split()).removeprefix("Because ")


def has_no_fitting_wheel(reason: str) -> bool:
    """Whether an installation failed because a pin has no wheel for this platform."""
    return any(words in reason for words in _NO_FITTING_WHEEL)
