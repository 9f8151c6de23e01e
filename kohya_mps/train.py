"""``invoke train``: the real trainer, in the pinned environment, with the user's own settings."""

from __future__ import annotations

from pathlib import Path

from . import explain, launch, preflight
from .errors import StepFailed, UsageError
from .home import Home
from .install import installed
from .preflight import Question
from .process import stream
from .report import Status, say
from .settings import Settings

TRAINER = "train_network.py"


def train(settings: Settings, file: Path, *, check: bool = True) -> int:
    """Start ``train_network.py`` with a TOML configuration and wait for it.

    It starts where the user stands, so that relative paths mean what they mean there.

    Args:
        settings: the home and the profile.
        file: the configuration.
        check: run preflight first, and do not start what it fails.

    Returns:
        The trainer's exit code.

    Raises:
        UsageError: there is no such file, no environment or no checkout.
        StepFailed: preflight found what cannot work.
    """
    home = Home(settings.home)
    generation = installed(home)
    if not file.is_file():
        raise UsageError(f"{file}: there is no such file", "give the path of a kohya TOML configuration")
    trainer = home.sd_scripts / TRAINER
    if not trainer.is_file():
        raise UsageError(f"there is no checkout in {home.root}", "`invoke clone` brings it")
    if check:
        _preflight(settings, file)
    command = launch.argv(generation, trainer, "--config_file", str(file.absolute()))
    finished = stream(command, cwd=Path.cwd(), env=launch.environ(generation))
    if finished.returncode:
        explain.tell(finished.tail)
    if finished.returncode < 0:
        raise StepFailed(f"the trainer was ended by signal {-finished.returncode}")
    return finished.returncode


def _preflight(settings: Settings, file: Path) -> None:
    report = preflight.check(settings, Question(file, trainer=TRAINER))
    for row in report.checks:
        if row.status is Status.WARN:
            say(f"  {row.name}: {row.detail}\n    -> {row.fix}")
    bad = [row for row in report.checks if row.status is Status.FAIL]
    if bad:
        listed = "\n".join(f"  {row.name}: {row.detail}\n    -> {row.fix}" for row in bad)
        raise StepFailed(
            f"this training cannot work here:\n{listed}",
            f"mend that (`invoke preflight {file} --fix OUT` writes a corrected copy), "
            "or train all the same with `--no-preflight`",
        )
