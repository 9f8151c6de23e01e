"""Steps, epochs and checkpoints, counted as the trainer counts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kohya_mps.dataset.scan import Dataset, Folder, PictureSet
from kohya_mps.diagnose.duration import Duration, ceil_div, checkpoints, duration, images_per_epoch
from kohya_mps.trainer_config.trainer_options import TrainerOptions


def picture_set(pictures: int, batch: int = 1) -> PictureSet:
    folder = Folder(Path("x"), 1, pictures=tuple(Path(f"{n}.png") for n in range(pictures)))
    return PictureSet(TrainerOptions(train_batch_size=batch), (folder,))


@pytest.mark.parametrize(("count", "by", "expected"), [(6, 3, 2), (7, 3, 3), (1, 3, 1), (0, 3, 0), (5, 0, 5)])
def test_divisions_round_up(count: int, by: int, expected: int) -> None:
    assert ceil_div(count, by) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # Batches of 3 of 10 pictures and of 2 of 5: 4 and 3 batches an epoch.
        ({"max_train_steps": 70}, (70, 10)),
        ({"max_train_steps": 71}, (71, 11)),
        ({"max_train_epochs": 2}, (14, 2)),
        ({"max_train_epochs": 2, "gradient_accumulation_steps": 2}, (8, 2)),
        ({"max_train_epochs": 0}, (0, 0)),
    ],
)
def test_steps_and_epochs_follow_from_the_batches(values: dict[str, Any], expected: tuple[int, int]) -> None:
    dataset = Dataset((picture_set(10, batch=3), picture_set(5, batch=2)))

    assert duration(TrainerOptions(**values), dataset) == Duration(*expected)


@pytest.mark.parametrize("dataset", [None, Dataset(), Dataset((picture_set(0),))])
def test_without_pictures_only_what_was_set_is_known(dataset: Dataset | None) -> None:
    assert duration(TrainerOptions(max_train_steps=9), dataset) == Duration(9, None)
    assert duration(TrainerOptions(max_train_epochs=9), dataset) == Duration(None, 9)


def test_the_pictures_of_an_epoch_are_those_of_all_sets() -> None:
    assert images_per_epoch(Dataset((picture_set(3), picture_set(4)))) == 7
    assert images_per_epoch(Dataset()) == 0
    assert images_per_epoch(None) is None


@pytest.mark.parametrize(
    ("values", "steps", "epochs", "files"),
    [
        ({}, 1000, 10, 1),
        ({"save_every_n_steps": 100}, 1000, None, 10),
        ({"save_every_n_steps": 100}, 1001, None, 11),
        ({"save_every_n_steps": 100, "save_last_n_steps": 200}, 1000, None, 3),
        ({"save_every_n_steps": 100, "save_last_n_steps": 201}, 1000, None, 4),
        ({"save_every_n_steps": 100, "save_last_n_steps": 5000}, 1000, None, 10),
        ({"save_every_n_steps": 1}, 2, None, 2),
        ({"save_every_n_steps": 1}, 1, None, 1),
        ({"save_every_n_steps": 1}, 0, None, 1),
        ({"save_every_n_steps": 0}, 1000, None, 1),
        ({"save_every_n_steps": -5}, 0, None, 1),
        ({"save_every_n_epochs": 1}, 1000, 5, 5),
        ({"save_every_n_epochs": 2}, 1000, 5, 3),
        ({"save_every_n_epochs": 2}, 1000, 0, 1),
        ({"save_every_n_epochs": 1}, 1000, 1, 1),
        ({"save_every_n_epochs": 0}, 1000, 5, 1),
        ({"save_every_n_epochs": 2}, 1000, None, 1),
        ({"save_every_n_epochs": -1}, 1000, 5, 1),
        ({"save_every_n_epochs": 1, "save_last_n_epochs": 2}, 1000, 5, 3),
        ({"save_every_n_epochs": 1, "save_last_n_epochs": 9}, 1000, 5, 5),
        ({"save_n_epoch_ratio": 5}, 1000, 10, 5),
        ({"save_n_epoch_ratio": 50}, 1000, 10, 10),
        ({"save_n_epoch_ratio": 4}, 1000, 10, 5),
        ({"save_n_epoch_ratio": -1}, 1000, 10, 1),
        ({"save_n_epoch_ratio": 5, "save_every_n_epochs": 1}, 1000, None, 1),
        ({"save_n_epoch_ratio": 0, "save_every_n_epochs": 1}, 1000, 10, 10),
        ({"save_every_n_steps": 100, "save_every_n_epochs": 1}, 1000, 5, 14),
    ],
)
def test_checkpoints_that_are_left_at_the_end(
    values: dict[str, Any], steps: int, epochs: int | None, files: int
) -> None:
    assert checkpoints(TrainerOptions(**values), Duration(steps, epochs)) == files


def test_without_steps_the_checkpoints_are_not_known() -> None:
    assert checkpoints(TrainerOptions(save_every_n_epochs=1), Duration(None, 5)) is None
