"""The accelerate configuration: written by accelerate's helper, corrected, read back, checked.

It is kept beside the environment, and every launch names it. A copy goes to accelerate's
default location, unless somebody else's file is there.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import msgspec

from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.core.files import write_atomic
from kohya_mps.core.installation import Installation
from kohya_mps.core.machine import expected_device, macos_version, on_mac
from kohya_mps.core.report import Check, Report, Status
from kohya_mps.core.settings import CONFIG, PROBES, Settings, hugging_face_home, read_yaml

from . import accelerate_launch
from .generations import Generation

_MARK = "# Written by kohya-mps; it is replaced only while this digest fits: "
_BACKUP = ".before-kohya-mps"


def fields(settings: Settings) -> dict[str, object]:
    """The fields for one process on this machine's device."""
    return _template("mps" if on_mac() else "one-gpu") | {"mixed_precision": settings.mixed_precision}


class ProcessLayout(msgspec.Struct, frozen=True):
    """How a training is distributed over processes and machines.

    ``processes``: on each machine. ``rank``: this machine's number, from 0. ``address`` and
    ``port``: where the other machines reach the first.
    """

    processes: int = 1
    machines: int = 1
    rank: int = 0
    address: str = ""
    port: int = 29500

    def check(self) -> None:
        """Raise UsageError for an invalid layout, and for one that this device cannot have."""
        if self.processes < 1 or self.machines < 1:
            raise UsageError("--processes and --machines: accepted: 1 or more")
        if not 0 <= self.rank < self.machines:
            raise UsageError(
                f"--machine-rank: {self.rank} of {self.machines} machines",
                f"accepted: 0 to {self.machines - 1}",
            )
        if self.machines > 1 and not self.address:
            raise UsageError(
                "--main-address is missing", "give the address at which the others reach the first machine"
            )
        if not 0 < self.port < 65536:
            raise UsageError(f"--main-port: {self.port} is no port", "accepted: 1 to 65535")
        if on_mac() and (self.processes, self.machines) != (1, 1):
            raise UsageError(
                "several processes cannot train together on MPS (torch.distributed has no backend for it)",
                "train on one Mac with one process, or on machines with CUDA",
            )


def configure_distributed(settings: Settings, generation: Generation, layout: ProcessLayout) -> Check:
    """Write the configuration that trainings are launched with from now on.

    One process on one machine removes it again. It is kept in the home, not in a generation:
    it stays when the environment is rebuilt. Verification always uses one process.

    Raises:
        UsageError: the layout is invalid.
        StepFailed: accelerate reads something else than was written.
    """
    layout.check()
    name, target = "trainings", Installation(settings.home).distributed_config
    if (layout.processes, layout.machines) == (1, 1):
        target.unlink(missing_ok=True)
        return Check(name, Status.PASS, "one process on this machine")
    values = _template("several-machines" if layout.machines > 1 else "several-gpus") | {
        "mixed_precision": settings.mixed_precision,
        "num_processes": layout.processes * layout.machines,
        "num_machines": layout.machines,
        "machine_rank": layout.rank,
    }
    if layout.machines > 1:
        values |= {"main_process_ip": layout.address, "main_process_port": layout.port}
    _write_checked(generation, target, values)
    machines = (
        f" on each of {layout.machines} machines, this is number {layout.rank}" if layout.machines > 1 else ""
    )
    plural = "es" if layout.processes > 1 else ""
    return Check(name, Status.PASS, f"{layout.processes} process{plural}{machines}: {target}")


def _template(name: str) -> dict[str, object]:
    return read_yaml(CONFIG / "accelerate" / f"{name}.yaml", dict[str, object])


def check_precision(settings: Settings) -> None:
    """Refuse a mixed precision that this device cannot train with.

    Raises:
        UsageError: with the reason, and the precisions that the profile allows.
    """
    device = expected_device()
    allowed = settings.profile.precisions(device)
    if settings.mixed_precision not in allowed:
        needed = settings.profile.needs_macos.get(settings.mixed_precision)
        older = (
            f"; it needs macOS {needed} there, and this is {macos_version()}"
            if needed and device == "mps"
            else ""
        )
        raise UsageError(
            f"mixed_precision: {settings.mixed_precision!r} does not work on {device} with the profile "
            f"{settings.profile_name} ({settings.profile.summary}){older}",
            f"accepted: {', '.join(allowed)} (config/settings.yaml: mixed_precision, or --mixed-precision)",
        )


