"""``invoke gui`` around a small page, in a small environment that the tests make."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
import venv
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from kohya_mps.core import machine, settings
from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.core.installation import Installation
from kohya_mps.core.report import Status
from kohya_mps.core.settings import GUI_PRESETS, ROOT, Settings
from kohya_mps.diagnose import preflight
from kohya_mps.gui import serve
from kohya_mps.install import checkout, environment, inventory, rollback, setup, status, uninstall
from kohya_mps.install.generations import Generation, Manifest, activate
from kohya_mps.install.inventory import Inventory, site_packages
from tests.support.installs import Small, make_settings
from tests.support.wheelhouse import pin, wheel
from tests.support.world import World

# Answers on every address with what it was started with, and starts something that outlives it.
PAGE = """
import argparse, http.server, json, os, subprocess, sys
import tkinter, tkinter.font
from tkinter import *
parser = argparse.ArgumentParser()
parser.add_argument("--listen")
parser.add_argument("--server_port", type=int)
given, rest = parser.parse_known_args()
if os.environ.get("PAGE_FAILS"):
    sys.exit("the page has had enough")
training = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
told = {"environ": dict(os.environ), "rest": rest, "cwd": os.getcwd(), "training": training.pid}

class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if os.environ.get("PAGE_NEVER_ANSWERS") else 200)
        self.end_headers()
        self.wfile.write(json.dumps(told).encode())

