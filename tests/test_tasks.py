from __future__ import annotations

import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from invoke.collection import Collection
from invoke.loader import FilesystemLoader

from tests.support.installs import Upstream, git

ROOT = Path(__file__).parent.parent


def invoke(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "invoke", *arguments],
        cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tasks() -> Collection:
    module, _ = FilesystemLoader(start=str(ROOT)).load("tasks")
    return Collection.from_module(module)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "it's a $(home)"
    monkeypatch.setenv("KOHYA_HOME", str(path))
    return path


def test_the_list_shows_each_task_with_what_it_does(tasks: Collection) -> None:
    listed = invoke("--list")
    assert listed.returncode == 0, listed.stderr
    shown = " ".join(listed.stdout.split())
    for name in tasks.task_names:
        first_line = inspect.getdoc(tasks[name].body).splitlines()[0]  # type: ignore[union-attr]
        assert f"{name} {first_line}" in shown
        assert first_line.endswith(".")


def test_every_option_is_explained(tasks: Collection) -> None:
    for name in tasks.task_names:
        for argument in tasks[name].get_arguments():
            assert argument.help, f"{name} --{argument.name}"


def test_listing_imports_nothing_of_the_package() -> None:
    code = "import runpy, sys; runpy.run_path('tasks.py'); print([m for m in sys.modules if m.startswith('kohya_mps')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("task", ["setup", "clone"])
def test_a_wrong_commit_ends_with_2_and_json_alone_on_standard_output(task: str, home: Path) -> None:
    done = invoke(task, "--json", KOHYA_COMMIT="master")
    assert done.returncode == 2
    reported = json.loads(done.stdout)
    assert reported["ok"] is False
    assert "KOHYA_COMMIT" in reported["checks"][0]["detail"]
    assert "40 hexadecimal digits" in reported["checks"][0]["fix"]
    assert done.stderr.startswith("error: KOHYA_COMMIT")
    assert "Traceback" not in done.stderr
    assert not home.exists()


def test_a_dry_run_is_refused_and_does_nothing(home: Path) -> None:
    done = invoke("--dry", "setup")
    assert done.returncode == 2
    assert "--dry is not supported" in done.stderr
    assert not home.exists()


@pytest.mark.parametrize(
    "arguments", [("verify",), ("configure",), ("train", "no.toml"), ("verify", "--full"), ("rollback",)]
)
def test_what_needs_an_installation_says_how_to_get_one(arguments: tuple[str, ...], home: Path) -> None:
    done = invoke(*arguments)
    assert done.returncode == 2
    assert "`invoke setup`" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments", [("configure", "--processes", "two"), ("tensorboard", "run", "--port", "many")]
)
def test_a_flag_that_needs_a_number_ends_with_2_without_one(arguments: tuple[str, ...], home: Path) -> None:
    done = invoke(*arguments)
    assert done.returncode == 2
    assert f"{arguments[-2]}: found '{arguments[-1]}'" in done.stderr


def test_setup_takes_a_profile(home: Path) -> None:
    done = invoke("setup", "--json", "--profile", "no-such")
    assert done.returncode == 2
    assert "--profile: there is no profile 'no-such'" in json.loads(done.stdout)["checks"][0]["detail"]


def test_a_home_that_cannot_be_used_ends_with_2(home: Path) -> None:
    home.write_text("a file")
    done = invoke("setup", "--json")
    assert done.returncode == 2
    assert "is not a directory" in json.loads(done.stdout)["checks"][0]["detail"]
    assert home.read_text() == "a file"


def test_a_missing_git_is_reported_before_anything_is_touched(home: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    done = invoke("setup", "--json", PATH=str(tmp_path / "bin"))
    assert done.returncode == 1
    reported = json.loads(done.stdout)
    assert "git was not found" in reported["checks"][0]["detail"]
    assert reported["checks"][0]["fix"]
    assert not home.exists()


def test_clone_makes_the_checkout_and_reports_it_as_json(home: Path, upstream: Upstream) -> None:
    variables = {"KOHYA_REPO_URL": str(upstream.kohya_ss), "KOHYA_COMMIT": upstream.old}
    first = invoke("clone", "--json", **variables)
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["commits"] == {
        "kohya_ss": upstream.old,
        "sd_scripts": upstream.old_sd_scripts,
    }
    # A flag wins over the variable.
    second = invoke("clone", "--commit", upstream.commit, **variables)
    assert second.returncode == 0, second.stderr
    assert upstream.commit in second.stdout
    assert git(home, "rev-parse", "HEAD") == upstream.commit


def test_local_changes_are_refused_with_2_and_put_away_with_the_flag(home: Path, upstream: Upstream) -> None:
    variables = {"KOHYA_REPO_URL": str(upstream.kohya_ss), "KOHYA_COMMIT": upstream.commit}
    assert invoke("clone", **variables).returncode == 0
    (home / "kohya_gui.py").write_text("mine\n")
    refused = invoke("clone", **variables)
    assert refused.returncode == 2
    assert "kohya_gui.py" in refused.stderr
    assert "--stash" in refused.stderr
    assert invoke("clone", "--stash", **variables).returncode == 0
    assert git(home, "show", "stash@{0}:kohya_gui.py") == "mine"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_with_130_says_how_to_continue_and_leaves_no_process(
    sent: signal.Signals, home: Path, upstream: Upstream
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"git://127.0.0.1:{silent.getsockname()[1]}/kohya_ss"
        process = subprocess.Popen(
            [sys.executable, "-m", "invoke", "clone", "--json"],
            cwd=ROOT, env={**os.environ, "KOHYA_REPO_URL": url, "KOHYA_COMMIT": upstream.commit},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        connection, _ = silent.accept()
        children = psutil.Process(process.pid).children(recursive=True)
        assert [child.name() for child in children if child.name().startswith("git")]
        second = invoke("clone", "--json", KOHYA_REPO_URL=url, KOHYA_COMMIT=upstream.commit)
        process.send_signal(sent)
        out, err = process.communicate(timeout=20)
        connection.close()
    assert process.returncode == 130
    assert "the same command continues from here" in err
    assert "Traceback" not in err
    assert out == ""
    deadline = time.monotonic() + 10
    while any(child.is_running() for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [child for child in children if child.is_running()]
    # While it ran, the home was its own.
    assert second.returncode == 3
    assert str(process.pid) in json.loads(second.stdout)["checks"][0]["detail"]
    # And the same command goes on from there.
    again = invoke("clone", KOHYA_REPO_URL=str(upstream.kohya_ss), KOHYA_COMMIT=upstream.commit)
    assert again.returncode == 0, again.stderr
