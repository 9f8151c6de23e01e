"""``invoke train``: start the real trainer, in the pinned environment, with the user's settings.

The trainer runs in a session of its own and writes into its run's directory (:mod:`.runs`); this
process only shows the progress (:mod:`.follow`). All files of a run are in its directory, so no
run can damage the files of another one.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import threading
from pathlib import Path

import msgspec

from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.core.installation import Installation
from kohya_mps.core.machine import expected_device, on_mac
from kohya_mps.core.process import start
from kohya_mps.core.report import Check, Report, Status, say
from kohya_mps.core.settings import PROBES, Settings
from kohya_mps.diagnose import base_model, preflight
from kohya_mps.diagnose.base_model import Form, Model
from kohya_mps.diagnose.preflight import PreflightOptions
from kohya_mps.install import accelerate_launch, checkout, lockfile, receipt
from kohya_mps.install.generations import Generation, installed
from kohya_mps.trainer_config import config_file
from kohya_mps.trainer_config.config_file import ConfigFile, Kind, read

from . import follow, runs
from .runs import Process, Record, Resumption, Run, Saved

# probes/make_model.py writes this file into the folder of a small model.
SMALL_MARK = "made-small"

_TRAINERS = {"sd15": "train_network.py", "sd2": "train_network.py", "sdxl": "sdxl_train_network.py"}

# The settings that every LoRA training needs, each with an example.
_REQUIRED = {"network_module": '"networks.lora"', "pretrained_model_name_or_path": '"model.safetensors"'}

# The packages whose versions influence the losses of a training.
_RECORDED_PACKAGES = ("torch", "accelerate", "diffusers", "transformers", "lycoris-lora", "numpy")


class TrainOptions(msgspec.Struct, frozen=True):
    """The options of ``invoke train``.

    ``resume`` continues the latest run, ``detach`` returns as soon as the trainer is started, and
    ``preflight`` looks for known failures first.
    """

    resume: bool = False
    detach: bool = False
    preflight: bool = True


class Plan(msgspec.Struct, frozen=True):
    """One training, ready to be started.

    ``base`` is the trainer's working directory: the settings' paths are relative to it.
    """

    file: ConfigFile
    base: Path
    name: str
    model: Model
    trainer: Path


def train(settings: Settings, target: Path, options: TrainOptions) -> Report:
    """Train, and show the progress until the training ends.

    Args:
        settings: the home and the profile.
        target: a project, a settings file or, to resume, a run.
        options: the options of the command.

    Raises:
        UsageError: nothing is installed, or the settings cannot be trained with.
        StepFailed: preflight found a known failure, or there is no state to resume from.
        Stopped: the user stopped the training.
    """
    home = Installation(settings.home)
    generation = installed(home, settings.profile_name)
    if options.resume:
        run = runs.find(target)
        child = resume(settings, generation, run, runs.resumable(run))
    else:
        planned = plan(home, runs.settings_file(target), None)
        if options.preflight:
            _preflight(settings, planned)
        run, child = start_run(settings, generation, planned)
    say(f"run: {run.path}")
    if options.detach:
        # The trainer would stay a zombie while this process lives if nobody took its exit status.
        threading.Thread(target=child.wait, daemon=True).start()
        return _detached(run)
    return follow.own_training(run, child)


def plan(home: Installation, file: Path, base: Path | None) -> Plan:
    """Read a trainer's TOML and decide how to train it.

    Args:
        home: the installation whose checkout has the trainers.
        file: the settings.
        base: the directory that their paths are relative to. None: the settings' own directory or
            the working directory, whichever has the files.

    Raises:
        UsageError: the file is not a TOML of a LoRA training, or its base model is missing,
            damaged, or of a family that is not trained here.
    """
    config = read(file)
    if config.kind is not Kind.TOML:
        raise UsageError(
            f"{file}: {config.kind} cannot be trained with",
            "give a TOML as train_network.py --config_file takes it",
        )
    for name, example in _REQUIRED.items():
        if not config.settings.get(name):
            raise UsageError(f"{file}: {name} is not set: `invoke train` trains LoRA", f"{name} = {example}")
    base = base or config_file.base_directory(config)
    model = _base_model(config, base)
    trainer = home.sd_scripts / _TRAINERS.get(model.family, "train_network.py")
    if not trainer.is_file():
        raise UsageError(f"there is no checkout in {home.root}", "`invoke clone` brings it")
    name = str(config.settings.get("output_name") or base.name)
    return Plan(config, base, name, model, trainer)


def _base_model(config: ConfigFile, base: Path) -> Model:
    name = str(config.settings["pretrained_model_name_or_path"])
    model = base_model.inspect(name, config_file.resolve_path(name, base))
    if model.form in (Form.MISSING, Form.DAMAGED):
        raise UsageError(
            f"{config.path}: pretrained_model_name_or_path: {model.detail}", "give a .safetensors file"
        )
    if model.family and model.family not in _TRAINERS:
        raise UsageError(
            f"{config.path}: the base model is {model.family}",
            "Stable Diffusion 1.5, 2 and SDXL are trained here",
        )
    return model


def _preflight(settings: Settings, planned: Plan) -> None:
    """Print the warnings of preflight, and refuse a training that is known to fail."""
    options = PreflightOptions(planned.file.path, base=planned.base, trainer=planned.trainer.name)
    checks = preflight.check(settings, options).checks
    for check in checks:
        if check.status is Status.WARN:
            say(_listed(check))
    if failures := [check for check in checks if check.status is Status.FAIL]:
        listed = "\n".join(map(_listed, failures))
        raise StepFailed(
            f"this training cannot work here:\n{listed}",
            f"correct that (`invoke preflight {shlex.quote(str(planned.file.path))} --fix OUT` writes a corrected copy), "
            "or train anyway with `--no-preflight`",
        )


def _listed(check: Check) -> str:
    return f"  {check.name}: {check.detail}\n    -> {check.fix}"


def configuration(home: Installation, generation: Generation) -> Path:
    """The accelerate configuration of a training: the distributed one where there is one."""
    return home.distributed_config if home.distributed_config.is_file() else generation.accelerate_config


def command(generation: Generation, config: Path, planned: Plan, run: Run, saved: Saved | None) -> list[str]:
    """The command that starts the trainer, in the wrapper that makes it resumable.

    Args:
        generation: the environment that it runs in.
        config: the accelerate configuration.
        planned: the training.
        run: the run whose directory the trainer writes into.
        saved: the state to resume from.
    """
    request = {
        "steps": str(run.steps_file),
        "begun": str(run.begun_file),
        "ended": str(run.ended_file),
        "stop": str(run.stop_file),
        "resume": str(saved.path) if saved else None,
    }
    chain = [str(PROBES / "resumable_trainer.py"), msgspec.json.encode(request).decode()]
    if _is_small(planned):
        chain.append(str(PROBES / "small_trainer.py"))
    awake = ["/usr/bin/caffeinate", "-i", "-m"] if on_mac() else []
    return awake + accelerate_launch.argv(
        generation, *chain, str(planned.trainer), *trainer_arguments(planned, run), config=config
    )


def trainer_arguments(planned: Plan, run: Run) -> list[str]:
    """The trainer's arguments: the run's copy of the settings, and what takes precedence over it."""
    return [
        *("--config_file", str(run.settings)),
        *("--output_dir", str(run.output), "--output_name", planned.name),
        *("--logging_dir", str(run.tensorboard)),
    ]


def _is_small(planned: Plan) -> bool:
    name = str(planned.file.settings["pretrained_model_name_or_path"])
    return (config_file.resolve_path(name, planned.base) / SMALL_MARK).is_file()


def start_run(
    settings: Settings, generation: Generation, planned: Plan
) -> tuple[Run, subprocess.Popen[bytes]]:
    """Make the run's directory and start the trainer."""
    run = runs.new(planned.file.path)
    shutil.copyfile(planned.file.path, run.settings)
    record = _record(settings, generation, planned, run)
    run.save(record)
    return run, _start(run, record, generation, planned)


