"""``invoke doctor``: the machine and the installation, without importing torch and within a second.

Facts are found out here; what is wrong about them is said by ``config/failures.yaml``.
"""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import Version

from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.core.files import existing_ancestor
from kohya_mps.core.installation import Installation
from kohya_mps.core.machine import expected_device, free_disk_gb, memory_gb, on_mac
from kohya_mps.core.process import capture, clean_environ, stream, uv
from kohya_mps.core.report import Check, Report, Status, say
from kohya_mps.core.settings import CONSTRAINTS, ROOT, Settings, read_yaml
from kohya_mps.core.text import join_some
from kohya_mps.install import accelerate_config, accelerate_launch, generations, inventory, lockfile, status
from kohya_mps.install.generations import Generation
from kohya_mps.known_failures import catalogue, rules
from kohya_mps.known_failures.rules import Target

# What torch takes when the variables are not set (aten/src/ATen/mps/MPSAllocator.h, unified memory).
_HIGH_WATERMARK, _LOW_WATERMARK = 1.7, 1.4
_NETWORK_SECONDS = 15.0


class DoctorOptions(msgspec.Struct, frozen=True):
    """What the doctor looks at besides: torch (``deep``), the network (``online``)."""

    deep: bool = False
    online: bool = False


class MachineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What rules over the environment may ask for; nothing means unknown or not there.

    Versions of installed packages are facts, too, as ``package_NAME``, with underlines. ``_gb`` are
    gigabytes. Texts are ready to be told.
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


def examine(settings: Settings, asked: DoctorOptions) -> Report:
    """Look at the machine and the installation, and judge them by the known failures."""
    home = Installation(settings.home)
    active = generations.active(home)
    state = status.status(settings).checks if active else ()
    lock = lockfile.read(settings.profile.lock_file).versions(lockfile.here(on_mac()))
    machine = _machine(settings, home)
    if active:
        machine = _with_environment(machine, settings, active, state, lock)
    if asked.online:
        machine = _online(settings, machine)
    versions = inventory.versions(active.venv) if active else {}
    facts: dict[str, Any] = msgspec.structs.asdict(machine)
    facts |= {f"package_{name.replace('-', '_')}": version for name, version in versions.items()}
    situation = Target(expected_device(), settings.profile_name, settings.profile, lock)
    found = list(rules.matching(catalogue.known(), "environment", facts, situation))
    troubles: dict[str, list[Check]] = {}
    for finding in found:
        troubles.setdefault(finding.rule.about, []).append(finding.check())
    checks: list[Check] = []
    for name, detail in _topics(machine, settings, asked):
        checks += troubles.pop(name, [Check(name, Status.PASS, detail)])
    checks += [check for rest in troubles.values() for check in rest]
    told = {check.name for check in checks}
    checks += [row for row in state if row.name not in told and not row.name.startswith("package ")]
    if asked.deep:
        checks += _deep(settings, active)
    extra = {
        "home": str(home.root),
        "device": expected_device(),
        "profile": settings.profile_name,
        "machine": machine,
        "failures": [finding.failure.id for finding in found],
    }
    return Report(f"Doctor: this machine and {home.root}", tuple(checks), extra)


def _machine(settings: Settings, home: Installation) -> MachineFacts:
    macos = platform.mac_ver()[0] or None
    environ = os.environ
    high, low = (
        environ.get("PYTORCH_MPS_HIGH_WATERMARK_RATIO"),
        environ.get("PYTORCH_MPS_LOW_WATERMARK_RATIO"),
    )
    hf_home = environ.get("HF_HOME") or None
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
        conda=environ.get("CONDA_PREFIX") or None,
        other_venv=_other_venv(environ.get("VIRTUAL_ENV"), home),
        pythonpath=environ.get("PYTHONPATH") or None,
        hf_home=hf_home,
        hf_home_is_file=hf_home is not None and Path(hf_home).expanduser().is_file(),
        mps_fallback=environ.get("PYTORCH_ENABLE_MPS_FALLBACK"),
        high_watermark=_ratio(high, _HIGH_WATERMARK),
        low_watermark=_ratio(low, _LOW_WATERMARK),
        watermark_nonsense=next((v for v in (high, low) if v is not None and _ratio(v, 0) is None), None),
        home=str(home.root),
        home_has_space=" " in str(home.root),
        case_sensitive=_tells_case(existing_ancestor(home.root)),
        venv=str(home.venv),
        foreign_venv=generations.foreign_venv(home),
        installed=generations.active(home) is not None,
        interrupted=any(generation.manifest() is None for generation in generations.present(home)),
        default_config=str(default),
        default_use_cpu=_use_cpu(default),
        default_config_is_directory=default.is_dir(),
    )


