"""``invoke doctor``: checks the machine and the installation within a second, without importing torch.

The rules of ``config/failures.yaml`` judge the facts that were found.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from kohya_mps.core.installation import Installation
from kohya_mps.core.machine import expected_device, on_mac
from kohya_mps.core.report import Check, Report, Status
from kohya_mps.core.settings import Settings
from kohya_mps.install import generations, inventory, lockfile, status
from kohya_mps.install.generations import Generation
from kohya_mps.known_failures import catalogue, rules
from kohya_mps.known_failures.rules import Finding, Target

from .machine_facts import MachineFacts, machine_facts, with_environment


class DoctorOptions(msgspec.Struct, frozen=True):
    """What else to check: torch (``deep``), the network (``online``)."""

    deep: bool = False
    online: bool = False


def examine(settings: Settings, options: DoctorOptions) -> Report:
    """Check the machine and the installation for known failures."""
    home = Installation(settings.home)
    active = generations.active(home)
    status_checks = status.status(settings).checks if active else ()
    lock = lockfile.read(settings.profile.lock_file).versions(lockfile.here(on_mac()))
    machine = machine_facts(settings, home)
    if active:
        machine = with_environment(machine, settings, active, status_checks, lock)
    if options.online:
        from .online import with_network

        machine = with_network(machine, settings)
    versions = inventory.versions(active.venv) if active else {}
    facts: dict[str, Any] = msgspec.structs.asdict(machine)
    facts |= {f"package_{name.replace('-', '_')}": version for name, version in versions.items()}
    target = Target(expected_device(), settings.profile_name, settings.profile, lock)
    found = list(rules.matching(catalogue.known(), "environment", facts, target))
    checks = _checks(dict(_topics(machine, options)), found)
    reported = {check.name for check in checks}
    checks += [c for c in status_checks if c.name not in reported and not c.name.startswith("package ")]
    if options.deep:
        checks += _deep(settings, active)
    extra = {
        "home": str(home.root),
        "device": expected_device(),
        "profile": settings.profile_name,
        "machine": machine,
        "failures": [finding.failure.id for finding in found],
    }
    return Report(f"Doctor: this machine and {home.root}", tuple(checks), extra)


def _checks(topics: dict[str, str], found: list[Finding]) -> list[Check]:
    """A row for each topic: its failures, or that it is good. Failures of no topic come last."""
    failures: dict[str, list[Check]] = {}
    for finding in found:
        failures.setdefault(finding.rule.about, []).append(finding.check())
    rows = [failures.pop(name, [Check(name, Status.PASS, good)]) for name, good in topics.items()]
    return [check for row in (*rows, *failures.values()) for check in row]


def _topics(machine: MachineFacts, options: DoctorOptions) -> Iterator[tuple[str, str]]:
    """The rows of the report, and what each says if nothing is wrong."""
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
        yield "tkinter", "installed, for the GUI"
        yield "packages", "none needs CUDA, none conflicts with another"
        yield "accelerate configuration", f"{machine.config}: use_cpu {str(machine.config_use_cpu).lower()}"
    yield "environment", "as it was built"
    if options.online:
        yield "repository", f"{machine.repository} answers"
        yield "package index", "answers"
        if machine.upstream_pair_broken is None:
            yield "upstream's requirements", "could not be read, or do not pin torch"
        else:
            yield "upstream's requirements", f"corrected: {machine.upstream_pair}"


def _deep(settings: Settings, active: Generation | None) -> tuple[Check, ...]:
    """What needs torch: the smoke check, started through accelerate as a training is."""
    if active is None:
        return (Check("torch", Status.SKIP, "there is no environment to import it from"),)
    from kohya_mps.install import smoke_check

    return smoke_check.run(settings, active).checks
