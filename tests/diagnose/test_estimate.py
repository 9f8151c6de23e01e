"""The estimates against figures that were measured."""

from __future__ import annotations

import pytest

from kohya_mps.diagnose.estimate import estimate
from kohya_mps.diagnose.memory import trained_parameters
from kohya_mps.diagnose.model_families import families
from kohya_mps.trainer_config.trainer_options import TrainerOptions

LORA = TrainerOptions(
    network_module="networks.lora", network_dim=16, resolution="512,512", sdpa=True, cache_latents=True
)


def peak(training: TrainerOptions, family: str = "sd15", device: str = "mps") -> float:
    found = estimate(training, "train_network.py", family, None, None, device).peak_gb
    assert found is not None
    return found


def changed(**values: object) -> TrainerOptions:
    from msgspec.structs import replace

    return replace(LORA, **values)


@pytest.mark.parametrize(
    ("family", "size", "checkpointing", "counted"),
    [
        # One step on torch's meta device, attention by the math path: gigabytes beside the weights.
        ("sd15", 256, False, 0.696), ("sd15", 512, False, 5.710), ("sd15", 768, False, 23.909),
        ("sd15", 256, True, 0.151), ("sd15", 512, True, 1.808), ("sd15", 768, True, 8.596),
        ("sdxl", 512, False, 4.274), ("sdxl", 768, False, 11.615), ("sdxl", 1024, False, 26.088),
        ("sdxl", 512, True, 0.422), ("sdxl", 768, True, 1.249), ("sdxl", 1024, True, 3.100),
    ],
)  # fmt: skip
def test_a_steps_memory_is_what_was_counted(
    family: str, size: int, checkpointing: bool, counted: float
) -> None:
    known = families().get(family)
    assert known is not None
    curve = known.checkpointed_gb if checkpointing else known.step_gb

    assert curve.gigabytes(size * size / 512**2, False) == pytest.approx(counted, rel=0.03, abs=0.01)


def test_the_measured_peak_of_a_full_size_training_is_met() -> None:
    # Three steps at 64 x 64, SD 1.5 in full size and float32: 7.4 GB (Linux, CPU).
    assert peak(changed(resolution="64,64", network_dim=4), device="cpu") == pytest.approx(7.4, rel=0.2)


def test_lora_files_have_the_size_that_they_have() -> None:
    # Well-known sizes: SD 1.5 at dimension 128 in fp16 is 144 MiB, SDXL at 32 is 218 MiB.
    sd15, sdxl = families().sd15, families().sdxl
    assert trained_parameters(changed(network_dim=128), "", sd15) * 2 / 2**20 == pytest.approx(144, rel=0.01)
    assert trained_parameters(changed(network_dim=32), "", sdxl) * 2 / 2**20 == pytest.approx(218, rel=0.01)


def test_what_saves_memory_lowers_the_estimate() -> None:
    plain = peak(LORA)

    assert peak(changed(gradient_checkpointing=True)) < plain
    assert peak(changed(train_batch_size=2)) > plain
    assert peak(changed(resolution="768,768")) > plain
    assert peak(LORA, device="cuda") < plain
    assert peak(changed(mixed_precision="fp16")) < plain
    assert peak(LORA, "sdxl") > plain


@pytest.mark.parametrize(
    ("values", "files"),
    [
        ({"max_train_steps": 1000}, 1),
        ({"max_train_steps": 1000, "save_every_n_steps": 100}, 10),
        ({"max_train_steps": 1000, "save_every_n_steps": 100, "save_last_n_steps": 200}, 3),
        ({"max_train_steps": 0, "save_every_n_steps": -5}, 1),
    ],
)
def test_checkpoints_on_the_way_are_counted(values: dict[str, int], files: int) -> None:
    assert estimate(changed(**values), "", "sd15", None, None, "mps").checkpoints == files


def test_lokr_never_needs_more_than_the_factors_of_the_matrices() -> None:
    lokr = changed(
        network_module="lycoris.kohya", network_args=("algo=lokr", "factor=8"), network_dim=100_000
    )

    assert trained_parameters(lokr, "", families().sd15) < families().sd15.unet / 50


def test_families_that_are_not_reckoned_are_left_open() -> None:
    found = estimate(LORA, "", "flux", None, None, "mps")

    assert (found.peak_gb, found.checkpoints_gb, found.steps) == (None, None, 1600)
