"""How anything is started in the trainer's environment: one command line, one set of variables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kohya_mps.core.process import capture, clean_environ

from .generations import Generation


def argv(
    generation: Generation, script: Path | str, *arguments: str, config: Path | None = None
) -> list[str]:
    """``accelerate launch`` of a script, with this project's configuration named.

    A plain ``python script`` ignores the configuration and would see MPS where the trainer
    does not. The module is named instead of ``bin/accelerate``, whose first line cannot
    hold every path that a home may have; ``-P`` keeps the working directory's modules out.
    """
    return [*launcher(generation, config), str(script), *arguments]


def launcher(generation: Generation, config: Path | None = None) -> list[str]:
    """``accelerate launch`` with our configuration, up to its own options and the script."""
    return [*accelerate(generation), "launch", "--config_file", str(config or generation.accelerate_config)]


def accelerate(generation: Generation) -> list[str]:
    """The ``accelerate`` of the environment."""
    return [str(generation.python), "-P", "-m", "accelerate.commands.accelerate_cli"]


def environ(generation: Generation, *, offline: bool = False) -> dict[str, str]:
    """The variables for the trainer and the probes.

    ``PYTORCH_ENABLE_MPS_FALLBACK`` has to be there before Python starts: torch reads it
    while it loads, and accelerate sets it too late.
    """
    extra = {"PYTORCH_ENABLE_MPS_FALLBACK": "1", "PYTHONUNBUFFERED": "1"}
    if offline:
        extra |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return clean_environ(path_first=generation.venv / "bin", extra=extra)


def probe(
    generation: Generation, script: Path, *arguments: str, extra: Mapping[str, str] | None = None
) -> str:
    """Run a probe under the trainer's interpreter, without accelerate, and return what it printed.

    Raises:
        ProbeFailed: it ended with an error.
    """
    done = capture(
        [generation.python, script, *arguments], env=environ(generation, offline=True) | dict(extra or {})
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise ProbeFailed(f"{script.name}: {lines[-1] if lines else f'ended with {done.returncode}'}")
    return done.stdout


class ProbeFailed(Exception):
    """A probe could not do its work; the step that asked turns this into a check."""
