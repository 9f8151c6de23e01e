"""``invoke preflight``: what is known to go wrong with a training, before hours are spent on it.

The configuration file is read and every file that it names is looked at. The rules of
``config/failures.yaml`` judge the facts that were found.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import msgspec

from kohya_mps.core.errors import UsageError
from kohya_mps.core.machine import expected_device, memory_gb
from kohya_mps.core.report import Check, Report, Status
from kohya_mps.core.settings import Settings
from kohya_mps.install import lockfile
from kohya_mps.known_failures import catalogue, rules
from kohya_mps.known_failures.catalogue import DEVICES
from kohya_mps.known_failures.rules import Finding, Target
from kohya_mps.trainer_config import autofix, config_file
from kohya_mps.trainer_config.config_file import ConfigFile
from kohya_mps.trainer_config.edits import Change, Edit

from .inspection import Inspection, inspect
from .model_families import families
from .training_facts import facts_of_sets


class PreflightOptions(msgspec.Struct, frozen=True):
    """What to check.

    ``device`` is this machine's if empty. ``base`` is where relative paths begin, decided by
    the files that exist if None. ``trainer`` is the script to assume if the file names none.
    ``memory_gb`` is the memory of the machine that will train, if it is another one. ``fix`` is
    where a corrected copy is written.
    """

    file: Path
    device: str = ""
    base: Path | None = None
    trainer: str = ""
    memory_gb: float | None = None
    fix: Path | None = None


def parse_flags(file: str, device: str, memory: str, trainer: str, fix: str) -> PreflightOptions:
    """The options from flags as they were typed; a flag that was not typed is empty.

    Raises:
        UsageError: ``memory`` is not a number of gigabytes.
    """
    try:
        gigabytes = float(memory) if memory else None
    except ValueError:
        gigabytes = 0.0
    if gigabytes is not None and not 0 < gigabytes < 1e6:
        raise UsageError(f"--memory: {memory!r} is not a number of gigabytes", "such as 16")
    return PreflightOptions(
        Path(file), device=device, trainer=trainer, memory_gb=gigabytes, fix=Path(fix) if fix else None
    )


def check(settings: Settings, options: PreflightOptions) -> Report:
    """Check a training's configuration file.

    Raises:
        UsageError: the file cannot be read, the device does not exist, or the corrected copy
            would overwrite a file.
        StepFailed: no corrected copy can be made of the file.
    """
    device = options.device or expected_device()
    if device not in DEVICES:
        raise UsageError(f"--device: there is no device {device!r}", f"accepted: {', '.join(DEVICES)}")
    file = _read(options)
    target = target_for(settings, device)
    training = inspect(file, device, options.base or config_file.base_directory(file))
    memory = options.memory_gb or (memory_gb() if device == expected_device() else None)
    found = findings(training, target, memory)
    checks = [_file_check(training, device), *(finding.check() for finding in found)]
    reported = {check.name for check in checks}
    checks += [check for check in _passed(training, memory) if check.name not in reported]
    changes: list[Change] = []
    if options.fix:
        changes, more = _write_fix(training, found, options.fix)
        checks += more
    extra = {
        "file": str(options.file),
        "kind": file.kind,
        "device": device,
        "profile": target.profile_name,
        "trainer": file.trainer,
        "family": training.family,
        "estimate": training.estimate,
        "failures": [finding.failure.id for finding in found],
        "changes": changes,
    }
    return Report(
        f"Preflight of {options.file} for {device}", tuple(checks), extra, _next_step(found, options)
    )


def target_for(settings: Settings, device: str) -> Target:
    """The device and the profile, with the package versions of its lock for that device."""
    lock = lockfile.read(settings.profile.lock_file)
    versions = lock.versions(lockfile.here(device == "mps"))
    return Target(device, settings.profile_name, settings.profile, versions)


def findings(training: Inspection, target: Target, memory_gb: float | None) -> list[Finding]:
    """The known failures that the training would meet, the worst first, each once."""
    found: dict[str, Finding] = {}
    for facts in facts_of_sets(training, target, memory_gb):
        for finding in rules.matching(catalogue.known(), "settings", facts, target):
            found.setdefault(finding.failure.id, finding)
    return sorted(found.values(), key=lambda finding: finding.rule.level)


def _read(options: PreflightOptions) -> ConfigFile:
    file = config_file.read(options.file)
    return file if file.trainer else msgspec.structs.replace(file, trainer=options.trainer)


def _file_check(training: Inspection, device: str) -> Check:
    file, family = training.file, families().get(training.family)
    detail = f"{file.kind}{f', for {file.trainer}' if file.trainer else ''}, "
    detail += family.name if family else training.family
    if device != expected_device():
        detail += f", for {device}, which is not here (predicted)"
    if not file.notes:
        return Check("file", Status.PASS, detail)
    return Check("file", Status.WARN, f"{detail}. {'; '.join(file.notes)}", "check that you intend this")


def _passed(training: Inspection, memory_gb: float | None) -> Iterator[Check]:
    """A row for everything that was looked at. Rows of failures replace those of the same name."""
    predicted = training.estimate
    if training.model:
        yield Check("base model", Status.PASS, training.model.detail)
    if training.dataset is not None:
        folders = [folder for folder in training.dataset.folders if folder.pictures]
        detail = f"{predicted.pictures} an epoch, from {len(folders)} folders"
        yield Check("pictures", Status.PASS, detail)
    if predicted.steps is not None:
        epochs = f", about {predicted.epochs} epochs" if predicted.epochs else ""
        yield Check("steps", Status.PASS, f"{predicted.steps} steps{epochs}")
    if predicted.checkpoints_gb is not None:
        detail = f"{predicted.checkpoints} files, about {predicted.checkpoints_gb:.2f} GB"
        yield Check("checkpoints", Status.PASS, detail)
    if predicted.peak_gb is not None:
        of = f" of {memory_gb:.0f} GB" if memory_gb else ""
        detail = f"about {predicted.peak_gb:.1f} GB at the peak{of} (predicted)"
        yield Check("memory", Status.PASS, detail)


def _write_fix(training: Inspection, found: list[Finding], out: Path) -> tuple[list[Change], list[Check]]:
    edits: dict[str, Edit] = {}
    for finding in found:
        for name, value in finding.rule.change.items():
            edits.setdefault(name, Edit(name, value, f"{finding.failure.id}: {finding.detail}"))
    for wrong in training.wrong_types:
        value = autofix.coerce(wrong)
        if value is not None:
            edits.setdefault(wrong.name, Edit(wrong.name, value, f"wrong-type: must be {wrong.expected}"))
    corrected = autofix.autofix(training.file, list(edits.values()))
    autofix.save(training.file, corrected, out)
    checks = [Check("corrected copy", Status.PASS, f"{out}: {len(corrected.changes)} settings changed")]
    checks += [
        Check("corrected copy", Status.WARN, f"{name} could not be changed in this file", "change it by hand")
        for name in corrected.not_fixable
    ]
    return list(corrected.changes), checks


def _next_step(found: list[Finding], options: PreflightOptions) -> tuple[str, ...]:
    if options.fix:
        fixed = shlex.quote(str(options.fix))
        return ("", f"Corrected copy: {options.fix}. Check it:  invoke preflight {fixed}")
    if any(finding.rule.change for finding in found):
        file = shlex.quote(str(options.file))
        return ("", f"`invoke preflight {file} --fix OUT` writes a copy in which what can be corrected is.")
    return ()
