"""kohya's real page, from the pinned environment, in the system's headless Chromium. Slow: gigabytes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from playwright.sync_api import ConsoleMessage, Locator, Page, Route, sync_playwright

from devtools import sandbox
from kohya_mps.core import machine, settings
from kohya_mps.core.installation import Installation
from kohya_mps.core.report import Status
from kohya_mps.core.settings import PROBES, ROOT, Settings
from kohya_mps.diagnose import preflight
from kohya_mps.install import generations, setup, status, training_step
from kohya_mps.install.generations import Generation
from tests.support.web_pages import free_port

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

# Where screenshots go, for a person to look at.
SCREENSHOTS = ROOT / ".nox" / "screenshots"

pytestmark = [
    pytest.mark.environment,
    pytest.mark.upstream,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here (Debian: chromium)"),
    pytest.mark.skipif(
        not (os.environ.get("KOHYA_REPO_URL") and os.environ.get("KOHYA_COMMIT")),
        reason="KOHYA_REPO_URL and KOHYA_COMMIT do not name a real kohya_ss",
    ),
]


class Served:
    """A page that ``invoke gui`` serves, as a person's shell would have started it."""

    def __init__(self, home: Path, log: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        command = [str(Path(sys.prefix) / "bin" / "invoke"), "gui", "--port", str(self.port)]
        # What it trains on lies on the disk: it must not look for anything else.
        environ = {**os.environ, "KOHYA_HOME": str(home), "HF_HUB_OFFLINE": "1"}
        with log.open("wb") as output:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=output, stderr=output)
        wait_until(lambda: self.url in self.output() or self.process.poll() is not None, 300)
        assert self.process.poll() is None, self.output()

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def interrupt(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)


class Browser:
    """The LoRA tab of a page, its fields found by their labels as a person finds them."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.errors: list[str] = []
        page.set_default_timeout(120_000)
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        # Fonts and badges of other hosts: their absence is no error of the page.
        page.route(re.compile("^https:"), self._elsewhere)
        page.goto(url)
        page.get_by_role("tab", name="LoRA", exact=True).first.click()

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(message.text)

    def _elsewhere(self, route: Route) -> None:
        route.fulfill(status=200, body="")

    def unfold(self, *names: str) -> None:
        for name in names:
            self.visible(self.page.get_by_role("button", name=re.compile(rf"^{name} *\W*$"))).click()

    def field(self, label: str) -> Locator:
        return self.visible(self.page.get_by_label(label, exact=True))

    def visible(self, found: Locator) -> Locator:
        return found.filter(visible=True).first

    def fill(self, label: str, value: object) -> None:
        field = self.field(label)
        field.fill(str(value))
        field.press("Enter")
        field.press("Tab")

    def press(self, name: str) -> None:
        self.visible(self.page.get_by_role("button", name=name, exact=True)).click()

    def wait_until(self, happened: Callable[[], bool], seconds: float) -> None:
        """Wait as the browser has to: it answers nothing while this thread sleeps."""
        wait_until(happened, seconds, lambda: self.page.wait_for_timeout(200))

    def look(self, name: str) -> None:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


def wait_until(
    happened: Callable[[], bool], seconds: float, pause: Callable[[], None] = lambda: time.sleep(0.2)
) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        pause()


@pytest.fixture(scope="module")
def chosen() -> Settings:
    """The throw-away installation, with the web page in it."""
    separate = msgspec.structs.replace(settings.load(), home=sandbox.SANDBOX.with_name("gui"))
    report = setup.setup(separate, setup.SetupOptions(train_step=False, gui=True))
    assert report.ok, report.checks
    return separate


@pytest.fixture(scope="module")
def generation(chosen: Settings) -> Generation:
    return generations.installed(Installation(chosen.home))


@pytest.fixture(scope="module")
def served(chosen: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    running = Served(chosen.home, tmp_path_factory.mktemp("served") / "page.log")
    yield running
    assert running.interrupt() == 0, running.output()
    socket.create_server(("127.0.0.1", running.port)).close()


@pytest.fixture
def browser(served: Served) -> Iterator[Browser]:
    assert CHROMIUM
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=CHROMIUM) as chromium:
        yield Browser(chromium.new_page(viewport={"width": 1500, "height": 1200}), served.url)


def shrink_the_unet(home: Path) -> None:
    """Let trainings from the page run on the small model, whose widths the trainer has as constants.

    What the page starts stays what ``invoke gui`` wrote; the trainer alone gets a launcher.
    """
    started = home / ".kohya-mps" / "gui" / "bin" / "accelerate"
    original = started.with_name("accelerate-of-invoke-gui")
    started.rename(original)
    started.write_text(
        "#!/usr/bin/env python3\nimport os, sys\n"
        "at = next(i for i, word in enumerate(sys.argv) if word.endswith('train_network.py'))\n"
        f"words = [*sys.argv[1:at], {str(PROBES / 'small_trainer.py')!r}, *sys.argv[at:]]\n"
        f"os.execv({str(original)!r}, [{str(original)!r}, *words])\n"
    )
    started.chmod(0o755)


@pytest.fixture
def neighbour() -> Iterator[list[str]]:
    """Another machine on this one's network, as a network namespace: what a command there starts with."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("a network namespace needs root and iproute2")
    name, ours, theirs = (f"k{os.getpid()}{end}" for end in "nab")
    for command in (
        f"ip netns add {name}",
        f"ip link add {ours} type veth peer name {theirs} netns {name}",
        f"ip address add 10.213.7.1/24 dev {ours}",
        f"ip link set {ours} up",
        f"ip -n {name} address add 10.213.7.2/24 dev {theirs}",
        f"ip -n {name} link set {theirs} up",
    ):
        subprocess.run(command.split(), check=True)
    yield ["ip", "netns", "exec", name]
    subprocess.run(["ip", "netns", "delete", name], check=True)


