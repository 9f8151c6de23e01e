"""The outcome of a run: how it ended, why it failed, and what helps."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from kohya_mps.core.machine import memory_gb
from kohya_mps.core.report import Check, Report, Status
from kohya_mps.core.text import format_size
from kohya_mps.dataset import scan
from kohya_mps.diagnose import base_model
from kohya_mps.diagnose.estimate import estimate
from kohya_mps.known_failures import log_search
from kohya_mps.trainer_config import config_file
from kohya_mps.trainer_config.config_file import read
from kohya_mps.trainer_config.trainer_options import TrainerOptions, parse_options

from .live_view import pace
from .runs import Begun, Run, State, Step

_LAST_BYTES = 64_000
_LAST_CHARACTERS = 1000

# torch's messages on MPS, on CUDA and on the CPU when there is no memory for a tensor.
_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|Cannot allocate memory", re.IGNORECASE)

_GOOD = (State.FINISHED, State.STOPPED)


class Saving(msgspec.Struct, frozen=True):
    """A change of the settings that saves memory.

    ``peak_gb`` is the predicted peak in GB with this change and those before it.
    """

    change: str
    peak_gb: float


def summarize(run: Run) -> Report:
    """The outcome of a run, or its progress while it runs, as a report."""
    state, steps, begun, ended = run.state(), run.steps(), run.begun(), run.ended()
    # With several machines, only the first one writes the steps; each one writes its end.
    last_step = ended.step if ended else steps[-1].step if steps else 0
    total = begun.total if begun else None
    checks = [_check_state(run, state, last_step, total)]
    if state in (State.FAILED, State.DIED):
        checks += explain_run(run)
    if begun:
        checks.append(_check_device(begun, run.record().expected_device))
    if steps:
        checks += _check_steps(steps)
    lora = run.lora()
    if lora:
        checks.append(Check("LoRA", Status.PASS, f"{lora} ({format_size(lora.stat().st_size)})"))
    extra = {
        "run": str(run.path),
        "state": state,
        "steps": last_step,
        "total": total,
        "device": begun.device if begun else None,
        "losses": [step.loss for step in steps],
        "lora": str(lora) if lora else None,
        "log": str(run.log),
    }
    next_commands = ("", f"invoke report {run.quoted_path}", f"invoke test-lora {run.quoted_path}")
    return Report(f"Run {run.path}", tuple(checks), extra, next_commands if state is State.FINISHED else ())


def _check_state(run: Run, state: State, last_step: int, total: int | None) -> Check:
    steps = f"step {last_step}" + (f" of {total}" if total else "")
    if state is State.RUNNING:
        return Check("training", Status.PASS, f"running, at {steps}")
    word = "killed" if state is State.DIED else str(state)
    return Check(
        "training",
        Status.PASS if state in _GOOD else Status.FAIL,
        f"{word} after {steps}",
        "" if state is State.FINISHED else how_to_resume(run),
    )


def _check_device(begun: Begun, expected: str) -> Check:
    device = begun.device.partition(":")[0]
    return Check.of(
        "training device",
        device == expected,
        f"{begun.device}, {begun.processes} process{'es' if begun.processes > 1 else ''}, expected {expected}",
        "`invoke configure` writes the accelerate configuration again",
    )


def _check_steps(steps: list[Step]) -> Iterator[Check]:
    first, last = steps[0], steps[-1]
    # A loss that is not finite is never in the steps: it ends the run before (NotFinite).
    losses = f"{first.loss:.4f} in the first step, averages {first.average:.4f} to {last.average:.4f}"
    yield Check("loss", Status.PASS, losses)
    yield Check("pace", Status.PASS, f"{pace(steps):.2f} s per step")


def how_to_resume(run: Run) -> str:
    """The command that continues a run from its latest saved state, or why there is none."""
    saved = run.saved()
    if saved is None:
        return "no state was saved yet: `invoke train` starts a new run"
    return f"`invoke train {run.quoted_path} --resume` continues after step {saved.step}"


def explain_run(run: Run) -> tuple[Check, ...]:
    """The reason why a run failed or was killed, and its remedy."""
    ended = run.ended()
    error = ended.error if ended else ""
    tail = run.log.read_bytes()[-_LAST_BYTES:].decode(errors="replace") if run.log.is_file() else ""
    kind, _, message = error.partition(": ")
    if kind == "NotFinite":
        return (_not_finite(message),)
    if kind == "DiskFull" or "No space left on device" in error:
        fix = "free some space; all checkpoints that were saved before are complete"
        return (Check("disk", Status.FAIL, message, fix),)
    if _OUT_OF_MEMORY.search(error) or (not error and _OUT_OF_MEMORY.search(tail)):
        return (_memory(run, "the device ran out of memory"),)
    if kind == "NoExactResume":
        fix = "use as many processes as before (`invoke configure --processes N`), or start a new run"
        return (Check("resume", Status.FAIL, message, fix),)
    known = _known_failures(tail)
    if run.state() is State.DIED and ("Traceback" not in tail or "SIGKILL" in tail) and not known:
        return (
            _memory(run, "the trainer was killed: by you, by a restart, or by the system to free memory"),
        )
    return (Check("error", Status.FAIL, error or _last_line(tail), f"its log: {run.log}"), *known)


def _known_failures(tail: str) -> tuple[Check, ...]:
    """Known failures in the traceback, or else in the last lines: earlier lines did not end the run."""
    end = tail[tail.find("Traceback") :] if "Traceback" in tail else tail[-_LAST_CHARACTERS:]
    found = log_search.search(io.BytesIO(end.encode())).found
    return tuple(
        Check("known failure", Status.FAIL, f"{f.text}: {f.failure.cause}", f.failure.remedy)
        for f in found[:2]
    )


def _not_finite(message: str) -> Check:
    return Check(
        "not finite",
        Status.FAIL,
        f"{message}: nothing was saved from it",
        "resuming would repeat it. Start a new run with a lower learning_rate, "
        'with mixed_precision = "no", for SDXL with no_half_vae = true; and look for damaged pictures',
    )


def _memory(run: Run, cause: str) -> Check:
    savings = [f"{saving.change} (about {saving.peak_gb:.1f} GB)" for saving in _savings(run)]
    if not savings:
        fix = "close other programs; no change of the settings would save more memory"
    else:
        fix = (
            f"predicted peaks, each with the changes before it, on this machine with {memory_gb():.0f} GB: "
            + "; ".join(savings)
        )
    return Check("memory", Status.FAIL, cause, fix)


def _savings(run: Run) -> Iterator[Saving]:
    """The changes that save memory, starting with the one that costs least time and quality."""
    record = run.record()
    base = Path(record.base)
    training, _ = parse_options(read(run.settings).settings, numbers_as_text=False)
    model = base_model.inspect(record.model, config_file.resolve_path(record.model, base))
    begun = run.begun()
    device = begun.device.partition(":")[0] if begun else record.expected_device

    def peak(options: TrainerOptions) -> float | None:
        data = scan.scan(options, base)
        return estimate(options, record.trainer, record.family, model, data, device).peak_gb

    before = peak(training)
    for change, cheaper in _cheaper_settings(training):
        after = peak(cheaper)
        if before is None or after is None:
            return
        if after < before:
            yield Saving(change, after)
        before = after


def _cheaper_settings(training: TrainerOptions) -> Iterator[tuple[str, TrainerOptions]]:
    """Settings that need less memory: each one has one change more than the one before."""
    changes: list[tuple[str, dict[str, object]]] = [
        ("cache_latents = true", {"cache_latents": True}),
        ("gradient_checkpointing = true", {"gradient_checkpointing": True}),
        ("train_batch_size = 1", {"train_batch_size": 1}),
        ("network_train_unet_only = true", {"network_train_unet_only": True}),
    ]
    sides = training.width_and_height
    for side in (768, 512, 384):
        if sides and max(sides) > side:
            changes.append((f'resolution = "{side},{side}"', {"resolution": f"{side},{side}"}))
    for change, values in changes:
        training = msgspec.structs.replace(training, **values)
        yield change, training


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "the trainer printed nothing"
