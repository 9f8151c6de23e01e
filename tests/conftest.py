"""What the tests share: a scrubbed machine, a small upstream, and a lock of small wheels."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from wheelhouse import pin, wheel

from kohya_mps.settings import Forbidden, Profile, Settings

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"

_GIT_CONFIG = """\
[user]
    name = Somebody
    email = somebody@example.invalid
[init]
    defaultBranch = main
    templateDir =
[protocol "file"]
    allow = always
"""


def pytest_configure() -> None:
    """A shell starts what it puts into the background with Ctrl-C ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a home, a git configuration and a ``bin`` that has git and this Python."""
    root = tmp_path_factory.mktemp("machine")
    (root / "bin").mkdir()
    git = shutil.which("git")
    assert git, "the tests need git"
    (root / "bin" / "git").symlink_to(git)
    interpreter = Path(sys.base_prefix) / "bin" / f"python{PYTHON}"
    (root / "bin" / f"python{PYTHON}").symlink_to(interpreter.resolve())
    (root / "gitconfig").write_text(_GIT_CONFIG)
    return root


@pytest.fixture(autouse=True)
def isolated_machine(
    request: pytest.FixtureRequest, machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the developer's own configuration reaches a test, and nothing of a test reaches it.

    Tests of the real environment or the real upstream are left with the variables that name those.
    """
    if any(request.node.get_closest_marker(name) for name in ("environment", "upstream")):
        return
    for name in list(os.environ):
        if name.startswith(
            ("KOHYA_", "PIP_", "UV_", "GIT_", "HF_", "XDG_", "CONDA", "PYTHON", "VIRTUAL_ENV")
        ):
            monkeypatch.delenv(name)
    user = tmp_path / "user"
    user.mkdir()
    monkeypatch.setenv("HOME", str(user))
    monkeypatch.setenv("PATH", os.pathsep.join((str(machine / "bin"), "/usr/bin", "/bin")))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(machine / "gitconfig"))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("UV_CACHE_DIR", str(machine / "uv-cache"))
    monkeypatch.setenv("UV_PYTHON_INSTALL_DIR", str(machine / "uv-pythons"))
    monkeypatch.setenv("UV_PYTHON_DOWNLOADS", "never")
    monkeypatch.setenv("UV_OFFLINE", "1")


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


@pytest.fixture(scope="session")
def _upstream(tmp_path_factory: pytest.TempPathFactory, machine: Path) -> Upstream:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GIT_CONFIG_GLOBAL", str(machine / "gitconfig"))
        patch.setenv("GIT_CONFIG_NOSYSTEM", "1")
        return make_upstream(tmp_path_factory.mktemp("upstream"))


@pytest.fixture
def upstream(_upstream: Upstream) -> Upstream:
    """The stand-in that tests share; one that changes it makes its own with ``make_upstream``."""
    return _upstream


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


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    """Wheels in a folder that uv is told of, and a lock of them."""
    house = tmp_path / "wheels"
    first = wheel(house, "plain", "1.0", files={"plain/core.py": b"VALUE = 1\n"})
    second = wheel(house, "other-thing", "2.1", files={"other_thing/data.txt": b"some data\n"})
    locks = tmp_path / "constraints"
    locks.mkdir()
    (locks / "small.txt").write_text(pin(first) + pin(second))
    monkeypatch.setattr("kohya_mps.settings.CONSTRAINTS", locks)
    monkeypatch.setenv("UV_FIND_LINKS", str(house))
    return Small(locks / "small.txt", house, make_settings(tmp_path / "home", profile=make_profile("small")))
