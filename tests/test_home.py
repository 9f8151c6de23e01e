from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from kohya_mps import home as home_module
from kohya_mps.errors import Busy, UsageError
from kohya_mps.home import Home, check_place, held, link, write
from kohya_mps.process import RUN_MARK

ROOT = Path(__file__).parent.parent

# Holds the home given as its argument, starts a process below it, and waits.
HOLDER = """
import subprocess, sys, time
from pathlib import Path
from kohya_mps.home import Home, held
from kohya_mps.process import scrubbed
with held(Home(Path(sys.argv[1]))):
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    below = subprocess.Popen(sleep, env=scrubbed(), stdout=subprocess.DEVNULL)
    print(below.pid, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "it's a $(home)")


@contextlib.contextmanager
def holder(home: Home) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A second process that holds the home, and the id of what it started."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, home.root], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    below = int(process.stdout.readline())
    try:
        yield process, below
    finally:
        process.stdout.close()
        process.kill()
        process.wait()
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(below).kill()


def test_a_home_in_use_is_refused_at_once_with_the_other_process(home: Home) -> None:
    with holder(home) as (process, _):
        with pytest.raises(Busy, match=f"process {process.pid}") as caught, held(home):
            pass
        assert str(process.pid) in caught.value.fix
        assert caught.value.exit_code == 3


def test_a_lock_left_by_a_killed_process_is_taken_over_and_its_leftovers_end(home: Home) -> None:
    with holder(home) as (process, below):
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert psutil.pid_exists(below)
        with held(home):
            pass
        left = psutil.Process(below) if psutil.pid_exists(below) else None
        assert left is None or left.status() == psutil.STATUS_ZOMBIE


def test_what_another_installation_runs_is_not_ended(home: Home, tmp_path: Path) -> None:
    with holder(Home(tmp_path / "another")) as (process, below), held(home):
        assert process.poll() is None
        assert psutil.Process(below).is_running()


def test_a_home_is_free_again_after_success_failure_and_in_turn(home: Home) -> None:
    with held(home):
        assert os.environ[RUN_MARK]
    assert RUN_MARK not in os.environ
    with pytest.raises(ZeroDivisionError), held(home):
        raise ZeroDivisionError
    with held(home):
        pass


def test_an_unreadable_record_of_the_holder_is_no_obstacle(home: Home) -> None:
    home.state.mkdir(parents=True)
    (home.state / "holder.json").write_bytes(b"\xff{")
    with held(home):
        (home.state / "holder.json").write_bytes(b"")
        with pytest.raises(Busy, match="another process"), held(home):
            pass


def refused(home: Home) -> str:
    with pytest.raises(UsageError) as caught:
        check_place(home)
    return str(caught.value)


def test_a_new_place_an_empty_one_and_a_checkout_are_good(home: Home) -> None:
    check_place(home)
    home.root.mkdir(parents=True)
    check_place(home)
    (home.root / ".DS_Store").touch()
    home.state.mkdir()
    home.venv.mkdir()
    check_place(home)
    (home.root / ".git").mkdir()
    (home.root / "kohya_gui.py").touch()
    check_place(home)


def test_a_file_and_a_place_below_a_file_are_refused(home: Home) -> None:
    home.root.touch()
    assert "is not a directory" in refused(home)
    assert "is not a directory" in refused(Home(home.root / "below" / "it"))


def test_a_link_to_nowhere_is_refused_and_a_link_to_a_directory_is_not(home: Home, tmp_path: Path) -> None:
    home.root.symlink_to(tmp_path / "elsewhere")
    assert "is not a directory" in refused(home)
    (tmp_path / "elsewhere").mkdir()
    check_place(home)


def test_a_directory_with_something_else_in_it_is_refused_with_what_it_holds(home: Home) -> None:
    home.root.mkdir()
    for n in range(7):
        (home.root / f"thesis-{n}.tex").touch()
    message = refused(home)
    assert "thesis-0.tex" in message
    assert "…" in message
    assert "KOHYA_HOME" in message


def test_a_checkout_whose_repository_was_being_replaced_is_no_stranger(home: Home) -> None:
    home.root.mkdir()
    (home.root / "kohya_gui.py").touch()
    assert "kohya_gui.py" in refused(home)
    write(home.moving, b"{}")
    check_place(home)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_place_that_cannot_be_written_is_refused(home: Home, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        assert "not writable" in refused(home)
    finally:
        tmp_path.chmod(0o700)


def test_a_place_that_says_it_cannot_be_written_is_refused(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "not writable" in refused(home)


def test_a_place_below_a_directory_of_everybodys_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared by all"
    shared.mkdir()
    shared.chmod(0o777)
    message = refused(Home(shared / "deep" / "home"))
    assert f"{shared} can be written by every user" in message
    assert f"chmod go-w '{shared}'" in message


def test_a_place_of_a_foreign_group_is_refused_and_of_the_users_own_is_not(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.root.mkdir()
    home.root.chmod(0o775)
    monkeypatch.setattr(home_module, "_private_group", lambda: home.root.stat().st_gid)
    check_place(home)
    if home.root.stat().st_gid == 0:
        os.chown(home.root, -1, 1)
    monkeypatch.setattr(home_module, "_private_group", lambda: None)
    assert "by its group" in refused(home)


def test_the_sticky_bit_protects_what_lies_below(tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    temporary.chmod(0o1777)
    check_place(Home(temporary / "home"))


def test_a_file_is_replaced_whole_and_is_nobody_elses_to_change(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    os.umask(mask := os.umask(0))
    write(path, b"one")
    write(path, b"two")
    os.umask(mask)
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["file"]


def test_a_link_is_switched_in_one_step_and_moves_with_its_home(tmp_path: Path) -> None:
    root = tmp_path / "home"
    for name in ("one", "two"):
        (root / "generations" / name).mkdir(parents=True)
    link(root / "venv", root / "generations" / "one")
    (root / ".venv.new").symlink_to("left by a killed run")
    link(root / "venv", root / "generations" / "two")
    assert (root / "venv").samefile(root / "generations" / "two")
    moved = root.rename(tmp_path / "moved")
    assert (moved / "venv").samefile(moved / "generations" / "two")
    assert not os.path.lexists(moved / ".venv.new")
