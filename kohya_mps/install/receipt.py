"""The receipt: the record of what was installed and verified, written last and in one step."""

from __future__ import annotations

import datetime
from pathlib import Path

import msgspec

from kohya_mps.core.files import write_atomic
from kohya_mps.core.report import Check, Report

from . import accelerate_config, lockfile
from .checkout import Commits
from .generations import Generation


class Verdict(msgspec.Struct, frozen=True):
    """The outcome of a verification.

    ``at``: when, in UTC. ``what``: which verification. ``device``: where it ran; None when it
    did not get so far. ``losses``: of a training, one per step.
    """

    ok: bool
    at: str
    what: str
    device: str | None
    checks: tuple[Check, ...]
    losses: tuple[float, ...] = ()
    kohya_trainer_ran: bool = False


class Receipt(msgspec.Struct, frozen=True):
    """The record of one installation.

    ``lock``, ``accelerate_config`` and ``default_config`` are SHA-256 digests in hexadecimal,
    empty where the file is not ours. ``seconds``: the time of each step. ``written``: when, in UTC.
    """

    generation: str
    profile: str
    lock: str
    python: str
    interpreter: str
    distributions: dict[str, str]
    url: str
    commits: Commits | None
    mixed_precision: str
    accelerate_config: str
    default_config_path: str
    default_config: str
    smoke: Verdict | None
    train_step: Verdict | None
    seconds: dict[str, float]
    written: str


def now() -> str:
    """The current time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def verdict(report: Report) -> Verdict:
    """The verdict that is kept of a verification's report."""
    extra = report.extra
    return Verdict(
        ok=report.ok,
        at=now(),
        what=extra.get("trainer", report.title),
        device=extra.get("device"),
        checks=report.checks,
        losses=tuple(extra.get("losses", ())),
        kohya_trainer_ran=bool(extra.get("kohya_trainer_ran")),
    )


def read(generation: Generation) -> Receipt | None:
    """A generation's receipt; None when it has none, or one that cannot be read."""
    try:
        return msgspec.json.decode(generation.receipt.read_bytes(), type=Receipt)
    except (OSError, msgspec.DecodeError):
        return None


def save(generation: Generation, receipt: Receipt) -> None:
    """Write the receipt beside its environment."""
    write_atomic(generation.receipt, msgspec.json.format(msgspec.json.encode(receipt)))


def config_digest(generation: Generation) -> str:
    """The digest of a generation's accelerate configuration; empty when there is none."""
    path = generation.accelerate_config
    return lockfile.digest(path) if path.is_file() else ""


def default_digest(path: Path) -> str:
    """The digest of accelerate's default configuration; empty when it is not as we wrote it."""
    return lockfile.digest(path) if accelerate_config.is_ours(path) else ""
