"""``invoke train``: the real trainer, in the pinned environment, with the user's own settings.

The trainer runs in a session of its own and writes into its run's directory (:mod:`.runs`);
this process only looks on. Each run keeps everything of it in that directory, so that no
run can damage what another one made.
"""

from __future__ import annotations

import math
import shlex
import shutil
import subprocess
import threading
import time
from pathlib import Path

import msgspec

from kohya_mps.core.errors import StepFailed, Stopped, UsageError
from kohya_mps.core.installation import Installation
from kohya_mps.core.machine import expected_device, on_mac
from kohya_mps.core.process import end_tree, start
from kohya_mps.core.report import Check, Report, Status, say
from kohya_mps.core.settings import PROBES, Settings
from kohya_mps.core.text import format_size
from kohya_mps.diagnose import base_model, preflight
from kohya_mps.diagnose.base_model import Form, Model
from kohya_mps.diagnose.preflight import PreflightOptions
from kohya_mps.install import accelerate_launch, checkout, lockfile, receipt
from kohya_mps.install.generations import Generation
from kohya_mps.install.setup import installed
from kohya_mps.trainer_config import config_file
from kohya_mps.trainer_config.config_file import ConfigFile, Kind, read

from . import live_view, outcome, runs
from .runs import Process, Record, Resumption, Run, Saved, State

# Written by probes/make_model.py into the folder of a small model.
SMALL_MARK = "made-small"

_TRAINERS = {"sd15": "train_network.py", "sd2": "train_network.py", "sdxl": "sdxl_train_network.py"}

_NEEDED = {"network_module": '"networks.lora"', "pretrained_model_name_or_path": '"model.safetensors"'}

# The packages whose versions decide about a training's numbers.
_DECISIVE = ("torch", "accelerate", "diffusers", "transformers", "lycoris-lora", "numpy")


class TrainOptions(msgspec.Struct, frozen=True):
    """What ``invoke train`` was asked for besides the settings."""

    resume: bool = False
    detach: bool = False
    preflight: bool = True


class Plan(msgspec.Struct, frozen=True):
    """One training, ready to be started.

    ``base`` is where the trainer starts, and so what the settings' paths are relative to.
    """

    file: ConfigFile
    base: Path
    name: str
    model: Model
    trainer: Path


def train(settings: Settings, place: Path, wanted: TrainOptions) -> Report:
    """Train, and show how it goes until it ends.

    Args:
        settings: the home and the profile.
        place: a project, a settings file or, to resume, a run.
        wanted: to go on with the latest run; to return as soon as it is started; to look
            for known failures first.

    Raises:
        UsageError: nothing is installed, or the settings cannot be trained with.
        StepFailed: preflight found what cannot work, or there is no state to resume from.
        Stopped: the person ended it.
    """
    home = Installation(settings.home)
    generation = installed(home, settings.profile_name)
    if wanted.resume:
        run = runs.find(place)
        child = resume(settings, generation, run, runs.resumable(run))
    else:
        file = runs.settings_file(place)
        planned = plan(home, file, None)
        if wanted.preflight:
            _preflight(settings, planned)
        run, child = start_run(settings, generation, planned)
    say(f"run: {run.path}")
    if wanted.detach:
        # Somebody has to take its exit status while this process lives.
        threading.Thread(target=child.wait, daemon=True).start()
        return _detached(run)
    _follow(run, child)
    return summarize(run)


def plan(home: Installation, file: Path, base: Path | None) -> Plan:
    """Read a trainer's TOML and decide how it is trained.

    Args:
        home: the checkout with the trainers.
        file: the settings.
        base: what their paths are relative to; decided by what is there when not given.

    Raises:
        UsageError: it is no TOML of a LoRA training, or of a base model that is not trained here.
    """
    found = read(file)
    if found.kind is not Kind.TOML:
        raise UsageError(
            f"{file}: {found.kind} cannot be trained with",
            "give a TOML as train_network.py --config_file takes it",
        )
    for name, example in _NEEDED.items():
        if not found.settings.get(name):
            raise UsageError(f"{file}: {name} is not set: `invoke train` trains LoRA", f"{name} = {example}")
    base = base or config_file.base_directory(found)
    named = str(found.settings["pretrained_model_name_or_path"])
    model = base_model.inspect(named, config_file.resolve_path(named, base))
    if model.form in (Form.MISSING, Form.DAMAGED):
        raise UsageError(f"{file}: pretrained_model_name_or_path: {model.detail}", "give a .safetensors file")
    if model.family and model.family not in _TRAINERS:
        raise UsageError(
            f"{file}: the base model is {model.family}", "Stable Diffusion 1.5, 2 and SDXL are trained here"
        )
    trainer = home.sd_scripts / _TRAINERS.get(model.family, "train_network.py")
    if not trainer.is_file():
        raise UsageError(f"there is no checkout in {home.root}", "`invoke clone` brings it")
    name = str(found.settings.get("output_name") or base.name)
    return Plan(found, base, name, model, trainer)


