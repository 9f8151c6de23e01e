from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import kohya_mps
from kohya_mps.core.installation import MANIFEST, Installation

ROOT = Path(__file__).parents[2]

# A command with a bug, as a program of its own.
BUGGY = """
import sys
from pathlib import Path
from kohya_mps.core import cli
def step():
    return len({{}}[{key!r}])
sys.argv = ["/usr/bin/invoke", "setup", "--json", "--repo-url", "https://me:secret@git.example/a"]
cli.run_task(step, json={json})
"""


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """The directory for logs of the tests' user."""
    if sys.platform == "darwin":
        return tmp_path / "user" / "Library" / "Logs" / "kohya-mps"
    return tmp_path / "user" / ".local" / "state" / "kohya-mps" / "log"


def run_buggy(*, json: bool = False, **variables: str) -> subprocess.CompletedProcess[str]:
    key = f"{Path.home()}/tools"
    return subprocess.run(
        [sys.executable, "-c", BUGGY.format(json=json, key=key)],
        cwd=ROOT, env={"HOME": str(Path.home()), "PATH": os.environ["PATH"], **variables},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_bug_is_reported_in_two_lines_that_name_a_log(logs: Path) -> None:
    done = run_buggy()
    assert done.returncode == 1
    assert done.stdout == ""
    what, fix = done.stderr.splitlines()
    assert what.startswith("error: This is a bug in kohya-mps: KeyError")
    log = Path(fix.removeprefix("  -> attach this log to an issue: "))
    assert [log] == list(logs.iterdir())


def test_the_log_of_a_bug_has_what_finds_it_and_nothing_private(logs: Path, tmp_path: Path) -> None:
    home = Installation(Path.home() / "tools" / "kohya_ss")
    generation = home.generations / "one"
    (generation / "venv").mkdir(parents=True)
    (generation / MANIFEST).write_text('{"profile": "latest"}')
    home.venv.symlink_to(generation / "venv")
    run_buggy()
    (log,) = logs.iterdir()
    text = log.read_text()
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for part in (
        f"kohya-mps {kohya_mps.__version__} (commit {commit.stdout.strip()}",
        f"Python {platform.python_version()} on {platform.platform()}",
        "installed profile: latest",
        "command: invoke setup --json --repo-url https://git.example/a",
        "KeyError: '~/tools'",
        "core/cli.py",
    ):
        assert part in text
    assert "secret" not in text
    assert str(Path.home()) not in text


def test_a_bug_is_an_error_as_json_too() -> None:
    done = run_buggy(json=True)
    assert done.returncode == 1
    reported = json.loads(done.stdout)
    assert reported["ok"] is False
    assert "This is a bug in kohya-mps: KeyError" in reported["checks"][0]["detail"]
    assert "attach this log" in reported["checks"][0]["fix"]


def test_a_bug_shows_its_traceback_where_the_log_is_lost(tmp_path: Path) -> None:
    in_ci = run_buggy(CI="true")
    assert "Traceback" in in_ci.stderr
    assert "KeyError" in in_ci.stderr.partition("error: ")[0]
    assert "attach this log" in in_ci.stderr
    (tmp_path / "file").touch()
    unwritable = run_buggy(XDG_STATE_HOME=str(tmp_path / "file"), HOME=str(tmp_path / "file"))
    assert "KeyError" in unwritable.stderr.partition("error: ")[0]
    assert "\nerror: This is a bug in kohya-mps: KeyError" in unwritable.stderr
    assert unwritable.stderr.endswith("\n  -> attach the lines above to an issue\n")
    assert unwritable.returncode == 1
