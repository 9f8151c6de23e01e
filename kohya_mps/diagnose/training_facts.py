"""The facts about a training that the rules of ``config/failures.yaml`` judge."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec
from packaging.version import Version

from kohya_mps.core.files import existing_ancestor
from kohya_mps.core.machine import free_disk_gb, macos_version
from kohya_mps.core.settings import hugging_face_home
from kohya_mps.core.text import join_some, shorten
from kohya_mps.dataset.picture_files import verify
from kohya_mps.dataset.scan import Dataset
from kohya_mps.known_failures.rules import FactValues, Target
from kohya_mps.trainer_config.config_file import Kind, resolve_path
from kohya_mps.trainer_config.trainer_options import TrainerOptions

from .base_model import Form
from .duration import ceil_div
from .estimate import Estimate
from .inspection import Inspection, script_family

# Above this part of a machine's memory, what else runs on it is swapped out.
_COMFORTABLE = 0.75

_TRUE = frozenset({"1", "TRUE", "YES", "ON"})

# Options that each set of pictures may override.
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


class TrainingFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known in addition to the options and the estimate, by the names that rules use.

    None means that it is not known, or that there is none. Strings are parts of sentences
    for the report. ``_gb`` are gigabytes, sides and buckets pixels.
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


#: Every name that a rule over settings may use.
FACTS = frozenset(
    TrainerOptions.__struct_fields__ + Estimate.__struct_fields__ + TrainingFacts.__struct_fields__
)


def facts_of_sets(training: Inspection, target: Target, memory_gb: float | None) -> list[FactValues]:
    """All facts by name, once for each set of pictures.

    Args:
        training: the training, inspected.
        target: the device and the profile that it is checked for.
        memory_gb: the machine's memory; None if it is not known.
    """
    common = _facts(training, target, memory_gb)
    estimate = msgspec.structs.asdict(training.estimate)
    options = msgspec.structs.asdict(training.options)
    found: list[FactValues] = []
    for of_set in training.option_sets:
        facts = msgspec.structs.asdict(_with_sizes(common, of_set))
        # The last one wins: facts say more than the plain option of the same name.
        found.append(options | estimate | facts | {name: getattr(of_set, name) for name in _PER_SET})
    return found


def _facts(training: Inspection, target: Target, memory_gb: float | None) -> TrainingFacts:
    options, model, vae = training.options, training.model, training.vae
    offline = [
        v for v in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(v, "").upper() in _TRUE
    ]
    problem, free_gb = _output(options, training.base)
    facts = TrainingFacts(
        is_training=training.file.kind is not Kind.DATASET,
        trainer=training.file.trainer or "train_network.py",
        family=training.family,
        family_differs=_family_differs(training),
        optimizer=options.optimizer,
        optimizer_type=options.optimizer_type or options.optimizer,
        first_learning_rate=options.learning_rate if options.unet_lr is None else options.unet_lr,
        algorithm=options.network_options.get("algo", "").strip("\"'").lower(),
        caches_latents=options.cache_latents or options.cache_latents_to_disk,
        wrong_types=_join([f"{w.name} is {w.found!r}, not {w.expected}" for w in training.wrong_types]),
        model_form=model.form if model else None,
        model_detail=model.detail if model else None,
        model_has_fp16=model.fp16 if model else None,
        vae_form=vae.form if vae else None,
        vae_detail=vae.detail if vae else None,
        tokenizer_at_hand=_has_tokenizer(options, training.base),
        offline=bool(offline),
        offline_by=" and ".join(offline),
        macos_too_old=_macos_too_old(options.mixed_precision, target),
        memory_gb=memory_gb,
        comfortable_gb=memory_gb * _COMFORTABLE if memory_gb else None,
        has_pictures=bool(training.dataset and training.dataset.sets),
        output_problem=problem,
        output_free_gb=free_gb,
    )
    return _with_pictures(facts, training.dataset) if training.dataset else facts


def _with_pictures(facts: TrainingFacts, dataset: Dataset) -> TrainingFacts:
    trained = [folder for folder in dataset.folders if not folder.regularization]
    unreadable = verify([path for folder in dataset.folders for path in folder.pictures])
    endings: Counter[str] = Counter()
    for folder in trained:
        endings.update(folder.other_captions)
    return msgspec.structs.replace(
        facts,
        pictures=sum(len(folder.pictures) for folder in trained),
        missing_data=_join(dataset.missing),
        ignored=_join(dataset.ignored),
        unfoldered=dataset.unfoldered,
        unsupported=_join([name for folder in dataset.folders for name in folder.unsupported]),
        unreadable=_join([f"{picture.path} ({picture.reason})" for picture in unreadable]),
        bad_captions=_join([problem for folder in trained for problem in folder.bad_captions]),
        other_captions=endings.total(),
        other_ending=endings.most_common(1)[0][0] if endings else None,
    )


def _with_sizes(facts: TrainingFacts, options: TrainerOptions) -> TrainingFacts:
    sides = options.width_and_height
    step = max(1, options.bucket_reso_steps)
    return msgspec.structs.replace(
        facts,
        short_side=min(sides) if sides else None,
        long_side=max(sides) if sides else None,
        steps_of_32=options.bucket_reso_steps % 32 == 0,
        # The trainer rounds the limits to whole steps, away from the resolution.
        least_bucket=options.min_bucket_reso // step * step,
        most_bucket=ceil_div(options.max_bucket_reso, step) * step,
    )


def _output(options: TrainerOptions, base: Path) -> tuple[str | None, float | None]:
    """What is wrong with the output directory, and how many gigabytes are free there."""
    if not options.output_dir:
        return None, None
    directory = resolve_path(options.output_dir, base)
    existing = existing_ancestor(directory)
    if not os.path.isdir(existing):
        return f"{directory} cannot be made: {existing} is not a directory", None
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"{existing} is not writable for you", None
    return None, free_disk_gb(existing)


def _join(items: Sequence[str]) -> str | None:
    """The first few items for a row of the report; None if there are none."""
    return join_some([shorten(item, 200) for item in items]) if items else None


def _family_differs(training: Inspection) -> str | None:
    """Say so if the script is for one family and the base model is of another."""
    model = training.model
    script = script_family(training.file.trainer, training.options)
    # The family of a repository is guessed by its name: too little for a warning.
    family = model.family if model and model.form is not Form.HUB else ""
    if not script or not family or script == family:
        return None
    with_v2 = " with v2" if training.options.v2 else ""
    return f"{training.file.trainer}{with_v2} is for {script}, the base model is {family}"


def _has_tokenizer(options: TrainerOptions, base: Path) -> bool:
    """Whether CLIP's tokenizer is on the disk where the trainer looks first."""
    name = "openai/clip-vit-large-patch14"
    if options.tokenizer_cache_dir:
        cache = resolve_path(options.tokenizer_cache_dir, base)
        if os.path.isdir(cache / name.replace("/", "_")):
            return True
    hub = os.path.expanduser(os.environ.get("HF_HUB_CACHE") or f"{hugging_face_home()}/hub")
    return os.path.isdir(f"{hub}/models--{name.replace('/', '--')}/snapshots")


def _macos_too_old(precision: str, target: Target) -> str | None:
    """Say so if this macOS cannot do a mixed precision, by the profile's ``needs_macos``."""
    here, needed = macos_version(), target.profile.needs_macos.get(precision)
    if target.device != "mps" or here == "0" or not needed or Version(here) >= Version(needed):
        return None
    return f"{precision} on MPS needs macOS {needed}, and this is {here}"
