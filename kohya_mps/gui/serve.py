"""``invoke gui``: kohya's own web page, in the pinned environment, reachable from this machine alone.

The checkout stays as it is. The page gets its forms' values by upstream's ``--config``, and finds a
program called ``accelerate`` first on its ``PATH`` (:mod:`.page_files`). So *Start training* starts
what ``invoke train`` starts.
"""

from __future__ import annotations

import os
import threading
import time
import webbrowser
from collections.abc import Sequence
from pathlib import Path

import msgspec

from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.core.installation import Installation, check_location
from kohya_mps.core.machine import on_mac
from kohya_mps.core.process import RUN_MARK, capture, end_leftovers, stream
from kohya_mps.core.report import say
from kohya_mps.core.run_lock import exclusive_lock
from kohya_mps.core.settings import PROBES, Settings, load_gui
from kohya_mps.install import accelerate_launch, generations
from kohya_mps.install.generations import Generation, installed

from . import page_files
from .address import LOOPBACK, Address, check_free, parse_port

_POLL_SECONDS = 0.1


class ServeOptions(msgspec.Struct, frozen=True):
    """The options of ``invoke gui``.

    ``port`` is a text as it was typed, ``listen`` the host to listen on; ``open`` opens the browser.
    ``profile`` names a profile whose environment is used instead of the active one. ``config`` is a
    ``config.toml`` of the user that the forms open with.
    """

    port: str = ""
    listen: str = LOOPBACK
    open: bool = False
    profile: str = ""
    config: str = ""


def serve(settings: Settings, options: ServeOptions) -> int:
    """Start the page, print its address once it answers, and end it on Ctrl-C.

    Returns:
        0 when the user ended it.

    Raises:
        UsageError: the page is not installed, or cannot listen on the requested address.
        StepFailed: it ended by itself, or did not answer in time.
        Busy: another run holds this installation.
    """
    home, gui = Installation(settings.home), load_gui()
    address = Address(options.listen, parse_port(options.port, gui.port))
    generation = _generation(home, options.profile)
    if options.config and not Path(options.config).is_file():
        raise UsageError(
            f"{options.config}: there is no such file", "give a config.toml as kohya_ss takes it"
        )
    check_location(home)
    with exclusive_lock(home):
        check_free(address)
        forms = Path(options.config) if options.config else page_files.write_forms(home, generation, gui)
        page_files.write_accelerate(home, generation)
        page_files.offer_presets(home)
        if address.host != LOOPBACK:
            say(f"warning: everybody who reaches {address.host} can use this page: it has no password")
        _check_tkinter(generation)
        say(f"starting kohya_ss's page from {home.venv}")
        announcer = _Announcer(address, gui.answers_within_seconds, options.open)
        return _run(home, generation, _arguments(address, forms.absolute()), announcer)


class _Announcer(threading.Thread):
    """Waits until a starting page answers, then prints its address.

    It is used as a context: when the block ends, so does everything that the page started.
    """

    def __init__(self, address: Address, within_seconds: float, browser: bool) -> None:
        super().__init__(daemon=True)
        self.late = False
        self.address, self.within_seconds = address, within_seconds
        self._browser = browser
        self._mark = os.environ[RUN_MARK]
        self._ended = threading.Event()

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        end_leftovers(self._mark)  # a training outlives the page that started it
        self.join()

    def run(self) -> None:
        deadline = time.monotonic() + self.within_seconds
        while not self.address.answers():
            if self._ended.wait(_POLL_SECONDS):
                return
            if time.monotonic() > deadline:
                self.late = True
                end_leftovers(self._mark)
                return
        say(f"\n  {self.address.url}\n\nCtrl-C ends the page, and a training that was started from it.\n")
        if self._browser:
            webbrowser.open(self.address.url)


def _run(home: Installation, generation: Generation, arguments: Sequence[str], announcer: _Announcer) -> int:
    script = [str(generation.python), str(PROBES / "gui_page.py"), str(home.root / "kohya_gui.py")]
    try:
        with announcer:
            finished = stream([*script, *arguments], cwd=home.root, env=environ(home, generation))
    except KeyboardInterrupt:
        say("\nThe page has ended.")
        return 0
    if announcer.late:
        raise StepFailed(
            f"the page did not answer at {announcer.address.url} within {announcer.within_seconds:g} seconds",
            "its output is above; config/gui.yaml: answers_within_seconds",
        )
    if finished.returncode:
        raise StepFailed(
            f"the page ended with {finished.returncode}: {finished.last_line}",
            "`invoke status` shows whether the environment is as it was installed",
        )
    return 0


def environ(home: Installation, generation: Generation) -> dict[str, str]:
    """The variables for the page and for what it starts."""
    # Gradio would read an address, a port and directories to publish from its own variables.
    kept = {
        name: value
        for name, value in accelerate_launch.environ(generation).items()
        if not name.startswith("GRADIO_") and name != "TENSORBOARD_HOST"
    }
    users = os.environ.get("NO_PROXY") or os.environ.get("no_proxy")
    without_proxy = ",".join([*([users] if users else []), LOOPBACK, "localhost"])
    return kept | {
        "PATH": f"{page_files.program_directory(home)}{os.pathsep}{kept['PATH']}",
        "GRADIO_ANALYTICS_ENABLED": "False",
        # Gradio's default is a directory in /tmp, which belongs to the first user of the machine.
        "GRADIO_TEMP_DIR": str(page_files.directory(home) / "uploads"),
        # The page's TensorBoard would listen on every address.
        "TENSORBOARD_HOST": LOOPBACK,
        # Gradio checks whether its own page answers, and would ask the proxy.
        "NO_PROXY": without_proxy,
        "no_proxy": without_proxy,
    }


def _arguments(address: Address, config: Path) -> list[str]:
    """The page's arguments. Without ``--noverify`` it updates the submodule and runs pip at its start."""
    listen = ["--listen", address.host, "--server_port", str(address.port)]
    return [*listen, "--config", str(config), "--headless", "--noverify"]


def _check_tkinter(generation: Generation) -> None:
    """Warn when this Python cannot open file dialogs, and name the command that installs tkinter."""
    if capture([generation.python, "-I", "-c", "import _tkinter"]).returncode == 0:
        return
    command = "`brew install python-tk@3.11`" if on_mac() else "`sudo apt install python3-tk`"
    say(
        f"warning: {os.path.realpath(generation.python)} has no tkinter ({command} installs it, and uv's "
        "Pythons have it); the page works, its file dialogs do not"
    )


def _generation(home: Installation, profile: str) -> Generation:
    """The active generation, or the newest one of the named profile.

    Raises:
        UsageError: there is none, or it lacks the page, its configuration or its checkout.
    """
    install = f"`invoke setup --gui{f' --profile {profile}' if profile else ''}` installs it"
    generation = installed(home)
    if profile:
        built = [g for g in generations.present(home) if (m := g.manifest()) and m.profile == profile]
        if not built:
            raise UsageError(f"{home.root} has no environment of the profile {profile!r}", install)
        generation = next((g for g in built if g.has_gui()), built[0])
    if not generation.has_gui():
        raise UsageError(f"{generation.name} is the trainer's environment, without the web page", install)
    if not generation.accelerate_config.is_file():
        raise UsageError(f"{generation.accelerate_config} is missing", "`invoke configure` writes it")
    if not (home.root / "kohya_gui.py").is_file():
        raise UsageError(f"there is no checkout in {home.root}", "`invoke clone` brings it")
    return generation
