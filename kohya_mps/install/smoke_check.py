"""The smoke check: whether the environment and the device are what the trainer needs."""

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
    """What the probe checks against: the expected versions, device and configuration."""

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
    request = _request(settings, generation)
    say("  smoke check: starting torch through accelerate launch")
    directory = generation.path / "smoke"
    shutil.rmtree(directory, ignore_errors=True)  # of a run that was killed
    directory.mkdir()
    try:
        request_file, result_file = directory / "request.json", directory / "result.json"
        request_file.write_bytes(msgspec.json.encode(request))
        probe = [str(PROBES / "smoke.py"), str(request_file), str(result_file)]
        command = accelerate_launch.argv(generation, *probe)
        result = stream(command, cwd=directory, env=accelerate_launch.environ(generation, offline=True))
        if result.returncode or not result_file.exists():
            detail = f"the probe exited with {result.returncode}: {result.last_line}"
            start = Check("start", Status.FAIL, detail, "`invoke setup` repairs the environment")
            return Report("Smoke check", (start,), {"device": None})
        rows = msgspec.json.decode(result_file.read_bytes(), type=tuple[_Row, ...])
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    checks = tuple(Check.of(row.name, row.good, row.detail, row.fix) for row in rows)
    device = request.device if all(row.good for row in rows) else None
    return Report("Smoke check", checks, {"device": device, "seconds": round(result.seconds, 1)})


def _request(settings: Settings, generation: Generation) -> Request:
    gui = generation.has_gui()
    lock = lockfile.read(settings.profile.lock_for(gui=gui))
    modules = read_yaml(CONFIG / "trainer_modules.yaml", _Modules).modules
    return Request(
        python=settings.profile.python,
        versions=lock.versions(lockfile.here(on_mac())),
        forbidden=settings.profile.forbidden_here(),
        prefix=str(generation.venv),
        device=expected_device(),
        mixed_precision=settings.mixed_precision,
        modules=(*modules, *load_gui().modules) if gui else modules,
        config_file=str(generation.accelerate_config),
    )
