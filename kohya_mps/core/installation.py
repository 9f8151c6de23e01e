"""One installation: where its parts lie, and the lock that one run at a time holds."""

from __future__ import annotations

import os
import pwd
import shlex
import stat
from pathlib import Path

import msgspec

from .errors import UsageError
from .files import existing_ancestor
from .text import join_some

STATE = ".kohya-mps"


class Installation(msgspec.Struct, frozen=True):
    """The places of an installation, all below ``root`` (``KOHYA_HOME``)."""

    root: Path

    @property
    def state(self) -> Path:
        """Everything of ours that is not the checkout and not the link to the environment."""
        return self.root / STATE

    @property
    def venv(self) -> Path:
        """The link to the active environment."""
        return self.root / "venv"

    @property
    def generations(self) -> Path:
        """The built environments, each in a directory of its own."""
        return self.state / "generations"

    @property
    def verification(self) -> Path:
        """The generated models and images that the training step trains on, and its runs."""
        return self.state / "verification"

    @property
    def distributed_config(self) -> Path:
        """The accelerate configuration of trainings with more than one process; absent with one."""
        return self.state / "several.yaml"

    @property
    def checkout_move(self) -> Path:
        """The record of a checkout on its way: while it is there, a run was killed in between."""
        return self.state / "moving-kohya_ss.json"

    @property
    def sd_scripts(self) -> Path:
        """The submodule with the trainers."""
        return self.root / "sd-scripts"


def check_location(home: Installation) -> None:
    """Refuse a place that an installation cannot, or must not, be put in.

    Raises:
        UsageError: it is a file, belongs to something else, cannot be written, or is a
            place where another user could swap the programs that we would then run.
    """
    root = home.root
    choose = "choose another place with KOHYA_HOME"
    if os.path.lexists(root) and not root.is_dir():
        raise UsageError(f"{root} is not a directory", choose)
    if root.is_dir():
        strangers = sorted({entry.name for entry in root.iterdir()} - {STATE, "venv", ".DS_Store"})
        if strangers and not (root / ".git").exists() and not home.checkout_move.exists():
            raise UsageError(
                f"{root} is not empty and is not a kohya_ss checkout: it holds {join_some(strangers)}", choose
            )
    existing = existing_ancestor(root)
    if not existing.is_dir():
        raise UsageError(f"{existing} is not a directory, so {root} cannot be made", choose)
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"{existing} is not writable for you, so {root} cannot be used", choose)
    ours = (home.venv / "bin", home.venv, home.generations, home.state, root)
    for place in ours:
        if place.exists() and place.stat().st_uid not in (0, os.getuid()):
            mine = shlex.join(["sudo", "chown", "-R", pwd.getpwuid(os.getuid()).pw_name, str(place)])
            raise UsageError(
                f"{place} belongs to another user, who could replace the programs that run from {root}",
                f"if it is yours, `{mine}`; else {choose}",
            )
    for place in (*ours, *root.parents):
        if place.exists() and (reason := _shared_with_others(place)):
            raise UsageError(
                f"{place} {reason}: another user could replace the programs that run from {root}",
                f"`chmod go-w {shlex.quote(str(place))}`, or {choose}",
            )


def _shared_with_others(place: Path) -> str:
    mode = place.stat()
    if mode.st_mode & stat.S_ISVTX:
        return ""
    if mode.st_mode & stat.S_IWOTH:
        return "can be written by every user"
    if mode.st_mode & stat.S_IWGRP and mode.st_gid not in (0, _private_group()):
        return "can be written by its group"
    return ""


def _private_group() -> int | None:
    """The group that many systems make for one user alone: as private as the user."""
    import grp

    user = pwd.getpwuid(os.getuid())
    try:
        return user.pw_gid if grp.getgrgid(user.pw_gid).gr_name == user.pw_name else None
    except KeyError:
        return None
