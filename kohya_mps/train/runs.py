"""Runs: a training's directory, what is in it, and what state the training is in.

``runs/<time>/`` lies beside the settings file. The trainer writes into it while it runs, so
every question about a run is answered from its files: a run goes on when the terminal, or
``invoke`` itself, is gone.
"""

from __future__ import annotations

import datetime
import itertools
import json
import os
import re
import shlex
import time
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

import msgspec
import psutil

from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.core.files import write_atomic
from kohya_mps.core.process import is_alive
from kohya_mps.install.checkout import Commits
from kohya_mps.trainer_config.config_file import read

RUNS = "runs"
SETTINGS = "train.toml"

_LAUNCHER_SECONDS = 30.0
_DYING_SECONDS = 1.0

T = TypeVar("T")


class State(StrEnum):
    """What a training is doing, or how it ended. ``died``: it was killed and could not say so."""

    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"
    DIED = "died"


class Process(msgspec.Struct, frozen=True):
    """A process by its number and, since numbers are used again, when it began (seconds, epoch)."""

    pid: int
    began: float

    @classmethod
    def of(cls, pid: int) -> Process:
        """A process that is running now."""
        try:
            return cls(pid, psutil.Process(pid).create_time())
        except psutil.Error:
            return cls(pid, 0.0)

    def alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        try:
            found = psutil.Process(self.pid)
            return found.create_time() == self.began and found.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


class Resumption(msgspec.Struct, frozen=True):
    """One ``--resume``: when (UTC), from which step, in which generation."""

    at: str
    step: int
    generation: str


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What a run was started with.

    ``settings`` is the file it was asked for, whose copy lies in the run; ``base`` what its
    paths are relative to; ``model`` the base model as the trainer was told; ``lock`` and
    ``accelerate_config`` are SHA-256 digests, ``packages`` the versions that decide about
    numbers, ``started`` is in UTC.
    """

    name: str
    settings: str
    base: str
    model: str
    family: str
    trainer: str
    expected_device: str
    command: tuple[str, ...]
    started: str
    generation: str
    profile: str
    lock: str
    accelerate_config: str
    packages: dict[str, str]
    commits: Commits | None
    resumed: tuple[Resumption, ...] = ()
    process: Process | None = None


class Begun(msgspec.Struct, frozen=True):
    """What the trainer said before its first step: optimizer steps in all, device, processes."""

    total: int
    device: str
    processes: int
    pid: int


class Ended(msgspec.Struct, frozen=True):
    """How the trainer says it ended: ``finished``, ``stopped`` or ``failed``, after which step."""

    how: State
    step: int
    error: str = ""


class Step(msgspec.Struct, frozen=True):
    """One optimizer step.

    ``loss`` is the mean of all processes, ``average`` that over an epoch, ``time`` in seconds
    since 1970; then the bytes that the trainer holds on its device, and learning rates by name.
    """

    step: int
    epoch: int
    time: float
    loss: float
    average: float
    memory: int
    rates: dict[str, float]


class Saved(msgspec.Struct, frozen=True):
    """A saved state and the step that it was saved after."""

    path: Path
    step: int


class Run(msgspec.Struct, frozen=True):
    """The places in a run's directory."""

    path: Path

    @property
    def quoted_path(self) -> str:
        """Its path as it is typed behind a command."""
        return shlex.quote(str(self.path))

    @property
    def settings(self) -> Path:
        """The settings as they were when the run began."""
        return self.path / SETTINGS

    @property
    def log(self) -> Path:
        """Everything that the trainer printed."""
        return self.path / "trainer.log"

    @property
    def steps_file(self) -> Path:
        """One line of JSON for each step."""
        return self.path / "steps.jsonl"

    @property
    def begun_file(self) -> Path:
        """What the trainer said before its first step."""
        return self.path / "begun.json"

    @property
    def ended_file(self) -> Path:
        """How the trainer says it ended."""
        return self.path / "ended.json"

    @property
    def stop_file(self) -> Path:
        """Its being there asks the trainer to save and end."""
        return self.path / "stop"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's logs."""
        return self.path / "logs"

    @property
    def output(self) -> Path:
        """LoRAs, saved states and samples."""
        return self.path / "output"

    @property
    def samples(self) -> Path:
        """Where sd-scripts puts its samples (library/train_util.py, ``sample_images_common``)."""
        return self.output / "sample"

    @property
    def rendered(self) -> Path:
        """The pictures of ``invoke test-lora``."""
        return self.path / "test-lora"

    @property
    def report(self) -> Path:
        """The report of ``invoke report``."""
        return self.path / "report.html"

    @property
    def _record(self) -> Path:
        return self.path / "run.json"

    def record(self) -> Record:
        """What it was started with.

        Raises:
            UsageError: this is no run's directory.
        """
        found = _decode(self._record, Record)
        if found is None:
            raise UsageError(f"{self.path} is no run", "give a directory of `runs/`, or its project")
        return found

    def save(self, record: Record) -> None:
        """Write what it was started with."""
        write_atomic(self._record, msgspec.json.format(msgspec.json.encode(record)))

    def begun(self) -> Begun | None:
        """What the trainer said before its first step; nothing until then."""
        return _decode(self.begun_file, Begun)

    def ended(self) -> Ended | None:
        """How the trainer says it ended."""
        return _decode(self.ended_file, Ended)

    def prompts(self) -> tuple[str, ...]:
        """The sample prompts, numbered as the trainer numbers the lines of a text file."""
        told = read(self.settings).settings.get("sample_prompts")
        path = Path(self.record().base) / str(told or "")
        if path.suffix != ".txt" or not path.is_file():
            return ()
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        return tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))

    def state(self) -> State:
        """What it is doing, or how it ended."""
        process = self.record().process
        if process and process.alive():
            return State.RUNNING
        ended = self.ended()
        return ended.how if ended else State.DIED

    def steps(self) -> list[Step]:
        """Every step so far; a line that a kill cut off is left out."""
        try:
            lines = self.steps_file.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        return [msgspec.json.decode(line, type=Step) for line in lines if line.endswith(b"\n")]

    def forget_after(self, step: int) -> None:
        """Drop the steps after one: a resumed run makes them again."""
        kept = [s for s in self.steps() if s.step <= step]
        write_atomic(self.steps_file, b"".join(msgspec.json.encode(s) + b"\n" for s in kept))

    def saved(self) -> Saved | None:
        """The latest saved state that is whole."""
        found = []
        for file in self.output.glob("[!.]*-state/train_state.json"):
            # sd-scripts writes it; our part of it, and so exactness, is the other file.
            if (file.parent / "watched_0.pt").is_file():
                found.append(Saved(file.parent, int(json.loads(file.read_bytes())["current_step"])))
        return max(found, key=lambda saved: saved.step, default=None)

    def lora(self) -> Path | None:
        """The finished LoRA, else the latest checkpoint."""
        name = self.record().name
        final = self.output / f"{name}.safetensors"
        checkpoints = [p for p in self.output.glob("[!.]*.safetensors") if p != final]
        latest = max(checkpoints, key=lambda path: path.stat().st_mtime_ns, default=None)
        return final if final.is_file() else latest