http.server.ThreadingHTTPServer((given.listen, given.server_port), Page).serve_forever()
"""

# The packages that gui_page.py and the launcher import.
STAND_INS = {
    "gradio/__init__.py": "",
    "gradio/networking.py": "",
    "httpx.py": "",
    "accelerate/__init__.py": "",
    "accelerate/commands/__init__.py": "",
    "accelerate/commands/accelerate_cli.py": "import json, sys\nprint(json.dumps(sys.argv[1:]))\n",
}


def make_installation(root: Path, *, gui: bool = True) -> Settings:
    """A home with a checkout and an active generation, whose path is one that a shell would split."""
    chosen = make_settings(root / "a home of 'mine'")
    home = Installation(chosen.home)
    generation = Generation(home.generations / "small")
    venv.create(generation.venv, symlinks=True)
    for name, text in STAND_INS.items():
        path = site_packages(generation.venv) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    generation.accelerate_config.write_text("mixed_precision: bf16\n")
    generation.complete(
        Manifest("small", "0", "3.11", sys.executable, Inventory({}, (), "", 0, ()), 0.0, gui)
    )
    activate(home, generation)
    (chosen.home / "kohya_gui.py").write_text(PAGE)
    subprocess.run(["git", "init", "--quiet", chosen.home], check=True)
    return chosen


@pytest.fixture
def installation(tmp_path: Path) -> Settings:
    return make_installation(tmp_path)


def generation_of(chosen: Settings) -> Generation:
    return Generation(Installation(chosen.home).generations / "small")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Started:
    """``invoke gui`` as a person types it."""

    def __init__(self, chosen: Settings, log: Path, *arguments: str, **variables: str) -> None:
        self.port, self._log = free_port(), log
        command = [sys.executable, "-m", "invoke", "gui", "--port", str(self.port), *arguments]
        environ = {**os.environ, "KOHYA_HOME": str(chosen.home), **variables}
        with log.open("wb") as output:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=output, stderr=output)

    def said(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def told(self) -> dict[str, Any]:
        """What the page says, once the address was printed."""
        deadline = time.monotonic() + 60
        while f"http://127.0.0.1:{self.port}" not in self.said():
            assert self.process.poll() is None and time.monotonic() < deadline, self.said()
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
    training = psutil.Process(started.told()["training"])
    assert started.end(how) == 0, started.said()
    assert "The page has ended." in started.said()
    assert not training.is_running() or training.status() == psutil.STATUS_ZOMBIE
    socket.create_server(("127.0.0.1", started.port)).close()


def test_a_second_page_of_the_same_installation_is_refused(installation: Settings, tmp_path: Path) -> None:
    first = Started(installation, tmp_path / "first")
    first.told()
    second = Started(installation, tmp_path / "second")
    assert second.process.wait(30) == 3
    assert f"in use by process {first.process.pid}" in second.said()
    assert first.end() == 0


def test_forms_of_ones_own_are_taken(installation: Settings, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[basic]\n")
    started = Started(installation, tmp_path / "log", "--config", str(tmp_path / "mine.toml"))
    rest = started.told()["rest"]
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
    told = started.told()
    started.end()
    environ, home = told["environ"], Installation(installation.home)
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
    assert {"--headless", "--noverify"} <= set(told["rest"])
    assert told["cwd"] == str(installation.home)


def test_what_the_page_calls_accelerate_launches_with_our_configuration(installation: Settings) -> None:
    generation = generation_of(installation)
    place = serve.write_accelerate(Installation(installation.home), generation)
    given = ["launch", "--mixed_precision", "no", "a script.py", "--config_file", "with 'quotes'.toml"]
    done = subprocess.run([place / "accelerate", *given], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [
        *("launch", "--config_file", str(generation.accelerate_config)),
        *given[1:],
    ]
    other = subprocess.run([place / "accelerate", "env"], capture_output=True, text=True, check=True)
    assert json.loads(other.stdout) == ["env"]


def test_the_forms_open_with_the_launchs_precision_and_what_config_says(installation: Settings) -> None:
    chosen = settings.load_gui()
    path = serve.write_forms(Installation(installation.home), generation_of(installation), chosen)
    forms = tomllib.loads(path.read_text(encoding="utf-8"))
    assert forms["accelerate_launch"]["mixed_precision"] == "bf16"
    assert forms["folders"]["output_dir"] == str(installation.home / "outputs")
    assert forms["basic"]["optimizer"] == "AdamW"
    assert forms["advanced"]["xformers"] == "sdpa"
    assert forms["advanced"]["max_data_loader_n_workers"] == 0
    assert not path.is_relative_to(installation.home / "kohya_gui")


def test_values_of_every_kind_survive_toml() -> None:
    values = {"text": 'a "quoted" \\ path/ß/日本/🙂\n', "yes": True, "whole": -3, "part": 1e-4, "none": ""}
    assert tomllib.loads(serve.toml({"section": values})) == {"section": values}


def test_a_port_that_is_taken_is_an_error_that_names_another(installation: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} is in use") as told:
            serve.serve(installation, serve.ServeOptions(port=str(port)))
    assert "invoke gui --port" in told.value.fix


@pytest.mark.parametrize("port", ["0", "65536", "web", "-1", "٣"])
def test_a_port_that_is_none_is_refused(installation: Settings, port: str) -> None:
    with pytest.raises(UsageError, match="is no port"):
        serve.serve(installation, serve.ServeOptions(port=port))


def test_an_address_of_another_machine_is_refused(installation: Settings) -> None:
    with pytest.raises(UsageError, match=r"has no address '192\.0\.2\.1'"):
        serve.serve(installation, serve.ServeOptions(port=str(free_port()), listen="192.0.2.1"))


def test_another_address_is_taken_with_a_warning(installation: Settings, tmp_path: Path) -> None:
    started = Started(installation, tmp_path / "log", "--listen", "0.0.0.0")
    started.told()
    started.end()
    assert "it has no password" in started.said()
    quiet = Started(installation, tmp_path / "quiet")
    quiet.told()
    quiet.end()
    assert "password" not in quiet.said()


def test_a_page_that_ends_by_itself_is_a_failure_with_its_last_words(
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


def test_the_page_is_one_more_lock_and_stays_until_it_is_asked_away(small: Small) -> None:
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
    asked = [setup.SetupOptions().with_gui(gui, no_gui).gui for gui, no_gui in flags]
    assert asked == [True, False, None]


def test_an_environment_without_the_page_names_the_command_that_installs_it(tmp_path: Path) -> None:
    bare = make_installation(tmp_path, gui=False)
    with pytest.raises(UsageError, match="without the web page") as told:
        serve.serve(bare, serve.ServeOptions())
    assert "invoke setup --gui" in told.value.fix
    with pytest.raises(UsageError, match="no environment of the profile 'latest'") as told:
        serve.serve(bare, serve.ServeOptions(profile="latest"))
    assert "invoke setup --gui --profile latest" in told.value.fix


def test_without_tkinter_the_command_is_named_and_the_page_starts(
    installation: Settings, tmp_path: Path
) -> None:
    hide = "import sys; sys.modules['_tkinter'] = None\n"
    (site_packages(generation_of(installation).venv) / "no_tkinter.pth").write_text(hide)
    started = Started(installation, tmp_path / "log")
    started.told()
    started.end()
    wanted = "brew install python-tk@3.11" if machine.on_mac() else "apt install python3-tk"
    assert wanted in started.said().splitlines()[0]


def test_the_users_own_presets_stay_and_ours_are_offered(installation: Settings) -> None:
    place = installation.home / serve.USER_PRESETS
    place.mkdir(parents=True)
    names = sorted(preset.name for preset in GUI_PRESETS.glob("*.json"))
    (place / names[0]).write_text("mine")
    serve.offer_presets(Installation(installation.home))
    serve.offer_presets(Installation(installation.home))
    assert (place / names[0]).read_text() == "mine"
    assert (place / names[1]).read_bytes() == (GUI_PRESETS / names[1]).read_bytes()
    assert sorted(entry.name for entry in place.iterdir()) == names


def test_what_the_page_leaves_in_the_checkout_is_not_taken_for_the_users(installation: Settings) -> None:
    root = installation.home
    (root / ".gitignore").write_text("presets/*/user_presets/*\nsetup.log\noutputs\n")
    subprocess.run(["git", "-C", root, "add", "kohya_gui.py", ".gitignore"], check=True)
    subprocess.run(["git", "-C", root, "commit", "--quiet", "-m", "upstream"], check=True)
    serve.offer_presets(Installation(root))
    (root / "setup.log").write_text("said")
    (root / "outputs").mkdir()
    (root / "outputs" / "mine.safetensors").write_text("mine")
    (root / serve.USER_PRESETS / "mine.json").write_text("{}")
    found = [name for name in uninstall.user_files(Installation(root)) if not name.startswith("branch")]
    assert sorted(found) == ["outputs/mine.safetensors", f"{serve.USER_PRESETS}/mine.json"]


@pytest.mark.parametrize("preset", sorted(GUI_PRESETS.glob("*.json")), ids=lambda path: path.stem)
@pytest.mark.parametrize("profile", settings.profile_names())
def test_a_preset_is_sound_on_mps(preset: Path, profile: str, tmp_path: Path) -> None:
    world = World(tmp_path)
    world.picture(world.folder / "a.png", (1024, 1024))
    world.safetensors(world.model, "sdxl" if json.loads(preset.read_text())["sdxl"] else "sd15")
    files = {
        "pretrained_model_name_or_path": str(world.model),
        "train_data_dir": str(world.data),
        "output_dir": str(tmp_path / "out"),
    }
    saved = world.write("saved.json", json.dumps({**json.loads(preset.read_text()), **files}))
    question = preflight.PreflightOptions(saved, device="mps", memory_gb=32)
    chosen = make_settings(tmp_path / "home", profile=settings.load_profile(profile))
    judged = preflight.check(chosen, question)
    wrong = [check.detail for check in judged.checks if check.status in (Status.FAIL, Status.WARN)]
    assert not wrong


@pytest.mark.upstream
@pytest.mark.skipif(
    not (os.environ.get("KOHYA_REPO_URL") and os.environ.get("KOHYA_COMMIT")),
    reason="KOHYA_REPO_URL and KOHYA_COMMIT do not name a real kohya_ss",
)
def test_forms_and_presets_use_names_that_the_page_knows(tmp_path: Path) -> None:
    chosen = msgspec.structs.replace(settings.load(), home=tmp_path / "home")
    checkout.clone(chosen)
    source = "\n".join(
        path.read_text(encoding="utf-8")
        for path in [chosen.home / "kohya_gui.py", *(chosen.home / "kohya_gui").glob("*.py")]
    )
    asked = set(re.findall(r'"([a-z0-9_]+\.[a-z0-9_]+)"', source))
    forms = {f"{section}.{key}" for section, values in settings.load_gui().forms.items() for key in values}
    assert forms <= asked
    saved = (chosen.home / "kohya_gui" / "lora_gui.py").read_text(encoding="utf-8")
    fields = set(re.findall(r"^    (\w+),$", saved.partition("def save_configuration(")[2], re.MULTILINE))
    for preset in GUI_PRESETS.glob("*.json"):
        assert json.loads(preset.read_text()).keys() <= fields
