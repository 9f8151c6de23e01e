"""The training step: the real trainer, on a model and pictures that are generated here.

It passes only when the trainer exited with 0, every loss is finite, the trainer named the
expected device, and training moved weights of the saved LoRA away from zero.
"""

from __future__ import annotations

import hashlib
import math
import re
import shutil
import sys
from pathlib import Path

import msgspec

from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.core.files import write_atomic
from kohya_mps.core.machine import expected_device
from kohya_mps.core.process import ProcessResult, stream
from kohya_mps.core.report import Check, Report, Status, say
from kohya_mps.core.settings import PROBES, Settings
from kohya_mps.core.text import format_size
from kohya_mps.known_failures import log_search

from . import accelerate_launch
from .generations import Generation
from .lockfile import digest

STEPS = 3
_DIGESTS = "digests.json"


class Network(msgspec.Struct, frozen=True):
    """A kind of LoRA: the trainer's module for it, and a pattern for the weights that are zero before training."""

    module: str
    algorithm: str
    starts_at_zero: str

    def arguments(self) -> list[str]:
        """The trainer's options for it; sd-scripts' own module has no algorithm to choose."""
        own = self.module == "networks.lora"
        return [
            "--network_module",
            self.module,
            *([] if own else ["--network_args", f"algo={self.algorithm}"]),
        ]


NETWORKS = {
    "lora": Network("networks.lora", "lora", "lora_up"),
    "locon": Network("lycoris.kohya", "lora", "lora_up"),
    "loha": Network("lycoris.kohya", "loha", "hada_w2_a"),
    "lokr": Network("lycoris.kohya", "lokr", r"lokr_w2(_b)?$"),
}

# Prodigy finds the step size itself; its README recommends to start from 1.
LEARNING_RATES = {"Prodigy": "1.0"}


class TrainingStepOptions(msgspec.Struct, frozen=True):
    """What is trained, and by which trainer.

    ``network`` is a key of :data:`NETWORKS`, ``optimizer`` a name that sd-scripts knows.
    ``full`` trains a model of Stable Diffusion 1.5's full size, ``builtin`` trains without
    kohya's trainer.
    """

    network: str = "lora"
    optimizer: str = "AdamW"
    full: bool = False
    builtin: bool = False

    def check(self) -> None:
        """Raise UsageError for a combination that does not exist."""
        if self.network not in NETWORKS:
            raise UsageError(f"there is no network {self.network!r}", f"accepted: {', '.join(NETWORKS)}")
        if self.builtin and self.full:
            raise UsageError("the built-in step trains the small model only", "leave out --full or --builtin")


class TrainedLora(msgspec.Struct, frozen=True):
    """What a training left behind: its logged losses and its saved LoRA.

    ``losses``: one per step. ``seconds_per_step``: the median; None with a single step.
    ``tensors``: how many the LoRA has. ``zero_start``: how many of them are zero before the
    first step. ``trained``: how many of those are no longer zero. ``finite``: whether every
    weight is.
    """

    losses: tuple[float, ...]
    seconds_per_step: float | None
    tensors: int
    zero_start: int
    trained: int
    finite: bool


def run(
    settings: Settings,
    generation: Generation,
    checkout: Path | None,
    work: Path,
    options: TrainingStepOptions,
) -> Report:
    """Train a few steps and judge them.

    Args:
        settings: the mixed precision.
        generation: the environment and the configuration it runs with.
        checkout: the kohya_ss checkout; not needed for the built-in step.
        work: where models are kept for the next time, and where this run's files go.
        options: what is trained.
    """
    options.check()
    trainer = checkout / "sd-scripts" / "train_network.py" if checkout else None
    if not options.builtin and not (trainer and trainer.is_file()):
        raise UsageError(
            "there is no kohya_ss checkout to train with",
            "`invoke clone` makes it; `nox -s train_step -- --builtin` trains without kohya's trainer",
        )
    model = prepare_model(generation, work, "sd15", "full" if options.full else "small")
    output = work / "run"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    if options.builtin or checkout is None:
        command, directory = builtin_command(generation, model, output, options), work
    else:
        command, directory = trainer_command(settings, generation, checkout, model, output, options)
    say(f"  training {STEPS} steps: {what_ran(options)}")
    log = output / "trainer.log"
    environ = accelerate_launch.environ(generation, offline=True)
    result = stream(command, cwd=directory, env=environ, log=log, on_output=_progress_only)
    if options.full:
        shutil.rmtree(model)  # four gigabytes, and quickly made again
    if result.returncode:
        log_search.print_known_failures(result.tail)
        return trainer_failed(result, log, options)
    return judge(result, inspect(generation, output, options), log, options)


