"""``invoke gui``: kohya's own web page, in the pinned environment, reachable from this machine alone.

The checkout stays as it is. What is ours lies beside it: the values that the forms open with
(upstream's ``config.toml``, named by its ``--config``), and a program called ``accelerate`` that
comes first on the page's ``PATH``, so that *Start training* starts what ``invoke train`` starts.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import os
import shlex
import socket
import threading
import time
import webbrowser
from pathlib import Path
from typing import Any

import msgspec

from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.core.files import write_atomic
from kohya_mps.core.installation import Installation, check_location
from kohya_mps.core.machine import on_mac
from kohya_mps.core.process import RUN_MARK, capture, end_leftovers, stream
from kohya_mps.core.report import say
from kohya_mps.core.run_lock import exclusive_lock
from kohya_mps.core.settings import GUI_PRESETS, PROBES, Gui, Settings, load_gui, read_yaml
from kohya_mps.install import accelerate_launch, generations
from kohya_mps.install.generations import Generation
from kohya_mps.install.setup import installed

LOOPBACK = "127.0.0.1"

# Where upstream lists the user's own presets; its .gitignore leaves them out.
USER_PRESETS = Path("presets", "lora", "user_presets")


class ServeOptions(msgspec.Struct, frozen=True):
    """What ``invoke gui`` was asked for.

    ``port`` as it was typed, ``listen`` the address to answer on, ``open`` the browser,
    ``profile`` another one's environment than the active, ``config`` a ``config.toml`` to
    open the forms with instead of ours.
    """

    port: str = ""
    listen: str = LOOPBACK
    open: bool = False
    profile: str = ""
    config: str = ""


class Address(msgspec.Struct, frozen=True):
    """Where the page listens."""

    host: str
    port: int

    @property
    def reached_at(self) -> str:
        """The host that this machine reaches it by."""
        return {"0.0.0.0": LOOPBACK, "::": "::1"}.get(self.host, self.host)  # noqa: S104

    @property
    def url(self) -> str:
        """What is typed into the browser."""
        host = f"[{self.reached_at}]" if ":" in self.reached_at else self.reached_at
        return f"http://{host}:{self.port}"

    def answers(self) -> bool:
        """Whether a web server gives its first page there."""
        # Not urllib: a proxy has no way to this machine's own addresses. And with patience: each
        # request is work for a page with 3,000 fields, and many would keep it from starting.
        connection = http.client.HTTPConnection(self.reached_at, self.port, timeout=60)
        try:
            connection.request("GET", "/")
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def serve(settings: Settings, wanted: ServeOptions) -> int:
    """Start the page, say where it is once it answers, and end it on Ctrl-C.

    Returns:
        0 when the person ended it.

    Raises:
        UsageError: it is not installed, or cannot listen where it was asked to.
        StepFailed: it ended by itself, or did not answer in time.
        Busy: another run holds this installation.
    """
    home, chosen = Installation(settings.home), load_gui()
    address = Address(wanted.listen, _port(wanted.port, chosen.port))
    generation = _generation(home, wanted.profile)
    if wanted.config and not Path(wanted.config).is_file():
        raise UsageError(f"{wanted.config}: there is no such file", "give a config.toml as kohya_ss takes it")
    check_location(home)
    with exclusive_lock(home):
        check_free(address)
        config = Path(wanted.config).absolute() if wanted.config else write_forms(home, generation, chosen)
        write_accelerate(home, generation)
        offer_presets(home)
        if address.host != LOOPBACK:
            say(f"warning: everybody who reaches {address.host} can use this page: it has no password")
        _check_tkinter(generation)
        script = [str(generation.python), str(PROBES / "gui_page.py"), str(home.root / "kohya_gui.py")]
        command = [*script, *_arguments(address, config)]
        return _run(home, command, environ(home, generation), address, chosen, wanted.open)


def _run(
    home: Installation,
    command: list[str],
    variables: dict[str, str],
    address: Address,
    chosen: Gui,
    browser: bool,
) -> int:
    say(f"starting kohya_ss's page from {home.venv}")
    announcer = _Announcer(address, chosen.answers_within_seconds, browser)
    try:
        with announcer:
            finished = stream(command, cwd=home.root, env=variables)
    except KeyboardInterrupt:
        say("\nThe page has ended.")
        return 0
    if announcer.late:
        raise StepFailed(
            f"the page did not answer at {address.url} within {chosen.answers_within_seconds:g} seconds",
            "what it said is above; config/gui.yaml: answers_within_seconds",
        )
    if finished.returncode:
        raise StepFailed(
            f"the page ended with {finished.returncode}: {finished.last_line}",
            "`invoke status` shows whether the environment is as it was installed",
        )
    return 0


class _Announcer(threading.Thread):
    """Waits beside a page that starts until it answers, and says so.

    When the block that it is entered for is left, nothing that the page started is left.
    """

    def __init__(self, address: Address, within_seconds: float, browser: bool) -> None:
        super().__init__(daemon=True)
        self.late = False
        self._address, self._within, self._browser = address, within_seconds, browser
        self._mark = os.environ[RUN_MARK]
        self._ended = threading.Event()

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        end_leftovers(self._mark)  # a training outlives the page that started it
        self.join()

    def run(self) -> None:
        deadline = time.monotonic() + self._within
        while not self._address.answers():
            if self._ended.wait(0.1):
                return
            if time.monotonic() > deadline:
                self.late = True
                end_leftovers(self._mark)
                return
        say(f"\n  {self._address.url}\n\nCtrl-C ends the page, and a training that was started from it.\n")
        if self._browser:
            webbrowser.open(self._address.url)


def check_free(address: Address) -> None:
    """Whether the page can listen there.

    Raises:
        UsageError: something else does, or the address is not this machine's.
    """
    another = f"`invoke gui --port {address.port + 1 if address.port < 65535 else 7860}`"
    in_use = UsageError(f"port {address.port} is in use by another program", another)
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    # Asked first: macOS lets one bind 127.0.0.1 beside another that listens everywhere.
    with socket.socket(family) as asked:
        asked.settimeout(2)
        with contextlib.suppress(OSError):
            if asked.connect_ex((address.reached_at, address.port)) == 0:
                raise in_use
    try:
        socket.create_server((address.host, address.port), family=family).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise in_use from None
        if error.errno == errno.EACCES:
            raise UsageError(f"port {address.port} is not for you to listen on", another) from None
        raise UsageError(
            f"--listen: this machine has no address {address.host!r} ({error.strerror})",
            f"leave it out for {LOOPBACK}, or give one of its own",
        ) from None


def write_forms(home: Installation, generation: Generation, chosen: Gui) -> Path:
    """Write the values that the page's forms open with, and return the file.

    The mixed precision is that of the accelerate configuration, with which trainings start.
    """
    configuration = read_yaml(
        generation.accelerate_config, dict[str, object], fix="`invoke configure` writes it again"
    )
    # Without an output directory the page writes to the root of the disk (lora_gui.py, tmpfilename).
    own = {
        "accelerate_launch": {"mixed_precision": str(configuration["mixed_precision"])},
        "folders": {"output_dir": str(home.root / "outputs"), "logging_dir": str(home.root / "logs")},
    }
    sections = {name: {**chosen.forms.get(name, {}), **own.get(name, {})} for name in {**chosen.forms, **own}}
    path = _place(home) / "config.toml"
    write_atomic(path, toml(sections).encode())
    return path


def toml(sections: dict[str, dict[str, Any]]) -> str:
    """Sections of settings as TOML."""
    import tomlkit

    return f"# Written by `invoke gui` from config/gui.yaml.\n\n{tomlkit.dumps(sections)}"


def write_accelerate(home: Installation, generation: Generation) -> Path:
    """Write what the page finds when it looks for ``accelerate`` on its ``PATH``.

    The page names no configuration (kohya_gui/lora_gui.py, ``run_cmd``), so accelerate would
    take the default one, which may be somebody else's and say ``use_cpu: true``.

    Returns:
        The directory that it lies in.
    """
    launcher = shlex.join(accelerate_launch.launcher(generation))
    other = shlex.join(accelerate_launch.accelerate(generation))
    text = (
        "#!/bin/sh\n# Written by `invoke gui`: trainings that the page starts get the accelerate\n"
        "# configuration that `invoke train` uses.\n"
        f'if [ "$1" = launch ]; then\n    shift\n    exec {launcher} "$@"\nfi\nexec {other} "$@"\n'
    )
    path = _place(home) / "bin" / "accelerate"
    write_atomic(path, text.encode())
    path.chmod(0o755)
    return path.parent


def offer_presets(home: Installation) -> None:
    """Put links to our presets where the LoRA tab lists the user's; what is the user's stays."""
    for preset in sorted(GUI_PRESETS.glob("*.json")):
        offered = home.root / USER_PRESETS / preset.name
        offered.parent.mkdir(parents=True, exist_ok=True)
        if offered.is_symlink():
            offered.unlink()  # this project may have moved
        if not offered.exists():
            offered.symlink_to(preset)


def environ(home: Installation, generation: Generation) -> dict[str, str]:
    """The variables for the page and, through it, for what it starts."""
    # Gradio would take an address, a port and folders to show from its own variables.
    kept = {
        name: value
        for name, value in accelerate_launch.environ(generation).items()
        if not name.startswith("GRADIO_") and name not in ("TENSORBOARD_HOST",)
    }
    direct = [
        *filter(None, [os.environ.get("NO_PROXY") or os.environ.get("no_proxy")]),
        LOOPBACK,
        "localhost",
    ]
    return kept | {
        "PATH": f"{_place(home) / 'bin'}{os.pathsep}{kept['PATH']}",
        "GRADIO_ANALYTICS_ENABLED": "False",
        # Its own place is a folder of /tmp that the first user of a machine owns.
        "GRADIO_TEMP_DIR": str(_place(home) / "uploads"),
        # The page's TensorBoard would listen on every address.
        "TENSORBOARD_HOST": LOOPBACK,
        # Gradio asks its own page whether it is there, and would ask the proxy.
        "NO_PROXY": ",".join(direct),
        "no_proxy": ",".join(direct),
    }


def _arguments(address: Address, config: Path) -> list[str]:
    """Without ``--noverify`` the page updates the submodule and runs pip when it starts."""
    where = ["--listen", address.host, "--server_port", str(address.port)]
    return [*where, "--config", str(config), "--headless", "--noverify"]


def _check_tkinter(generation: Generation) -> None:
    """Say it now when this Python cannot open file dialogs, and what installs that."""
    if capture([generation.python, "-I", "-c", "import _tkinter"]).returncode == 0:
        return
    how = "`brew install python-tk@3.11`" if on_mac() else "`sudo apt install python3-tk`"
    say(
        f"warning: {os.path.realpath(generation.python)} has no tkinter ({how}, or a Python that uv brings, "
        "has it); the page works, its file dialogs do not"
    )


def _generation(home: Installation, profile: str) -> Generation:
    """The active generation, or the newest of a profile that was named."""
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


def _port(typed: str, otherwise: int) -> int:
    if not typed:
        return otherwise
    if not (typed.isascii() and typed.isdecimal()) or not 0 < int(typed) < 65536:
        raise UsageError(f"--port: {typed!r} is no port", "accepted: 1 to 65535")
    return int(typed)


def _place(home: Installation) -> Path:
    return home.state / "gui"
