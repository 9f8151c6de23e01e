from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from kohya_mps.core.errors import Busy
from kohya_mps.core.files import write_atomic
from kohya_mps.core.installation import Installation
from kohya_mps.core.process import RUN_MARK
from kohya_mps.core.run_lock import exclusive_lock

ROOT = Path(__file__).parents[2]

# Holds the lock of the home that its argument names, starts a child, and waits.
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


def test_a_run_starts_although_another_command_tests_the_lock_for_a_moment(
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