def _progress_only(piece: bytes) -> None:
    """Show the progress bar alone of what the trainer prints; the rest is in the log."""
    bars = [part for part in re.split(rb"[\r\n]+", piece) if part.startswith(b"steps:")]
    if bars and sys.stderr.isatty():
        sys.stderr.buffer.write(b"\r      " + bars[-1][:100] + (b"\n" if b"100%" in bars[-1] else b""))
        sys.stderr.buffer.flush()


def what_ran(options: TrainingStepOptions) -> str:
    """One phrase for the report: which trainer, which network and optimizer, and on which model."""
    trainer = (
        "the built-in step (kohya's trainer was not run)" if options.builtin else "kohya's train_network.py"
    )
    size = "full-size" if options.full else "small"
    return f"{trainer}, {options.network} with {options.optimizer} on a {size} random SD 1.5"


def prepare_model(generation: Generation, work: Path, family: str, size: str) -> Path:
    """The directory with a generated model, its tokenizers and images; made once for each lock.

    Raises:
        StepFailed: the environment cannot make it.
    """
    script = PROBES / "make_model.py"
    manifest = generation.manifest()
    made_by = script.read_bytes() + (manifest.lock if manifest else "").encode()
    model = work / "models" / f"{family}-{size}-{hashlib.sha256(made_by).hexdigest()[:12]}"
    if _is_whole(model):
        return model
    for old in model.parent.glob(f"{family}-{size}-*"):
        shutil.rmtree(old)
    say(f"  making a random {size} {family} model to train on")
    unfinished = model.with_name(f"{model.name}.unfinished")
    try:
        accelerate_launch.probe(generation, script, str(unfinished), family, size)
    except accelerate_launch.ProbeFailed as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise StepFailed(
            f"the model to train on could not be made: {error}", "`invoke setup` repairs the environment"
        ) from error
    digests = {
        str(path.relative_to(unfinished)): digest(path) for path in unfinished.rglob("*") if path.is_file()
    }
    write_atomic(unfinished / _DIGESTS, msgspec.json.encode(digests))
    unfinished.rename(model)
    return model


def _is_whole(model: Path) -> bool:
    """Whether every file is as it was made; a file that the disk lost must not look like a failing trainer."""
    try:
        digests = msgspec.json.decode((model / _DIGESTS).read_bytes(), type=dict[str, str])
        return all(digest(model / name) == expected for name, expected in digests.items())
    except (OSError, msgspec.DecodeError):
        return False


def trainer_command(
    settings: Settings,
    generation: Generation,
    checkout: Path,
    model: Path,
    output: Path,
    options: TrainingStepOptions,
) -> tuple[list[str], Path]:
    """The command that starts the real trainer, and the directory it starts in."""
    directory = checkout / "sd-scripts"
    trainer = [str(directory / "train_network.py")]
    if not options.full:
        trainer = [str(PROBES / "small_trainer.py"), *trainer]
    arguments = trainer_arguments(settings.mixed_precision, model, output, options)
    return accelerate_launch.argv(generation, *trainer, *arguments), directory


def trainer_arguments(precision: str, model: Path, output: Path, options: TrainingStepOptions) -> list[str]:
    """The options for sd-scripts' trainer; where one is repeated it takes the last."""
    return [
        *("--pretrained_model_name_or_path", str(model / "model")),
        *("--tokenizer_cache_dir", str(model / "tokenizers")),
        *("--train_data_dir", str(model / "images"), "--caption_extension", ".txt"),
        *("--resolution", "64,64", "--min_bucket_reso", "64"),
        *NETWORKS[options.network].arguments(),
        *("--network_dim", "4", "--network_alpha", "1"),
        *("--optimizer_type", options.optimizer),
        *("--learning_rate", LEARNING_RATES.get(options.optimizer, "1e-4")),
        *("--train_batch_size", "1", "--max_train_steps", str(STEPS), "--seed", "42"),
        *("--mixed_precision", precision, "--save_precision", "float"),
        *("--sdpa", "--max_data_loader_n_workers", "0"),
        *("--save_model_as", "safetensors", "--output_dir", str(output), "--output_name", "lora"),
        *("--logging_dir", str(output / "logs"), "--log_with", "tensorboard"),
    ]