def _record(settings: Settings, generation: Generation, planned: Plan, run: Run) -> Record:
    config = configuration(Installation(settings.home), generation)
    manifest = generation.manifest()
    assert manifest is not None  # it is the active one
    distributions = manifest.inventory.distributions
    return Record(
        name=planned.name,
        settings=str(planned.file.path),
        base=str(planned.base),
        model=str(planned.file.settings["pretrained_model_name_or_path"]),
        family=planned.model.family,
        trainer=planned.trainer.name,
        expected_device=expected_device(),
        command=tuple(command(generation, config, planned, run, None)),
        started=receipt.now(),
        generation=generation.name,
        profile=settings.profile_name,
        lock=manifest.lock,
        accelerate_config=lockfile.digest(config),
        packages={name: distributions[name].version for name in _RECORDED_PACKAGES if name in distributions},
        commits=checkout.present(Installation(settings.home)),
    )


def resume(settings: Settings, generation: Generation, run: Run, saved: Saved) -> subprocess.Popen[bytes]:
    """Resume a run from a saved state, with the copy of its settings that it has."""
    record, home = run.record(), Installation(settings.home)
    original = Path(record.settings)
    if original.is_file() and original.read_bytes() != run.settings.read_bytes():
        say(
            f"{original} has changed since the run began; the run continues with its own copy, {run.settings}"
        )
    if generation.name != record.generation:
        say(f"the run began in {record.generation} and continues in {generation.name}: losses may differ")
    planned = plan(home, run.settings, Path(record.base))
    planned = msgspec.structs.replace(planned, name=record.name)
    say(f"continuing after step {saved.step}")
    run.forget_after(saved.step)
    for file in (run.ended_file, run.stop_file, run.begun_file):
        file.unlink(missing_ok=True)
    resumption = Resumption(receipt.now(), saved.step, generation.name)
    record = msgspec.structs.replace(
        record,
        command=tuple(command(generation, configuration(home, generation), planned, run, saved)),
        resumed=(*record.resumed, resumption),
        process=None,
    )
    run.save(record)
    return _start(run, record, generation, planned)


def _start(run: Run, record: Record, generation: Generation, planned: Plan) -> subprocess.Popen[bytes]:
    environ = accelerate_launch.environ(generation)
    child = start(record.command, cwd=planned.base, env=environ, log=run.log)
    run.save(msgspec.structs.replace(record, process=Process.of(child.pid)))
    return child


def _detached(run: Run) -> Report:
    process = run.record().process
    return Report(
        "Training started",
        (Check("run", Status.PASS, f"{run.path}, process {process.pid if process else '?'}"),),
        {"run": str(run.path)},
        (
            "",
            f"invoke logs {run.quoted_path}     shows its progress",
            f"invoke stop {run.quoted_path}     saves its state and ends it",
        ),
    )
