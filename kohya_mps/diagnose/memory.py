"""How much memory and disk a training takes, predicted from its options and ``config/models.yaml``.

Gigabytes are powers of ten. The memory is that of the trainer's process at its peak. On Apple
Silicon the CPU and the GPU share it.
"""

from __future__ import annotations

import math

from kohya_mps.dataset.scan import Dataset
from kohya_mps.trainer_config.trainer_options import TrainerOptions

from .base_model import Model
from .model_families import Family, families

# What sd-scripts takes if ``network_dim`` is not set (networks/lora.py, ``create_network``).
_DEFAULT_DIM = 4
# LyCORIS' own choice for most matrices is larger: 20 for 320 by 320, 40 for 1280 by 1280.
_LOKR_FACTOR = 16
# A base model with fewer parameters than this part of its family is a small stand-in.
_STAND_IN = 1 / 4
_DEFAULT_SIDES = (512, 512)


def trained_parameters(options: TrainerOptions, trainer: str, family: Family) -> int:
    """How many numbers are trained.

    LyCORIS' algorithms differ: loha and glora store two pairs of matrices where LoRA stores
    one, lokr at most the factors of a matrix, ia3 one row. For the others, LoRA's number is the
    upper bound.
    """
    if "textual_inversion" in trainer:
        return 0  # a few vectors
    everything = family.unet + (0 if options.network_train_unet_only else family.text_encoders)
    arguments = {name: value.strip("\"'") for name, value in options.network_options.items()}
    algorithm = arguments.get("algo", "").lower()
    if not options.network_module or algorithm == "full":
        return everything
    dim = _DEFAULT_DIM if options.network_dim is None else options.network_dim
    conv = _integer(arguments.get("conv_dim", ""))
    if algorithm == "ia3":
        dim, conv = 1, 0
    parts = 0
    if not options.network_train_text_encoder_only:
        parts += family.lora_unet * dim + family.lora_conv * conv
    if not options.network_train_unet_only:
        parts += family.lora_text_encoders * dim
    if algorithm == "lokr":
        factor = _integer(arguments.get("factor", "")) or _LOKR_FACTOR
        return max(0, min(parts // factor, everything // factor**2))
    return max(0, parts) * (2 if algorithm in ("loha", "glora") else 1)


def _integer(text: str) -> int:
    # Eight digits are more than any network has. int() refuses thousands of digits.
    return int(text) if text.isascii() and text.isdigit() and len(text) < 8 else 0


def _optimizer_copies(name: str) -> float:
    """How many float32 numbers an optimizer stores for each trained one."""
    if "8bit" in name:
        return 0.5
    if name.startswith(("prodigy", "dadapt")):
        return 4
    if name == "adafactor":
        return 0.1  # rows and columns instead of the whole matrix
    return 1 if "lion" in name or "sgd" in name else 2


def checkpoint_gb(options: TrainerOptions, trainer: str, family: Family) -> float:
    """The size of one checkpoint, with the saved state if there is one."""
    count = trained_parameters(options, trainer, family)
    if count and not options.network_module:
        count = family.unet + family.text_encoders + family.vae
    is_half = options.save_precision in ("fp16", "bf16") or options.full_fp16 or options.full_bf16
    size = count * (2 if is_half else 4)
    if options.save_state:
        size += int(count * 4 * (1 + _optimizer_copies(options.optimizer)))
    return size / 1e9


def peak_gb(
    options: TrainerOptions,
    trainer: str,
    family: Family,
    model: Model | None,
    dataset: Dataset | None,
    device: str,
) -> float:
    """The memory at the peak: while the model is loaded, or in a training step."""
    counted = model.parameters if model else {}
    unet = counted.get("unet", family.unet)
    others = counted.get("text_encoders", family.text_encoders) + counted.get("vae", family.vae)
    # Only a model that a network is added to is stored in half precision.
    width = 2 if options.network_module and options.mixed_precision != "no" else 4
    weights = (unet + others) * width / 1e9
    trained = trained_parameters(options, trainer, family)
    if unet < family.unet * _STAND_IN:
        trained = int(trained * unet / family.unet)
    # In float32: gradients, what the optimizer stores, and the weights of a network.
    copies = (2 if options.network_module else 1) + _optimizer_copies(options.optimizer)
    learned = trained * 4 * copies / 1e9
    sets = [s.options for s in dataset.sets] if dataset and dataset.sets else [options]
    step = max(_step_gb(options, of_set, family, unet, device) for of_set in sets)
    loading = weights + unet * width / 1e9  # the file's tensors and the model's, until they are copied
    return families().trainer_gb + max(loading, weights + learned + step)


def _step_gb(
    options: TrainerOptions, of_set: TrainerOptions, family: Family, unet: int, device: str
) -> float:
    """What a training step takes in addition to the weights.

    Args:
        options: the training's.
        of_set: those of the picture set, which may override resolution and batch size.
        family: the base model's.
        unet: the parameters that its U-Net really has.
        device: ``mps``, ``cuda`` or ``cpu``.
    """
    width, height = of_set.width_and_height or _DEFAULT_SIDES
    area = width * height / 512**2
    # On MPS, fused attention is for inference only: with gradients it takes the math path.
    is_fused = options.mem_eff_attn or (device != "mps" and (options.sdpa or options.xformers))
    curve = family.checkpointed_gb if options.gradient_checkpointing else family.step_gb
    batch = max(1, of_set.train_batch_size)
    precision = 1.0 if options.mixed_precision == "no" else 0.5
    scale = math.sqrt(unet / family.unet) if unet < family.unet * _STAND_IN else 1.0
    step = curve.gigabytes(area, is_fused) * batch * precision * scale
    is_cached = options.cache_latents or options.cache_latents_to_disk
    encoded_at_once = max(1, options.vae_batch_size) if is_cached else batch
    vae_precision = 1.0 if options.no_half_vae else precision
    return max(step, families().vae_encode_gb * area * encoded_at_once * vae_precision * scale)