def _with_environment(
    machine: MachineFacts,
    settings: Settings,
    active: Generation,
    state: tuple[Check, ...],
    wanted: Mapping[str, str],
) -> MachineFacts:
    manifest = active.manifest()
    versions = inventory.versions(active.venv)
    changed = [
        f"{row.name.removeprefix('package ')} {row.detail}"
        for row in state
        if row.name.startswith("package ")
    ]
    refused = [f"{name} {versions[name]}" for name in settings.profile.forbidden_here() if name in versions]
    asked = capture([active.python, "-I", "-c", "import _tkinter"], env=accelerate_launch.environ(active))
    return msgspec.structs.replace(
        machine,
        trainer_python=manifest.python if manifest else None,
        tkinter=asked.returncode == 0,
        drift=_listed(changed),
        forbidden=_listed(refused),
        missing_packages=_listed([name for name in wanted if name not in versions]),
        config=str(active.accelerate_config),
        config_use_cpu=_use_cpu(active.accelerate_config),
    )


def _topics(machine: MachineFacts, settings: Settings, asked: DoctorOptions) -> Iterator[tuple[str, str]]:
    """The rows of the report and what they say when nothing is wrong with them."""
    yield "architecture", f"{machine.system} {machine.architecture}"
    if machine.macos:
        yield "macOS", f"{machine.macos}; the lock needs {machine.macos_needed}"
        yield "Xcode tools", machine.xcode or "not needed: git is there without them"
    yield "Python", f"{machine.tools_python} for this project's tools"
    yield "git", machine.git or ""
    yield "disk", f"{machine.free_gb:.0f} GB free; a first installation needs {machine.needed_gb:g} GB"
    yield "memory", f"{machine.memory_gb:.0f} GB"
    yield "home", machine.home
    yield "other Pythons", "none is active"
    yield "HF_HOME", machine.hf_home or "not set"
    yield "MPS variables", "do not contradict each other"
    yield "accelerate default", machine.default_config
    if machine.installed:
        yield "trainer's Python", machine.trainer_python or ""
        yield "tkinter", "is there, for the GUI"
        yield "packages", "none that needs CUDA, none that does not go with another"
        yield "accelerate configuration", f"{machine.config}: use_cpu {str(machine.config_use_cpu).lower()}"
    yield "environment", "as it was built"
    if asked.online:
        yield "repository", f"{machine.repository} answers"
        yield "package index", "answers"
        if machine.upstream_pair_broken is None:
            yield "upstream's requirements", "could not be read, or pin no torch"
        else:
            yield "upstream's requirements", f"mended: {machine.upstream_pair}"


def _deep(settings: Settings, active: Generation | None) -> tuple[Check, ...]:
    """What needs torch: the smoke check, through accelerate as a training is."""
    if active is None:
        return (Check("torch", Status.SKIP, "there is no environment to import it from"),)
    from kohya_mps.install import smoke_check

    return smoke_check.run(settings, active).checks


def _online(settings: Settings, machine: MachineFacts) -> MachineFacts:
    from kohya_mps.install import package_index  # and what only it needs: the other rows are there without

    say("  asking the repository and the package index")
    reached, reason = _answers(
        ["git", "ls-remote", "--exit-code", settings.url, "HEAD"], {"GIT_TERMINAL_PROMPT": "0"}
    )
    tools = CONSTRAINTS / "tools.in"
    ask = [
        uv(),
        "pip",
        "compile",
        "--quiet",
        "--no-deps",
        "--upgrade",
        "--refresh",
        "--python-version",
        "3.11",
        str(tools),
    ]
    index, index_reason = _answers([*ask, "--output-file", "-"], package_index.for_uv())
    pair, broken = _upstream_pair(settings.url) if reached else ("", None)
    return msgspec.structs.replace(
        machine,
        repository=settings.url,
        repository_reached=reached,
        repository_reason=reason,
        index_reached=index,
        index_reason=index_reason,
        upstream_pair=pair,
        upstream_pair_broken=broken,
    )


