"""``nox -s rehearse``: prepare rehearsals, run them under the trainer's interpreter, read the records."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import msgspec
import psutil

from devtools import posargs, sandbox
from kohya_mps.core import settings
from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.core.installation import Installation
from kohya_mps.core.machine import on_mac
from kohya_mps.core.process import stream
from kohya_mps.core.report import Report, say
from kohya_mps.core.run_lock import exclusive_lock
from kohya_mps.core.settings import CONFIG, PROBES, ROOT, Settings, read_yaml
from kohya_mps.install import accelerate_launch, lockfile, training_step
from kohya_mps.install.generations import Generation

from . import operators, record, request, verdict
from .record import Record
from .request import Request

SIMULATION = Path(__file__).resolve().parent / "simulation"
TABLE = CONFIG / "rehearsal.yaml"
# A short training of a small model, its libraries shared with its siblings.
_MEMORY_OF_ONE = 3e9


class Trainings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``config/rehearsal.yaml``: what can be rehearsed, each a name and the trainer's arguments for it."""

    trainers: dict[str, str]
    networks: dict[str, tuple[str, ...]]
    optimizers: dict[str, tuple[str, ...]]
    options: dict[str, tuple[str, ...]]


class RehearsalOptions(msgspec.Struct, frozen=True):
    """One rehearsal; ``arguments`` go to the trainer as they are, ``profile`` None is the installed one."""

    profile: str | None
    family: str
    network: str
    optimizer: str
    builtin: bool
    fallback: bool
    arguments: tuple[str, ...]


class Training(msgspec.Struct, frozen=True):
    """One training to rehearse: a family of models and the trainer's arguments.

    Without a family it is the built-in step.
    """

    name: str
    family: str
    arguments: tuple[str, ...]


class Stage(msgspec.Struct, frozen=True):
    """What all rehearsals share: the environment, the trainer, the mixed precision, a working directory.

    ``sd_scripts`` is None where only the built-in step is rehearsed.
    """

    generation: Generation
    sd_scripts: Path | None
    precision: str
    work: Path


def trainings() -> Trainings:
    """The table of what can be rehearsed."""
    return read_yaml(TABLE, Trainings)


def parse_options(arguments: Sequence[str]) -> RehearsalOptions:
    """The options of ``nox -s rehearse``; what follows a second ``--`` is the trainer's."""
    table = trainings()
    own = list(arguments)
    theirs: list[str] = []
    if "--" in own:
        own, theirs = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = posargs.parser(
        "rehearse",
        "Train a few steps on a simulated MPS device and report what is different on a Mac.",
        epilog="What follows a second -- goes to kohya's trainer: nox -s rehearse -- -- --loss_type huber",
    )
    parser.add_argument(
        "--profile", help="whose versions are used; if left out, the installed one's or the configured one's"
    )
    parser.add_argument("--family", default="sd15", choices=tuple(table.trainers))
    parser.add_argument("--network", default="lora", choices=tuple(table.networks))
    parser.add_argument("--optimizer", default="AdamW", choices=tuple(table.optimizers))
    parser.add_argument("--builtin", action="store_true", help="train without kohya's trainer")
    parser.add_argument(
        "--fallback",
        action="store_true",
        help="as with PYTORCH_ENABLE_MPS_FALLBACK=1, which invoke train sets",
    )
    parsed = parser.parse_args(own)
    if parsed.builtin and theirs:
        parser.error("--builtin takes none of the trainer's options")
    return RehearsalOptions(
        parsed.profile,
        parsed.family,
        parsed.network,
        parsed.optimizer,
        parsed.builtin,
        parsed.fallback,
        tuple(theirs),
    )


def rehearse(options: RehearsalOptions) -> Report:
    """Train once on the simulated device and once on the CPU, and compare.

    Raises:
        UsageError: nothing can be simulated here, or the built-in step has no such network.
    """
    training = _selected(options)
    chosen = settings.load(profile=options.profile)
    with exclusive_lock(Installation(sandbox.SANDBOX)):
        stage = prepare(chosen, builtin=options.builtin)
        pair = requests(stage, training, stage.work / "one", options.fallback)
        say(
            f"  rehearsing {training.name}: {training_step.STEPS} steps on the simulated device and on the CPU"
        )
        run(stage, pair, jobs=1)
        simulated, on_cpu = (result(each) for each in pair)
    return verdict.report(
        training.name,
        chosen.profile_name,
        simulated,
        on_cpu,
        fallback=options.fallback,
        logs={each.device: each.log for each in pair},
        precision=precision(training, stage.precision),
    )


def _selected(options: RehearsalOptions) -> Training:
    """The training that the options describe."""
    name = f"{options.network} with {options.optimizer}"
    if not options.builtin:
        table = trainings()
        known = (*table.networks[options.network], *table.optimizers[options.optimizer])
        return Training(name, options.family, (*known, *options.arguments))
    if options.network not in training_step.NETWORKS:
        accepted = ", ".join(training_step.NETWORKS)
        raise UsageError(f"the built-in step has no network {options.network!r}", f"accepted: {accepted}")
    algorithm = training_step.NETWORKS[options.network].algorithm
    return Training(name, "", (algorithm, options.optimizer, str(training_step.STEPS)))


