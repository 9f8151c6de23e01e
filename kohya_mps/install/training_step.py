"""The training step: the real trainer, on a model and pictures that are made here.

It passes only when the trainer ended well, every loss is finite, the trainer named the
expected device, and the saved LoRA has weights that training moved away from zero.
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
        """What the trainer is told; sd-scripts' own module has no algorithm to choose."""
        chosen = [] if self.module == "networks.lora" else [f"algo={self.algorithm}"]
        return ["--network_module", self.module, *(["--network_args", *chosen] if chosen else [])]


NETWORKS = {
    "lora": Network("networks.lora", "lora", "lora_up"),
    "locon": Network("lycoris.kohya", "lora", "lora_up"),
    "loha": Network("lycoris.kohya", "loha", "hada_w2_a"),
    "lokr": Network("lycoris.kohya", "lokr", r"lokr_w2(_b)?$"),
}

# Prodigy finds the step size itself and wants to start from 1 (its README says so).
LEARNING_RATES = {"Prodigy": "1.0"}


class TrainingStepOptions(msgspec.Struct, frozen=True):
    """What is trained: ``network`` is a key of :data:`NETWORKS`, ``optimizer`` a name sd-scripts knows."""

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
    """What a training left behind.

    ``losses`` one per step, ``tensors`` in the saved LoRA, ``zero_start`` how many of them
    start at zero and ``trained`` how many of those no longer are, ``finite`` whether all are.
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
    if not options.builtin and (
        checkout is None or not (checkout / "sd-scripts" / "train_network.py").is_file()
    ):
        raise UsageError(
            "there is no kohya_ss checkout to train with",
            "`invoke clone` brings it; `nox -s train_step -- --builtin` trains without kohya's trainer",
        )
    model = prepare_model(generation, work, "sd15", "full" if options.full else "small")
    output = work / "run"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    if options.builtin or checkout is None:
        command, place = builtin_command(generation, model, output, options), work
    else:
        command, place = trainer_command(settings, generation, checkout, model, output, options)
    say(f"  training {STEPS} steps: {what_ran(options)}")
    log = output / "trainer.log"
    environ = accelerate_launch.environ(generation, offline=True)
    finished = stream(command, cwd=place, env=environ, log=log, on_output=_progress_only)
    if options.full:
        shutil.rmtree(model)  # four gigabytes that are made again in less time than they are missed
    return judge(generation, finished, output, log, options)


def _progress_only(piece: bytes) -> None:
    """Of what the trainer says, a person waiting wants the progress bar; the log has the rest."""
    bars = [part for part in re.split(rb"[\r\n]+", piece) if part.startswith(b"steps:")]
    if bars and sys.stderr.isatty():
        sys.stderr.buffer.write(b"\r      " + bars[-1][:100] + (b"\n" if b"100%" in bars[-1] else b""))
        sys.stderr.buffer.flush()


def what_ran(options: TrainingStepOptions) -> str:
    """One phrase for the report: which trainer, what it trained, and on what."""
    trainer = (
        "the built-in step (kohya's trainer was not run)" if options.builtin else "kohya's train_network.py"
    )
    size = "full-size" if options.full else "small"
    return f"{trainer}, {options.network} with {options.optimizer} on a {size} random SD 1.5"


def prepare_model(generation: Generation, work: Path, family: str, size: str) -> Path:
    """The generated model, its tokenizers and images; made once for an environment's versions."""
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
    """Whether every file is as it was made: a disk that lost one must not look like a trainer that fails."""
    try:
        digests = msgspec.json.decode((model / _DIGESTS).read_bytes(), type=dict[str, str])
        return all(digest(model / name) == made for name, made in digests.items())
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
    place = checkout / "sd-scripts"
    trainer = [str(place / "train_network.py")]
    if not options.full:
        trainer = [str(PROBES / "small_trainer.py"), *trainer]
    arguments = trainer_arguments(settings.mixed_precision, model, output, options)
    return accelerate_launch.argv(generation, *trainer, *arguments), place


def trainer_arguments(precision: str, model: Path, output: Path, options: TrainingStepOptions) -> list[str]:
    """What sd-scripts' trainer is told; of an option that is repeated it takes the last."""
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


def judge(
    generation: Generation, finished: ProcessResult, output: Path, log: Path, options: TrainingStepOptions
) -> Report:
    """The verdict on a training that ended, each condition a check of its own."""
    what = what_ran(options)
    title = f"Training step: {what}"
    if finished.returncode:
        log_search.print_known_failures(finished.tail)
        ended = Check(
            "trainer",
            Status.FAIL,
            f"ended with {finished.returncode}: {finished.last_line}",
            f"its log: {log}",
        )
        return Report(title, (ended,), {"trainer": what, "log": str(log)})
    found = inspect(generation, output, options)
    device = named_device(log)
    expected = expected_device()
    finite = all(math.isfinite(loss) for loss in found.losses)
    pace = f"{found.seconds_per_step:.2f} s per step, " if found.seconds_per_step is not None else ""
    checks = (
        Check("trainer", Status.PASS, f"{what}: exit 0 after {finished.seconds:.0f} s"),
        Check.of(
            "losses",
            len(found.losses) == STEPS and finite,
            f"{len(found.losses)} of {STEPS} steps: {', '.join(f'{loss:.4f}' for loss in found.losses)}",
            "every step has to log a finite loss; the log above says what went wrong",
        ),
        Check.of(
            "training device",
            device == expected,
            f"the trainer ran on {device or 'a device it did not name'}, expected {expected}",
            "`invoke configure` writes the accelerate configuration anew; `invoke verify` checks the device",
        ),
        Check.of(
            "saved LoRA",
            # Not all: the middle block sees one position of a 64 x 64 picture, and attention
            # of one position to itself has no gradient.
            2 * found.trained > found.zero_start > 0 and found.finite,
            f"{found.tensors} tensors, {found.trained} of the {found.zero_start} that start at zero were trained",
            "the optimizer did not move the weights, or they are not finite",
        ),
        Check("pace", Status.PASS, f"{pace}peak memory {format_size(finished.peak_bytes)}"),
    )
    return Report(
        title,
        checks,
        {
            "trainer": what,
            "kohya_trainer_ran": not options.builtin,
            "device": device,
            "losses": found.losses,
            "seconds_per_step": found.seconds_per_step,
            "peak_bytes": finished.peak_bytes,
            "log": str(log),
        },
    )


def inspect(generation: Generation, output: Path, options: TrainingStepOptions) -> TrainedLora:
    """Losses and LoRA of a finished run, read in the trainer's environment.

    Raises:
        StepFailed: the trainer said it ended well and left no readable LoRA.
    """
    marks = NETWORKS[options.network].starts_at_zero
    try:
        printed = accelerate_launch.probe(
            generation,
            PROBES / "inspect_run.py",
            str(output / "logs"),
            str(output / "lora.safetensors"),
            marks,
        )
    except accelerate_launch.ProbeFailed as error:
        raise StepFailed(f"the trainer ended well but its LoRA or its log cannot be read: {error}") from error
    return msgspec.json.decode(printed, type=TrainedLora)


def named_device(log: Path) -> str | None:
    """The device that the trainer says it runs on (sd-scripts prints ``accelerator device:``)."""
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("accelerator device:"):
            return line.partition(":")[2].strip().partition(":")[0]
    return None
