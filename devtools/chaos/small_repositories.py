"""Two small repositories in place of kohya_ss and sd-scripts, for machines without the real ones."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from kohya_mps.core.process import capture, clean_environ
from kohya_mps.core.settings import Settings
from kohya_mps.install.checkout import SUBMODULE

from .testbed import expect

_FILES = 200
_BYTES_IN_A_FILE = 2000


def make(directory: Path, settings: Settings) -> Settings:
    """Make both repositories; the settings that are returned install from them."""
    sd_scripts = _repository(directory / "sd-scripts", "train_network.py")
    kohya_ss = _repository(directory / "kohya_ss", "kohya_gui.py")
    module = f'[submodule "{SUBMODULE}"]\n\tpath = {SUBMODULE}\n\turl = {sd_scripts}\n'
    (kohya_ss / ".gitmodules").write_text(module, encoding="utf-8")
    gitlink = _git(sd_scripts, "rev-parse", "HEAD")
    _git(kohya_ss, "add", ".gitmodules")
    _git(kohya_ss, "update-index", "--add", "--cacheinfo", f"160000,{gitlink},{SUBMODULE}")
    _git(kohya_ss, "commit", "--quiet", "--message", "with its submodule")
    return msgspec.structs.replace(settings, url=str(kohya_ss), commit=_git(kohya_ss, "rev-parse", "HEAD"))


def _repository(path: Path, script: str) -> Path:
    path.mkdir()
    _git(path, "init", "--quiet")
    (path / script).write_text("raise SystemExit('a stand-in')\n", encoding="utf-8")
    for number in range(_FILES):
        content = f"# {os.urandom(_BYTES_IN_A_FILE).hex()}\n"  # random, so that a pack has a size
        (path / f"file{number}.py").write_text(content, encoding="utf-8")
    _git(path, "add", "--all")
    _git(path, "commit", "--quiet", "--message", "a stand-in")
    return path


def _git(path: Path, *arguments: str) -> str:
    author = {
        f"GIT_{role}_{field}": value
        for role in ("AUTHOR", "COMMITTER")
        for field, value in (("NAME", "chaos"), ("EMAIL", "chaos@example.invalid"))
    }
    done = capture(["git", "-C", path, *arguments], env=clean_environ(extra=author))
    expect(done.returncode == 0, f"git {arguments[0]} failed in {path}: {done.stderr.strip()}")
    return done.stdout.strip()
