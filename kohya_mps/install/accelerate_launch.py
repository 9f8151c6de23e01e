"""How programs are started in the trainer's environment: one command line, one set of variables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kohya_mps.core.process import capture, clean_environ

from .generations import Generation


def argv(
    generation: Generation, script: Path | str, *arguments: str, config: Path | None = None
) -> list[str]:
    """The command that starts a script with ``accelerate launch`` and our configuration.

    A plain ``python script`` ignores the configuration, and could find MPS where the trainer
    does not. ``bin/accelerate`` is not used: its first line cannot hold every path that a
    home may have. ``-P`` keeps modules of the working directory out.

    Args:
        generation: the environment, and the configuration unless ``config`` names another.
        script: what is started.
        arguments: of the script.
        config: another accelerate configuration.
    """
    return [*launcher(generation, config), str(script), *arguments]


def launcher(generation: Generation, config: Path | None = None) -> list[str]:
    """``accelerate launch`` with our configuration; its further options and the script follow."""
    return [*accelerate(generation), "launch", "--config_file", str(config or generation.accelerate_config)]


def accelerate(generation: Generation) -> list[str]:
    """The ``accelerate`` of the environment."""
    return [str(generation.python), "-P", "-m", "accelerate.commands.accelerate_cli"]


def environ(generation: Generation, *, offline: bool = False) -> dict[str, str]:
    """The variables for the trainer and the probes.

    ``PYTORCH_ENABLE_MPS_FALLBACK`` has to be set before Python starts: torch reads it while
    it is imported, and accelerate sets it too late.

    Args:
        generation: whose ``bin`` comes first on ``PATH``.
        offline: Hugging Face's libraries ask no server.
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
        ProbeFailed: it exited with an error; its last line is in the message.
    """
    done = capture(
        [generation.python, script, *arguments], env=environ(generation, offline=True) | dict(extra or {})
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise ProbeFailed(f"{script.name}: {lines[-1] if lines else f'exited with {done.returncode}'}")
    return done.stdout


class ProbeFailed(Exception):
    """A probe could not do its work; the step that ran it turns this into a check or an error."""
