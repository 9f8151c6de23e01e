"""``invoke preflight``: everything known to go wrong with a training, told before hours are spent on it.

A file is read, its settings typed, the files that it names looked at and its size reckoned.
All of that becomes facts, and the rules of ``config/failures.yaml`` judge them.
"""

from __future__ import annotations

import os
import platform
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from packaging.version import Version

from kohya_mps.core.errors import UsageError
from kohya_mps.core.files import existing_ancestor
from kohya_mps.core.machine import expected_device, free_disk_gb, memory_gb
from kohya_mps.core.report import Check, Report, Status
from kohya_mps.core.settings import Settings, hugging_face_home
from kohya_mps.core.text import join_some, shorten
from kohya_mps.dataset import scan
from kohya_mps.dataset.scan import Dataset
from kohya_mps.install import lockfile
from kohya_mps.known_failures import catalogue, rules
from kohya_mps.known_failures.catalogue import DEVICES
from kohya_mps.known_failures.rules import Finding, Target
from kohya_mps.trainer_config import autofix, config_file
from kohya_mps.trainer_config.config_file import ConfigFile, Kind, read
from kohya_mps.trainer_config.edits import Change, Edit
from kohya_mps.trainer_config.trainer_options import TrainerOptions, WrongType, parse_options

from . import base_model
from .base_model import Form, Model
from .estimate import Estimate, estimate, models

# Above this part of a machine's memory, what else runs on it is swapped out.
_COMFORTABLE = 0.75


class TrainingFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What preflight finds out besides the settings and the estimate; rules ask for these names.

    Nothing means that it is not known, or that there is nothing of the kind. Texts are
    ready to be told; ``_gb`` are gigabytes, sides and buckets pixels.
    """

    is_training: bool
    trainer: str
    family: str
    family_differs: str | None
    optimizer: str
    optimizer_type: str
    first_learning_rate: float
    algorithm: str
    caches_latents: bool
    wrong_types: str | None
    model_form: str | None
    model_detail: str | None
    model_has_fp16: bool | None
    vae_form: str | None
    vae_detail: str | None
    tokenizer_at_hand: bool
    offline: bool
    offline_by: str
    macos_too_old: str | None
    memory_gb: float | None
    comfortable_gb: float | None
    has_pictures: bool
    output_problem: str | None
    output_free_gb: float | None
    pictures: int | None = None
    missing_data: str | None = None
    ignored: str | None = None
    unfoldered: int | None = None
    unsupported: str | None = None
    unreadable: str | None = None
    bad_captions: str | None = None
    other_captions: int | None = None
    other_ending: str | None = None
    short_side: int | None = None
    long_side: int | None = None
    steps_of_32: bool | None = None
    least_bucket: int | None = None
    most_bucket: int | None = None


#: Every name that a rule over settings may ask for.
FACTS = frozenset(
    TrainerOptions.__struct_fields__ + Estimate.__struct_fields__ + TrainingFacts.__struct_fields__
)


class PreflightOptions(msgspec.Struct, frozen=True):
    """What is asked: a file, for which device, and where its relative paths begin.

    ``trainer`` is the script that a file is meant for which does not say so itself.
    ``memory_gb`` is the memory of the machine that it is for, when that is another one.
    ``fix`` is where a corrected copy goes.
    """

    file: Path
    device: str = ""
    base: Path | None = None
    trainer: str = ""
    memory_gb: float | None = None
    fix: Path | None = None


class Inspection(msgspec.Struct, frozen=True):
    """A training with everything that was found out about it."""

    file: ConfigFile
    training: TrainerOptions
    wrong: tuple[WrongType, ...]
    model: Model | None
    vae: Model | None
    data: Dataset | None
    family: str
    estimate: Estimate


def parse_flags(file: str, device: str, memory: str, trainer: str, fix: str) -> PreflightOptions:
    """The question as it was typed; what is empty was not.

    Raises:
        UsageError: ``memory`` is no number of gigabytes.
    """
    try:
        memory_gb = float(memory) if memory else None
    except ValueError:
        memory_gb = 0.0
    if memory_gb is not None and not 0 < memory_gb < 1e6:
        raise UsageError(f"--memory: {memory!r} is no number of gigabytes", "such as 16")
    return PreflightOptions(
        Path(file),
        device=device,
        trainer=trainer,
        memory_gb=memory_gb,
        fix=Path(fix) if fix else None,
    )


def check(settings: Settings, asked: PreflightOptions) -> Report:
    """Judge a training's settings.

    Raises:
        UsageError: the file cannot be read, there is no such device, or the corrected copy
            would overwrite something.
    """
    device = asked.device or expected_device()
    if device not in DEVICES:
        raise UsageError(f"--device: there is no device {device!r}", f"accepted: {', '.join(DEVICES)}")
    file = read(asked.file)
    if not file.trainer:
        file = msgspec.structs.replace(file, trainer=asked.trainer)
    situation = target_for(settings, device)
    start = asked.base or config_file.base_directory(file)
    looked = inspect(file, device, start)
    memory = asked.memory_gb or (memory_gb() if device == expected_device() else None)
    found = findings(looked, situation, start, memory)
    checks = [_read_row(looked, situation), *(finding.check() for finding in found)]
    checks += _passes(looked, {check.name for check in checks}, memory)
    fixed: list[Change] = []
    if asked.fix:
        fixed, more = _write_fix(looked, found, asked.fix)
        checks += more
    extra = {
        "file": str(asked.file),
        "kind": file.kind,
        "device": device,
        "profile": situation.profile_name,
        "trainer": file.trainer,
        "family": looked.family,
        "estimate": looked.estimate,
        "failures": [finding.failure.id for finding in found],
        "changes": fixed,
    }
    return Report(f"Preflight of {asked.file} for {device}", tuple(checks), extra, _next(found, asked))


def target_for(settings: Settings, device: str) -> Target:
    """The profile's rules and the versions of its lock on the machines that have a device."""
    lock = lockfile.read(settings.profile.lock_file)
    versions = lock.versions(lockfile.here(device == "mps"))
    return Target(device, settings.profile_name, settings.profile, versions)


