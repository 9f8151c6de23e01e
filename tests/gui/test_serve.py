"""``invoke gui`` around a small page, in a small environment that the tests make."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from kohya_mps.core import machine, settings
from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.core.installation import Installation
from kohya_mps.core.settings import ROOT, Settings
from kohya_mps.gui import serve
from kohya_mps.install import environment, inventory, rollback, setup, status
from kohya_mps.install.generations import Generation, activate
from kohya_mps.install.inventory import site_packages
from tests.support.installs import Small
from tests.support.web_pages import free_port, generation_of, make_installation
from tests.support.wheelhouse import pin, wheel


class Started:
    """``invoke gui`` as a user types it."""

    def __init__(self, chosen: Settings, log: Path, *arguments: str, **variables: str) -> None:
        self.port, self._log = free_port(), log
        command = [sys.executable, "-m", "invoke", "gui", "--port", str(self.port), *arguments]
        environ = {**os.environ, "KOHYA_HOME": str(chosen.home), **variables}
        with log.open("wb") as output:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=output, stderr=output)

    def output(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def answer(self) -> dict[str, Any]:
        """The page's answer, once its address was printed."""
        deadline = time.monotonic() + 60
        while f"http://127.0.0.1:{self.port}" not in self.output():
            assert self.process.poll() is None and time.monotonic() < deadline, self.output()
            time.sleep(0.05)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            f"http://127.0.0.1:{self.port}/", timeout=10
        ) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    def end(self, how: signal.Signals = signal.SIGINT) -> int:
        self.process.send_signal(how)
        return self.process.wait(30)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_the_address_is_printed_and_nothing_is_left_when_it_is_ended(
    installation: Settings, tmp_path: Path, how: signal.Signals
) -> None:
    started = Started(installation, tmp_path / "log")
    training = psutil.Process(started.answer()["training"])
    assert started.end(how) == 0, started.output()
    assert "The page has ended." in started.output()
    assert not training.is_running() or training.status() == psutil.STATUS_ZOMBIE
    socket.create_server(("127.0.0.1", started.port)).close()


def test_a_second_page_of_the_same_installation_is_refused(installation: Settings, tmp_path: Path) -> None:
    first = Started(installation, tmp_path / "first")
    first.answer()
    second = Started(installation, tmp_path / "second")
    assert second.process.wait(30) == 3
    assert f"in use by process {first.process.pid}" in second.output()
    assert first.end() == 0


