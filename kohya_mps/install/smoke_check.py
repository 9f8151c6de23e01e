"""The smoke check: is this the environment that the trainer needs, on the device that it needs?"""

from __future__ import annotations

import shutil

import msgspec

from kohya_mps.core.machine import expected_device, on_mac
from kohya_mps.core.process import stream
from kohya_mps.core.report import Check, Report, Status, say
from kohya_mps.core.settings import CONFIG, PROBES, Settings, load_gui, read_yaml

from . import accelerate_launch, lockfile
from .generations import Generation


class _Modules(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    modules: tuple[str, ...]


class Request(msgspec.Struct, frozen=True):
    """What the probe is told to expect."""

    python: str
    versions: dict[str, str]
    forbidden: tuple[str, ...]
    prefix: str
    device: str
    mixed_precision: str
    modules: tuple[str, ...]
    config_file: str


class _Row(msgspec.Struct, frozen=True):
    name: str
    good: bool
    detail: str
    fix: str


def run(settings: Settings, generation: Generation) -> Report:
    """Start the probe as the trainer is started, and report each of its checks."""
    gui = generation.has_gui()
    lock = lockfile.read(settings.profile.lock_for(gui=gui))
    modules = read_yaml(CONFIG / "trainer_modules.yaml", _Modules).modules
    request = Request(
        python=settings.profile.python,
        versions=lock.versions(lockfile.here(on_mac())),
        forbidden=settings.profile.forbidden_here(),
        prefix=str(generation.venv),
        device=expected_device(),
        mixed_precision=settings.mixed_precision,
        modules=(*modules, *load_gui().modules) if gui else modules,
        config_file=str(generation.accelerate_config),
    )
    say("  smoke check: starting torch through accelerate launch")
    directory = generation.path / "smoke"
    shutil.rmtree(directory, ignore_errors=True)  # of a run that was killed
    directory.mkdir()
    try:
        asked, told = directory / "request.json", directory / "result.json"
        asked.write_bytes(msgspec.json.encode(request))
        command = accelerate_launch.argv(generation, PROBES / "smoke.py", str(asked), str(told))
        finished = stream(command, cwd=directory, env=accelerate_launch.environ(generation, offline=True))
        if finished.returncode or not told.exists():
            start = Check(
                "start", Status.FAIL, f"the probe ended with {finished.returncode}: {finished.last_line}",
                "`invoke setup` repairs the environment",
            )  # fmt: skip
            return Report("Smoke check", (start,), {"device": None})
        rows = msgspec.json.decode(told.read_bytes(), type=tuple[_Row, ...])
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    checks = tuple(Check.of(row.name, row.good, row.detail, row.fix) for row in rows)
    device = request.device if Report("", checks).ok else None
    return Report("Smoke check", checks, {"device": device, "seconds": round(finished.seconds, 1)})
