"""Why a run ended before its time, and what helps."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from kohya_mps.core.machine import memory_gb
from kohya_mps.core.report import Check, Status
from kohya_mps.dataset import scan
from kohya_mps.diagnose import base_model
from kohya_mps.diagnose.estimate import estimate
from kohya_mps.known_failures import log_search
from kohya_mps.trainer_config import config_file
from kohya_mps.trainer_config.config_file import read
from kohya_mps.trainer_config.trainer_options import TrainerOptions, parse_options

from .runs import Run, State

_LAST_BYTES = 64_000
_LAST_WORDS = 1000

# What torch says on MPS, on CUDA and on the CPU when a tensor finds no room.
_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|Cannot allocate memory", re.IGNORECASE)


class Saving(msgspec.Struct, frozen=True):
    """A change of the settings that saves memory, and the peak (GB, predicted) with it and those before it."""

    change: str
    peak_gb: float


def explain_run(run: Run) -> tuple[Check, ...]:
    """The reason that a failed or killed run left behind, and its remedy."""
    ended = run.ended()
    error = ended.error if ended else ""
    tail = run.log.read_bytes()[-_LAST_BYTES:].decode(errors="replace") if run.log.is_file() else ""
    if error.startswith("NotFinite"):
        return (_not_finite(error),)
    if error.startswith("DiskFull") or "No space left on device" in error:
        fix = "free some space; every checkpoint that was there is whole"
        return (Check("disk", Status.FAIL, error.partition(": ")[2], fix),)
    if _OUT_OF_MEMORY.search(error) or (not error and _OUT_OF_MEMORY.search(tail)):
        return (_memory(run, "the device's memory did not suffice"),)
    if error.startswith("NoExactResume"):
        fix = "use as many processes as before (`invoke configure --processes N`), or start a new run"
        return (Check("resume", Status.FAIL, error.partition(": ")[2], fix),)
    if run.state() is State.DIED and ("Traceback" not in tail or "SIGKILL" in tail) and not _known(tail):
        return (
            _memory(run, "the trainer was killed: by you, by a restart, or by the system for want of memory"),
        )
    return (Check("error", Status.FAIL, error or _last_line(tail), f"its log: {run.log}"), *_known(tail))


def _known(tail: str) -> tuple[Check, ...]:
    """Known failures in what was printed at the end; what came before the error is no reason for it."""
    end = tail[tail.find("Traceback") :] if "Traceback" in tail else tail[-_LAST_WORDS:]
    found = log_search.search(io.BytesIO(end.encode())).found
    return tuple(
        Check("known failure", Status.FAIL, f"{f.text}: {f.failure.cause}", f.failure.remedy)
        for f in found[:2]
    )


def _not_finite(error: str) -> Check:
    return Check(
        "not finite",
        Status.FAIL,
        f"{error.partition(': ')[2]}: nothing was saved from it",
        "resuming would repeat it. Start anew with a lower learning_rate, "
        'with mixed_precision = "no", for SDXL with no_half_vae = true; and look for broken pictures',
    )


def _memory(run: Run, what: str) -> Check:
    savings = tuple(_savings(run))
    listed = "; ".join(f"{saving.change} (about {saving.peak_gb:.1f} GB)" for saving in savings)
    fix = f"predicted peaks, each with those before it, of this machine's {memory_gb():.0f} GB: {listed}" if listed else (
        "close other programs; the settings leave nothing more to save"
    )  # fmt: skip
    return Check("memory", Status.FAIL, what, fix)


def _savings(run: Run) -> Iterator[Saving]:
    """What saves memory, the cheapest in time and quality first."""
    record = run.record()
    base = Path(record.base)
    training, _ = parse_options(read(run.settings).settings, numbers_as_text=False)
    model = base_model.inspect(record.model, config_file.resolve_path(record.model, base))
    begun = run.begun()
    device = begun.device.partition(":")[0] if begun else record.expected_device

    def peak(changed: TrainerOptions) -> float | None:
        return estimate(
            changed, record.trainer, record.family, model, scan.scan(changed, base), device
        ).peak_gb

    before = peak(training)
    for told, changed in _cheaper_settings(training):
        after = peak(changed)
        if before is None or after is None:
            return
        if after < before:
            yield Saving(told, after)
        before = after


def _cheaper_settings(training: TrainerOptions) -> Iterator[tuple[str, TrainerOptions]]:
    """Settings that take less memory, one change after the other."""
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
    for told, change in changes:
        training = msgspec.structs.replace(training, **change)
        yield told, training


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "the trainer printed nothing"