def test_the_users_own_forms_are_used(installation: Settings, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[basic]\n")
    started = Started(installation, tmp_path / "log", "--config", str(tmp_path / "mine.toml"))
    rest = started.answer()["rest"]
    started.end()
    assert rest[rest.index("--config") + 1] == str(tmp_path / "mine.toml")
    with pytest.raises(UsageError, match="there is no such file"):
        serve.serve(installation, serve.ServeOptions(config=str(tmp_path / "nothing.toml")))


def test_the_page_gets_a_scrubbed_environment_and_upstreams_own_switches(
    installation: Settings, tmp_path: Path
) -> None:
    leaks = {
        "PYTHONPATH": "/leak", "CONDA_PREFIX": "/leak", "ACCELERATE_USE_CPU": "1",
        "GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_ALLOWED_PATHS": "/", "HTTP_PROXY": "http://proxy.invalid:1",
        "NO_PROXY": "intern.invalid",
    }  # fmt: skip
    started = Started(installation, tmp_path / "log", **leaks)
    answer = started.answer()
    started.end()
    environ, home = answer["environ"], Installation(installation.home)
    assert not {"PYTHONPATH", "CONDA_PREFIX", "ACCELERATE_USE_CPU"} & environ.keys()
    assert not {"GRADIO_SERVER_NAME", "GRADIO_ALLOWED_PATHS"} & environ.keys()
    assert environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert environ["PYTORCH_ENABLE_MPS_FALLBACK"] == "1"
    assert environ["TENSORBOARD_HOST"] == "127.0.0.1"
    assert environ["NO_PROXY"] == "intern.invalid,127.0.0.1,localhost"
    assert environ["PATH"].split(os.pathsep)[:2] == [
        str(home.state / "gui" / "bin"),
        str(generation_of(installation).venv / "bin"),
    ]
    assert {"--headless", "--noverify"} <= set(answer["rest"])
    assert answer["cwd"] == str(installation.home)


def test_a_port_that_is_taken_is_an_error_that_names_another(installation: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} is in use") as caught:
            serve.serve(installation, serve.ServeOptions(port=str(port)))
    assert "invoke gui --port" in caught.value.fix


@pytest.mark.parametrize("port", ["0", "65536", "web", "-1", "٣"])
def test_what_is_not_a_port_is_refused(installation: Settings, port: str) -> None:
    with pytest.raises(UsageError, match="is not a port"):
        serve.serve(installation, serve.ServeOptions(port=port))


def test_an_address_of_another_machine_is_refused(installation: Settings) -> None:
    with pytest.raises(UsageError, match=r"has no address '192\.0\.2\.1'"):
        serve.serve(installation, serve.ServeOptions(port=str(free_port()), listen="192.0.2.1"))


def test_another_address_is_used_with_a_warning(installation: Settings, tmp_path: Path) -> None:
    started = Started(installation, tmp_path / "log", "--listen", "0.0.0.0")
    started.answer()
    started.end()
    assert "it has no password" in started.output()
    quiet = Started(installation, tmp_path / "quiet")
    quiet.answer()
    quiet.end()
    assert "password" not in quiet.output()


def test_a_page_that_ends_by_itself_is_a_failure_with_its_last_line(
    installation: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGE_FAILS", "1")
    with pytest.raises(StepFailed, match="ended with 1: the page has had enough"):
        serve.serve(installation, serve.ServeOptions(port=str(free_port())))


def test_a_page_that_does_not_answer_is_ended(
    installation: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGE_NEVER_ANSWERS", "1")
    short = msgspec.structs.replace(settings.load_gui(), answers_within_seconds=2.0)
    monkeypatch.setattr(serve, "load_gui", lambda: short)
    port = free_port()
    with pytest.raises(StepFailed, match="did not answer"):
        serve.serve(installation, serve.ServeOptions(port=str(port)))
    socket.create_server(("127.0.0.1", port)).close()


def small_with_page(small: Small) -> Small:
    """The same, and a lock with one package more."""
    page = pin(wheel(small.wheels, "page", "3.0"))
    small.lock.with_name("small-gui.txt").write_text(small.lock.read_text() + page)
    return small


def built(chosen: Settings, *, page: bool) -> Generation:
    generation = environment.build(chosen, environment.plan(chosen, gui=page))
    activate(Installation(chosen.home), generation)
    return generation


def test_the_page_has_a_lock_of_its_own_and_stays_until_no_gui_is_given(small: Small) -> None:
    chosen = small_with_page(small).settings
    trainer, with_page = built(chosen, page=False), built(chosen, page=True)
    assert inventory.versions(with_page.venv) == {**inventory.versions(trainer.venv), "page": "3.0"}

    assert environment.plan(chosen).usable == with_page
    assert environment.rebuild(chosen).extra["generation"] == with_page.name
    Installation(chosen.home).venv.unlink()
    assert environment.plan(chosen).usable == with_page

    assert built(chosen, page=False) == trainer
    assert environment.plan(chosen).usable == trainer


def test_a_newer_lock_is_built_with_the_page_again(small: Small) -> None:
    chosen = small_with_page(small).settings
    old = built(chosen, page=True)
    lock = small.lock.with_name("small-gui.txt")
    lock.write_text(lock.read_text() + "# refreshed\n")
    new = environment.build(chosen)
    assert new != old
    assert new.has_gui()


def test_an_environment_with_the_page_is_compared_with_the_pages_lock(small: Small) -> None:
    chosen = small_with_page(small).settings
    built(chosen, page=True)
    assert "lock" not in {check.name for check in status.status(chosen).checks}
    lock = small.lock.with_name("small-gui.txt")
    lock.write_text(lock.read_text() + "# refreshed\n")
    (row,) = (check for check in status.status(chosen).checks if check.name == "lock")
    assert "small-gui.txt" in row.detail


def test_rollback_goes_back_to_the_environment_before_the_page(small: Small) -> None:
    chosen = small_with_page(small).settings
    trainer, _ = built(chosen, page=False), built(chosen, page=True)
    assert rollback.rollback(chosen).extra["generation"] == trainer.name
    assert environment.plan(chosen).usable == trainer


def test_both_flags_at_once_are_refused() -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        setup.SetupOptions().with_gui(gui=True, no_gui=True)
    flags = ((True, False), (False, True), (False, False))
    chosen = [setup.SetupOptions().with_gui(gui, no_gui).gui for gui, no_gui in flags]
    assert chosen == [True, False, None]


def test_an_environment_without_the_page_names_the_command_that_installs_it(tmp_path: Path) -> None:
    bare = make_installation(tmp_path, gui=False)
    with pytest.raises(UsageError, match="without the web page") as caught:
        serve.serve(bare, serve.ServeOptions())
    assert "invoke setup --gui" in caught.value.fix
    with pytest.raises(UsageError, match="no environment of the profile 'latest'") as caught:
        serve.serve(bare, serve.ServeOptions(profile="latest"))
    assert "invoke setup --gui --profile latest" in caught.value.fix


def test_without_tkinter_the_command_is_named_and_the_page_starts(
    installation: Settings, tmp_path: Path
) -> None:
    hide = "import sys; sys.modules['_tkinter'] = None\n"
    (site_packages(generation_of(installation).venv) / "no_tkinter.pth").write_text(hide)
    started = Started(installation, tmp_path / "log")
    started.answer()
    started.end()
    command = "brew install python-tk@3.11" if machine.on_mac() else "apt install python3-tk"
    assert command in started.output().splitlines()[0]