def durations(steps: list[Step], resumed: Iterable[Resumption]) -> dict[int, float]:
    """Seconds that each step took, by its number.

    The first one has none, and neither has the first one after a pause: nobody knows when it began.
    """
    pauses = {again.step for again in resumed}
    return {
        after.step: after.time - before.time
        for before, after in itertools.pairwise(steps)
        if before.step not in pauses
    }


def _decode(path: Path, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError):
        return None


def settings_file(place: Path) -> Path:
    """The settings that a project or a file name stands for.

    Raises:
        UsageError: there are none.
    """
    file = place / SETTINGS if place.is_dir() else place
    if not file.is_file():
        what = f"{place} has no {SETTINGS}" if place.is_dir() else f"{file}: there is no such file"
        raise UsageError(what, "`invoke new NAME --images DIR` makes a project; or give a kohya TOML file")
    return Path(os.path.abspath(file))


def new(file: Path) -> Run:
    """Make the directory of a new run of these settings."""
    parent = file.parent / RUNS
    parent.mkdir(exist_ok=True)
    name = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    number = 1
    while True:
        path = parent / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
            continue
        (path / "output").mkdir()
        return Run(path)


def find(place: Path) -> Run:
    """The run that a path stands for: itself, or the latest of a project or settings file.

    Raises:
        UsageError: there is none.
    """
    path = Path(os.path.abspath(place))
    if _is_run(path):
        return Run(path)
    parent = (path if path.is_dir() else path.parent) / RUNS
    found = sorted((p for p in parent.glob("*") if _is_run(p)), key=_order)
    if path.is_file():
        found = [p for p in found if Run(p).record().settings == str(path)]
    if not found:
        raise UsageError(
            f"{place}: there is no run of it", f"`invoke train {shlex.quote(str(place))}` starts one"
        )
    return Run(found[-1])


def _is_run(path: Path) -> bool:
    return (path / "run.json").is_file()


def _order(path: Path) -> tuple[str, int]:
    """By time, then by the number that a second run of the same second has."""
    named = re.fullmatch(r"(.{19})(?:-(\d+))?", path.name)
    return (named[1], int(named[2] or 1)) if named else (path.name, 1)


def resumable(run: Run) -> Saved:
    """The state that a run can go on from.

    Raises:
        UsageError: it runs, or it is finished.
        StepFailed: it saved nothing.
    """
    state = _settled(run)
    if state is State.RUNNING:
        raise UsageError(f"{run.path} is still running", f"`invoke logs {run.quoted_path}` shows it")
    if state is State.FINISHED:
        raise UsageError(
            f"{run.path} is finished: nothing is left to train", "`invoke train` starts a new run"
        )
    saved = run.saved()
    if saved is None:
        raise StepFailed(
            f"{run.path} ended before it saved a state: nothing to go on from",
            "`invoke train` starts a new run; save_every_n_steps with save_state = true decides how often one is saved",
        )
    return saved


def _settled(run: Run) -> State:
    """The state, waited for when only the launcher is left: it takes seconds to tell of a killed trainer."""
    begun, began = run.begun(), time.monotonic()
    while (state := run.state()) is State.RUNNING and begun:
        waited = time.monotonic() - began
        # A process that was killed a moment ago may still be there.
        if waited > (_DYING_SECONDS if is_alive(begun.pid) else _LAUNCHER_SECONDS):
            break
        time.sleep(0.1)
    return state