def inspect(file: ConfigFile, device: str, base: Path) -> Inspection:
    """Type the settings and look at every file that they name."""
    training, wrong = parse_options(file.settings, numbers_as_text=file.numbers_as_text)
    if wrong:  # what is meant is judged, besides how it is written
        meant = {w.name: value for w in wrong if (value := autofix.coerce(w)) is not None}
        training, _ = parse_options({**file.settings, **meant}, numbers_as_text=file.numbers_as_text)
    name, vae = training.pretrained_model_name_or_path, training.vae
    model = base_model.inspect(name, config_file.resolve_path(name, base)) if name else None
    data = scan.scan(training, base)
    family = _family(file, training, model)
    return Inspection(
        file=file,
        training=training,
        wrong=wrong,
        model=model,
        vae=base_model.inspect(vae, config_file.resolve_path(vae, base)) if vae else None,
        data=data,
        family=family,
        estimate=_estimate(file, training, family, model, data, device),
    )


def _estimate(
    file: ConfigFile,
    training: TrainerOptions,
    family: str,
    model: Model | None,
    data: Dataset | None,
    device: str,
) -> Estimate:
    if file.kind is Kind.DATASET:  # how it is trained is told elsewhere
        return Estimate(pictures=sum(s.images_per_epoch for s in data.sets) if data else None)
    return estimate(training, file.trainer, family, model, data, device)


def findings(looked: Inspection, situation: Target, base: Path, memory_gb: float | None) -> list[Finding]:
    """The known failures that a training would meet, worst first, each once."""
    common = _facts(looked, situation, base, memory_gb)
    found: dict[str, Finding] = {}
    for settings in (
        [s.settings for s in looked.data.sets] if looked.data and looked.data.sets else [looked.training]
    ):
        facts = _together(looked, _of_set(common, settings), settings)
        for finding in rules.matching(catalogue.known(), "settings", facts, situation):
            found.setdefault(finding.failure.id, finding)
    return sorted(found.values(), key=lambda finding: finding.rule.level)


def _together(looked: Inspection, facts: TrainingFacts, settings: TrainerOptions) -> dict[str, Any]:
    """All facts by name, those that mean more than the plain setting last."""
    named = {name: getattr(settings, name) for name in _PER_SET}
    parts = (looked.training, looked.estimate, facts)
    merged: dict[str, Any] = {}
    for part in parts:
        merged |= msgspec.structs.asdict(part)
    return merged | named | {"pictures": facts.pictures}


def _family(file: ConfigFile, training: TrainerOptions, model: Model | None) -> str:
    """What is trained: the script says it, then the base model, then what only one family has."""
    if by_script := _script_family(file.trainer, training):
        return by_script
    if model and model.family:
        return model.family
    if "flux" in training.network_module:
        return "flux"
    return "sd2" if training.v2 else "sd15"