def precision(training: Training, otherwise: str) -> str:
    """The mixed precision of a training; of an option that is repeated, the last one counts."""
    words = ("--mixed_precision", otherwise, *training.arguments)
    return next(value for name, value in reversed(list(pairwise(words))) if name == "--mixed_precision")


def prepare(chosen: Settings, *, builtin: bool) -> Stage:
    """Build the isolated environment, check the trainer out, and make a working directory.

    Raises:
        UsageError: nothing can be simulated: this is a Mac, or there is no data for the profile's torch.
    """
    if on_mac():
        raise UsageError("this is a Mac: it has the real device", "`nox -s train_step` trains on it")
    lock = lockfile.read(chosen.profile.lock_file)
    try:
        operators.load(lock.versions(lockfile.LINUX_X86_64)["torch"])
    except LookupError as error:
        raise UsageError(str(error), f"`nox -s rehearse_data -- {chosen.profile_name}`") from error
    tree = None if builtin else sandbox.kohya_checkout(chosen)
    generation = sandbox.ready(sandbox.isolated(chosen))
    work = ROOT / ".nox" / "rehearsal" / generation.name
    work.mkdir(parents=True, exist_ok=True)
    return Stage(generation, tree / "sd-scripts" if tree else None, chosen.mixed_precision, work)


def requests(stage: Stage, training: Training, directory: Path, fallback: bool) -> tuple[Request, Request]:
    """The same training on the simulated device and on the CPU, with its files in a directory.

    What is in the directory is removed first.
    """
    shutil.rmtree(directory, ignore_errors=True)
    model = training_step.prepare_model(stage.generation, stage.work, training.family or "sd15", "small")
    pictures = prepare_pictures(stage)
    simulated, on_cpu = (
        _request(stage, training, device, directory / device, model, pictures, fallback)
        for device in ("mps", "cpu")
    )
    return simulated, on_cpu


def _request(
    stage: Stage,
    training: Training,
    device: str,
    output: Path,
    model: Path,
    pictures: Path,
    fallback: bool,
) -> Request:
    output.mkdir(parents=True)
    if stage.sd_scripts is None or not training.family:
        script = PROBES / "builtin_step.py"
        arguments = [str(model / "model"), str(pictures), str(output), *training.arguments]
    else:
        script = stage.sd_scripts / trainings().trainers[training.family]
        arguments = _trainer_arguments(stage, training, output, model, pictures)
    return Request(
        name=training.name,
        device=device,
        script=str(script),
        arguments=tuple(arguments),
        small=bool(training.family),
        fallback=fallback,
        result=str(output / "record.json"),
        log=str(output / "trainer.log"),
    )


def _trainer_arguments(
    stage: Stage, training: Training, output: Path, model: Path, pictures: Path
) -> list[str]:
    prompts = output / "prompts.txt"
    prompts.write_text("a red circle --w 64 --h 64 --s 2 --d 1\na blue square --w 64 --h 64 --s 2 --d 2\n")
    copied = output / "pictures"  # trainers write caches next to the pictures
    shutil.copytree(pictures, copied)
    step = training_step.TrainingStepOptions()
    return [
        *training_step.trainer_arguments(stage.precision, model, output, step),
        *("--train_data_dir", str(copied), "--resolution", "128,128"),
        *(part.replace("{prompts}", str(prompts)) for part in training.arguments),
    ]


def run(stage: Stage, pending: Sequence[Request], jobs: int) -> None:
    """Run trainings, ``jobs`` at a time; each writes a record, or its log says why not.

    Raises:
        StepFailed: the trainer's libraries cannot be imported.
    """
    if not pending:
        return
    path = stage.work / "requests.json"
    request.write(path, list(pending))
    environ = accelerate_launch.environ(stage.generation, offline=True) | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HOME": str(stage.work / "huggingface"),
        # `accelerate launch` sets it, and a script without the option reads it.
        "ACCELERATE_MIXED_PRECISION": stage.precision,
    }
    done = stream(
        [stage.generation.python, SIMULATION, path, str(jobs)],
        cwd=stage.sd_scripts or stage.work,
        env=environ,
        log=stage.work / "rehearsal.log",
    )
    if done.returncode:
        raise StepFailed(
            f"the rehearsal could not start: {done.last_line}", f"its log: {stage.work}/rehearsal.log"
        )


def result(of: Request) -> Record:
    """The record of a training; without one, its error names the log."""
    if Path(of.result).exists():
        return record.read(Path(of.result))
    return Record(of.device, "", (), 0.0, error=f"it ended without a record; its log: {of.log}")


def most_jobs() -> int:
    """How many trainings run at once: one per core, as far as memory allows."""
    return max(1, min(os.cpu_count() or 1, int(psutil.virtual_memory().available / _MEMORY_OF_ONE)))


def prepare_pictures(stage: Stage) -> Path:
    """The pictures that are trained on; made once."""
    script = SIMULATION / "pictures.py"
    pictures = stage.work / f"pictures-{hashlib.sha256(script.read_bytes()).hexdigest()[:12]}"
    if not pictures.is_dir():
        unfinished = pictures.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            accelerate_launch.probe(stage.generation, script, str(unfinished))
        except accelerate_launch.ProbeFailed as error:
            raise StepFailed(f"the pictures to train on could not be made: {error}") from error
        unfinished.rename(pictures)
    return pictures
