"""Why a package is there: the chain of requirements that leads to it, and which packages are forbidden."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path

from packaging.utils import canonicalize_name

from kohya_mps.core import settings
from kohya_mps.install import lockfile


def chain(needs: Mapping[str, Iterable[str]], roots: Iterable[str], culprit: str) -> str:
    """The shortest "X needs Y needs Z" that ends at a package.

    Args:
        needs: the packages that each package requires.
        roots: the packages that the ``.in`` file names.
        culprit: the package at the end; the chain is its name alone when none leads there.
    """
    waiting = deque([root] for root in sorted(roots))
    seen: set[str] = set()
    while waiting:
        path = waiting.popleft()
        if path[-1] == culprit:
            return " needs ".join(path)
        if path[-1] not in seen:
            seen.add(path[-1])
            waiting.extend([*path, following] for following in sorted(needs.get(path[-1], ())))
    return culprit


def chain_in_lock(lock: Path, culprit: str) -> str:
    """The chain that leads to a package, read from the "via" comments that uv writes into a lock."""
    needs: dict[str, set[str]] = {}
    roots: set[str] = set()
    name, in_note = "", False
    for line in lock.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith(("#", " ")):
            name, in_note = canonicalize_name(re.split(r"[=\s;\[]", line)[0]), False
            continue
        note = line.strip().removeprefix("#").strip()
        if not line.startswith("    #") or not (in_note or note.startswith("via")):
            continue
        in_note = True
        note = note.removeprefix("via").strip() if note.split(" ")[0] == "via" else note
        if note.startswith("-r "):
            roots.add(name)
        elif note and not note.startswith("-c "):
            needs.setdefault(canonicalize_name(note), set()).add(name)
    return chain(needs, roots, canonicalize_name(culprit))


def forbidden(names: Iterable[str], on_mac: Iterable[str]) -> list[tuple[str, str]]:
    """The packages that some profile forbids, and the reason.

    Args:
        names: the canonical names of everything that is locked or installed.
        on_mac: those of them that a Mac installs.
    """
    rules = [settings.load_profile(name).forbidden for name in settings.profile_names()]
    everywhere: set[str] = {canonicalize_name(name) for rule in rules for name in rule.any}
    darwin: set[str] = {canonicalize_name(name) for rule in rules for name in rule.darwin}
    found = [(name, "is forbidden on every system") for name in sorted(everywhere & set(names))]
    return found + [(name, "is forbidden on macOS") for name in sorted(darwin & set(on_mac))]


def forbidden_in_lock(lock: lockfile.Lock) -> list[tuple[str, str]]:
    """The forbidden packages of a lock, each with the chain that leads to it and the reason."""
    found = forbidden([pin.name for pin in lock.pins], lock.versions(lockfile.MAC_ARM64))
    return [(name, f"{chain_in_lock(lock.path, name)}, and {name} {reason}") for name, reason in found]
