"""Runs: a training's directory, the files in it, and the state of the training.

The directory is ``runs/<time>/`` beside the settings file. The trainer writes into it while it
runs, and everything about a run is read from its files. So a run continues when the terminal,
or ``invoke`` itself, is gone.
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

# How long a launcher may take to report that its trainer was killed.
_LAUNCHER_SECONDS = 30.0
# How long a process may still be listed after it was killed.
_DYING_SECONDS = 1.0
# Linux computes a start time from the boot time, which moves when the clock is set.
_START_TOLERANCE_SECONDS = 1.0

T = TypeVar("T")


class State(StrEnum):
    """What a training is doing, or how it ended. ``died``: it was killed and could not write its end."""

    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"
    DIED = "died"


class Process(msgspec.Struct, frozen=True):
    """A process: its number and its start time (seconds since the epoch), because numbers are reused."""

    pid: int
    began: float

    @classmethod
    def of(cls, pid: int) -> Process:
        """The process with this number, now."""
        try:
            return cls(pid, psutil.Process(pid).create_time())
        except psutil.Error:
            return cls(pid, 0.0)

    def alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        try:
            found = psutil.Process(self.pid)
            same = abs(found.create_time() - self.began) <= _START_TOLERANCE_SECONDS
            return same and found.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


class Resumption(msgspec.Struct, frozen=True):
    """One ``--resume``: its time (UTC), the step that it continued from, and the generation."""

    at: str
    step: int
    generation: str


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What a run was started with (``run.json``).

    ``settings`` is the user's file; the run has a copy of it. ``base`` is the directory that its
    paths are relative to. ``model`` is the base model as the settings name it. ``lock`` and
    ``accelerate_config`` are SHA-256 digests. ``packages`` has the versions that influence the
    losses. ``started`` is in UTC.
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
    """What the trainer reported before its first step (``begun.json``).

    ``total`` is the number of optimizer steps, ``pid`` the trainer's process number.
    """

    total: int
    device: str
    processes: int
    pid: int


class Ended(msgspec.Struct, frozen=True):
    """The end that the trainer reported (``ended.json``).

    ``how`` is ``finished``, ``stopped`` or ``failed``, ``step`` the last step.
    """

    how: State
    step: int
    error: str = ""


class Step(msgspec.Struct, frozen=True):
    """One optimizer step (a line of ``steps.jsonl``).

    ``time`` is in seconds since the epoch, ``loss`` the mean of all processes, ``average`` the
    loss's moving average over an epoch, ``memory`` the bytes that the trainer holds on its
    device, ``rates`` the learning rates by name.
    """

    step: int
    epoch: int
    time: float
    loss: float
    average: float
    memory: int
    rates: dict[str, float]


class Saved(msgspec.Struct, frozen=True):
    """A saved state, and the step after which it was saved."""

    path: Path
    step: int


class Run(msgspec.Struct, frozen=True):
    """A run's directory and the files in it."""

    path: Path

    @property
    def quoted_path(self) -> str:
        """Its path, quoted for a shell."""
        return shlex.quote(str(self.path))

    @property
    def settings(self) -> Path:
        """The copy of the settings, made when the run began."""
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
        """What the trainer reported before its first step."""
        return self.path / "begun.json"

    @property
    def ended_file(self) -> Path:
        """The end that the trainer reported."""
        return self.path / "ended.json"

    @property
    def stop_file(self) -> Path:
        """When this file exists, the trainer saves its state and ends."""
        return self.path / "stop"

    @property
    def tensorboard(self) -> Path:
        """The directory of TensorBoard's logs."""
        return self.path / "logs"

    @property
    def output(self) -> Path:
        """The directory of the LoRAs, the saved states and the samples."""
        return self.path / "output"

    @property
    def samples(self) -> Path:
        """The directory that sd-scripts puts samples into (library/train_util.py, ``sample_images_common``)."""
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
            UsageError: this is not a run's directory.
        """
        found = _decode(self._record, Record)
        if found is None:
            raise UsageError(f"{self.path} is not a run", "give a directory of `runs/`, or its project")
        return found

    def save(self, record: Record) -> None:
        """Write ``run.json``."""
        write_atomic(self._record, msgspec.json.format(msgspec.json.encode(record)))

    def begun(self) -> Begun | None:
        """What the trainer reported before its first step; None until then."""
        return _decode(self.begun_file, Begun)

    def ended(self) -> Ended | None:
        """The end that the trainer reported; None while it runs, and after it was killed."""
        return _decode(self.ended_file, Ended)

    def prompts(self) -> tuple[str, ...]:
        """The sample prompts of a text file, in the order in which the trainer numbers them."""
        name = read(self.settings).settings.get("sample_prompts")
        path = Path(self.record().base) / str(name or "")
        if path.suffix != ".txt" or not path.is_file():
            return ()
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        return tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))

    def state(self) -> State:
        """The state that its process and its files show."""
        process = self.record().process
        if process and process.alive():
            return State.RUNNING
        ended = self.ended()
        return ended.how if ended else State.DIED

    def steps(self) -> list[Step]:
        """Every step so far. A last line that a kill cut off is left out."""
        try:
            lines = self.steps_file.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        return [msgspec.json.decode(line, type=Step) for line in lines if line.endswith(b"\n")]

    def forget_after(self, step: int) -> None:
        """Remove the steps after this one from the file: a resumed run repeats them."""
        kept = [s for s in self.steps() if s.step <= step]
        write_atomic(self.steps_file, b"".join(msgspec.json.encode(s) + b"\n" for s in kept))

    def saved(self) -> Saved | None:
        """The latest saved state that is complete; None when there is none."""
        found = []
        for file in self.output.glob("[!.]*-state/train_state.json"):
            # sd-scripts writes train_state.json. watched_0.pt is ours: without it no exact resume.
            if (file.parent / "watched_0.pt").is_file():
                found.append(Saved(file.parent, int(json.loads(file.read_bytes())["current_step"])))
        return max(found, key=lambda saved: saved.step, default=None)

    def lora(self) -> Path | None:
        """The finished LoRA, or else the latest checkpoint."""
        name = self.record().name
        final = self.output / f"{name}.safetensors"
        checkpoints = [p for p in self.output.glob("[!.]*.safetensors") if p != final]
        latest = max(checkpoints, key=lambda path: path.stat().st_mtime_ns, default=None)
        return final if final.is_file() else latest


def durations(steps: list[Step], resumed: Iterable[Resumption]) -> dict[int, float]:
    """The seconds that each step took, by the step's number.

    The first step and the first step after each resumption are left out: their start was not recorded.
    """
    pauses = {resumption.step for resumption in resumed}
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


def settings_file(target: Path) -> Path:
    """The settings file of a project, or the settings file itself.

    Raises:
        UsageError: there is no such file.
    """
    file = target / SETTINGS if target.is_dir() else target
    if not file.is_file():
        what = f"{target} has no {SETTINGS}" if target.is_dir() else f"{file}: there is no such file"
        raise UsageError(what, "`invoke new NAME --images DIR` makes a project; or give a kohya TOML file")
    return Path(os.path.abspath(file))


def new(file: Path) -> Run:
    """Make the directory of a new run of this settings file."""
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


def find(target: Path) -> Run:
    """Find the run at a path, or the latest run of a project or settings file.

    Raises:
        UsageError: there is no run.
    """
    path = Path(os.path.abspath(target))
    if _is_run(path):
        return Run(path)
    parent = (path if path.is_dir() else path.parent) / RUNS
    found = sorted((p for p in parent.glob("*") if _is_run(p)), key=_order)
    if path.is_file():
        found = [p for p in found if Run(p).record().settings == str(path)]
    if not found:
        raise UsageError(
            f"{target}: there is no run of it", f"`invoke train {shlex.quote(str(target))}` starts one"
        )
    return Run(found[-1])


def _is_run(path: Path) -> bool:
    return (path / "run.json").is_file()


def _order(path: Path) -> tuple[str, int]:
    """The time, then the number that :func:`new` adds to a second run of the same second."""
    named = re.fullmatch(r"(.{19})(?:-(\d+))?", path.name)
    return (named[1], int(named[2] or 1)) if named else (path.name, 1)


def resumable(run: Run) -> Saved:
    """The saved state that a run can be resumed from.

    Raises:
        UsageError: the run is still running, or it is finished.
        StepFailed: it has not saved a state.
    """
    state = _settled_state(run)
    if state is State.RUNNING:
        raise UsageError(f"{run.path} is still running", f"`invoke logs {run.quoted_path}` shows it")
    if state is State.FINISHED:
        raise UsageError(
            f"{run.path} is finished: nothing is left to train", "`invoke train` starts a new run"
        )
    saved = run.saved()
    if saved is None:
        raise StepFailed(
            f"{run.path} ended before it saved a state, so it cannot be resumed",
            "`invoke train` starts a new run; save_every_n_steps with save_state = true decides how often a state is saved",
        )
    return saved


def _settled_state(run: Run) -> State:
    """The state, once it is certain.

    A launcher takes seconds to notice that its trainer was killed, and runs until then.
    """
    begun, began = run.begun(), time.monotonic()
    while (state := run.state()) is State.RUNNING and begun:
        waited = time.monotonic() - began
        if waited > (_DYING_SECONDS if is_alive(begun.pid) else _LAUNCHER_SECONDS):
            break
        time.sleep(0.1)
    return state
