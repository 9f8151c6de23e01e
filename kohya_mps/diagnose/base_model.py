"""A base model or VAE on the disk: its format and size, its family, and whether it is complete."""

from __future__ import annotations

import os
import re
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from kohya_mps.core.text import format_size


class Form(StrEnum):
    """How a model is stored, or why it cannot be used."""

    SAFETENSORS = "safetensors"
    PICKLE = "pickle"
    DIFFUSERS = "diffusers"
    HUB = "hub"
    MISSING = "missing"
    DAMAGED = "damaged"


class Model(msgspec.Struct, frozen=True):
    """What is known of a model.

    ``detail`` is for the report. ``family`` is a key of ``config/models.yaml``, ``flux`` or
    ``sd3``, empty if it is not known. ``parameters`` are numbers by part (``unet``, ``vae``,
    ``text_encoders``), of the parts that were read. ``fp16`` is whether a diffusers folder also
    has the weights in fp16.
    """

    form: Form
    detail: str
    family: str = ""
    parameters: dict[str, int] = {}
    fp16: bool = False


# A key of each family's single-file checkpoints. SDXL comes first: it also has 1.5's text encoder.
_FAMILY_KEYS = (
    ("sdxl", "conditioner.embedders.1."),
    ("flux", "double_blocks."),
    ("flux", "model.diffusion_model.double_blocks."),
    ("sd3", "model.diffusion_model.joint_blocks."),
    ("sd2", "cond_stage_model.model."),
    ("sd15", "cond_stage_model.transformer."),
)
_PART_KEYS = (
    ("unet", "model.diffusion_model."),
    ("vae", "first_stage_model."),
    ("text_encoders", "cond_stage_model."),
    ("text_encoders", "conditioner."),
)
_PIPELINES = {
    "StableDiffusionXLPipeline": "sdxl",
    "FluxPipeline": "flux",
    "StableDiffusion3Pipeline": "sd3",
}
_FOLDERS = {"unet": "unet", "vae": "vae", "text_encoder": "text_encoders", "text_encoder_2": "text_encoders"}
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WEIGHTS = frozenset({".safetensors", ".ckpt", ".pt", ".pth", ".bin"})
_LARGEST_HEADER = 100_000_000
# What reading a header with another structure raises.
_MALFORMED = (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)


def inspect(name: str, path: Path) -> Model:
    """Look at a model without loading it.

    Args:
        name: as the settings say it. If there is no such path, it may be a repository's name.
        path: the same as a path.
    """
    if os.path.isdir(path):
        return _diffusers(path)
    if os.path.isfile(path):
        if path.suffix.lower() == ".safetensors":
            return _safetensors(path)
        return Model(Form.PICKLE, f"{path} ({format_size(os.path.getsize(path))})")
    if _REPOSITORY.fullmatch(name) and Path(name).suffix.lower() not in _WEIGHTS:
        return Model(Form.HUB, f"{name}, downloaded from Hugging Face", _guess_family(name))
    return Model(Form.MISSING, f"{path} does not exist")


def _guess_family(repository: str) -> str:
    """The family of a repository, by the names that the first publishers of each family chose."""
    name = repository.lower()
    if re.search(r"xl\b|[-_]xl[-_]|sdxl", name):
        return "sdxl"
    if re.search(r"(^|[^a-z])flux([^a-z]|$)", name):
        return "flux"
    if "stable-diffusion-3" in name:
        return "sd3"
    if "stable-diffusion-2" in name:
        return "sd2"
    return "sd15" if "stable-diffusion-v1" in name else ""


class _DamagedError(Exception):
    """Why a safetensors file cannot be used, as the end of a sentence."""


def _safetensors(path: Path) -> Model:
    try:
        tensors = _tensor_sizes(path)
    except _DamagedError as error:
        return Model(Form.DAMAGED, f"{path} {error}")
    family = next((name for name, prefix in _FAMILY_KEYS if any(k.startswith(prefix) for k in tensors)), "")
    parameters: dict[str, int] = {}
    for key, count in tensors.items():
        part = next((part for part, prefix in _PART_KEYS if key.startswith(prefix)), "")
        if part:
            parameters[part] = parameters.get(part, 0) + count
    return Model(Form.SAFETENSORS, f"{path} ({format_size(os.path.getsize(path))})", family, parameters)


def _diffusers(path: Path) -> Model:
    try:
        index: Any = msgspec.json.decode((path / "model_index.json").read_bytes())
        pipeline = str(index.get("_class_name", ""))
    except (OSError, msgspec.DecodeError, AttributeError):
        if os.path.isfile(path / "config.json"):  # a VAE alone has no index
            return Model(Form.DIFFUSERS, f"{path} (diffusers)")
        return Model(
            Form.DAMAGED, f"{path} is a folder without model_index.json, so it is no diffusers model"
        )
    parameters: dict[str, int] = {}
    for folder, part in _FOLDERS.items():
        for file in sorted((path / folder).glob("*.safetensors")):
            if ".fp16." in file.name:
                continue  # the same weights again
            try:
                parameters[part] = parameters.get(part, 0) + sum(_tensor_sizes(file).values())
            except _DamagedError as error:
                return Model(Form.DAMAGED, f"{file} {error}")
    has_fp16 = any((path / "unet").glob("*.fp16.*"))
    return Model(Form.DIFFUSERS, f"{path} (diffusers)", _family(path, pipeline), parameters, has_fp16)


def _family(path: Path, pipeline: str) -> str:
    if pipeline in _PIPELINES:
        return _PIPELINES[pipeline]
    try:
        unet: Any = msgspec.json.decode((path / "unet" / "config.json").read_bytes())
        return "sd2" if unet.get("cross_attention_dim") == 1024 else "sd15"
    except (OSError, msgspec.DecodeError, AttributeError):
        return ""


def _tensor_sizes(path: Path) -> dict[str, int]:
    """How many numbers each tensor of a safetensors file has.

    The format: eight bytes with the length of the header, the header in JSON, the tensors.

    Raises:
        _DamagedError: it is not such a file, or not a complete one.
    """
    try:
        size = os.path.getsize(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LARGEST_HEADER):
                raise _DamagedError("is not a complete safetensors file: its header is cut off")
            header: Any = msgspec.json.decode(file.read(length))
        header.pop("__metadata__", None)
        counts = {name: _product(tensor["shape"]) for name, tensor in header.items()}
        end = max((int(tensor["data_offsets"][1]) for tensor in header.values()), default=0)
    except OSError as error:
        raise _DamagedError(f"cannot be read: {error.strerror}") from error
    except _MALFORMED as error:
        raise _DamagedError("is not a safetensors file: its header cannot be read") from error
    missing = 8 + length + end - size
    if missing > 0:
        raise _DamagedError(f"is incomplete: {format_size(missing)} are missing (an interrupted download?)")
    return counts


def _product(shape: list[Any]) -> int:
    count = 1
    for side in shape:
        count *= int(side)
    return count