def configure(settings: Settings, generation: Generation, *, replace_default: bool = False) -> Report:
    """Write and check the configuration of a generation, and accelerate's default where that is ours.

    Args:
        settings: the mixed precision, and the profile that limits it.
        generation: the environment whose configuration is written.
        replace_default: back up somebody else's default configuration and replace it.
    """
    check_precision(settings)
    checks = (write_own(settings, generation), write_default(generation, replace=replace_default))
    extra = {"config_file": str(generation.accelerate_config), "default_config": str(default_location())}
    return Report("accelerate configuration", checks, extra)


def write_own(settings: Settings, generation: Generation) -> Check:
    """Write the configuration beside the environment; every launch of ours names it.

    Raises:
        StepFailed: accelerate could not write it, or reads back something else.
    """
    name, values, target = "accelerate configuration", fields(settings), generation.accelerate_config
    if is_current(target, values):
        return Check(name, Status.PASS, f"{target} is in place")
    _write_checked(generation, target, values)
    return Check(name, Status.PASS, f"{target}: use_cpu false, mixed_precision {settings.mixed_precision}")


def _write_checked(generation: Generation, target: Path, values: dict[str, object]) -> None:
    """Write a configuration with accelerate, and compare what accelerate reads back."""
    try:
        printed = accelerate_launch.probe(
            generation, PROBES / "accelerate_config.py", str(target), json.dumps(values)
        )
    except accelerate_launch.ProbeFailed as error:
        raise StepFailed(
            f"accelerate could not write its configuration: {error}", "`invoke setup` repairs the environment"
        ) from error
    read_back = json.loads(printed)
    wrong = [
        f"{key} is {read_back.get(key)!r}, not {value!r}"
        for key, value in values.items()
        if _differs(read_back.get(key), value)
    ]
    if wrong:
        raise StepFailed(f"accelerate does not read {target} as it was written: {'; '.join(wrong)}")


def is_current(path: Path, values: dict[str, object]) -> bool:
    """Whether a configuration has these values; it may have further fields."""
    try:
        present = read_yaml(path, dict[str, object])
    except UsageError:
        return False
    return all(key in present and present[key] == value for key, value in values.items())


def default_location() -> Path:
    """The file that accelerate reads when none is named (accelerate 1.3.0, config_args.py, lines 31 to 43)."""
    return hugging_face_home() / "accelerate" / "default_config.yaml"


def is_ours(path: Path) -> bool:
    """Whether this project wrote a default configuration, and nobody has edited it since."""
    try:
        head, _, body = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return False
    return head == _MARK + hashlib.sha256(body.encode()).hexdigest()


def backup(default: Path) -> Path:
    """The backup of somebody else's default configuration that ours replaced."""
    return default.with_name(default.name + _BACKUP)


def original(kept: Path) -> Path:
    """The path that a backup was moved from."""
    return kept.with_name(kept.name.removesuffix(_BACKUP))


def exists(path: Path) -> bool:
    """Whether anything has this name, a dangling link included."""
    return os.path.lexists(path)


def write_default(generation: Generation, *, replace: bool = False) -> Check:
    """Copy a generation's configuration to accelerate's default location.

    A file that this project did not write, or that was edited since, is left alone, and the
    check says so. With ``replace`` it is backed up and replaced.

    Raises:
        UsageError: there is a backup already, which would be overwritten.
    """
    name, path = "accelerate default", default_location()
    body = generation.accelerate_config.read_text(encoding="utf-8")
    content = f"{_MARK}{hashlib.sha256(body.encode()).hexdigest()}\n{body}"
    note = ""
    if exists(path) and not is_ours(path):
        if not replace:
            found = "is a directory" if path.is_dir() else "was written by something else"
            return Check(
                name, Status.WARN, f"{path} {found} and is left alone; only launches by other tools read it",
                "`invoke configure --replace-default` backs it up and replaces it",
            )  # fmt: skip
        kept = backup(path)
        if exists(kept):
            raise UsageError(f"{kept} exists already and would be overwritten", "move it away first")
        path.rename(kept)
        note = f"; the previous one is {kept.name}"
    try:
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            write_atomic(path, content.encode())
    except OSError as error:
        return Check(
            name, Status.WARN, f"{path} cannot be written ({error.strerror}); our launches do not need it"
        )
    return Check(name, Status.PASS, f"{path}{note}")


def _differs(found: object, written: object) -> bool:
    # accelerate turns some of its fields into enumerations: "no" is read as MixedPrecision.NO.
    name = str(found).upper()
    return str(written).upper() not in (name, name.rpartition(".")[2])
