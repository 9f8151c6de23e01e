"""A training's configuration file, with every file that it names looked at."""

from __future__ import annotations

from pathlib import Path

import msgspec

from kohya_mps.dataset.scan import Dataset, scan
from kohya_mps.trainer_config import autofix
from kohya_mps.trainer_config.config_file import ConfigFile, Kind, resolve_path
from kohya_mps.trainer_config.trainer_options import TrainerOptions, WrongType, parse_options

from . import base_model
from .base_model import Model
from .duration import images_per_epoch
from .estimate import Estimate, estimate


class Inspection(msgspec.Struct, frozen=True):
    """A training: its options, and what is on the disk.

    ``base`` is the directory that relative paths begin in. ``family`` is a key of
    ``config/models.yaml``, ``flux`` or ``sd3``. A model or a dataset is None if the file names
    none.
    """

    file: ConfigFile
    base: Path
    options: TrainerOptions
    wrong_types: tuple[WrongType, ...]
    model: Model | None
    vae: Model | None
    dataset: Dataset | None
    family: str
    estimate: Estimate

    @property
    def option_sets(self) -> list[TrainerOptions]:
        """The options of each set of pictures; a dataset configuration may override some."""
        sets = self.dataset.sets if self.dataset else ()
        return [s.options for s in sets] or [self.options]


def inspect(file: ConfigFile, device: str, base: Path) -> Inspection:
    """Look at a training.

    Args:
        file: its settings.
        device: ``mps``, ``cuda`` or ``cpu``, which decides how much memory is needed.
        base: the directory that relative paths begin in.
    """
    options, wrong_types = parse_options(file.settings, numbers_as_text=file.numbers_as_text)
    if wrong_types:  # report the type, and check the value that was probably meant
        meant = {w.name: value for w in wrong_types if (value := autofix.coerce(w)) is not None}
        options, _ = parse_options({**file.settings, **meant}, numbers_as_text=file.numbers_as_text)
    model = _model(options.pretrained_model_name_or_path, base)
    dataset = scan(options, base)
    family = _family(file.trainer, options, model)
    if file.kind is Kind.DATASET:  # another file has the options of the training
        predicted = Estimate(pictures=images_per_epoch(dataset))
    else:
        predicted = estimate(options, file.trainer, family, model, dataset, device)
    return Inspection(
        file=file,
        base=base,
        options=options,
        wrong_types=wrong_types,
        model=model,
        vae=_model(options.vae, base),
        dataset=dataset,
        family=family,
        estimate=predicted,
    )


def script_family(trainer: str, options: TrainerOptions) -> str:
    """The family that a trainer's script is for; empty if no script is named."""
    for prefix in ("sdxl", "flux", "sd3"):
        if trainer.startswith(prefix):
            return prefix
    if not trainer:
        return ""
    return "sd2" if options.v2 else "sd15"


def _model(name: str, base: Path) -> Model | None:
    return base_model.inspect(name, resolve_path(name, base)) if name else None


def _family(trainer: str, options: TrainerOptions, model: Model | None) -> str:
    """By the script, then by the base model, then by options that only one family has."""
    if by_script := script_family(trainer, options):
        return by_script
    if model and model.family:
        return model.family
    if "flux" in options.network_module:
        return "flux"
    return "sd2" if options.v2 else "sd15"
