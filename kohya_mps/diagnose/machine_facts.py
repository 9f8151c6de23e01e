"""The facts about the machine and the installation that the rules of ``config/failures.yaml`` judge."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path

import msgspec
from packaging.version import Version

from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.core.files import existing_ancestor
from kohya_mps.core.installation import Installation
from kohya_mps.core.machine import free_disk_gb, macos_version, memory_gb, on_mac
from kohya_mps.core.process import capture
from kohya_mps.core.report import Check
from kohya_mps.core.settings import ROOT, Settings, read_yaml
from kohya_mps.core.text import join_some
from kohya_mps.install import accelerate_config, accelerate_launch, generations, inventory
from kohya_mps.install.generations import Generation

_HIGH, _LOW = "PYTORCH_MPS_HIGH_WATERMARK_RATIO", "PYTORCH_MPS_LOW_WATERMARK_RATIO"
# torch's defaults (aten/src/ATen/mps/MPSAllocator.h, unified memory).
_HIGH_DEFAULT, _LOW_DEFAULT = 1.7, 1.4


class MachineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What rules over the environment may use; None means that it is not known, or not there.

    Versions of installed packages are also facts, as ``package_NAME`` with underscores. ``_gb``
    are gigabytes. Strings are parts of sentences for the report.
    """

    system: str
    architecture: str
    rosetta: bool
    virtual_machine: bool
    macos: str | None
    macos_needed: str
    macos_is_older: bool
    tools_python: str
    trainer_python: str | None = None
    tkinter: bool | None = None
    git: str | None = None
    xcode: str | None = None
    free_gb: float
    needed_gb: float
    memory_gb: float
    conda: str | None
    other_venv: str | None
    pythonpath: str | None
    hf_home: str | None
    hf_home_is_file: bool
    mps_fallback: str | None
    high_watermark: float | None
    low_watermark: float | None
    watermark_nonsense: str | None
    home: str
    home_has_space: bool
    case_sensitive: bool | None
    venv: str
    foreign_venv: bool
    installed: bool
    interrupted: bool
    drift: str | None = None
    forbidden: str | None = None
    missing_packages: str | None = None
    config: str | None = None
    config_use_cpu: bool | None = None
    default_config: str
    default_use_cpu: bool | None
    default_config_is_directory: bool
    repository: str = ""
    repository_reached: bool | None = None
    repository_reason: str = ""
    index_reached: bool | None = None
    index_reason: str = ""
    upstream_pair: str = ""
    upstream_pair_broken: bool | None = None


def machine_facts(settings: Settings, home: Installation) -> MachineFacts:
    """The facts that do not need an environment."""
    macos = macos_version() if on_mac() else None
    hf_home = os.environ.get("HF_HOME") or None
    default = accelerate_config.default_location()
    return MachineFacts(
        system=platform.system(),
        architecture=platform.machine(),
        rosetta=_sysctl("sysctl.proc_translated") == "1",
        virtual_machine=_sysctl("kern.hv_vmm_present") == "1",
        macos=macos,
        macos_needed=settings.profile.macos,
        macos_is_older=macos is not None and Version(macos) < Version(settings.profile.macos),
        tools_python=platform.python_version(),
        git=_first_line(["git", "--version"]),
        xcode=_first_line(["xcode-select", "-p"]) if on_mac() else None,
        free_gb=free_disk_gb(home.root),
        needed_gb=settings.profile.disk_gb["darwin" if on_mac() else "linux"],
        memory_gb=memory_gb(),
        conda=os.environ.get("CONDA_PREFIX") or None,
        other_venv=_other_venv(os.environ.get("VIRTUAL_ENV"), home),
        pythonpath=os.environ.get("PYTHONPATH") or None,
        hf_home=hf_home,
        hf_home_is_file=hf_home is not None and Path(hf_home).expanduser().is_file(),
        mps_fallback=os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK"),
        high_watermark=_ratio(os.environ.get(_HIGH), _HIGH_DEFAULT),
        low_watermark=_ratio(os.environ.get(_LOW), _LOW_DEFAULT),
        watermark_nonsense=_invalid_ratio(_HIGH, _LOW),
        home=str(home.root),
        home_has_space=" " in str(home.root),
        case_sensitive=_is_case_sensitive(existing_ancestor(home.root)),
        venv=str(home.venv),
        foreign_venv=generations.foreign_venv(home),
        installed=generations.active(home) is not None,
        interrupted=any(generation.manifest() is None for generation in generations.present(home)),
        default_config=str(default),
        default_use_cpu=_use_cpu(default),
        default_config_is_directory=default.is_dir(),
    )


def with_environment(
    facts: MachineFacts,
    settings: Settings,
    active: Generation,
    status_checks: tuple[Check, ...],
    locked: Mapping[str, str],
) -> MachineFacts:
    """The same facts, with those about the active environment.

    Args:
        facts: those that do not need an environment.
        settings: with the profile that forbids packages.
        active: the environment.
        status_checks: the rows of ``invoke status``; those named ``package …`` have drifted.
        locked: the package versions of the lock.
    """
    manifest = active.manifest()
    versions = inventory.versions(active.venv)
    package = "package "
    drifted = [
        f"{check.name.removeprefix(package)} {check.detail}"
        for check in status_checks
        if check.name.startswith(package)
    ]
    forbidden = [f"{name} {versions[name]}" for name in settings.profile.forbidden_here() if name in versions]
    probe = capture([active.python, "-I", "-c", "import _tkinter"], env=accelerate_launch.environ(active))
    return msgspec.structs.replace(
        facts,
        trainer_python=manifest.python if manifest else None,
        tkinter=probe.returncode == 0,
        drift=_join(drifted),
        forbidden=_join(forbidden),
        missing_packages=_join([name for name in locked if name not in versions]),
        config=str(active.accelerate_config),
        config_use_cpu=_use_cpu(active.accelerate_config),
    )


def _first_line(command: list[str]) -> str | None:
    try:
        done = capture(command)
    except StepFailed:
        return None
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else None


def _sysctl(name: str) -> str | None:
    return _first_line(["sysctl", "-in", name]) if on_mac() else None


def _other_venv(active: str | None, home: Installation) -> str | None:
    """An active environment that is neither that of this project's tools nor the trainer's."""
    if not active:
        return None
    ours = {(ROOT / ".venv").resolve(), home.venv.resolve()}
    return None if Path(active).resolve() in ours else active


def _ratio(text: str | None, default: float) -> float | None:
    """A variable's number; None if it has another value."""
    try:
        return default if text is None else float(text)
    except ValueError:
        return None


def _invalid_ratio(*variables: str) -> str | None:
    """The first value of the variables that is no number."""
    values = (os.environ.get(variable) for variable in variables)
    return next((value for value in values if _ratio(value, 0) is None), None)


def _is_case_sensitive(path: Path) -> bool | None:
    """Whether the file system tells upper case from lower case; None if the name has no letters."""
    swapped = path.with_name(path.name.swapcase())
    if swapped.name == path.name:
        return None
    try:
        return not swapped.samefile(path)
    except OSError:
        return True


def _use_cpu(path: Path) -> bool | None:
    """What an accelerate configuration says; None if it is missing or cannot be read."""
    try:
        return bool(read_yaml(path, dict[str, object]).get("use_cpu", False))
    except UsageError:
        return None


def _join(items: list[str]) -> str | None:
    return join_some(items) if items else None
