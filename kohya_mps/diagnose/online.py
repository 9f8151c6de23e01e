"""What the doctor asks the network: the repository, the package index, upstream's requirements."""

from __future__ import annotations

import tempfile

import msgspec
from packaging.requirements import InvalidRequirement, Requirement

from kohya_mps.core.errors import StepFailed
from kohya_mps.core.process import capture, clean_environ, stream, uv
from kohya_mps.core.report import say
from kohya_mps.core.settings import CONSTRAINTS, ROOT, Settings
from kohya_mps.install import package_index

from .machine_facts import MachineFacts

_SECONDS = 15.0
_REQUIREMENTS = "requirements_macos_arm64.txt"


def with_network(facts: MachineFacts, settings: Settings) -> MachineFacts:
    """The same facts, with those that the network knows."""
    say("  asking the repository and the package index")
    repository = ["git", "ls-remote", "--exit-code", settings.url, "HEAD"]
    reached, reason = _answers(repository, {"GIT_TERMINAL_PROMPT": "0"})
    resolve = [uv(), "pip", "compile", "--quiet", "--no-deps", "--upgrade", "--refresh"]
    arguments = ["--python-version", "3.11", str(CONSTRAINTS / "tools.in"), "--output-file", "-"]
    index_reached, index_reason = _answers([*resolve, *arguments], package_index.for_uv())
    pair, is_broken = _upstream_pair(settings.url) if reached else ("", None)
    return msgspec.structs.replace(
        facts,
        repository=settings.url,
        repository_reached=reached,
        repository_reason=reason,
        index_reached=index_reached,
        index_reason=index_reason,
        upstream_pair=pair,
        upstream_pair_broken=is_broken,
    )


def _answers(command: list[str], extra: dict[str, str]) -> tuple[bool, str]:
    """Whether a command succeeds in time, and its last line."""
    try:
        done = stream(
            command,
            cwd=ROOT,
            env=clean_environ(extra=extra),
            stall_seconds=_SECONDS,
            on_output=lambda piece: None,
        )
    except StepFailed as error:
        return False, error.what
    reason = f"no answer in {_SECONDS:g} seconds" if done.stalled else done.last_line
    return done.returncode == 0, reason


def _upstream_pair(url: str) -> tuple[str, bool | None]:
    """The torch and torchvision that upstream's newest requirements pin; see :func:`torch_pair`."""
    with tempfile.TemporaryDirectory() as directory:
        git = ["git", "-C", directory]
        capture([*git, "init", "--quiet", "--bare"])
        # A partial clone fetches missing objects from the remote with this name.
        capture([*git, "remote", "add", "origin", url])
        fetch = [*git, "fetch", "--quiet", "--depth", "1", "--filter=blob:none", url, "HEAD"]
        if not _answers(fetch, {"GIT_TERMINAL_PROMPT": "0"})[0]:
            return "", None
        shown = capture([*git, "show", f"FETCH_HEAD:{_REQUIREMENTS}"])
    return torch_pair(shown.stdout) if shown.returncode == 0 else ("", None)


def torch_pair(requirements: str) -> tuple[str, bool | None]:
    """The torch and torchvision that requirements pin, and whether they exclude each other.

    torchvision 0.N is made for torch 2.(N - 15), since 0.15 for 2.0 (its release notes).

    Returns:
        Both pins, and whether they exclude each other; an empty string and None if one of
        them is not pinned.
    """
    pinned: dict[str, tuple[int, int]] = {}
    lines = []
    for line in requirements.splitlines():
        try:
            requirement = Requirement(line.split("#")[0].strip())
        except InvalidRequirement:
            continue
        version = _pinned_version(requirement)
        if version and requirement.name in ("torch", "torchvision"):
            pinned[requirement.name] = version
            lines.append(str(requirement))
    if len(pinned) < 2:
        return "", None
    major, minor = pinned["torch"]
    return " with ".join(lines), major == 2 and pinned["torchvision"] != (0, minor + 15)


def _pinned_version(requirement: Requirement) -> tuple[int, int] | None:
    """The major and minor version of a ``==`` pin."""
    for specifier in requirement.specifier:
        parts = specifier.version.split(".")
        if specifier.operator == "==" and len(parts) >= 2 and all(p.isdigit() for p in parts[:2]):
            return int(parts[0]), int(parts[1])
    return None