def _preflight(settings: Settings, planned: Plan) -> None:
    question = PreflightOptions(planned.file.path, base=planned.base, trainer=planned.trainer.name)
    checks = preflight.check(settings, question).checks
    for row in checks:
        if row.status is Status.WARN:
            say(f"  {row.name}: {row.detail}\n    -> {row.fix}")
    if bad := [row for row in checks if row.status is Status.FAIL]:
        listed = "\n".join(f"  {row.name}: {row.detail}\n    -> {row.fix}" for row in bad)
        raise StepFailed(
            f"this training cannot work here:\n{listed}",
            f"mend that (`invoke preflight {shlex.quote(str(planned.file.path))} --fix OUT` writes a corrected copy), "
            "or train all the same with `--no-preflight`",
        )


def configuration(home: Installation, generation: Generation) -> Path:
    """The accelerate configuration of a training: of several processes where that was configured."""
    return home.distributed_config if home.distributed_config.is_file() else generation.accelerate_config


def command(generation: Generation, config: Path, planned: Plan, run: Run, saved: Saved | None) -> list[str]:
    """What is started: the trainer, watched, with everything that it writes kept in the run."""
    orders = {
        "steps": str(run.steps_file),
        "begun": str(run.begun_file),
        "ended": str(run.ended_file),
        "stop": str(run.stop_file),
        "resume": str(saved.path) if saved else None,
    }
    chain = [str(PROBES / "resumable_trainer.py"), msgspec.json.encode(orders).decode()]
    if _is_small(planned):
        chain.append(str(PROBES / "small_trainer.py"))
    awake = ["/usr/bin/caffeinate", "-i", "-m"] if on_mac() else []
    return awake + accelerate_launch.argv(
        generation, *chain, str(planned.trainer), *trainer_arguments(planned, run), config=config
    )


def trainer_arguments(planned: Plan, run: Run) -> list[str]:
    """What the trainer is told: the run's copy of the settings, and what is said above them."""
    return [
        *("--config_file", str(run.settings)),
        *("--output_dir", str(run.output), "--output_name", planned.name),
        *("--logging_dir", str(run.tensorboard)),
    ]


def _is_small(planned: Plan) -> bool:
    told = str(planned.file.settings["pretrained_model_name_or_path"])
    return (config_file.resolve_path(told, planned.base) / SMALL_MARK).is_file()


def start_run(
    settings: Settings, generation: Generation, planned: Plan
) -> tuple[Run, subprocess.Popen[bytes]]:
    """Make the run's directory and start the trainer."""
    run = runs.new(planned.file.path)
    shutil.copyfile(planned.file.path, run.settings)
    config = configuration(Installation(settings.home), generation)
    argv = command(generation, config, planned, run, None)
    manifest = generation.manifest()
    assert manifest is not None  # it is the active one
    distributions = manifest.inventory.distributions
    record = Record(
        name=planned.name,
        settings=str(planned.file.path),
        base=str(planned.base),
        model=str(planned.file.settings["pretrained_model_name_or_path"]),
        family=planned.model.family,
        trainer=planned.trainer.name,
        expected_device=expected_device(),
        command=tuple(argv),
        started=receipt.now(),
        generation=generation.name,
        profile=settings.profile_name,
        lock=manifest.lock,
        accelerate_config=lockfile.digest(config),
        packages={name: distributions[name].version for name in _DECISIVE if name in distributions},
        commits=checkout.present(Installation(settings.home)),
    )
    run.save(record)
    return run, _start(run, record, generation, planned)


def resume(settings: Settings, generation: Generation, run: Run, saved: Saved) -> subprocess.Popen[bytes]:
    """Go on with a run from a saved state, with the settings that it began with."""
    record = run.record()
    original = Path(record.settings)
    if original.is_file() and original.read_bytes() != run.settings.read_bytes():
        say(f"{original} was changed since; this run goes on with its own copy, {run.settings}")
    if generation.name != record.generation:
        say(f"the run began in {record.generation} and goes on in {generation.name}: numbers may differ")
    planned = plan(Installation(settings.home), run.settings, Path(record.base))
    planned = msgspec.structs.replace(planned, name=record.name)
    say(f"going on after step {saved.step}")
    run.forget_after(saved.step)
    for file in (run.ended_file, run.stop_file, run.begun_file):
        file.unlink(missing_ok=True)
    again = Resumption(receipt.now(), saved.step, generation.name)
    argv = command(generation, configuration(Installation(settings.home), generation), planned, run, saved)
    record = msgspec.structs.replace(
        record, command=tuple(argv), resumed=(*record.resumed, again), process=None
    )
    run.save(record)
    return _start(run, record, generation, planned)


def _start(run: Run, record: Record, generation: Generation, planned: Plan) -> subprocess.Popen[bytes]:
    environ = accelerate_launch.environ(generation)
    child = start(record.command, cwd=planned.base, env=environ, log=run.log)
    run.save(msgspec.structs.replace(record, process=Process.of(child.pid)))
    return child


