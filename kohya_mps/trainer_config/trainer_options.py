"""The settings of a training, typed, with the trainers' own defaults.

Names, types and defaults are those of sd-scripts 2e0fcc50 (``library/train_util.py`` and
``train_network.py``, the ``add_argument`` calls). Settings that no check reads are left out.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import msgspec


class TrainerOptions(msgspec.Struct, frozen=True):
    """What a trainer gets; ``launch_cpu`` is an option of ``accelerate launch`` instead."""

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
        """The optimizer's name in lower case, as sd-scripts compares it."""
        if self.use_8bit_adam:
            return "adamw8bit"
        if self.use_lion_optimizer:
            return "lion"
        return (self.optimizer_type or "AdamW").lower()

    @property
    def width_and_height(self) -> tuple[int, int] | None:
        """The resolution's width and height in pixels; None if it has another form."""
        numbers = re.fullmatch(r"\s*(\d{1,6})\s*(?:,\s*(\d{1,6})\s*)?", self.resolution)
        return (int(numbers[1]), int(numbers[2] or numbers[1])) if numbers else None

    @property
    def network_options(self) -> dict[str, str]:
        """``network_args``, each of which is ``key=value``, as a dictionary."""
        return dict(pair.split("=", 1) for pair in self.network_args if "=" in pair)


class ValueType(StrEnum):
    """A type that a trainer takes, in words for a message."""

    BOOLEAN = "true or false"
    INTEGER = "a whole number"
    NUMBER = "a number"
    STRING = "a string in quotes"
    STRINGS = "a list of strings"


class WrongType(msgspec.Struct, frozen=True):
    """A setting whose value does not have the type that the trainer takes."""

    name: str
    found: Any
    expected: ValueType


NAMES = frozenset(TrainerOptions.__struct_fields__)


def parse_options(
    settings: Mapping[str, Any], *, numbers_as_text: bool
) -> tuple[TrainerOptions, tuple[WrongType, ...]]:
    """Settings with the types that the trainer gives them.

    Args:
        settings: by the trainers' names; unknown names are ignored.
        numbers_as_text: numbers and booleans may be written as strings, as on a command
            line or in the GUI's files. In a TOML file they may not: argparse takes its values
            as they are.

    Returns:
        The options, with the default for each value of a wrong type, and those values.
    """
    values: dict[str, Any] = {}
    wrong = []
    for name, hint in typing.get_type_hints(TrainerOptions).items():
        if name not in settings or settings[name] is None:
            continue
        kind = typing.get_args(hint)[0] if isinstance(hint, types.UnionType) else hint
        value_type = _VALUE_TYPES.get(kind, ValueType.STRINGS)
        try:
            values[name] = _convert(settings[name], value_type, numbers_as_text)
        except (ValueError, OverflowError):
            wrong.append(WrongType(name, settings[name], value_type))
    return TrainerOptions(**values), tuple(wrong)


_VALUE_TYPES: dict[Any, ValueType] = {
    bool: ValueType.BOOLEAN,
    int: ValueType.INTEGER,
    float: ValueType.NUMBER,
    str: ValueType.STRING,
}

# No setting is larger; estimates from larger numbers would overflow.
_LARGEST = 1e12


def _convert(value: Any, kind: ValueType, numbers_as_text: bool) -> Any:
    if kind is ValueType.STRING:
        if isinstance(value, str) or (numbers_as_text and isinstance(value, int | float)):
            return str(value)
    elif kind is ValueType.STRINGS:
        if isinstance(value, list | tuple):
            return tuple(str(item) for item in value)
        if isinstance(value, str):
            return tuple(value.split())
    else:
        number = _number(value.strip().lower(), kind) if numbers_as_text and isinstance(value, str) else value
        if isinstance(number, int | float) and abs(number) <= _LARGEST:
            if kind is ValueType.BOOLEAN and number in (0, 1):
                return bool(number)
            if kind is ValueType.INTEGER and not isinstance(number, bool) and number == int(number):
                return int(number)
            if kind is ValueType.NUMBER and not isinstance(number, bool):
                return float(number)
    raise ValueError(value)


def _number(text: str, kind: ValueType) -> float | bool:
    """A number or a boolean that is written as a string."""
    if kind is not ValueType.BOOLEAN:
        return float(text)
    if text in {"true", "1", "yes"}:
        return True
    if text in {"false", "0", "no", "none", ""}:
        return False
    raise ValueError(text)
