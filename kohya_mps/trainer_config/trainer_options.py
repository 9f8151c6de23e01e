"""The settings of a training, typed, with the trainers' own defaults.

Names, types and defaults are those of sd-scripts 2e0fcc50 (``library/train_util.py`` and
``train_network.py``, the ``add_argument`` calls). Settings that no check reads are left out.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping
from typing import Any

import msgspec


class TrainerOptions(msgspec.Struct, frozen=True):
    """What a trainer would be told; ``launch_cpu`` is told to ``accelerate launch`` instead."""

    pretrained_model_name_or_path: str = ""
    v2: bool = False
    tokenizer_cache_dir: str = ""
    vae: str = ""
    train_data_dir: str = ""
    reg_data_dir: str = ""
    dataset_config: str = ""
    in_json: str = ""
    output_dir: str = ""
    output_name: str = ""
    logging_dir: str = ""
    resume: str = ""
    caption_extension: str = ".caption"
    dataset_repeats: int = 1
    resolution: str = ""
    enable_bucket: bool = False
    min_bucket_reso: int = 256
    max_bucket_reso: int = 1024
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False
    cache_latents: bool = False
    cache_latents_to_disk: bool = False
    cache_text_encoder_outputs: bool = False
    vae_batch_size: int = 1
    color_aug: bool = False
    random_crop: bool = False
    train_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    max_train_steps: int = 1600
    max_train_epochs: int | None = None
    max_data_loader_n_workers: int = 8
    persistent_data_loader_workers: bool = False
    mixed_precision: str = "no"
    save_precision: str = ""
    full_fp16: bool = False
    full_bf16: bool = False
    fp8_base: bool = False
    fp8_base_unet: bool = False
    no_half_vae: bool = False
    xformers: bool = False
    sdpa: bool = False
    mem_eff_attn: bool = False
    torch_compile: bool = False
    deepspeed: bool = False
    optimizer_type: str = ""
    use_8bit_adam: bool = False
    use_lion_optimizer: bool = False
    learning_rate: float = 2e-6
    unet_lr: float | None = None
    loss_type: str = "l2"
    huber_schedule: str = "snr"
    validation_split: float = 0.0
    validate_every_n_steps: int | None = None
    validate_every_n_epochs: int | None = None
    blocks_to_swap: int | None = None
    network_module: str = ""
    network_dim: int | None = None
    network_args: tuple[str, ...] = ()
    network_train_unet_only: bool = False
    network_train_text_encoder_only: bool = False
    network_weights: str = ""
    save_model_as: str = "safetensors"
    save_every_n_steps: int | None = None
    save_every_n_epochs: int | None = None
    save_n_epoch_ratio: int | None = None
    save_last_n_steps: int | None = None
    save_last_n_epochs: int | None = None
    save_state: bool = False
    save_state_on_train_end: bool = False
    sample_prompts: str = ""
    launch_cpu: bool = False

    @property
    def optimizer(self) -> str:
        """The optimizer's name in small letters, as sd-scripts compares it."""
        if self.use_8bit_adam:
            return "adamw8bit"
        if self.use_lion_optimizer:
            return "lion"
        return (self.optimizer_type or "AdamW").lower()

    @property
    def width_and_height(self) -> tuple[int, int] | None:
        """The resolution's width and height in pixels; nothing when it does not say that."""
        numbers = re.fullmatch(r"\s*(\d{1,6})\s*(?:,\s*(\d{1,6})\s*)?", self.resolution)
        return (int(numbers[1]), int(numbers[2] or numbers[1])) if numbers else None

    @property
    def network_options(self) -> dict[str, str]:
        """``network_args`` taken apart: ``key=value`` each."""
        return dict(pair.split("=", 1) for pair in self.network_args if "=" in pair)


class WrongType(msgspec.Struct, frozen=True):
    """A setting whose value has a type that the trainer does not take."""

    name: str
    found: Any
    wanted: str


NAMES = frozenset(TrainerOptions.__struct_fields__)


def parse_options(settings: Mapping[str, Any], *, text: bool) -> tuple[TrainerOptions, tuple[WrongType, ...]]:
    """Settings as the trainer would have them.

    Args:
        settings: by the trainers' names; others are left out.
        text: numbers and truth values may be written as text, as on a command line or in
            the GUI's files. argparse takes what a TOML file gives as it is.
    """
    values: dict[str, Any] = {}
    wrong = []
    for name, hint in typing.get_type_hints(TrainerOptions).items():
        if name not in settings or settings[name] is None:
            continue
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        try:
            values[name] = _coerce(settings[name], kinds[0], text)
        except (ValueError, OverflowError):
            wrong.append(WrongType(name, settings[name], _WORDS.get(kinds[0], "a list of texts")))
    return TrainerOptions(**values), tuple(wrong)


# Nothing here counts further; larger numbers would overflow what is reckoned from them.
_LARGEST = 1e12

_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text in quotes",
}


def _coerce(value: Any, kind: Any, text: bool) -> Any:
    if isinstance(value, str) and text:
        stripped = value.strip()
        if kind is bool and stripped.lower() in {"true", "1", "yes"}:
            return True
        if kind is bool and stripped.lower() in {"false", "0", "no", "none", ""}:
            return False
        if kind is int:
            value = float(stripped)
        if kind is float:
            value = float(stripped)
    if isinstance(value, int | float) and abs(value) > _LARGEST:
        raise ValueError(value)
    if kind is bool and value in (0, 1) and isinstance(value, int | float):
        return bool(value)
    if kind is int and isinstance(value, int | float) and not isinstance(value, bool) and value == int(value):
        return int(value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind is str and (isinstance(value, str) or (text and isinstance(value, int | float))):
        return str(value)
    if kind not in (bool, int, float, str) and isinstance(value, list | tuple):
        return tuple(str(item) for item in value)
    if kind not in (bool, int, float, str) and isinstance(value, str):
        return tuple(value.split())
    raise ValueError(value)