def _script_family(trainer: str, training: TrainerOptions) -> str:
    for prefix in ("sdxl", "flux", "sd3"):
        if trainer.startswith(prefix):
            return prefix
    if not trainer:
        return ""
    return "sd2" if training.v2 else "sd15"


def _facts(looked: Inspection, situation: Target, base: Path, memory_gb: float | None) -> TrainingFacts:
    training, data = looked.training, looked.data
    offline = [
        n for n in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(n, "0").upper() in _YES
    ]
    problem, free = _output(training, base)
    facts = TrainingFacts(
        is_training=looked.file.kind is not Kind.DATASET,
        trainer=looked.file.trainer or "train_network.py",
        family=looked.family,
        family_differs=_differs(looked),
        optimizer=training.optimizer,
        optimizer_type=training.optimizer_type or training.optimizer,
        first_learning_rate=training.learning_rate if training.unet_lr is None else training.unet_lr,
        algorithm=training.network_options.get("algo", "").strip("\"'").lower(),
        caches_latents=training.cache_latents or training.cache_latents_to_disk,
        wrong_types=_listed([f"{w.name} is {w.found!r}, not {w.expected}" for w in looked.wrong]),
        model_form=looked.model.form if looked.model else None,
        model_detail=looked.model.detail if looked.model else None,
        model_has_fp16=looked.model.fp16 if looked.model else None,
        vae_form=looked.vae.form if looked.vae else None,
        vae_detail=looked.vae.detail if looked.vae else None,
        tokenizer_at_hand=_has_tokenizer(training, base),
        offline=bool(offline),
        offline_by=" and ".join(offline),
        macos_too_old=_macos_too_old(training.mixed_precision, situation),
        memory_gb=memory_gb,
        comfortable_gb=memory_gb * _COMFORTABLE if memory_gb else None,
        has_pictures=bool(data and data.sets),
        output_problem=problem,
        output_free_gb=free,
    )
    return _with_pictures(facts, data) if data else facts


_YES = frozenset({"1", "TRUE", "YES", "ON"})


