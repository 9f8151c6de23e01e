from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from kohya_mps.core import installation as home_module
from kohya_mps.core.errors import Busy, UsageError
from kohya_mps.core.files import link_atomic, write_atomic
from kohya_mps.core.installation import Installation, check_location
from kohya_mps.core.process import RUN_MARK
from kohya_mps.core.run_lock import exclusive_lock

ROOT = Path(__file__).parents[2]

# Holds the home given as its argument, starts a process below it, and waits.
HOLDER = """
import subprocess, sys, time
from pathlib import Path
from kohya_mps.core.installation import Installation
from kohya_mps.core.run_lock import exclusive_lock
from kohya_mps.core.process import clean_environ
with exclusive_lock(Installation(Path(sys.argv[1]))):
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    below = subprocess.Popen(sleep, env=clean_environ(), stdout=subprocess.DEVNULL)
    print(below.pid, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def home(tmp_path: Path) -> Installation:
    return Installation(tmp_path / "it's a $(home)")


@contextlib.contextmanager
def holder(home: Installation) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
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


def test_a_home_in_use_is_refused_at_once_with_the_other_process(home: Installation) -> None:
    with holder(home) as (process, _):
        with pytest.raises(Busy, match=f"process {process.pid}") as caught, exclusive_lock(home):
            pass
        assert str(process.pid) in caught.value.fix
        assert caught.value.exit_code == 3


def test_a_lock_left_by_a_killed_process_is_taken_over_and_its_leftovers_end(home: Installation) -> None:
    with holder(home) as (process, below):
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert psutil.pid_exists(below)
        with exclusive_lock(home):
            pass
        left = psutil.Process(below) if psutil.pid_exists(below) else None
        assert left is None or left.status() == psutil.STATUS_ZOMBIE


def test_the_run_that_holds_the_home_is_named_and_not_a_killed_one_before_it(home: Installation) -> None:
    """Ending what a killed run left takes seconds; a third run that comes meanwhile has to name the second."""
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    environ = {**os.environ, RUN_MARK: "killed"}
    below = subprocess.Popen([sys.executable, "-c", stubborn], env=environ, stdout=subprocess.PIPE)
    assert below.stdout is not None
    below.stdout.readline()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    record = home.state / "holder.json"
    write_atomic(record, json.dumps({"pid": gone.pid, "mark": "killed"}).encode())
    second = subprocess.Popen([sys.executable, "-c", HOLDER, home.root], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        while json.loads(record.read_bytes())["pid"] == gone.pid:
            assert second.poll() is None
        assert below.poll() is None, "the leftover has to be there still"
        with pytest.raises(Busy, match=f"process {second.pid}"), exclusive_lock(home):
            pass
        # Killed in the middle of that, it leaves both marks to the next run.
        second.kill()
        second.wait()
        with exclusive_lock(home):
            pass
        assert below.wait(timeout=10) == -signal.SIGKILL
    finally:
        for process in (second, below):
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def test_a_look_at_the_lock_does_not_turn_a_run_away(
    home: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`invoke status` holds the lock for the moment that it takes to see whether it is free."""
    home.state.mkdir(parents=True)
    with (home.state / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        monkeypatch.setattr(time, "sleep", lambda _: fcntl.flock(lock, fcntl.LOCK_UN))
        with exclusive_lock(home):
            pass


def test_a_lock_that_outlives_its_dead_holder_for_a_moment_is_taken_over(home: Installation) -> None:
    with holder(home) as (process, _):
        dead = subprocess.Popen([sys.executable, "-c", "pass"])
        dead.wait()
        record = home.state / "holder.json"
        record.write_bytes(record.read_bytes().replace(str(process.pid).encode(), str(dead.pid).encode()))
        threading.Timer(1.5, process.kill).start()
        with exclusive_lock(home):
            assert process.wait(5) == -signal.SIGKILL


def test_what_another_installation_runs_is_not_ended(home: Installation, tmp_path: Path) -> None:
    with holder(Installation(tmp_path / "another")) as (process, below), exclusive_lock(home):
        assert process.poll() is None
        assert psutil.Process(below).is_running()


def test_a_home_is_free_again_after_success_failure_and_in_turn(home: Installation) -> None:
    with exclusive_lock(home):
        assert os.environ[RUN_MARK]
    assert RUN_MARK not in os.environ
    with pytest.raises(ZeroDivisionError), exclusive_lock(home):
        raise ZeroDivisionError
    with exclusive_lock(home):
        pass


def test_an_unreadable_record_of_the_holder_is_no_obstacle(home: Installation) -> None:
    home.state.mkdir(parents=True)
    (home.state / "holder.json").write_bytes(b"\xff{")
    with exclusive_lock(home):
        (home.state / "holder.json").write_bytes(b"")
        with pytest.raises(Busy, match="another process"), exclusive_lock(home):
            pass


def refused(home: Installation) -> str:
    with pytest.raises(UsageError) as caught:
        check_location(home)
    return str(caught.value)


def test_a_new_place_an_empty_one_and_a_checkout_are_good(home: Installation) -> None:
    check_location(home)
    home.root.mkdir(parents=True)
    check_location(home)
    (home.root / ".DS_Store").touch()
    home.state.mkdir()
    home.venv.mkdir()
    check_location(home)
    (home.root / ".git").mkdir()
    (home.root / "kohya_gui.py").touch()
    check_location(home)


def test_a_file_and_a_place_below_a_file_are_refused(home: Installation) -> None:
    home.root.touch()
    assert "is not a directory" in refused(home)
    assert "is not a directory" in refused(Installation(home.root / "below" / "it"))


def test_a_link_to_nowhere_is_refused_and_a_link_to_a_directory_is_not(
    home: Installation, tmp_path: Path
) -> None:
    home.root.symlink_to(tmp_path / "elsewhere")
    assert "is not a directory" in refused(home)
    (tmp_path / "elsewhere").mkdir()
    check_location(home)


def test_a_directory_with_something_else_in_it_is_refused_with_what_it_holds(home: Installation) -> None:
    home.root.mkdir()
    for n in range(7):
        (home.root / f"thesis-{n}.tex").touch()
    message = refused(home)
    assert "thesis-0.tex" in message
    assert "…" in message
    assert "KOHYA_HOME" in message


def test_a_checkout_whose_repository_was_being_replaced_is_no_stranger(home: Installation) -> None:
    home.root.mkdir()
    (home.root / "kohya_gui.py").touch()
    assert "kohya_gui.py" in refused(home)
    write_atomic(home.checkout_move, b"{}")
    check_location(home)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_place_that_cannot_be_written_is_refused(home: Installation, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        assert "not writable" in refused(home)
    finally:
        tmp_path.chmod(0o700)


def test_a_place_that_says_it_cannot_be_written_is_refused(
    home: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "not writable" in refused(home)


def test_a_place_below_a_directory_of_everybodys_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared by all"
    shared.mkdir()
    shared.chmod(0o777)
    message = refused(Installation(shared / "deep" / "home"))
    assert f"{shared} can be written by every user" in message
    assert f"chmod go-w '{shared}'" in message


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give a directory away")
def test_a_place_of_another_user_is_refused(home: Installation) -> None:
    home.generations.mkdir(parents=True)
    os.chown(home.generations, 12345, -1)
    message = refused(home)
    assert f"{home.generations} belongs to another user" in message
    assert "sudo chown -R" in message
    os.chown(home.generations, 0, -1)
    check_location(home)


def test_a_place_of_a_foreign_group_is_refused_and_of_the_users_own_is_not(
    home: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.root.mkdir()
    home.root.chmod(0o775)
    monkeypatch.setattr(home_module, "_private_group", lambda: home.root.stat().st_gid)
    check_location(home)
    if home.root.stat().st_gid == 0:
        os.chown(home.root, -1, 1)
    monkeypatch.setattr(home_module, "_private_group", lambda: None)
    assert "by its group" in refused(home)


def test_the_sticky_bit_protects_what_lies_below(tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    temporary.chmod(0o1777)
    check_location(Installation(temporary / "home"))


def test_a_file_is_replaced_whole_and_is_nobody_elses_to_change(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    os.umask(mask := os.umask(0))
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    os.umask(mask)
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_what_a_killed_write_left_is_replaced_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "file"
    killed = "import os, sys; os.fsync = lambda _: os._exit(9); from pathlib import Path\n"
    killed += "from kohya_mps.core.files import write_atomic; write_atomic(Path(sys.argv[1]), b'half')"
    assert subprocess.run([sys.executable, "-c", killed, path], cwd=ROOT, check=False).returncode == 9
    assert not path.exists()
    assert len(list(tmp_path.glob(".file*"))) == 1

    write_atomic(path, b"whole")

    assert path.read_bytes() == b"whole"
    assert list(tmp_path.glob(".file*")) == []


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["file"]


def test_a_link_is_switched_in_one_step_and_moves_with_its_home(tmp_path: Path) -> None:
    root = tmp_path / "home"
    for name in ("one", "two"):
        (root / "generations" / name).mkdir(parents=True)
    link_atomic(root / "venv", root / "generations" / "one")
    (root / ".venv.new").symlink_to("left by a killed run")
    link_atomic(root / "venv", root / "generations" / "two")
    assert (root / "venv").samefile(root / "generations" / "two")
    moved = root.rename(tmp_path / "moved")
    assert (moved / "venv").samefile(moved / "generations" / "two")
    assert not os.path.lexists(moved / ".venv.new")
