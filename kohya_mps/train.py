"""``invoke train``: the real trainer, in the pinned environment, with the user's own settings."""

from __future__ import annotations

from pathlib import Path

from . import launch
from .errors import StepFailed, UsageError
from .home import Home
from .install import installed
from .process import stream
from .settings import Settings


def train(settings: Settings, file: Path) -> int:
    """Start ``train_network.py`` with a TOML configuration and wait for it.

    Returns:
        The trainer's exit code.

    Raises:
        UsageError: there is no such file, no environment or no checkout.
    """
    home = Home(settings.home)
    generation = installed(home)
    if not file.is_file():
        raise UsageError(f"{file}: there is no such file", "give the path of a kohya TOML configuration")
    trainer = home.sd_scripts / "train_network.py"
    if not trainer.is_file():
        raise UsageError(f"there is no checkout in {home.root}", "`invoke clone` brings it")
    command = launch.argv(generation, trainer, "--config_file", str(file.absolute()))
    finished = stream(command, cwd=home.sd_scripts, env=launch.environ(generation))
    if finished.returncode < 0:
        raise StepFailed(f"the trainer was ended by signal {-finished.returncode}")
    return finished.returncode