def builtin_command(
    generation: Generation, model: Path, output: Path, options: TrainingStepOptions
) -> list[str]:
    """The command that starts the probe which trains without kohya_ss."""
    return accelerate_launch.argv(
        generation,
        str(PROBES / "builtin_step.py"),
        *(str(model / "model"), str(model / "images"), str(output)),
        *(NETWORKS[options.network].algorithm, options.optimizer, str(STEPS)),
    )


def trainer_failed(result: ProcessResult, log: Path, options: TrainingStepOptions) -> Report:
    """The verdict on a trainer that exited with an error."""
    what = what_ran(options)
    detail = f"exited with {result.returncode}: {result.last_line}"
    check = Check("trainer", Status.FAIL, detail, f"its log: {log}")
    return Report(f"Training step: {what}", (check,), {"trainer": what, "log": str(log)})


def judge(result: ProcessResult, lora: TrainedLora, log: Path, options: TrainingStepOptions) -> Report:
    """The verdict on a trainer that exited with 0; each condition is a check of its own.

    Args:
        result: how the trainer ended.
        lora: what it left behind.
        log: what it printed; the device that it ran on is read from there.
        options: what was trained.
    """
    what, device = what_ran(options), named_device(log)
    checks = (
        Check("trainer", Status.PASS, f"{what}: exit 0 after {result.seconds:.0f} s"),
        _judge_losses(lora, log),
        _judge_device(device),
        _judge_weights(lora),
        _pace(result, lora),
    )
    extra = {
        "trainer": what,
        "kohya_trainer_ran": not options.builtin,
        "device": device,
        "losses": lora.losses,
        "seconds_per_step": lora.seconds_per_step,
        "peak_bytes": result.peak_bytes,
        "log": str(log),
    }
    return Report(f"Training step: {what}", checks, extra)


def _judge_losses(lora: TrainedLora, log: Path) -> Check:
    listed = ", ".join(f"{loss:.4f}" for loss in lora.losses)
    return Check.of(
        "losses",
        len(lora.losses) == STEPS and all(math.isfinite(loss) for loss in lora.losses),
        f"{len(lora.losses)} of {STEPS} steps: {listed}",
        f"every step has to log a finite loss; the trainer's log may say why: {log}",
    )


def _judge_device(device: str | None) -> Check:
    expected = expected_device()
    return Check.of(
        "training device",
        device == expected,
        f"the trainer ran on {device or 'a device it did not name'}, expected {expected}",
        "`invoke configure` writes the accelerate configuration again; `invoke verify` checks the device",
    )


def _judge_weights(lora: TrainedLora) -> Check:
    return Check.of(
        "saved LoRA",
        # Not all: the middle block sees one position of a 64 x 64 picture, and attention
        # of one position to itself has no gradient.
        2 * lora.trained > lora.zero_start > 0 and lora.finite,
        f"{lora.tensors} tensors, {lora.trained} of the {lora.zero_start} that start at zero were trained",
        "the optimizer did not change the weights, or they are not finite",
    )


def _pace(result: ProcessResult, lora: TrainedLora) -> Check:
    pace = f"{lora.seconds_per_step:.2f} s per step, " if lora.seconds_per_step is not None else ""
    return Check("pace", Status.PASS, f"{pace}peak memory {format_size(result.peak_bytes)}")


def inspect(generation: Generation, output: Path, options: TrainingStepOptions) -> TrainedLora:
    """Read the losses and the LoRA of a finished run, in the trainer's environment.

    Raises:
        StepFailed: the trainer exited with 0 but left no readable LoRA or log.
    """
    pattern = NETWORKS[options.network].starts_at_zero
    try:
        printed = accelerate_launch.probe(
            generation,
            PROBES / "inspect_run.py",
            str(output / "logs"),
            str(output / "lora.safetensors"),
            pattern,
        )
    except accelerate_launch.ProbeFailed as error:
        raise StepFailed(
            f"the trainer exited with 0, but its LoRA or its log cannot be read: {error}"
        ) from error
    return msgspec.json.decode(printed, type=TrainedLora)


def named_device(log: Path) -> str | None:
    """The type of the device that the trainer ran on, without its index; None when the log has none.

    sd-scripts prints ``accelerator device:``.
    """
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("accelerator device:"):
            return line.partition(":")[2].strip().partition(":")[0]
    return None
