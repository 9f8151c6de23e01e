"""One installation: the paths of its parts, the profile it has, and whether its directory is safe."""

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

# In each generation: what was built. It is written last, and an interrupted build has none.
MANIFEST = "manifest.json"


class Installation(msgspec.Struct, frozen=True):
    """The paths of an installation, all below ``root`` (``KOHYA_HOME``)."""

    root: Path

    @property
    def state(self) -> Path:
        """Everything of this project except the checkout and the link to the environment."""
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
    def active_generation(self) -> Path | None:
        """The generation whose environment ``venv`` links to; it may be damaged or missing."""
        if not self.venv.is_symlink():
            return None
        generation = Path(os.path.normpath(self.root / self.venv.readlink())).parent
        return generation if generation.parent == self.generations else None

    @property
    def verification(self) -> Path:
        """The generated models and images for the training step, and its runs."""
        return self.state / "verification"

    @property
    def distributed_config(self) -> Path:
        """The accelerate configuration for trainings with several processes; absent with one."""
        return self.state / "several.yaml"

    @property
    def checkout_move(self) -> Path:
        """The record of a checkout in progress; if it is there and no run is active, one was killed."""
        return self.state / "moving-kohya_ss.json"

    @property
    def sd_scripts(self) -> Path:
        """The submodule with the trainers."""
        return self.root / "sd-scripts"


class _ManifestProfile(msgspec.Struct, frozen=True):
    profile: str


def installed_profile(home: Installation) -> str:
    """The profile of the active generation; empty if there is none or its manifest cannot be read."""
    try:
        generation = home.active_generation
        manifest = (generation / MANIFEST).read_bytes() if generation else b""
        return msgspec.json.decode(manifest, type=_ManifestProfile).profile
    except (OSError, msgspec.DecodeError):
        return ""


def check_location(home: Installation) -> None:
    """Refuse a directory that an installation cannot, or must not, be in.

    Raises:
        UsageError: it is a file, has something else in it, cannot be written, or is where
            another user could replace the programs that this project runs.
    """
    root = home.root
    choose = "choose another directory with KOHYA_HOME"
    _check_directory(home, choose)
    own = (home.venv / "bin", home.venv, home.generations, home.state, root)
    for path in own:
        if path.exists() and path.stat().st_uid not in (0, os.getuid()):
            user = pwd.getpwuid(os.getuid()).pw_name
            chown = shlex.join(["sudo", "chown", "-R", user, str(path)])
            raise UsageError(
                f"{path} belongs to another user, who could replace the programs that run from {root}",
                f"if it is yours, `{chown}`; else {choose}",
            )
    for path in (*own, *root.parents):
        if path.exists() and (reason := _shared_with_others(path)):
            raise UsageError(
                f"{path} {reason}: another user could replace the programs that run from {root}",
                f"`chmod go-w {shlex.quote(str(path))}`, or {choose}",
            )


def _check_directory(home: Installation, choose: str) -> None:
    """Refuse what is no directory, cannot be written, or has something else in it."""
    root = home.root
    if os.path.lexists(root) and not root.is_dir():
        raise UsageError(f"{root} is not a directory", choose)
    if root.is_dir():
        others = sorted({entry.name for entry in root.iterdir()} - {STATE, "venv", ".DS_Store"})
        if others and not (root / ".git").exists() and not home.checkout_move.exists():
            raise UsageError(
                f"{root} is not empty and is not a kohya_ss checkout: it holds {join_some(others)}", choose
            )
    existing = existing_ancestor(root)
    if not existing.is_dir():
        raise UsageError(f"{existing} is not a directory, so {root} cannot be made", choose)
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"{existing} is not writable for you, so {root} cannot be used", choose)


def _shared_with_others(path: Path) -> str:
    """How other users can write to a directory; empty if they cannot."""
    mode = path.stat()
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