def test_only_this_machine_reaches_the_page(served: Served, neighbour: list[str]) -> None:
    def reached(port: int) -> bool:
        ask = f"import socket; socket.create_connection(('10.213.7.1', {port}), 10)"
        done = subprocess.run([*neighbour, sys.executable, "-c", ask], capture_output=True, check=False)
        return done.returncode == 0

    with socket.create_server(("0.0.0.0", 0)) as everywhere:
        assert reached(everywhere.getsockname()[1])
        assert not reached(served.port)


def test_a_preset_fills_the_forms(browser: Browser) -> None:
    browser.unfold("Parameters", "Accelerate launch", "Advanced")
    browser.fill("Presets", "user_presets/MPS - SDXL LoRA")
    browser.wait_until(lambda: browser.field("Max resolution").input_value() == "1024,1024", 60)
    assert browser.field("Mixed precision").input_value() == "no"
    assert browser.field("CrossAttention").input_value() == "sdpa"
    browser.look("preset")
    assert not browser.errors


def test_a_lora_is_trained_from_the_page(
    served: Served, browser: Browser, chosen: Settings, generation: Generation, tmp_path: Path
) -> None:
    """The forms are the device's, a saved configuration is sound, and *Start training* trains."""
    shrink_the_unet(chosen.home)
    model = training_step.prepare_model(generation, Installation(chosen.home).verification, "sd15", "small")
    output, saved = tmp_path / "output", tmp_path / "saved" / "mine.json"
    saved.parent.mkdir()
    browser.unfold("Configuration", "Accelerate launch", "Parameters", "Advanced")
    browser.look("lora-tab")

    assert browser.field("Mixed precision").input_value() == "no"
    assert browser.field("Optimizer").input_value() == "AdamW"
    assert browser.field("CrossAttention").input_value() == "sdpa"
    assert browser.field("Max num workers for DataLoader").input_value() == "0"

    browser.fill("Pretrained model name or path", model / "model")
    browser.fill("Image folder (containing training images subfolders)", model / "images")
    browser.fill("Output directory for trained model", output)
    browser.fill("Trained Model output name", "from-the-page")
    browser.fill("Max resolution", "64,64")
    browser.fill("number input for Minimum bucket resolution", 64)
    browser.fill("Max train steps", training_step.STEPS)
    browser.fill("Additional parameters", f"--tokenizer_cache_dir {model / 'tokenizers'}")
    browser.fill("Load/Save Config file", saved)
    browser.press("💾")
    browser.wait_until(saved.exists, 60)
    judged = preflight.check(chosen, preflight.PreflightOptions(saved))
    assert not [check for check in judged.checks if check.status in (Status.FAIL, Status.WARN)]

    browser.press("Start training")
    browser.wait_until(lambda: "Training has ended" in served.output(), 300)
    browser.look("after-training")
    shutil.copy(served.log, SCREENSHOTS / "page.log")

    assert (output / "from-the-page.safetensors").stat().st_size > 10_000, served.output()
    assert f"accelerator device: {machine.expected_device()}" in served.output()
    (written,) = output.glob("config_lora-*.toml")
    assert 'mixed_precision = "no"' in written.read_text()
    assert not browser.errors
    assert not [check for check in status.status(chosen).checks if check.status is Status.FAIL]
