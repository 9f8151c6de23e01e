"""Git: how it is started on a working tree, and what can be read of a repository without it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from kohya_mps.core.errors import StepFailed
from kohya_mps.core.process import capture, clean_environ


def command(tree: Path) -> list[str]:
    """``git`` for a working tree, up to the subcommand.

    A submodule is checked out by a step of its own, whatever the user's configuration says.
    """
    return ["git", "-C", str(tree), "-c", "submodule.recurse=false"]


def environment(tree: Path) -> dict[str, str]:
    """The variables for git.

    It asks for no password in the middle of a set-up, and answers in English, which is
    parsed here. It never takes a repository in a parent directory for the one in ``tree``.
    A command that only reads does not lock the index: killed, it would leave the lock behind.
    """
    return clean_environ(
        extra={
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_OPTIONAL_LOCKS": "0",
            "GIT_CEILING_DIRECTORIES": str(tree.resolve().parent),
            "LC_ALL": "C",
        }
    )


def run(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run git on a working tree; the caller judges the exit status."""
    return capture([*command(tree), *arguments], env=environment(tree))


def output(tree: Path, *arguments: str) -> str:
    """Run git on a working tree and return what it prints.

    Raises:
        StepFailed: it ended with an error; git's own message is in it.
    """
    done = run(tree, *arguments)
    if done.returncode:
        raise failure(tree, arguments[0], done.stderr)
    return done.stdout


def failure(tree: Path, subcommand: str, message: str) -> StepFailed:
    """The error for a git command that failed with this message."""
    return StepFailed(f"git {subcommand} failed in {tree}: {message.strip()}")


def check_disk_full(message: str) -> None:
    """Raise StepFailed when git's message says, in one of its ways, that the disk is full."""
    if "No space left" in message or "Out of diskspace" in message:
        last = message.strip().splitlines()[-1]
        raise StepFailed(f"the disk is full: {last}", "free some space, then run the same command again")


def status(tree: Path, *flags: str) -> list[str]:
    """The paths that ``git status`` lists, relative to the working tree.

    Raises:
        StepFailed: git cannot read the repository.
    """
    # Without renames each entry is one path.
    porcelain = ("--porcelain=v1", "-z", "--no-renames", "--ignore-submodules=all")
    return [entry[3:] for entry in output(tree, "status", *porcelain, *flags).split("\0") if entry]


def repository(tree: Path) -> Path:
    """The directory of a working tree's repository, found without git."""
    path = tree / ".git"
    if path.is_file():  # a submodule's, made by `git clone --recurse-submodules`
        pointer = path.read_text(encoding="utf-8", errors="replace").removeprefix("gitdir:")
        path = tree / pointer.strip().replace("\0", "")
    return path


def read_head(tree: Path) -> str:
    """The commit that HEAD names, read without git; empty when the files do not say."""
    directory = repository(tree)
    try:
        head = (directory / "HEAD").read_text(encoding="utf-8").strip()
        if head.startswith("ref: "):
            head = _read_ref(directory, head.removeprefix("ref: "))
    except (OSError, UnicodeDecodeError):
        return ""
    return head if re.fullmatch(r"[0-9a-f]{40,64}", head) else ""


def _read_ref(directory: Path, name: str) -> str:
    if (directory / name).is_file():
        return (directory / name).read_text(encoding="utf-8").strip()
    packed = (directory / "packed-refs").read_text(encoding="utf-8").splitlines()
    return next((line.split()[0] for line in packed if line.endswith(f" {name}")), "")