def _answers(command: list[str], extra: dict[str, str]) -> tuple[bool, str]:
    try:
        done = stream(
            command,
            cwd=ROOT,
            env=clean_environ(extra=extra),
            stall_seconds=_NETWORK_SECONDS,
            on_output=lambda piece: None,
        )
    except StepFailed as error:
        return False, error.what
    reason = f"no answer in {_NETWORK_SECONDS:g} seconds" if done.stalled else done.last_line
    return done.returncode == 0, reason


def _upstream_pair(url: str) -> tuple[str, bool | None]:
    """What the newest requirements_macos_arm64.txt asks for, and whether that excludes itself."""
    name = "requirements_macos_arm64.txt"
    with tempfile.TemporaryDirectory() as directory:
        fetch = [
            "git",
            "-C",
            directory,
            "fetch",
            "--quiet",
            "--depth",
            "1",
            "--filter=blob:none",
            url,
            "HEAD",
        ]
        capture(["git", "init", "--quiet", "--bare", directory])
        # A partial clone fetches what it misses from a remote that has this name.
        capture(["git", "-C", directory, "remote", "add", "origin", url])
        if not _answers(fetch, {"GIT_TERMINAL_PROMPT": "0"})[0]:
            return "", None
        shown = capture(["git", "-C", directory, "show", f"FETCH_HEAD:{name}"])
    return torch_pair(shown.stdout) if shown.returncode == 0 else ("", None)


def torch_pair(requirements: str) -> tuple[str, bool | None]:
    """The torch and torchvision that requirements pin, and whether they exclude each other.

    torchvision 0.N is made for torch 2.(N - 15), since 0.15 for 2.0 (its release notes).
    """
    pinned: dict[str, tuple[int, int]] = {}
    lines = []
    for line in requirements.splitlines():
        try:
            requirement = Requirement(line.split("#")[0].strip())
        except InvalidRequirement:
            continue
        for specifier in requirement.specifier:
            parts = specifier.version.split(".")
            if specifier.operator == "==" and len(parts) >= 2 and all(p.isdigit() for p in parts[:2]):
                pinned[requirement.name] = (int(parts[0]), int(parts[1]))
                if requirement.name in ("torch", "torchvision"):
                    lines.append(str(requirement))
    if "torch" not in pinned or "torchvision" not in pinned:
        return "", None
    major, minor = pinned["torch"]
    return " with ".join(lines), major == 2 and pinned["torchvision"] != (0, minor + 15)


def _first_line(command: list[str]) -> str | None:
    try:
        done = capture(command)
    except StepFailed:
        return None
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else None


def _sysctl(name: str) -> str | None:
    return _first_line(["sysctl", "-in", name]) if on_mac() else None


def _other_venv(active: str | None, home: Installation) -> str | None:
    """An active environment that is neither this project's tools' nor the trainer's."""
    if not active:
        return None
    ours = {(ROOT / ".venv").resolve(), home.venv.resolve()}
    return None if Path(active).resolve() in ours else active


def _ratio(text: str | None, default: float) -> float | None:
    try:
        return default if text is None else float(text)
    except ValueError:
        return None


def _tells_case(place: Path) -> bool | None:
    """Whether the file system takes capital and small letters for different names."""
    swapped = place.with_name(place.name.swapcase())
    if swapped.name == place.name:
        return None
    try:
        return not swapped.samefile(place)
    except OSError:
        return True


def _use_cpu(path: Path) -> bool | None:
    """What an accelerate configuration says; nothing when it is missing or cannot be read."""
    try:
        return bool(read_yaml(path, dict[str, object]).get("use_cpu", False))
    except UsageError:
        return None


def _listed(items: list[str]) -> str | None:
    return join_some(items) if items else None
