"""How long a training is: its steps, its epochs, and the checkpoints that it leaves."""

from __future__ import annotations

import msgspec

from kohya_mps.dataset.scan import Dataset
from kohya_mps.trainer_config.trainer_options import TrainerOptions


class Duration(msgspec.Struct, frozen=True):
    """Optimizer steps and epochs; None if they depend on pictures that were not found."""

    steps: int | None
    epochs: int | None


def images_per_epoch(dataset: Dataset | None) -> int | None:
    """How many pictures one epoch shows; None if the training names none."""
    return sum(s.images_per_epoch for s in dataset.sets) if dataset else None


def duration(options: TrainerOptions, dataset: Dataset | None) -> Duration:
    """The steps and epochs of a training. ``max_train_epochs`` counts before ``max_train_steps``."""
    sets = dataset.sets if dataset else ()
    batches = sum(ceil_div(s.images_per_epoch, s.options.train_batch_size) for s in sets)
    per_epoch = ceil_div(batches, options.gradient_accumulation_steps)
    if options.max_train_epochs is None:
        steps: int | None = options.max_train_steps
    else:
        steps = options.max_train_epochs * per_epoch if per_epoch else None
    if steps is None or not per_epoch:
        return Duration(steps, options.max_train_epochs)
    return Duration(steps, ceil_div(steps, per_epoch))


def checkpoints(options: TrainerOptions, length: Duration) -> int | None:
    """How many checkpoints are left at the end: the final one, and intermediate ones that are kept."""
    steps, epochs = length.steps, length.epochs
    if steps is None:
        return None
    every = options.save_every_n_epochs or 0
    if options.save_n_epoch_ratio and epochs:
        every = max(1, epochs // max(1, options.save_n_epoch_ratio))
    kept = 1
    if every > 0 and epochs:
        saved = max(0, epochs - 1) // every
        kept += min(saved, options.save_last_n_epochs or saved)
    every = options.save_every_n_steps or 0
    if every > 0:
        saved = max(0, steps - 1) // every
        last = options.save_last_n_steps
        kept += min(saved, ceil_div(last, every) if last else saved)
    return kept


def ceil_div(count: int, by: int) -> int:
    """A division that rounds up. The divisor is at least 1."""
    return -(-count // max(1, by))
