"""How long, how large, how much memory: reckoned from the settings and ``config/models.yaml``.

All figures are predictions. The memory is what the trainer's process holds at its peak; on
Apple Silicon that is the machine's own memory, for the CPU and the GPU alike.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import msgspec

from kohya_mps.core.settings import CONFIG, read_yaml
from kohya_mps.dataset.scan import Dataset
from kohya_mps.trainer_config.trainer_options import TrainerOptions

from .base_model import Model

PATH = CONFIG / "models.yaml"


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class Curve(_Strict, frozen=True):
    """Gigabytes for one picture: ``linear`` by its area, ``square`` by its area's square.

    The area's unit is 512 by 512 pixels; the square is attention's.
    """

    linear: float
    square: float

    def gigabytes(self, area: float, attention_is_fused: bool) -> float:
        """For a picture of this area; fused attention never holds its square."""
        return self.linear * area + (0.0 if attention_is_fused else self.square * area * area)


class Family(_Strict, frozen=True):
    """A family of base models: parameters of its parts, and what a training step holds."""

    name: str
    unet: int
    text_encoders: int
    vae: int
    lora_unet: int
    lora_text_encoders: int
    lora_conv: int
    step_gb: Curve
    checkpointed_gb: Curve


class Models(_Strict, frozen=True):
    """``config/models.yaml``."""

    sd15: Family
    sd2: Family
    sdxl: Family
    vae_encode_gb: float
    trainer_gb: float

    def family(self, name: str) -> Family | None:
        """A family by its key; nothing for those that are not reckoned here."""
        return {"sd15": self.sd15, "sd2": self.sd2, "sdxl": self.sdxl}.get(name)


class Estimate(msgspec.Struct, frozen=True):
    """What a training will take; a figure that cannot be told is nothing.

    ``steps`` are optimizer steps, ``checkpoints`` files that stay on disk and
    ``checkpoints_gb`` their size with saved states, ``peak_gb`` the process' memory.
    """

    steps: int | None = None
    epochs: int | None = None
    pictures: int | None = None
    checkpoints: int | None = None
    checkpoints_gb: float | None = None
    peak_gb: float | None = None


@cache
def models(path: Path = PATH) -> Models:
    """The sizes of the model families."""
    return read_yaml(path, Models)


def estimate(
    training: TrainerOptions,
    trainer: str,
    family: str,
    model: Model | None,
    data: Dataset | None,
    device: str,
) -> Estimate:
    """Reckon a training.

    Args:
        training: its settings.
        trainer: the script, which decides what is trained where no network is named.
        family: the base model's, a key of :class:`Models` or something else.
        model: the base model on disk, whose own numbers count where they were read.
        data: the pictures that were found.
        device: ``mps``, ``cuda`` or ``cpu``.
    """
    shown = sum(s.images_per_epoch for s in data.sets) if data else 0
    batches = (
        sum(_ceil_div(s.images_per_epoch, s.settings.train_batch_size) for s in data.sets) if data else 0
    )
    per_epoch = _ceil_div(batches, training.gradient_accumulation_steps)
    if training.max_train_epochs is not None:
        steps = training.max_train_epochs * per_epoch if per_epoch else None
    else:
        steps = training.max_train_steps
    epochs = _ceil_div(steps, per_epoch) if steps is not None and per_epoch else training.max_train_epochs
    known = models().family(family)
    files = None if steps is None else _checkpoints(training, steps, epochs)
    size = _checkpoint_gb(training, trainer, known) if known else None
    return Estimate(
        steps=steps,
        epochs=epochs,
        pictures=shown if data else None,
        checkpoints=files,
        checkpoints_gb=None if files is None or size is None else files * size,
        peak_gb=_peak_gb(training, trainer, known, model, data, device) if known else None,
    )


def _ceil_div(count: int, by: int) -> int:
    return -(-count // max(1, by))


def _checkpoints(training: TrainerOptions, steps: int, epochs: int | None) -> int:
    """Files that stay: those on the way, less those that are removed again, and the last."""
    kept = 1
    every = training.save_every_n_epochs
    if training.save_n_epoch_ratio and epochs:
        every = max(1, epochs // max(1, training.save_n_epoch_ratio))
    if every and every > 0 and epochs:
        files = max(0, epochs - 1) // every
        kept += min(files, training.save_last_n_epochs or files)
    if training.save_every_n_steps and training.save_every_n_steps > 0:
        files = max(0, steps - 1) // training.save_every_n_steps
        last = training.save_last_n_steps
        kept += min(files, _ceil_div(last, training.save_every_n_steps) if last else files)
    return kept


def trained_parameters(training: TrainerOptions, trainer: str, family: Family) -> int:
    """How many numbers are trained.

    LyCORIS' algorithms differ: loha and glora hold two pairs where LoRA holds one, lokr the
    factors of a matrix at most, ia3 one row; for the others LoRA's number is the upper bound.
    """
    if "textual_inversion" in trainer:
        return 0  # a few vectors
    everything = family.unet + (0 if training.network_train_unet_only else family.text_encoders)
    options = training.network_options
    algorithm = options.get("algo", "").strip("\"'").lower()
    if not training.network_module or algorithm == "full":
        return everything
    dim = training.network_dim if training.network_dim is not None else 4
    conv = _integer(options.get("conv_dim", "").strip("\"'"))
    if algorithm == "ia3":
        dim, conv = 1, 0
    parts = (
        0 if training.network_train_text_encoder_only else family.lora_unet * dim + family.lora_conv * conv
    )
    if not training.network_train_unet_only:
        parts += family.lora_text_encoders * dim
    if algorithm == "lokr":
        factor = _integer(options.get("factor", "")) or _LOKR_FACTOR
        return max(0, min(parts // factor, everything // factor**2))
    return max(0, parts) * (2 if algorithm in ("loha", "glora") else 1)


# What LyCORIS chooses by itself for most matrices is larger: 20 for 320 by 320, 40 for 1280 by 1280.
_LOKR_FACTOR = 16


def _integer(text: str) -> int:
    # Eight digits are more than any network has; int() of thousands is refused with an error.
    return int(text) if text.isascii() and text.isdigit() and len(text) < 8 else 0


def _optimizer_copies(name: str) -> float:
    """Numbers of four bytes that an optimizer keeps for each trained one."""
    if "8bit" in name:
        return 0.5
    if name.startswith(("prodigy", "dadapt")):
        return 4
    if name == "adafactor":
        return 0.1  # rows and columns instead of the whole
    return 1 if "lion" in name or "sgd" in name else 2


def _checkpoint_gb(training: TrainerOptions, trainer: str, family: Family) -> float:
    count = trained_parameters(training, trainer, family)
    if count and not training.network_module:
        count = family.unet + family.text_encoders + family.vae
    half = training.save_precision in ("fp16", "bf16") or training.full_fp16 or training.full_bf16
    size = count * (2 if half else 4)
    if training.save_state:
        size += int(count * 4 * (1 + _optimizer_copies(training.optimizer)))
    return size / 1e9


def _peak_gb(
    training: TrainerOptions,
    trainer: str,
    family: Family,
    model: Model | None,
    data: Dataset | None,
    device: str,
) -> float:
    read = model.parameters if model else {}
    unet = read.get("unet", family.unet)
    parts = unet + read.get("text_encoders", family.text_encoders) + read.get("vae", family.vae)
    # Only what a network is added to is held in half precision; what is trained itself is not.
    width = 2 if training.network_module and training.mixed_precision != "no" else 4
    weights = parts * width / 1e9
    trained = trained_parameters(training, trainer, family)
    if unet < family.unet / 4:  # a small stand-in: what is trained shrinks with it
        trained = int(trained * unet / family.unet)
    # The weights of a network, their gradients and what the optimizer keeps, in float32.
    copies = (1 if not training.network_module else 2) + _optimizer_copies(training.optimizer)
    learned = trained * 4 * copies / 1e9
    sets = [s.settings for s in data.sets] if data and data.sets else [training]
    step = max(_step_gb(training, settings, family, unet, device) for settings in sets)
    loading = weights + unet * width / 1e9  # the file's tensors beside the model's, until they are copied
    return models().trainer_gb + max(loading, weights + learned + step)


def _step_gb(
    training: TrainerOptions, settings: TrainerOptions, family: Family, unet: int, device: str
) -> float:
    width, height = settings.width_and_height or (512, 512)
    area = width * height / 512**2
    # MPS has a fused attention for inference only: with gradients it takes the long way.
    fused = training.mem_eff_attn or (device != "mps" and (training.sdpa or training.xformers))
    curve = family.checkpointed_gb if training.gradient_checkpointing else family.step_gb
    batch = max(1, settings.train_batch_size)
    half = 1.0 if training.mixed_precision == "no" else 0.5
    scale = min(1.0, math.sqrt(unet / family.unet)) if unet < family.unet / 4 else 1.0
    held = curve.gigabytes(area, fused) * batch * half * scale
    cached = training.cache_latents or training.cache_latents_to_disk
    encoded = models().vae_encode_gb * area * (max(1, training.vae_batch_size) if cached else batch)
    return max(held, encoded * (1.0 if training.no_half_vae else half) * scale)
