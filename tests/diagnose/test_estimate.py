"""The estimate as a whole: what it adds up, and what it leaves open."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from kohya_mps.dataset.scan import Dataset, Folder, PictureSet
from kohya_mps.diagnose.estimate import Estimate, estimate
from kohya_mps.diagnose.memory import checkpoint_gb
from kohya_mps.diagnose.model_families import families
from kohya_mps.trainer_config.trainer_options import TrainerOptions

LORA = TrainerOptions(
    network_module="networks.lora", network_dim=16, resolution="512,512", sdpa=True, cache_latents=True
)


def peak(options: TrainerOptions, family: str = "sd15", device: str = "mps") -> float:
    found = estimate(options, "train_network.py", family, None, None, device).peak_gb
    assert found is not None
    return found


def changed(**values: object) -> TrainerOptions:
    return replace(LORA, **values)


def test_what_saves_memory_lowers_the_estimate() -> None:
    plain = peak(LORA)

    assert peak(changed(gradient_checkpointing=True)) < plain
    assert peak(changed(train_batch_size=2)) > plain
    assert peak(changed(resolution="768,768")) > plain
    assert peak(LORA, device="cuda") < plain
    assert peak(changed(mixed_precision="fp16")) < plain
    assert peak(LORA, "sdxl") > plain


def test_every_figure_is_that_of_the_training() -> None:
    pictures = (Path("a.png"), Path("b.png"), Path("c.png"))
    dataset = Dataset((PictureSet(LORA, (Folder(Path("x"), 10, pictures=pictures),)),))
    options = changed(max_train_epochs=4, save_every_n_epochs=1)
    found = estimate(options, "train_network.py", "sd15", None, dataset, "mps")

    assert (found.steps, found.epochs, found.pictures, found.checkpoints) == (120, 4, 30, 4)
    assert found.checkpoints_gb == pytest.approx(4 * checkpoint_gb(options, "", families().sd15))
    assert found.peak_gb is not None


def test_families_whose_size_is_not_known_are_left_open() -> None:
    assert estimate(LORA, "", "flux", None, None, "mps") == Estimate(steps=1600, checkpoints=1)


def test_epochs_of_pictures_that_were_not_found_are_left_open() -> None:
    found = estimate(changed(max_train_epochs=3), "", "sd15", None, None, "mps")

    assert (found.steps, found.epochs, found.checkpoints, found.checkpoints_gb) == (None, 3, None, None)