def _of_set(common: TrainingFacts, settings: TrainerOptions) -> TrainingFacts:
    """The facts for one set of pictures: each may have a resolution and buckets of its own."""
    sides = settings.width_and_height
    step = max(1, settings.bucket_reso_steps)
    return msgspec.structs.replace(
        common,
        short_side=min(sides) if sides else None,
        long_side=max(sides) if sides else None,
        steps_of_32=settings.bucket_reso_steps % 32 == 0,
        # The trainer rounds the limits to whole steps, away from the resolution.
        least_bucket=settings.min_bucket_reso // step * step,
        most_bucket=-(-settings.max_bucket_reso // step) * step,
    )


_PER_SET = (
    "resolution",
    "train_batch_size",
    "enable_bucket",
    "min_bucket_reso",
    "max_bucket_reso",
    "bucket_reso_steps",
    "validation_split",
    "color_aug",
    "random_crop",
)


def _with_pictures(facts: TrainingFacts, data: Dataset) -> TrainingFacts:
    trained = [folder for folder in data.folders if not folder.regularization]
    examined = scan.verify([path for folder in data.folders for path in folder.pictures])
    endings: Counter[str] = Counter()
    for folder in trained:
        endings.update(folder.other_captions)
    return msgspec.structs.replace(
        facts,
        pictures=sum(len(folder.pictures) for folder in trained),
        missing_data=_listed(data.missing),
        ignored=_listed(data.ignored),
        unfoldered=data.unfoldered,
        unsupported=_listed([name for folder in data.folders for name in folder.unsupported]),
        unreadable=_listed([f"{path} ({reason})" for path, reason in examined.unreadable]),
        bad_captions=_listed([problem for folder in trained for problem in folder.bad_captions]),
        other_captions=endings.total(),
        other_ending=endings.most_common(1)[0][0] if endings else None,
    )


def _output(training: TrainerOptions, base: Path) -> tuple[str | None, float | None]:
    """What is wrong with the output directory, and how many gigabytes are free there."""
    if not training.output_dir:
        return None, None
    wanted = config_file.resolve_path(training.output_dir, base)
    existing = existing_ancestor(wanted)
    if not os.path.isdir(existing):
        return f"{wanted} cannot be made: {existing} is not a directory", None
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"{existing} is not writable for you", None
    return None, free_disk_gb(existing)


def _listed(items: tuple[str, ...] | list[str]) -> str | None:
    """The first few of many, for a report's row; nothing for nothing."""
    return join_some([shorten(item, 200) for item in items]) if items else None


def _differs(looked: Inspection) -> str | None:
    """A script for one family, and a base model that is of another."""
    script = _script_family(looked.file.trainer, looked.training)
    model = looked.model.family if looked.model and looked.model.form is not Form.HUB else ""
    if not script or not model or script == model:
        return None
    return f"{looked.file.trainer}{' with v2' if looked.training.v2 else ''} is for {script}, the base model is {model}"


def _has_tokenizer(training: TrainerOptions, base: Path) -> bool:
    """Whether CLIP's tokenizer is where the trainer looks before it asks the network."""
    name = "openai/clip-vit-large-patch14"
    if training.tokenizer_cache_dir:
        cache = config_file.resolve_path(training.tokenizer_cache_dir, base)
        if os.path.isdir(cache / name.replace("/", "_")):
            return True
    hub = os.path.expanduser(os.environ.get("HF_HUB_CACHE") or f"{hugging_face_home()}/hub")
    return os.path.isdir(f"{hub}/models--{name.replace('/', '--')}/snapshots")


def _macos_too_old(precision: str, situation: Target) -> str | None:
    """A mixed precision that this Mac's system cannot do, by the profile's ``needs_macos``."""
    here, needed = platform.mac_ver()[0], situation.profile.needs_macos.get(precision)
    if situation.device != "mps" or not here or not needed or Version(here) >= Version(needed):
        return None
    return f"{precision} on MPS needs macOS {needed}, and this is {here}"


def _read_row(looked: Inspection, situation: Target) -> Check:
    file = looked.file
    where = (
        ""
        if situation.device == expected_device()
        else f", for {situation.device}, which is not here (predicted)"
    )
    for_script = f", for {file.trainer}" if file.trainer else ""
    family = models().family(looked.family)
    detail = f"{file.kind}{for_script}, {family.name if family else looked.family}{where}"
    if not file.notes:
        return Check("file", Status.PASS, detail)
    return Check("file", Status.WARN, f"{detail}. {'; '.join(file.notes)}", "see that this is what you mean")


def _passes(looked: Inspection, told: set[str], memory_gb: float | None) -> Iterator[Check]:
    """What was looked at and is good, or could not be told."""
    reckoned = looked.estimate
    rows = []
    if looked.model:
        rows.append(("base model", looked.model.detail))
    if looked.data is not None:
        folders = [f for f in looked.data.folders if f.pictures]
        rows.append(("pictures", f"{reckoned.pictures} an epoch, from {len(folders)} folders"))
    if reckoned.steps is not None:
        rows.append(
            (
                "steps",
                f"{reckoned.steps} steps" + (f", about {reckoned.epochs} epochs" if reckoned.epochs else ""),
            )
        )
    if reckoned.checkpoints_gb is not None:
        rows.append(("checkpoints", f"{reckoned.checkpoints} files, about {reckoned.checkpoints_gb:.2f} GB"))
    if reckoned.peak_gb is not None:
        of = f" of {memory_gb:.0f} GB" if memory_gb else ""
        rows.append(("memory", f"about {reckoned.peak_gb:.1f} GB at the peak{of} (predicted)"))
    return (Check(name, Status.PASS, detail) for name, detail in rows if name not in told)


def _write_fix(looked: Inspection, found: list[Finding], out: Path) -> tuple[list[Change], list[Check]]:
    wanted: dict[str, Edit] = {}
    for finding in found:
        for name, value in finding.rule.change.items():
            wanted.setdefault(name, Edit(name, value, f"{finding.failure.id}: {finding.detail}"))
    for wrong in looked.wrong:
        repaired = autofix.coerce(wrong)
        if repaired is not None and wrong.name not in wanted:
            wanted[wrong.name] = Edit(wrong.name, repaired, f"wrong-type: wants {wrong.expected}")
    corrected = autofix.autofix(looked.file, list(wanted.values()))
    autofix.save(looked.file, corrected, out)
    rows = [Check("corrected copy", Status.PASS, f"{out}: {len(corrected.changes)} settings changed")]
    rows += [
        Check("corrected copy", Status.WARN, f"{name} could not be changed in this file", "change it by hand")
        for name in corrected.not_fixable
    ]
    return list(corrected.changes), rows


def _next(found: list[Finding], question: PreflightOptions) -> tuple[str, ...]:
    if question.fix:
        return ("", f"Corrected copy: {question.fix}. Check it:  invoke preflight {question.fix}")
    if any(finding.rule.change for finding in found):
        return (
            "",
            f"`invoke preflight {shlex.quote(str(question.file))} --fix OUT` writes a copy with what can be mended mended.",
        )
    return ()
