"""A base model or VAE as it lies on disk: what it is, whether it is whole, how large."""

from __future__ import annotations

import os
import re
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from kohya_mps.core.text import format_size


class Form(StrEnum):
    """How a model is stored, or why there is none."""

    SAFETENSORS = "safetensors"
    PICKLE = "pickle"
    DIFFUSERS = "diffusers"
    HUB = "hub"
    MISSING = "missing"
    DAMAGED = "damaged"


class Model(msgspec.Struct, frozen=True):
    """What is known of a model.

    ``family`` is a key of ``config/models.yaml``, ``flux`` or ``sd3``, and empty when it cannot
    be told. ``parameters`` counts those that were read, by part. ``fp16`` says whether a diffusers
    folder also has the weights in fp16.
    """

    form: Form
    detail: str
    family: str = ""
    parameters: dict[str, int] = {}
    fp16: bool = False


# One key of each family's single-file checkpoints. The order matters: SDXL has 1.5's text encoder too.
_MARKS = (
    ("sdxl", "conditioner.embedders.1."),
    ("flux", "double_blocks."),
    ("flux", "model.diffusion_model.double_blocks."),
    ("sd3", "model.diffusion_model.joint_blocks."),
    ("sd2", "cond_stage_model.model."),
    ("sd15", "cond_stage_model.transformer."),
)
_PARTS = (
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


def inspect(name: str, path: Path) -> Model:
    """Look at a model without loading it.

    Args:
        name: as the settings say it; a name that is no path may be a repository's.
        path: the same as a path.
    """
    if os.path.isdir(path):
        return _diffusers(path)
    if os.path.isfile(path):
        if path.suffix.lower() == ".safetensors":
            return _safetensors(path)
        return Model(Form.PICKLE, f"{path} ({format_size(os.path.getsize(path))})")
    if _REPOSITORY.fullmatch(name) and Path(name).suffix.lower() not in _WEIGHTS:
        return Model(Form.HUB, f"{name}, fetched from Hugging Face", _guess(name))
    return Model(Form.MISSING, f"{path} does not exist")


def _guess(name: str) -> str:
    """The family of a repository, by the names that the families' first publishers gave."""
    plain = name.lower()
    if re.search(r"xl\b|[-_]xl[-_]|sdxl", plain):
        return "sdxl"
    if re.search(r"(^|[^a-z])flux([^a-z]|$)", plain):
        return "flux"
    if "stable-diffusion-3" in plain:
        return "sd3"
    if "stable-diffusion-2" in plain:
        return "sd2"
    return "sd15" if "stable-diffusion-v1" in plain else ""


class _Damaged(Exception):
    pass


def _safetensors(path: Path) -> Model:
    try:
        tensors = _header(path)
    except _Damaged as error:
        return Model(Form.DAMAGED, f"{path} {error}")
    family = next((name for name, mark in _MARKS if any(key.startswith(mark) for key in tensors)), "")
    parameters: dict[str, int] = {}
    for key, count in tensors.items():
        part = next((part for part, prefix in _PARTS if key.startswith(prefix)), "")
        if part:
            parameters[part] = parameters.get(part, 0) + count
    return Model(Form.SAFETENSORS, f"{path} ({format_size(os.path.getsize(path))})", family, parameters)


def _diffusers(path: Path) -> Model:
    try:
        index: Any = msgspec.json.decode((path / "model_index.json").read_bytes())
        pipeline = str(index.get("_class_name", ""))
    except (OSError, msgspec.DecodeError, AttributeError):
        # A VAE alone has no index.
        if os.path.isfile(path / "config.json"):
            return Model(Form.DIFFUSERS, f"{path} (diffusers)")
        return Model(Form.DAMAGED, f"{path} is a folder without model_index.json, so no diffusers model")
    parameters: dict[str, int] = {}
    for folder, part in _FOLDERS.items():
        for file in sorted((path / folder).glob("*.safetensors")):
            if ".fp16." in file.name:
                continue  # the same weights once more
            try:
                parameters[part] = parameters.get(part, 0) + sum(_header(file).values())
            except _Damaged as error:
                return Model(Form.DAMAGED, f"{file} {error}")
    fp16 = any((path / "unet").glob("*.fp16.*"))
    return Model(Form.DIFFUSERS, f"{path} (diffusers)", _family(path, pipeline), parameters, fp16)


def _family(path: Path, pipeline: str) -> str:
    if pipeline in _PIPELINES:
        return _PIPELINES[pipeline]
    try:
        unet: Any = msgspec.json.decode((path / "unet" / "config.json").read_bytes())
        return "sd2" if unet.get("cross_attention_dim") == 1024 else "sd15"
    except (OSError, msgspec.DecodeError, AttributeError):
        return ""


def _header(path: Path) -> dict[str, int]:
    """The tensors of a safetensors file and how many numbers each holds.

    The format: eight bytes with the header's length, the header in JSON, the tensors.
    """
    try:
        size = os.path.getsize(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, 100_000_000):
                raise _Damaged("is no whole safetensors file: its header is cut off")
            header: Any = msgspec.json.decode(file.read(length))
        counts = {}
        end = 0
        for name, tensor in header.items():
            if name != "__metadata__":
                count = 1
                for side in tensor["shape"]:
                    count *= int(side)
                counts[name] = count
                end = max(end, int(tensor["data_offsets"][1]))
    except OSError as error:
        raise _Damaged(f"cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise _Damaged("is no safetensors file: its header cannot be read") from error
    if 8 + length + end > size:
        missing = format_size(8 + length + end - size)
        raise _Damaged(f"is not whole: {missing} are missing (an interrupted download?)")
    return counts
