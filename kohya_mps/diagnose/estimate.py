"""What a training will take: time, disk and memory. All figures are predictions."""

from __future__ import annotations

import msgspec

from kohya_mps.dataset.scan import Dataset
from kohya_mps.trainer_config.trainer_options import TrainerOptions

from . import duration
from .base_model import Model
from .memory import checkpoint_gb, peak_gb
from .model_families import families


class Estimate(msgspec.Struct, frozen=True):
    """What a training will take; a figure that is not known is None.

    ``steps`` are optimizer steps, ``pictures`` those that an epoch shows. ``checkpoints``
    are files that are left, ``checkpoints_gb`` their size with saved states. ``peak_gb`` is
    the memory of the trainer's process.
    """

    steps: int | None = None
    epochs: int | None = None
    pictures: int | None = None
    checkpoints: int | None = None
    checkpoints_gb: float | None = None
    peak_gb: float | None = None


def estimate(
    options: TrainerOptions,
    trainer: str,
    family: str,
    model: Model | None,
    dataset: Dataset | None,
    device: str,
) -> Estimate:
    """Estimate a training.

    Args:
        options: the training's.
        trainer: the script, which decides what is trained if no network is named.
        family: the base model's, a key of ``config/models.yaml`` or another name.
        model: the base model on disk; its own sizes are used if they were read.
        dataset: the pictures that were found.
        device: ``mps``, ``cuda`` or ``cpu``.
    """
    length = duration.duration(options, dataset)
    files = duration.checkpoints(options, length)
    sizes = families().get(family)
    return Estimate(
        steps=length.steps,
        epochs=length.epochs,
        pictures=duration.images_per_epoch(dataset),
        checkpoints=files,
        checkpoints_gb=files * checkpoint_gb(options, trainer, sizes) if files and sizes else None,
        peak_gb=peak_gb(options, trainer, sizes, model, dataset, device) if sizes else None,
    )
