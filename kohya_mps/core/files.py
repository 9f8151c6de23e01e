"""Replacing files and links in one step, and finding where a new one would go."""

from __future__ import annotations

import os
from pathlib import Path


def existing_ancestor(path: Path) -> Path:
    """The path itself if it exists, else the nearest directory above it that does.

    A link counts as existing even if it leads nowhere: nothing can be created under its name.
    """
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    return path


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file in one step: readers see the old content or the new, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name is always the same, so that files of killed runs are replaced and do not pile up.
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    try:
        with new.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.chmod(0o644)
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def link_atomic(path: Path, target: Path) -> None:
    """Point the symbolic link ``path`` at ``target`` in one step, relative to its directory."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(os.path.relpath(target, path.parent))
    new.replace(path)
