"""Memory and disk: against figures that were measured, and each part of the sum by itself."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from kohya_mps.dataset.scan import Dataset, PictureSet
from kohya_mps.diagnose.base_model import Form, Model
from kohya_mps.diagnose.memory import checkpoint_gb, peak_gb, trained_parameters
from kohya_mps.diagnose.model_families import Curve, Family, families
from kohya_mps.trainer_config.trainer_options import TrainerOptions

LORA = TrainerOptions(
    network_module="networks.lora", network_dim=16, resolution="512,512", sdpa=True, cache_latents=True
)
FAMILY = Family(
    name="round numbers",
    unet=1_000_000_000,
    text_encoders=100_000_000,
    vae=10_000_000,
    lora_unet=1_000_000,
    lora_text_encoders=300_000,
    lora_conv=20_000,
    step_gb=Curve(linear=8.0, square=32.0),
    checkpointed_gb=Curve(linear=2.0, square=16.0),
)
TRAINER = families().trainer_gb
ENCODE = families().vae_encode_gb
WEIGHTS = 1.11 * 4  # gigabytes in float32


def changed(**values: Any) -> TrainerOptions:
    return msgspec.structs.replace(LORA, **values)


def lycoris(*arguments: str, **values: Any) -> TrainerOptions:
    return changed(network_module="lycoris.kohya", network_args=arguments, **values)


def peak(options: TrainerOptions, device: str = "mps", model: Model | None = None) -> float:
    return peak_gb(options, "train_network.py", FAMILY, model, None, device)


# ---- Figures from outside -----------------------------------------------------------------------


def test_the_measured_peak_of_a_full_size_training_is_met() -> None:
    # Three steps at 64 x 64, SD 1.5 in full size and float32: 7.4 GB (Linux, CPU).
    options = changed(resolution="64,64", network_dim=4)
    predicted = peak_gb(options, "train_network.py", families().sd15, None, None, "cpu")

    assert predicted == pytest.approx(7.4, rel=0.2)


def test_lora_files_have_the_size_that_they_have() -> None:
    # Well-known sizes: SD 1.5 at dimension 128 in fp16 is 144 MiB, SDXL at 32 is 218 MiB.
    sd15, sdxl = families().sd15, families().sdxl
    assert trained_parameters(changed(network_dim=128), "", sd15) * 2 / 2**20 == pytest.approx(144, rel=0.01)
    assert trained_parameters(changed(network_dim=32), "", sdxl) * 2 / 2**20 == pytest.approx(218, rel=0.01)


# ---- What is trained ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "trainer", "count"),
    [
        (changed(network_dim=2), "", 2_600_000),
        (changed(network_dim=None), "", 4 * 1_300_000),
        (changed(network_dim=2, network_train_unet_only=True), "", 2_000_000),
        (changed(network_dim=2, network_train_text_encoder_only=True), "", 600_000),
        (changed(network_dim=2, network_args=("conv_dim=3",)), "", 2_660_000),
        (changed(network_dim=2, network_args=("conv_dim='3'",)), "", 2_660_000),
        (changed(network_dim=2, network_args=("conv_dim=12345678",)), "", 2_600_000),
        (changed(network_dim=2, network_args=("conv_dim=³",)), "", 2_600_000),
        (changed(network_dim=-2), "", 0),
        (lycoris("algo=locon", network_dim=2), "", 2_600_000),
        (lycoris("algo=LoHa", network_dim=2), "", 5_200_000),
        (lycoris("algo=glora", network_dim=2), "", 5_200_000),
        (lycoris("algo=ia3", "conv_dim=3", network_dim=2), "", 1_300_000),
        (lycoris("algo=full", network_dim=2), "", 1_100_000_000),
        (lycoris("algo='full'", network_train_unet_only=True), "", 1_000_000_000),
        (lycoris("algo=lokr", network_dim=2), "", 2_600_000 // 16),
        (lycoris("algo=lokr", "factor=8", network_dim=2), "", 2_600_000 // 8),
        (lycoris("algo=lokr", "factor=8", network_dim=100_000), "", 1_100_000_000 // 64),
        (lycoris("algo=lokr", "factor=7", network_dim=2), "", 2_600_000 // 7),
        (lycoris("algo=lokr", "factor=7", network_dim=100_000), "", 1_100_000_000 // 49),
        (lycoris("algo=lokr", network_dim=-2), "", 0),
        (TrainerOptions(), "train_db.py", 1_100_000_000),
        (TrainerOptions(), "sdxl_train_textual_inversion.py", 0),
    ],
)
def test_trained_parameters(options: TrainerOptions, trainer: str, count: int) -> None:
    assert trained_parameters(options, trainer, FAMILY) == count


# ---- Checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "gigabytes"),
    [
        ({}, 0.0052),
        ({"save_precision": "float"}, 0.0052),
        ({"save_precision": "fp16"}, 0.0026),
        ({"save_precision": "bf16"}, 0.0026),
        ({"full_fp16": True}, 0.0026),
        ({"full_bf16": True}, 0.0026),
        # A state also has the weights in float32, and what the optimizer stores.
        ({"save_state": True}, 0.0052 + 0.0052 * 3),
        ({"save_state": True, "save_precision": "fp16"}, 0.0026 + 0.0052 * 3),
        ({"save_state": True, "optimizer_type": "AdamW8bit"}, 0.0052 + 0.0052 * 1.5),
        ({"save_state": True, "optimizer_type": "Lion"}, 0.0052 + 0.0052 * 2),
        ({"save_state": True, "optimizer_type": "SGDNesterov"}, 0.0052 + 0.0052 * 2),
        ({"save_state": True, "optimizer_type": "Prodigy"}, 0.0052 + 0.0052 * 5),
        ({"save_state": True, "optimizer_type": "DAdaptAdam"}, 0.0052 + 0.0052 * 5),
        ({"save_state": True, "optimizer_type": "Adafactor"}, 0.0052 + 0.0052 * 1.1),
    ],
)
def test_the_size_of_a_networks_checkpoint(values: dict[str, Any], gigabytes: float) -> None:
    assert checkpoint_gb(changed(network_dim=1, **values), "", FAMILY) == pytest.approx(gigabytes, rel=1e-6)


def test_a_checkpoint_without_a_network_is_a_whole_model() -> None:
    options = TrainerOptions(network_train_unet_only=True)

    assert checkpoint_gb(options, "train_db.py", FAMILY) == pytest.approx(WEIGHTS)
    assert checkpoint_gb(options, "train_textual_inversion.py", FAMILY) == 0


# ---- The peak -----------------------------------------------------------------------------------

LEARNED = 16 * 1_300_000 * 4 / 1e9  # the numbers of a copy of what LORA trains


@pytest.mark.parametrize(
    ("values", "device", "step", "copies", "weights"),
    [
        ({}, "mps", 40.0, 4, WEIGHTS),
        ({}, "cuda", 8.0, 4, WEIGHTS),
        ({"sdpa": False}, "cuda", 40.0, 4, WEIGHTS),
        ({"sdpa": False, "xformers": True}, "cpu", 8.0, 4, WEIGHTS),
        ({"sdpa": False, "mem_eff_attn": True}, "mps", 8.0, 4, WEIGHTS),
        ({"gradient_checkpointing": True}, "mps", 18.0, 4, WEIGHTS),
        ({"train_batch_size": 3}, "mps", 120.0, 4, WEIGHTS),
        ({"train_batch_size": -3}, "mps", 40.0, 4, WEIGHTS),
        # Four times the area: four times the linear part, sixteen times the squared one.
        ({"resolution": "1024,1024"}, "mps", 8.0 * 4 + 32.0 * 16, 4, WEIGHTS),
        ({"resolution": "1024,512"}, "mps", 8.0 * 2 + 32.0 * 4, 4, WEIGHTS),
        ({"resolution": ""}, "mps", 40.0, 4, WEIGHTS),
        ({"mixed_precision": "fp16"}, "mps", 20.0, 4, WEIGHTS / 2),
        ({"optimizer_type": "Lion"}, "mps", 40.0, 3, WEIGHTS),
    ],
)
def test_the_peak_is_the_trainer_the_weights_what_is_learned_and_a_step(
    values: dict[str, Any], device: str, step: float, copies: float, weights: float
) -> None:
    expected = TRAINER + weights + LEARNED * copies + step

    assert peak(changed(**values), device) == pytest.approx(expected, rel=1e-6)


def test_a_training_without_a_network_keeps_the_model_in_float32() -> None:
    options = TrainerOptions(mixed_precision="fp16", resolution="512")
    # Weights, gradients, and AdamW's two copies.
    expected = TRAINER + WEIGHTS + 1.1 * 4 * 3 + 20.0

    assert peak(options) == pytest.approx(expected, rel=1e-6)


SMALL_PICTURES = {"resolution": "16,16", "cache_latents": False}


def test_while_the_model_is_loaded_its_unet_is_there_twice() -> None:
    assert peak(changed(**SMALL_PICTURES)) == pytest.approx(TRAINER + WEIGHTS + 4.0, rel=1e-6)
    half = peak(changed(**SMALL_PICTURES, mixed_precision="bf16"))
    assert half == pytest.approx(TRAINER + WEIGHTS / 2 + 2.0, rel=1e-6)


@pytest.mark.parametrize(
    ("values", "pictures"),
    [
        ({"vae_batch_size": 5}, 5),
        ({"vae_batch_size": 5, "cache_latents": False, "cache_latents_to_disk": True}, 5),
        ({"vae_batch_size": 5, "mixed_precision": "fp16"}, 2.5),
        ({"vae_batch_size": 5, "mixed_precision": "fp16", "no_half_vae": True}, 5),
        ({"vae_batch_size": 5, "resolution": "512,256"}, 2.5),
        ({"vae_batch_size": 5, "cache_latents": False}, 3),
        ({"vae_batch_size": 0}, 1),
    ],
)
def test_encoding_counts_where_it_takes_more_than_the_step(values: dict[str, Any], pictures: float) -> None:
    light = msgspec.structs.replace(FAMILY, step_gb=Curve(linear=0.01, square=0.0), unet=1_000_000)
    options = changed(**{"train_batch_size": 3, "network_dim": 0, **values})
    weights = (1_000_000 + 110_000_000) * (2 if "mixed_precision" in values else 4) / 1e9

    assert peak_gb(options, "", light, None, None, "cpu") == pytest.approx(
        TRAINER + weights + ENCODE * pictures, rel=1e-6
    )


def counted(unet: int, **others: int) -> Model:
    return Model(Form.SAFETENSORS, "", "sd15", {"unet": unet, **others})


def test_the_models_own_numbers_count_where_they_were_read() -> None:
    own = counted(500_000_000, text_encoders=200_000_000, vae=20_000_000)
    expected = TRAINER + 0.72 * 4 + LEARNED * 4 + 40.0

    assert peak(LORA, model=own) == pytest.approx(expected, rel=1e-6)


def test_a_small_stand_in_takes_a_small_part() -> None:
    # A hundredth of the U-Net: a hundredth is trained, a tenth is the width of a step.
    own = counted(10_000_000)
    expected = TRAINER + 0.12 * 4 + LEARNED * 4 / 100 + 4.0

    assert peak(LORA, model=own) == pytest.approx(expected, rel=1e-6)
    quarter = TRAINER + 0.36 * 4 + LEARNED * 4 + 40.0  # is no stand-in any more
    assert peak(LORA, model=counted(250_000_000)) == pytest.approx(quarter, rel=1e-6)


def test_the_largest_set_of_pictures_decides() -> None:
    sets = tuple(PictureSet(changed(resolution=side), ()) for side in ("512", "1024", "256"))

    assert peak_gb(LORA, "", FAMILY, None, Dataset(sets), "mps") == peak(changed(resolution="1024"))
    assert peak_gb(LORA, "", FAMILY, None, Dataset(), "mps") == peak(LORA)
