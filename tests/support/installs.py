"""Made for tests: a small upstream, small settings, a process under another name."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from kohya_mps.core.settings import Forbidden, Profile, Settings
from kohya_mps.install.generations import Generation

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def git(path: Path, *arguments: str) -> str:
    """Run git in a directory and return what it prints, without the last line's end."""
    done = subprocess.run(["git", "-C", path, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"git {arguments}: {done.stderr}"
    return done.stdout.rstrip("\n")


@contextlib.contextmanager
def running_as(program: Path) -> Iterator[int]:
    """A process that was started under this name; its number."""
    process = subprocess.Popen([str(program), "60"], executable=shutil.which("sleep"))
    try:
        # A process that has just become its own program has no command line for a moment.
        while not psutil.Process(process.pid).cmdline():
            time.sleep(0.001)
        yield process.pid
    finally:
        process.kill()
        process.wait()


@dataclass(frozen=True)
class Upstream:
    """Two small repositories that stand in for kohya_ss and sd-scripts, each with two commits."""

    kohya_ss: Path
    sd_scripts: Path
    old: str
    old_sd_scripts: str
    commit: str
    sd_scripts_commit: str


def make_upstream(root: Path, submodule_url: str | None = None) -> Upstream:
    """Both repositories below ``root``; the first commit differs from the second in every way a file can."""
    sd_scripts, kohya_ss = root / "sd-scripts", root / "kohya_ss"
    for path in (sd_scripts, kohya_ss):
        path.mkdir(parents=True)
        git(path, "init", "--quiet")
    (sd_scripts / "train_network.py").write_text("print('old trainer')\n")
    git(sd_scripts, "add", "-A")
    git(sd_scripts, "commit", "--quiet", "-m", "old")
    old_sd_scripts = git(sd_scripts, "rev-parse", "HEAD")
    (sd_scripts / "train_network.py").write_text("print('trainer')\n")
    (sd_scripts / "library").mkdir()
    (sd_scripts / "library" / "__init__.py").write_text("")
    git(sd_scripts, "add", "-A")
    git(sd_scripts, "commit", "--quiet", "-m", "new")
    new_sd_scripts = git(sd_scripts, "rev-parse", "HEAD")

    address = submodule_url or str(sd_scripts)
    (kohya_ss / ".gitmodules").write_text(
        f'[submodule "sd-scripts"]\n\tpath = sd-scripts\n\turl = {address}\n'
    )
    (kohya_ss / ".gitignore").write_text("venv\n")
    (kohya_ss / "kohya_gui.py").write_text("old\n")
    (kohya_ss / "dropped.txt").write_text("only in the old commit\n")
    (kohya_ss / "stays.txt").write_text("the same in both\n")
    commits = []
    for gitlink in (old_sd_scripts, new_sd_scripts):
        git(kohya_ss, "add", "-A", ":!sd-scripts")
        git(kohya_ss, "update-index", "--add", "--cacheinfo", f"160000,{gitlink},sd-scripts")
        git(kohya_ss, "commit", "--quiet", "-m", "kohya_ss")
        commits.append(git(kohya_ss, "rev-parse", "HEAD"))
        (kohya_ss / "kohya_gui.py").write_text("new\n")
        (kohya_ss / "dropped.txt").unlink(missing_ok=True)
        (kohya_ss / "docs").mkdir(exist_ok=True)
        (kohya_ss / "docs" / "Größe 1.txt").write_text("only in the new commit\n")
    return Upstream(kohya_ss, sd_scripts, commits[0], old_sd_scripts, commits[1], new_sd_scripts)


def stand_in_python(generation: Generation, source: str) -> None:
    """Make a generation whose interpreter runs this program, whatever script it is started with.

    It gets the command line of the real one: ``sys.argv[1:]`` has the options, the script
    and its arguments.
    """
    generation.python.parent.mkdir(parents=True, exist_ok=True)
    generation.python.write_text(f"#!{sys.executable}\n{source}")
    generation.python.chmod(0o755)


def make_profile(lock: str = "none") -> Profile:
    """A profile for this machine's Python whose lock may be small."""
    return Profile(
        lock=lock,
        gui_lock=f"{lock}-gui",
        summary="made by the tests",
        python=PYTHON,
        macos="11.0",
        mixed_precision={"mps": ("no",), "cuda": ("no", "fp16", "bf16"), "cpu": ("no", "bf16")},
        disk_gb={"darwin": 0, "linux": 0},
        forbidden=Forbidden(any=("bitsandbytes",), darwin=("triton",)),
    )


def make_settings(
    home: Path, *, url: str = "", commit: str = "0" * 40, profile: Profile | None = None
) -> Settings:
    """Settings without the files that they are usually read from."""
    return Settings(
        home=home,
        url=url,
        commit=commit,
        profile_name="small",
        profile=profile or make_profile(),
        mixed_precision="no",
        generations_kept=2,
        network_stall_seconds=20.0,
    )


@dataclass(frozen=True)
class Small:
    """A lock of two small packages, the folder with their wheels, and the settings that use it."""

    lock: Path
    wheels: Path
    settings: Settings