def _follow(run: Run, child: subprocess.Popen[bytes]) -> None:
    """Show the progress until the trainer ends; Ctrl-C asks it to save, a second one ends it."""
    try:
        live_view.follow(
            run, lambda: child.poll() is None, on_ctrl_c="saves the state and stops the training"
        )
    except KeyboardInterrupt:
        run.stop_file.touch()
        say("\nThe trainer saves its state after this step and ends; Ctrl-C again ends it at once.")
        try:
            child.wait()
        except KeyboardInterrupt:
            end_tree([child.pid], grace_seconds=0)
            child.wait()
            raise Stopped(
                f"{run.path} was ended; what is new since its last saved state is lost", _go_on(run)
            ) from None
        if (ended := run.ended()) and ended.how is State.STOPPED:
            raise Stopped(
                f"{run.path} was stopped after step {ended.step}, its state saved", _go_on(run)
            ) from None
        if not ended or ended.how is not State.FINISHED:
            raise Stopped(f"{run.path} was interrupted", f"its log: {run.log}") from None


def stop(place: Path) -> Report:
    """``invoke stop``: ask the trainer to save its state and end, and wait until it has."""
    run = runs.find(place)
    if run.state() is not State.RUNNING:
        raise UsageError(
            f"{run.path} does not run: it {_STATES[run.state()]}", f"`invoke report {run.quoted_path}`"
        )
    run.stop_file.touch()
    say(f"{run.path}: the trainer saves its state after this step and ends")
    while run.state() is State.RUNNING:
        time.sleep(0.2)
    return summarize(run)


def logs(place: Path, *, whole: bool = False) -> Report:
    """``invoke logs``: look on from another terminal; Ctrl-C ends the looking on alone."""
    run = runs.find(place)
    try:
        live_view.follow(run, lambda: run.state() is State.RUNNING, whole_log=whole)
    except KeyboardInterrupt:
        raise Stopped(
            f"{run.path} goes on", f"`invoke stop {run.quoted_path}` saves its state and ends it"
        ) from None
    return summarize(run)


_STATES = {
    State.FINISHED: "is finished",
    State.STOPPED: "was stopped",
    State.FAILED: "failed",
    State.DIED: "was killed",
}


def _detached(run: Run) -> Report:
    process = run.record().process
    return Report(
        "Training started",
        (Check("run", Status.PASS, f"{run.path}, process {process.pid if process else '?'}"),),
        {"run": str(run.path)},
        (
            "",
            f"invoke logs {run.quoted_path}     shows how it goes",
            f"invoke stop {run.quoted_path}     saves its state and ends it",
        ),
    )


def summarize(run: Run) -> Report:
    """What came of a run, as a report."""
    state, steps, begun = run.state(), run.steps(), run.begun()
    record = run.record()
    ended = run.ended()
    # Only the first of several machines has the steps; each knows how it ended.
    reached = ended.step if ended else steps[-1].step if steps else 0
    total = begun.total if begun else None
    checks = [
        Check(
            "training",
            Status.PASS if state in (State.FINISHED, State.STOPPED) else Status.FAIL,
            f"{_STATES[state].removeprefix('is ').removeprefix('was ')} after step {reached}"
            + (f" of {total}" if total else ""),
            "" if state is State.FINISHED else _go_on(run),
        )
    ]
    if state in (State.FAILED, State.DIED):
        checks += outcome.explain_run(run)
    if begun:
        device = begun.device.partition(":")[0]
        checks.append(
            Check.of(
                "training device",
                device == record.expected_device,
                f"{begun.device}, {begun.processes} process{'es' if begun.processes > 1 else ''}, "
                f"expected {record.expected_device}",
                "`invoke configure` writes the accelerate configuration anew",
            )
        )
    if steps:
        finite = all(math.isfinite(step.loss) for step in steps)
        detail = f"{steps[0].loss:.4f} in the first step, averages {steps[0].average:.4f} to {steps[-1].average:.4f}"
        checks.append(Check.of("loss", finite, detail, "lower the learning rate"))
        checks.append(Check("pace", Status.PASS, f"{live_view.pace(steps):.2f} s per step"))
    lora = run.lora()
    if lora:
        checks.append(Check("LoRA", Status.PASS, f"{lora} ({format_size(lora.stat().st_size)})"))
    extra = {
        "run": str(run.path),
        "state": state,
        "steps": reached,
        "total": total,
        "device": begun.device if begun else None,
        "losses": [step.loss for step in steps],
        "lora": str(lora) if lora else None,
        "log": str(run.log),
    }
    next_lines = (
        ("", f"invoke report {run.quoted_path}", f"invoke test-lora {run.quoted_path}")
        if state is State.FINISHED
        else ()
    )
    return Report(f"Run {run.path}", tuple(checks), extra, next_lines)


def _go_on(run: Run) -> str:
    saved = run.saved()
    if saved is None:
        return "no state was saved yet: `invoke train` starts anew"
    return f"`invoke train {run.quoted_path} --resume` goes on after step {saved.step}"
