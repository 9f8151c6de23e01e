"""``nox -s lock_check``: whether each lock is unedited and still what its ``.in`` requires. Offline."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kohya_mps.core import settings
from kohya_mps.core.errors import UsageError, restores
from kohya_mps.core.process import capture
from kohya_mps.core.report import Check, Report, Status
from kohya_mps.install import lockfile

from . import dependency_chain, header, in_file
from .in_file import PYTHON


def check_all() -> Report:
    """Check every lock against its ``.in`` file, and every profile against the locks."""
    checks = [check for name in in_file.lock_names() for check in check_lock(name)]
    for profile_name in settings.profile_names():
        checks += _check_profile(profile_name)
    return Report("Locks and what they were made from", tuple(checks))


def check_lock(name: str) -> list[Check]:
    """What is wrong with a lock, a row for each; one row that passes when it is good."""
    source, lock_path = in_file.paths(name)
    again = f"`nox -s lock -- {name}` makes it again"
    try:
        lock, inputs, required = lockfile.read(lock_path), in_file.inputs(source), in_file.requirements(name)
    except UsageError as error:
        return [Check(lock_path.name, Status.FAIL, error.what, error.fix)]
    recorded = header.read(lock_path)
    if recorded is None:
        detail = "was not made by `nox -s lock`: it has another header"
        return [Check(lock_path.name, Status.FAIL, detail, again)]
    problems: list[tuple[str, str]] = []
    if recorded.python != PYTHON:
        problems.append((f"was made for Python {recorded.python}, not {PYTHON}", again))
    if recorded.inputs != inputs:
        made_from, says = f"what {lock_path.name} was made from", f"what {source.name} says"
        difference = difflib.unified_diff(recorded.inputs, inputs, made_from, says, lineterm="")
        problems.append(("\n".join(difference), again))
    if not recorded.unedited:
        details = ["was edited after uv wrote it", *_contradictions(required, lock), *_git_diff(lock_path)]
        problems.append(("\n".join(details), f"{again}; {restores(lock_path)}"))
    problems += [(why, again) for _, why in dependency_chain.forbidden_in_lock(lock)]
    if problems:
        return [Check(lock_path.name, Status.FAIL, detail, fix) for detail, fix in problems]
    good = f"agrees with {source.name}: {len(lock.pins)} pins, Python {PYTHON}"
    return [Check(lock_path.name, Status.PASS, good)]


def _check_profile(name: str) -> Iterator[Check]:
    profile = settings.load_profile(name)
    if profile.lock not in in_file.lock_names():
        detail = f"names the lock {profile.lock}, and there is no {profile.lock}.in"
        yield Check(f"profile {name}", Status.FAIL, detail, f"one of {', '.join(in_file.lock_names())}")
    if profile.python != PYTHON:
        detail = f"says Python {profile.python}; the locks are made for {PYTHON} and no other"
        yield Check(
            f"profile {name}", Status.FAIL, detail, f'config/profiles/{name}.yaml: python: "{PYTHON}"'
        )


def _contradictions(required: Iterable[Requirement], lock: lockfile.Lock) -> Iterator[str]:
    """Which requirements the lock does not meet on a Mac: what an edited line did."""
    versions = lock.versions(lockfile.MAC_ARM64)
    for requirement in required:
        if requirement.marker and not requirement.marker.evaluate(dict(lockfile.MAC_ARM64)):
            continue
        version = versions.get(canonicalize_name(requirement.name))
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            yield f"-{requirement}\n+{requirement.name}: {version or 'missing'}"


def _git_diff(path: Path) -> list[str]:
    """What changed since the last commit; empty where git cannot say."""
    done = capture(["git", "-C", path.parent, "diff", "--no-color", "--no-ext-diff", "HEAD", "--", path.name])
    return done.stdout.splitlines() if done.returncode == 0 else []
